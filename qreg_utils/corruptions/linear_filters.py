"""Linear filters as small dense matrices, padding included: rows @ image @ columns.T.

All of them run in float64 on levels (0..255). There a flat region stays on its level but for rounding errors near
1e-13, which `snap` takes away: without it the truncation to uint8 would hang on the summation order of the matrix
product, hence on the batch size. Reduced-precision modes (TF32, autocast) do not touch float64.
"""

import math
from functools import lru_cache

import torch

SNAP_STEPS = 2.0**24


def snap(levels):
    """Round to a grid of 2**-24 levels, in place."""
    return levels.mul_(SNAP_STEPS).round_().div_(SNAP_STEPS)


def separable(images, rows, columns):
    """rows @ images @ columns.T for images (..., H, W), rows (H', H), columns (W', W)."""
    return rows @ (images @ columns.mT)


def sum_of_separable(images, rows, columns):
    """sum over z of rows[z] @ images @ columns[z].T: two matrix products for rows (Z,H',H), columns (Z,W',W)."""
    new_height, new_width = rows.shape[1], columns.shape[1]
    # (..., H, Z * W') seen as (..., H * Z, W'): what comes out of the first product feeds the second as it lies.
    terms = images @ columns.flatten(0, 1).mT
    return rows.permute(1, 2, 0).reshape(new_height, -1) @ terms.reshape(*images.shape[:-2], -1, new_width)


def fold(indices, size, padding):
    """Map indices outside 0..size-1 into the image; `padding` in numpy.pad's terms: edge, symmetric or reflect."""
    if padding == "edge":
        return indices.clamp(0, size - 1)
    period = 2 * size if padding == "symmetric" else 2 * size - 2
    folded = indices.remainder(period)
    return torch.minimum(folded, (-1 if padding == "symmetric" else 0) + period - folded)


def band_matrix(size, taps, padding):
    """(size, size): correlation with an odd number of taps, centred, along an axis of `size` pixels."""
    radius = len(taps) // 2
    offsets = torch.arange(-radius, radius + 1)
    targets = torch.arange(size)[:, None].expand(-1, len(taps))
    sources = fold(targets + offsets, size, padding)
    values = torch.as_tensor(taps, dtype=torch.float64).expand(size, -1)
    return torch.zeros(size, size, dtype=torch.float64).index_put_((targets, sources), values, accumulate=True)


def gaussian_taps(sigma, truncate):
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return [1.0]
    weights = [math.exp(-0.5 * (t / sigma) ** 2) for t in range(-radius, radius + 1)]
    return [weight / sum(weights) for weight in weights]


@lru_cache(maxsize=256)
def axis_filter(size, taps, padding, device):
    """`band_matrix` for a tuple of taps, cached."""
    return band_matrix(size, taps, padding).to(device)


def gaussian_filter(images, sigma, padding="edge", truncate=4):
    """Gaussian blur of (..., H, W) levels, taps up to floor(truncate * sigma + 0.5)."""
    taps = tuple(gaussian_taps(sigma, truncate))
    if len(taps) == 1:
        return images
    height, width = images.shape[-2:]
    rows, columns = (axis_filter(size, taps, padding, images.device) for size in (height, width))
    return snap(separable(images.double(), rows, columns))


@lru_cache(maxsize=64)
def _kernel_matrices(kernel, height, width, padding, device):
    """The terms (rows, columns) of `correlate`: one for each row of the kernel."""
    one_hot = torch.eye(len(kernel)).tolist()
    rows = torch.stack([band_matrix(height, taps, padding) for taps in one_hot])
    columns = torch.stack([band_matrix(width, taps, padding) for taps in kernel])
    return rows.to(device), columns.to(device)


def correlate(images, kernel, padding):
    """Correlation of (..., H, W) levels with a square kernel of odd side, given as a tuple of rows."""
    return snap(sum_of_separable(images, *_kernel_matrices(kernel, *images.shape[-2:], padding, images.device)))


def clipped_zoom_matrix(size, factor, device):
    """(size, size): magnify the central part by `factor`, linearly, and trim the result to `size`.

    The window starts at floor((size - window) / 2), the trimmed part likewise: up to a pixel off centre.
    """
    window = math.ceil(size / factor)
    zoomed = round(window * factor)
    positions = torch.arange(zoomed, dtype=torch.float64) * (window - 1) / max(zoomed - 1, 1)
    positions = positions[(zoomed - size) // 2 :][:size, None] + (size - window) // 2
    # Linear interpolation: a triangle of half-width one around the position.
    return (1 - (torch.arange(size) - positions).abs()).clamp(min=0).to(device)


def motion_filter(images, radius, sigma, angles):
    """Motion blur with 2 * radius + 1 one-sided Gaussian taps along each image's own angle (degrees, (N,)).

    Tap i lies ceil(i cos - 1/2) pixels to the right and ceil(i sin - 1/2) down, borders repeat the edge: ImageMagick's
    rule, without sub-pixel interpolation. (N,C,H,W) -> float32 (N,C,H,W).
    """
    height, width = images.shape[-2:]
    steps = torch.arange(2 * radius + 1, device=images.device)
    weights = torch.exp(-(steps.double() ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    radians = torch.deg2rad(angles.double())[:, None]
    right = torch.ceil(steps * radians.cos() - 0.5).long()
    down = torch.ceil(steps * radians.sin() - 0.5).long()
    margin = 2 * radius
    padded = torch.nn.functional.pad(images.float(), (margin,) * 4, mode="replicate")
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    number = torch.arange(len(images), device=images.device)
    blurred = torch.zeros_like(images, dtype=torch.float32)
    for weight, dx, dy in zip(weights.tolist(), right.T + margin, down.T + margin, strict=True):
        blurred.add_(windows[number, :, dy, dx], alpha=weight)
    return blurred
