"""Linear filters as products with small dense matrices, padding included; large kernels by Fourier transforms.

A filter is cut into blocks of up to 64 outputs on each axis, each of which reads a short run of inputs; so the cost of
a pixel depends on the taps and not on the size of the image, and the memory on one tile.

All of them run in float64 on levels (0..255). There a flat region stays on its level but for rounding errors near
1e-13, which `snap` takes away: without it the truncation to uint8 would hang on the summation order of the matrix
product, hence on the batch size. Reduced-precision modes (TF32, autocast) do not touch float64.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from scipy.fft import next_fast_len
from torch.nn.functional import pad

SNAP_STEPS = 2.0**24
BLOCK = 64
LARGE_KERNEL = 7  # rows from which a kernel is applied by Fourier transforms


def snap(levels):
    """Round to a grid of 2**-24 levels, in place."""
    return levels.mul_(SNAP_STEPS).round_().mul_(1 / SNAP_STEPS)


def to_uint8(levels):
    """Levels 0..255 -> uint8 without the fraction; by way of int16, which CPUs are three times as fast at."""
    return levels.to(torch.int16).to(torch.uint8)


class Block(NamedTuple):
    """Some neighbouring outputs of filters along an axis: matrices (number of filters, outputs, inputs)."""

    inputs: slice
    matrices: torch.Tensor


def filter_blocks(sources, weights, device):
    """Blocks of filters whose output i is the sum over t of weights[z, i, t] * input[sources[z, i, t]]."""
    blocks = []
    for reads, values in zip(sources.split(BLOCK, 1), weights.double().split(BLOCK, 1), strict=True):
        first, last = int(reads.min()), int(reads.max())
        matrices = torch.zeros(*reads.shape[:2], last - first + 1, dtype=torch.float64)
        blocks.append(Block(slice(first, last + 1), matrices.scatter_add_(2, reads - first, values).to(device)))
    return tuple(blocks)


def filter_image(images, rows, columns):
    """Sum over z of rows[z] @ images @ columns[z].T for float64 images (..., H, W) and blocks along both axes."""
    return _joined([_joined([_filter_tile(images, row, column) for column in columns], -1) for row in rows], -2)


def filter_columns(images, columns):
    """images @ columns[0].T: one filter along the last axis alone."""
    return _joined([images[..., column.inputs] @ column.matrices[0].mT for column in columns], -1)


def filter_rows(images, rows):
    """rows[0] @ images: one filter along the last axis but one."""
    return _joined([row.matrices[0] @ images[..., row.inputs, :] for row in rows], -2)


def _joined(pieces, dim):
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def _filter_tile(images, row, column):
    """Two matrix products, however many filters there are."""
    tile = images[..., row.inputs, column.inputs]
    new_height, new_width = row.matrices.shape[1], column.matrices.shape[1]
    # (..., H, Z * W') seen as (..., H * Z, W'): what comes out of the first product feeds the second as it lies.
    terms = tile @ column.matrices.flatten(0, 1).mT
    all_rows = row.matrices.permute(1, 2, 0).reshape(new_height, -1)
    return all_rows @ terms.reshape(*tile.shape[:-2], -1, new_width)


def fold(indices, size, padding):
    """Map indices outside 0..size-1 into the image; `padding` in numpy.pad's terms: edge, symmetric or reflect."""
    if padding == "edge":
        return indices.clamp(0, size - 1)
    period = 2 * size if padding == "symmetric" else 2 * size - 2
    folded = indices.remainder(period)
    return torch.minimum(folded, (-1 if padding == "symmetric" else 0) + period - folded)


def correlations(size, filters, padding, device):
    """Blocks of correlations with an odd number of taps each, centred, along an axis of `size` pixels."""
    taps = torch.tensor(filters, dtype=torch.float64)
    radius = taps.shape[1] // 2
    reads = fold(torch.arange(size)[:, None] + torch.arange(-radius, radius + 1), size, padding)
    return filter_blocks(reads.expand(len(taps), -1, -1), taps[:, None].expand(-1, size, -1), device)


@lru_cache(maxsize=256)
def axis_filter(size, taps, padding, device):
    """Blocks of one correlation along an axis, cached; `taps` is a tuple."""
    return correlations(size, [taps], padding, device)


def gaussian_taps(sigma, truncate):
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return [1.0]
    weights = [math.exp(-0.5 * (t / sigma) ** 2) for t in range(-radius, radius + 1)]
    return [weight / sum(weights) for weight in weights]


