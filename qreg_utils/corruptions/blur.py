"""Blur: defocus, glass, motion, zoom, and Gaussian blur."""

import math
from functools import lru_cache

import torch

from qreg_utils.corruptions.linear_filters import (
    clipped_zooms,
    correlate,
    filter_image,
    gaussian_filter,
    motion_filter,
    snap,
    to_uint8,
)
from qreg_utils.corruptions.registry import severities


@severities(
    cifar={"sigma": (0.4, 0.6, 0.7, 0.8, 1.0)},
    imagenet={"sigma": (1, 2, 3, 4, 6)},
)
def gaussian_blur(images, draws, *, sigma):
    """Gaussian blur with a standard deviation of sigma pixels; borders repeat the edge."""
    return to_uint8(gaussian_filter(images, sigma))


@severities(
    cifar={"radius": (0.3, 0.4, 0.5, 1.0, 1.5), "alias_sigma": (0.4, 0.5, 0.6, 0.2, 0.1)},
    imagenet={"radius": (3, 4, 6, 8, 10), "alias_sigma": (0.1, 0.5, 0.5, 0.5, 0.5)},
)
def defocus_blur(images, draws, *, radius, alias_sigma):
    """Out of focus: correlation with a disk of the given radius, anti-aliased by a small Gaussian; borders mirror.

    Below radius 1 the disk is a single pixel, so that only the anti-aliasing Gaussian blurs. At radius 8 and 10 the
    disk touches the border of its grid, where the Gaussian mirrors it: the kernel sums to 1.013 and 1.011.
    """
    return to_uint8(correlate(images, _disk(radius, alias_sigma), "reflect").clamp_(0, 255))


@lru_cache(maxsize=16)
def _disk(radius, alias_sigma):
    """The kernel in float32, like its reference, cropped to what is not zero: a tuple of rows."""
    reach, alias_reach = (8, 1) if radius <= 8 else (radius, 2)
    grid = torch.arange(-reach, reach + 1, dtype=torch.float32)
    disk = (grid[:, None] ** 2 + grid**2 <= radius**2).float()
    disk /= disk.sum()
    taps = torch.exp(-(torch.arange(-alias_reach, alias_reach + 1, dtype=torch.float64) ** 2) / (2 * alias_sigma**2))
    taps = (taps / taps.sum()).float()
    mirrored = torch.nn.functional.pad(disk[None, None], (alias_reach,) * 4, mode="reflect")
    smooth = torch.nn.functional.conv2d(mirrored, (taps[:, None] * taps)[None, None])[0, 0]
    used = max(abs(int(i) - reach) for i in smooth.nonzero().flatten())
    return tuple(map(tuple, smooth[reach - used :, reach - used :][: 2 * used + 1, : 2 * used + 1].tolist()))


@severities(
    cifar={"sigma": (0.05, 0.25, 0.4, 0.25, 0.4), "max_delta": 1, "iterations": (1, 1, 1, 2, 2)},
    imagenet={"sigma": (0.7, 0.9, 1, 1.1, 1.5), "max_delta": (1, 2, 2, 3, 4), "iterations": (2, 1, 3, 2, 2)},
)
def glass_blur(images, draws, *, sigma, max_delta, iterations):
    """Frosted glass: Gaussian blur, each pixel replaced by a near neighbour `iterations` times, the same blur again.

    The original means to swap pixels but copies them, over an offset of -max_delta .. max_delta - 1 in each direction.
    It never writes the first max_delta + 1 rows and columns, nor the last max_delta - 1.
    """
    height, width = images.shape[-2:]
    blurred = to_uint8(gaussian_filter(images, sigma))
    sources = torch.arange(height * width, device=images.device).expand(len(images), -1)
    for _ in range(iterations):
        sources = sources.gather(1, _scan_of_copies(draws, height, width, max_delta, images.device))
    shuffled = blurred.flatten(2).gather(2, sources[:, None].expand(-1, 3, -1)).view_as(images)
    return to_uint8(gaussian_filter(shuffled, sigma))


def _scan_of_copies(draws, height, width, reach, device):
    """Where each pixel's value comes from in one scan of glass_blur: indices (N, H * W).

    The scan goes from the bottom right to the top left. A pixel that copies from one further on in the reading order
    gets what was copied there before, and so on: `via` leads to the last pixel of such a chain, by pointers that
    double their length, and that pixel's own source is the source of the whole chain.
    """
    pixels = torch.arange(height * width, device=device).view(height, width)
    scanned = (slice(None), slice(reach + 1, height - reach + 1), slice(reach + 1, width - reach + 1))
    shape = (height - 2 * reach, width - 2 * reach, 2)
    # Drawn in the scan's order: rows and columns descending; (column, row) offset.
    offsets = draws.integers(-reach, reach, shape).flip(1, 2)
    step = pixels.repeat(len(offsets), 1, 1)
    step[scanned] += offsets[..., 1] * width + offsets[..., 0]
    written = torch.zeros(1, height, width, dtype=torch.bool, device=device)
    written[scanned] = True
    step = step.flatten(1)
    copied_before = (step > pixels.flatten()) & written.flatten()[step]
    via = torch.where(copied_before, step, pixels.flatten())
    while not torch.equal(further := via.gather(1, via), via):
        via = further
    return step.gather(1, via)


@severities(
    cifar={"radius": (6, 6, 6, 8, 9), "sigma": (1.0, 1.5, 2.0, 2.0, 2.5), "rounding": 0.5},
    imagenet={"radius": (10, 15, 15, 15, 20), "sigma": (3, 5, 8, 12, 15), "rounding": 0},
)
def motion_blur(images, draws, *, radius, sigma, rounding):
    """Shaken camera: a one-sided Gaussian trail of 2 * radius + 1 pixels at an angle from uniform(-45, 45) degrees.

    `rounding` is added before the fraction is dropped: ImageMagick rounded to nearest when CIFAR-10-C was made (since
    its version 6.9.10-69 it truncates), imagecorruptions truncates.
    """
    blurred = motion_filter(images, radius, sigma, draws.uniform(-45, 45, ()))
    return to_uint8(blurred.add_(rounding).clamp_(0, 255))


@severities(
    cifar={"stop": (1.06, 1.11, 1.16, 1.21, 1.26), "step": 0.01},
    imagenet={"stop": (1.11, 1.16, 1.21, 1.26, 1.31), "step": (0.01, 0.01, 0.02, 0.02, 0.03)},
)
def zoom_blur(images, draws, *, stop, step):
    """Zooming camera: the mean of the image and its magnifications by 1, 1 + step, and so on below stop.

    So the sharp image counts twice. Rounding lets the factors include the stops 1.06 and 1.11, but not the others.
    """
    increment = (1 + step) - 1
    factors = (1.0, *(1 + i * increment for i in range(math.ceil((stop - 1) / step))))
    rows, columns = (clipped_zooms(size, factors, images.device) for size in images.shape[-2:])
    mean = filter_image(images.double(), rows, columns).div_(len(factors))
    return to_uint8(snap(mean).clamp_(0, 255))
