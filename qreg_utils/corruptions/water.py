"""The light on the water drops of `spatter`, as OpenCV's functions compute it, for a batch at once.

Levels and their small multiples are whole numbers below 2**24, which float32 adds exactly and in any order.
"""

from functools import lru_cache

import torch

CHAMFER_LIMIT = 20
ROWS_AT_ONCE = 3  # whose shares of the distance are looked up in one table


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
    """Correlation with ((-2, -1, 0), (-1, 1, 1), (0, 1, 2)): light from above left. That is the number of rows down,
    plus that of columns to the right, plus 1 in the centre."""
    padded = _padded(levels, "reflect")
    right, down = padded[..., 2:] - padded[..., :-2], padded[:, 2:] - padded[:, :-2]
    to_right = right[:, :-2] + right[:, 1:-1] + right[:, 2:]
    return to_right + down[..., :-2] + down[..., 1:-1] + down[..., 2:] + levels


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
    falling_peak = magnitude > torch.maximum(at(-1, -1), at(1, 1))
    rising_peak = magnitude > torch.maximum(at(-1, 1), at(1, -1))
    diagonal_peak = (falling & falling_peak) | (~falling & rising_peak)
    # the magnitudes are whole numbers: right and below may be as large
    horizontal_peak = magnitude > torch.maximum(at(0, -1), at(0, 1) - 1)
    vertical_peak = magnitude > torch.maximum(at(-1, 0), at(1, 0) - 1)
    diagonal = ~(horizontal | vertical)
    peak = (horizontal & horizontal_peak) | (vertical & vertical_peak) | (diagonal & diagonal_peak)
    candidates = peak & (magnitude > low)
    edges = candidates & (magnitude > high)
    while True:
        grown = _dilate(edges) & candidates
        if not (grown ^ edges).any():
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
    horizontal distance by a running maximum, then the minimum over the rows, above and below alike.
    """
    height, width = edges.shape[-2:]
    column = torch.arange(width, dtype=torch.int32, device=edges.device)
    marks = edges * (column + CHAMFER_LIMIT) - CHAMFER_LIMIT  # -20, which is too far away, where there is no edge
    mirrored = edges.flip(2) * (column + CHAMFER_LIMIT) - CHAMFER_LIMIT
    nearest = torch.minimum(column - marks.cummax(2).values, (column - mirrored.cummax(2).values).flip(2))
    nearest = nearest.clamp_(max=CHAMFER_LIMIT).to(torch.int16)
    margin = CHAMFER_LIMIT + ROWS_AT_ONCE
    rows = torch.nn.functional.pad(nearest, (0, 0, margin, margin), value=CHAMFER_LIMIT)
    tables = _chamfer_tables(edges.device)
    distance = tables[0].index_select(0, nearest.flatten().int())
    for start in range(1, CHAMFER_LIMIT, ROWS_AT_ONCE):
        if start >= distance.max():
            break
        place = torch.zeros_like(nearest)
        for away in range(start, start + ROWS_AT_ONCE):
            above, below = (rows[:, margin + shift : margin + shift + height] for shift in (-away, away))
            place = torch.minimum(above, below).add_(place, alpha=CHAMFER_LIMIT + 1)
        distance = torch.minimum(distance, tables[start].index_select(0, place.flatten().int()))
    return distance.view(edges.shape)


@lru_cache(maxsize=4)
def _chamfer_tables(device):
    """For a row, the length of the shortest path over so many rows and j columns, limited to 20: steps of a knight cost
    2.1969, diagonal ones 1.4, straight ones 1 (16.16 fixed point, as in OpenCV). Row 0 is alone; the others go
    ROWS_AT_ONCE from their first one on, and the table has the least length, at their js as the digits of a number."""
    straight, diagonal, knight = (round(cost * 2**16) for cost in (1, 1.4, 2.1969))
    steps = torch.arange(CHAMFER_LIMIT + 1 + ROWS_AT_ONCE)
    shorter, longer = torch.minimum(steps[:, None], steps), torch.maximum(steps[:, None], steps)
    mostly_straight = shorter * knight + (longer - 2 * shorter) * straight
    mostly_diagonal = (longer - shorter) * knight + (2 * shorter - longer) * diagonal
    length = torch.where(longer >= 2 * shorter, mostly_straight, mostly_diagonal)
    length = (length.float() / 2**16).clamp_(max=CHAMFER_LIMIT)[:, : CHAMFER_LIMIT + 1]
    tables = {0: length[0]}
    for start in range(1, CHAMFER_LIMIT, ROWS_AT_ONCE):
        tables[start] = torch.cartesian_prod(*length[start : start + ROWS_AT_ONCE]).amin(1)
    return {start: table.to(device) for start, table in tables.items()}


def _equalise(levels):
    """Histogram equalisation of integral levels (N,H,W), at most CHAMFER_LIMIT: cumulative count above the first
    occupied level, scaled to 255. A constant picture is left as it is."""
    bins = torch.arange(CHAMFER_LIMIT + 1, device=levels.device)
    image = torch.arange(len(levels), dtype=torch.int32, device=levels.device)[:, None]
    places = (levels.flatten(1).int() + len(bins) * image).flatten()
    cumulative = torch.bincount(places, minlength=len(bins) * len(levels)).view(-1, len(bins)).cumsum(1)
    first = cumulative.gather(1, levels.amin((1, 2)).long()[:, None])
    rest = cumulative[:, -1:] - first
    table = ((cumulative - first) * (255 / rest.clamp(min=1))).round().clamp(min=0).float()
    return torch.where(rest == 0, bins.float(), table).flatten().index_select(0, places).view_as(levels)
