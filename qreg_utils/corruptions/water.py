"""The light on the water drops of `spatter`, as OpenCV's functions compute it, for a batch at once.

Levels and their small multiples are whole numbers below 2**24, which float32 adds exactly and in any order.
"""

from functools import lru_cache

import torch

CHAMFER_LIMIT = 20
LIGHT_FROM_ABOVE_LEFT = ((-2, -1, 0), (-1, 1, 1), (0, 1, 2))


def lit_water(blobs):
    """Strength of the water, float32 (N,H,W), 1 where it is strongest in its picture, for blob levels (N,H,W).

    Blobs times a relief: the distance to the blobs' Canny edges, smoothed, equalised, lit by a directional kernel and
    smoothed again. A picture without any blob stays dry; the reference divides 0 by 0 there and turns it black.
    """
    blobs = blobs.float()
    distance = _distance_to_edges(_canny_edges(blobs))
    # In the order of the reference: sum, then one product with 1/9 in double, then float32, then truncation.
    smooth = (_box_sum(distance).double() * (1 / 9)).float().floor_()
    relief = _light(_equalise(smooth)).clamp_(0, 255)
    water = blobs * (_box_sum(relief) / 9).round_()
    return water / water.amax((1, 2), keepdim=True).clamp(min=1)


def _padded(levels, mode):
    """(N,H,W) with a pixel more on each side; ``mode`` in torch's terms."""
    return torch.nn.functional.pad(levels[None], (1, 1, 1, 1), mode=mode)[0]


def _neighbours(levels, mode):
    """A function that reads (N,H,W) at an offset of up to one pixel down and right."""
    height, width = levels.shape[-2:]
    padded = _padded(levels, mode)
    return lambda down, right: padded[:, 1 + down : 1 + down + height, 1 + right : 1 + right + width]


def _box_sum(levels):
    """Sum over 3 x 3 pixels."""
    padded = _padded(levels, "reflect")
    tall = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return tall[..., :-2] + tall[..., 1:-1] + tall[..., 2:]


def _light(levels):
    at = _neighbours(levels, "reflect")
    offsets = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    return sum(LIGHT_FROM_ABOVE_LEFT[1 + down][1 + right] * at(down, right) for down, right in offsets)


def _sobel(levels):
    """Derivatives of (N,H,W) to the right and down, smoothed across by 1, 2, 1."""
    padded = _padded(levels, "replicate")
    right, down = padded[..., 2:] - padded[..., :-2], padded[:, 2:] - padded[:, :-2]
    to_right = right[:, :-2] + 2 * right[:, 1:-1] + right[:, 2:]
    return to_right, down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]


def _canny_edges(levels, low=50, high=150):
    """Canny edges (N,H,W) bool: 3x3 Sobel, |gx| + |gy|, thinning along the gradient, 8-connected hysteresis."""
    gradient_x, gradient_y = _sobel(levels)
    steep, flat = gradient_y.abs(), gradient_x.abs()
    magnitude = steep + flat
    at = _neighbours(magnitude, "constant")
    # Sectors of 45 degrees: tan(22.5 degrees) in OpenCV's 15-bit fixed point, and tan(67.5) = tan(22.5) + 2.
    bound = flat * 13573
    horizontal, vertical = steep * 2**15 < bound, (steep - 2 * flat) * 2**15 > bound
    falling = gradient_x * gradient_y >= 0
    falling_peak = (magnitude > at(-1, -1)) & (magnitude > at(1, 1))
    rising_peak = (magnitude > at(-1, 1)) & (magnitude > at(1, -1))
    diagonal_peak = (falling & falling_peak) | (~falling & rising_peak)
    horizontal_peak = (magnitude > at(0, -1)) & (magnitude >= at(0, 1))
    vertical_peak = (magnitude > at(-1, 0)) & (magnitude >= at(1, 0))
    diagonal = ~(horizontal | vertical)
    peak = (horizontal & horizontal_peak) | (vertical & vertical_peak) | (diagonal & diagonal_peak)
    candidates = peak & (magnitude > low)
    edges = candidates & (magnitude > high)
    while True:
        grown = _dilate(edges) & candidates
        if torch.equal(grown, edges):
            return edges
        edges = grown


def _dilate(mask):
    """Each pixel of (N,H,W) bool or one of its eight neighbours."""
    tall = mask.clone()
    tall[:, 1:] |= mask[:, :-1]
    tall[:, :-1] |= mask[:, 1:]
    wide = tall.clone()
    wide[:, :, 1:] |= tall[:, :, :-1]
    wide[:, :, :-1] |= tall[:, :, 1:]
    return wide


def _distance_to_edges(edges):
    """Chamfer 5x5 distance (N,H,W) to the nearest edge pixel, limited to 20; float32, which is exact here.

    The chamfer distance grows with the horizontal distance, so of each row only its nearest edge pixel counts: its
    horizontal distance by a running maximum, then the minimum over the rows.
    """
    height, width = edges.shape[-2:]
    column = torch.arange(width, dtype=torch.int32, device=edges.device)
    beyond = -CHAMFER_LIMIT
    from_left = column - torch.where(edges, column, beyond).cummax(2).values
    from_right = column - torch.where(edges.flip(2), column, beyond).cummax(2).values
    horizontal = torch.minimum(from_left, from_right.flip(2)).clamp_(max=CHAMFER_LIMIT)
    table = _chamfer_table(edges.device)
    flat = horizontal.flatten()  # index_select is faster than an index of three dimensions
    distance = table[0].index_select(0, flat).view(edges.shape)
    for rows in range(1, min(CHAMFER_LIMIT, height)):
        if rows >= distance.max():
            break
        candidate = table[rows].index_select(0, flat).view(edges.shape)
        above, below = distance[:, :-rows], distance[:, rows:]
        torch.minimum(above, candidate[:, rows:], out=above)
        torch.minimum(below, candidate[:, :-rows], out=below)
    return distance


@lru_cache(maxsize=4)
def _chamfer_table(device):
    """[i, j]: length of the shortest path over i rows and j columns, limited to 20: steps of a knight cost 2.1969,
    diagonal ones 1.4, straight ones 1 (16.16 fixed point, as in OpenCV)."""
    straight, diagonal, knight = (round(cost * 2**16) for cost in (1, 1.4, 2.1969))
    steps = torch.arange(CHAMFER_LIMIT + 1)
    shorter, longer = torch.minimum(steps[:, None], steps), torch.maximum(steps[:, None], steps)
    mostly_straight = shorter * knight + (longer - 2 * shorter) * straight
    mostly_diagonal = (longer - shorter) * knight + (2 * shorter - longer) * diagonal
    length = torch.where(longer >= 2 * shorter, mostly_straight, mostly_diagonal)
    return (length.float() / 2**16).clamp_(max=CHAMFER_LIMIT).to(device)


def _equalise(levels):
    """Histogram equalisation of integral levels (N,H,W), at most CHAMFER_LIMIT: cumulative count above the first
    occupied level, scaled to 255. A constant picture is left as it is."""
    flat = levels.flatten(1).long()
    bins = CHAMFER_LIMIT + 1
    image = torch.arange(len(flat), device=flat.device)[:, None]
    histogram = torch.bincount((flat + bins * image).flatten(), minlength=bins * len(flat)).view(-1, bins)
    cumulative = histogram.cumsum(1)
    first = cumulative.gather(1, flat.amin(1, keepdim=True))
    rest = flat.shape[1] - first
    table = ((cumulative - first) * (255 / rest.clamp(min=1))).round().clamp(min=0).float()
    return torch.where(rest == 0, levels.flatten(1), table.gather(1, flat)).view_as(levels)
