"""Blur: defocus, glass, motion, zoom, and Gaussian blur."""

import math
from functools import lru_cache

import torch

from qreg_utils.corruptions.linear_filters import (
    clipped_zoom_matrix,
    correlate,
    gaussian_filter,
    motion_filter,
    snap,
    sum_of_separable,
)
from qreg_utils.corruptions.registry import severities


@severities(cifar={"sigma": (0.4, 0.6, 0.7, 0.8, 1.0)})
def gaussian_blur(images, draws, *, sigma):
    """Gaussian blur of standard deviation sigma, borders repeat the edge."""
    return gaussian_filter(images, sigma).to(torch.uint8)


@severities(cifar={"radius": (0.3, 0.4, 0.5, 1.0, 1.5), "alias_sigma": (0.4, 0.5, 0.6, 0.2, 0.1)})
def defocus_blur(images, draws, *, radius, alias_sigma):
    """Correlation with a disk of the given radius, anti-aliased by a small Gaussian; borders mirror.

    Below radius 1 the disk is a single pixel, so that only the anti-aliasing Gaussian blurs.
    """
    return correlate(images.double(), _disk(radius, alias_sigma), "reflect").clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=16)
def _disk(radius, alias_sigma):
    """The kernel in float32, like its reference, cropped to what is not zero: a tuple of rows."""
    reach = math.ceil(radius) + 1
    grid = torch.arange(-reach, reach + 1, dtype=torch.float32)
    disk = (grid[:, None] ** 2 + grid**2 <= radius**2).float()
    disk /= disk.sum()
    taps = torch.exp(-(torch.arange(-1, 2, dtype=torch.float64) ** 2) / (2 * alias_sigma**2))
    taps = (taps / taps.sum()).float()
    smooth = torch.nn.functional.conv2d(disk[None, None], (taps[:, None] * taps)[None, None], padding="same")[0, 0]
    used = max(abs(int(i) - reach) for i in smooth.nonzero().flatten())
    return tuple(map(tuple, smooth[reach - used :, reach - used :][: 2 * used + 1, : 2 * used + 1].tolist()))


@severities(cifar={"sigma": (0.05, 0.25, 0.4, 0.25, 0.4), "iterations": (1, 1, 1, 2, 2)})
def glass_blur(images, draws, *, sigma, iterations):
    """Gaussian blur, then pixels replaced by a near neighbour `iterations` times, then the same blur.

    The original means to swap pixels but copies them, over an offset of 0 or -1 in each direction; the first two rows
    and columns are never written. It scans from the bottom right, so a source is never one that was already
    written, and each iteration is one gather.
    """
    height, width = images.shape[-2:]
    blurred = gaussian_filter(images, sigma).to(torch.uint8)
    pixels = torch.arange(height * width, device=images.device).view(height, width)
    sources = pixels.flatten().expand(len(images), -1)
    for _ in range(iterations):
        # In the original's scan order: rows and columns descending; (column, row) offset.
        offsets = draws.integers(-1, 1, (height - 2, width - 2, 2)).flip(1, 2)
        step = pixels.repeat(len(images), 1, 1)
        step[:, 2:, 2:] += offsets[..., 1] * width + offsets[..., 0]
        sources = sources.gather(1, step.flatten(1))
    shuffled = blurred.flatten(2).gather(2, sources[:, None].expand(-1, 3, -1)).view_as(images)
    return gaussian_filter(shuffled, sigma).to(torch.uint8)


@severities(cifar={"radius": (6, 6, 6, 8, 9), "sigma": (1.0, 1.5, 2.0, 2.0, 2.5)})
def motion_blur(images, draws, *, radius, sigma):
    """One-sided Gaussian trail of 2 * radius + 1 pixels at an angle from uniform(-45, 45) degrees.

    Rounded to nearest, as ImageMagick did at the time; since its version 6.9.10-69 it truncates.
    """
    return motion_filter(images, radius, sigma, draws.uniform(-45, 45, ())).add_(0.5).to(torch.uint8)


@severities(cifar={"stop": (1.06, 1.11, 1.16, 1.21, 1.26), "step": (0.01,) * 5})
def zoom_blur(images, draws, *, stop, step):
    """Mean of the image and its magnifications by 1, 1 + step, ... below stop: the sharp image counts twice.

    Rounding lets the factors include the stops 1.06 and 1.11, but not the others.
    """
    rows, columns = (_zoom_matrices(size, stop, step, images.device) for size in images.shape[-2:])
    weighted_rows = rows / len(rows)
    return snap(sum_of_separable(images.double(), weighted_rows, columns)).clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=8)
def _zoom_matrices(size, stop, step, device):
    """(1 + number of factors, size, size): the identity and the clipped zooms."""
    increment = (1 + step) - 1
    factors = [1 + i * increment for i in range(math.ceil((stop - 1) / step))]
    return torch.stack([clipped_zoom_matrix(size, factor, device) for factor in (1.0, *factors)])