def gaussian_filter(images, sigma, padding="edge", truncate=4):
    """Gaussian blur of (..., H, W) levels, taps up to floor(truncate * sigma + 0.5).

    sigma is a number, or a pair: along the columns of pixels and along the rows.
    """
    sigmas = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    all_taps = [tuple(gaussian_taps(along_axis, truncate)) for along_axis in sigmas]
    if all(len(taps) == 1 for taps in all_taps):
        return images
    rows, columns = (
        axis_filter(size, taps, padding, images.device) for size, taps in zip(images.shape[-2:], all_taps, strict=True)
    )
    return snap(filter_rows(filter_columns(images.double(), columns), rows))


@lru_cache(maxsize=64)
def _kernel_filters(kernel, height, width, padding, device):
    """The terms (rows, columns) of a correlation: one for each distinct row of the kernel, which fewer do if it is
    symmetric."""
    distinct = list(dict.fromkeys(kernel))
    places = [[float(taps == row) for taps in kernel] for row in distinct]
    return correlations(height, places, padding, device), correlations(width, distinct, padding, device)


def correlate(images, kernel, padding):
    """Correlation of (..., H, W) levels with a square kernel of odd side, given as a tuple of rows: a large one by
    Fourier transforms, whose cost does not grow with the kernel."""
    if len(kernel) > LARGE_KERNEL:
        return snap(_correlate_by_fourier(images, kernel, padding))
    return snap(filter_image(images.double(), *_kernel_filters(kernel, *images.shape[-2:], padding, images.device)))


def _correlate_by_fourier(images, kernel, padding):
    height, width = images.shape[-2:]
    padded = pad(images.double(), (len(kernel) // 2,) * 4, mode=padding)
    sizes = tuple(next_fast_len(size, real=True) for size in padded.shape[-2:])
    spectrum = torch.fft.rfft2(padded, s=sizes).mul_(_kernel_spectrum(kernel, sizes, images.device))
    # one axis after the other, which is faster than irfft2, and the rows that are wanted alone
    return torch.fft.irfft(torch.fft.ifft(spectrum, dim=-2)[..., :height, :], n=sizes[1])[..., :width]


@lru_cache(maxsize=16)
def _kernel_spectrum(kernel, sizes, device):
    return torch.fft.rfft2(torch.tensor(kernel, dtype=torch.float64, device=device), s=sizes).conj().resolve_conj()


@lru_cache(maxsize=32)
def clipped_zooms(size, factors, device, trim=True):
    """Blocks that magnify the central part of an axis by each of `factors`, linearly, to `size` pixels or a few more.

    The window starts at floor((size - window) / 2), and the surplus is cut off at both ends, so the result is up to a
    pixel off centre. Without `trim` the surplus is left for the caller, who must then give one factor.
    """
    reads, weights = zip(*(_clipped_zoom(size, factor, trim) for factor in factors), strict=True)
    return filter_blocks(torch.stack(reads), torch.stack(weights), device)


def _clipped_zoom(size, factor, trim):
    """Sources and weights of the linear interpolation, (length, 2) each."""
    window = math.ceil(size / factor)
    length = round(window * factor)
    start, stop = ((length - size) // 2, (length + size) // 2) if trim else (0, length)
    # In the order of the reference, whose last pixel is black where rounding puts it beyond the window.
    positions = torch.arange(start, stop, dtype=torch.float64) * ((window - 1) / max(length - 1, 1))
    left = positions.floor().clamp(max=window - 2)
    weights = torch.stack((left + 1 - positions, positions - left), 1) * (positions <= window - 1)[:, None]
    return (size - window) // 2 + left.long()[:, None] + torch.arange(2), weights


def motion_filter(images, radius, sigma, angles):
    """Motion blur with 2 * radius + 1 one-sided Gaussian taps along each image's own angle (degrees, (N,)).

    Tap i lies ceil(i cos - 1/2) pixels to the right and ceil(i sin - 1/2) down, borders repeat the edge: ImageMagick's
    rule, without sub-pixel interpolation. Taps as far away as the image is wide or high are left out, so that an image
    shorter than the trail gets darker. (N,C,H,W) -> float32 (N,C,H,W).
    """
    height, width = images.shape[-2:]
    steps = torch.arange(2 * radius + 1, device=images.device)
    weights = torch.exp(-(steps.double() ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    radians = torch.deg2rad(angles.double())[:, None]
    right = torch.ceil(steps * radians.cos() - 0.5).long()
    down = torch.ceil(steps * radians.sin() - 0.5).long()
    weights = (weights * ((right.abs() < width) & (down.abs() < height))).float()
    margin = 2 * radius
    padded = pad(images.float(), (margin,) * 4, mode="replicate")
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    number = torch.arange(len(images), device=images.device)
    blurred = torch.zeros_like(images, dtype=torch.float32)
    for weight, dx, dy in zip(weights.T, right.T + margin, down.T + margin, strict=True):
        blurred.addcmul_(windows[number, :, dy, dx], weight[:, None, None, None])
    return blurred
