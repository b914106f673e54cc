"""Synthetic frost textures: stand-ins for the photographs of the original `frost`, which are not part of this package.

Each texture is a smooth field (clouds of ice) plus crystals (short strokes in random directions), whose ranks are
mapped to given quantiles of brightness; colours follow from the brightness. It is made at one fifth of the original's
size, which is CIFAR-10-C's; at full size the fields are enlarged, and finer crystals join them. The numbers below
(sizes, mean colours, quantiles, correlation lengths) were measured on the effect of the original textures.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.functional import interpolate

from qreg_utils.corruptions.counter_rng import CounterGenerator
from qreg_utils.corruptions.linear_filters import (
    axis_filter,
    filter_image,
    gaussian_filter,
    gaussian_taps,
    motion_filter,
)

PROBABILITIES = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1)
STROKE_DIRECTIONS = 7
REDUCTION = 5  # of CIFAR-10-C's textures
FINE_STROKE_LENGTH, FINE_BLUR = 12, 0.5  # pixels at full size


@dataclass(frozen=True)
class Frost:
    """The measured properties of one texture: colours in levels, lengths in pixels at one fifth of the full size."""

    full_size: tuple[int, int]
    mean_rgb: tuple[float, float, float]
    quantiles: tuple[float, ...]  # of the brightness (mean of R, G, B) at PROBABILITIES
    rgb_per_brightness: tuple[float, float, float]
    cloud_share: float  # of the variance
    cloud_sigma: tuple[float, float]  # along rows and columns
    stroke_length: int
    fine_share: float  # of the variance at full size: details that one pixel in five cannot show
    tint_rgb: tuple[float, float, float] = (0, 0, 0)  # standard deviation of a colour change at constant brightness


FROSTS = (
    Frost((600, 900), (77.7, 149.1, 165.7), (88, 97, 103, 108, 116, 128, 142, 155, 163, 179, 217), (1.38, 0.9, 0.72),
          0.70, (26, 9), 2, 0.28, (11, -3, -8)),
    Frost((315, 560), (200.8, 205.4, 214.5), (57, 144, 167, 179, 195, 210, 222, 229, 233, 240, 248), (0.97, 1.0, 1.03),
          0.42, (10, 22), 3, 0.30),
    Frost((350, 527), (137.6, 152.8, 165.2), (41, 83, 108, 121, 137, 154, 169, 185, 197, 232, 253), (0.99, 0.99, 1.02),
          0.32, (24, 11), 2, 0.42),
    Frost((495, 660), (112.4, 123.4, 134.8), (29, 46, 61, 71, 91, 119, 148, 176, 195, 230, 255), (1.02, 1.0, 0.97),
          0.28, (14, 30), 8, 0.28),
)  # fmt: skip
# The original draws one of five files, of which the second and third hold the same picture.
TEXTURE_OF_FILE = (0, 1, 1, 2, 3)


@lru_cache(maxsize=4)
def reduced_textures(height, width, device):
    """CIFAR-10-C's textures for images of height x width, float32: one fifth of the full size.

    A texture that is not larger than the image is reduced less: to 1.1 times the smallest size that holds the image.
    """
    textures = []
    for number, frost in enumerate(FROSTS):
        size = [side // REDUCTION for side in frost.full_size]
        if size[0] > height and size[1] > width:
            textures.append(_synthesise(frost, number, size, reduction=1))
        else:
            textures.append(_resized(_full_size_textures()[number], _size_that_holds(height, width, frost)))
    return _on_one_canvas(textures, device)


def enlarged_textures(height, width, device):
    """imagecorruptions' textures for images of height x width, uint8.

    1.1 times the full size, or where an image is larger than the full size, 1.1 times the smallest size that holds it.
    """
    sizes = (
        _size_that_holds(max(height, frost.full_size[0]), max(width, frost.full_size[1]), frost) for frost in FROSTS
    )
    return _textures_of_sizes(tuple(sizes), device)


def _size_that_holds(height, width, frost):
    """1.1 times the smallest size of a texture's shape that holds height x width."""
    factor = 1.1 * max(height / frost.full_size[0], width / frost.full_size[1])
    return tuple(math.ceil(side * factor) for side in frost.full_size)


def _resized(texture, size):
    smaller = size[0] < texture.shape[1]
    return interpolate(texture[None], size, mode="bicubic", antialias=smaller)[0].clamp_(0, 255)


@lru_cache(maxsize=4)
def _textures_of_sizes(sizes, device):
    enlarged = [
        _resized(texture, size).round().to(torch.uint8)
        for texture, size in zip(_full_size_textures(), sizes, strict=True)
    ]
    return _on_one_canvas(enlarged, device)


@lru_cache(maxsize=1)
def _full_size_textures():
    return [_synthesise(frost, number, frost.full_size, REDUCTION) for number, frost in enumerate(FROSTS)]


def _on_one_canvas(textures, device):
    """All textures in one tensor (4,3,h,w), zero where a smaller one ends, and each one's own size, int64 (4,2)."""
    sizes = torch.tensor([texture.shape[1:] for texture in textures])
    canvas = torch.zeros(len(textures), 3, *sizes.amax(0).tolist(), dtype=textures[0].dtype)
    for number, texture in enumerate(textures):
        canvas[number, :, : texture.shape[1], : texture.shape[2]] = texture
    return canvas.to(device), sizes.to(device)


def _synthesise(frost, number, size, reduction):
    """One texture, float32 (3, *size) in levels: its fields are made smaller by `reduction` and enlarged."""
    draws = CounterGenerator("frost texture", number, 0, 0, 1, torch.device("cpu"))
    small = [math.ceil(side / reduction) for side in size]
    fine_share = frost.fine_share if reduction > 1 else 0
    clouds = _clouds(draws, *small, frost.cloud_sigma)
    crystals = _crystals(draws, *small, frost.stroke_length)
    tint = _enlarge(_clouds(draws, *small, frost.cloud_sigma), size)
    field = math.sqrt(frost.cloud_share) * _enlarge(clouds, size)
    field += math.sqrt(1 - frost.cloud_share - fine_share) * _enlarge(crystals, size)
    if fine_share:
        fine = gaussian_filter(_crystals(draws, *size, FINE_STROKE_LENGTH), FINE_BLUR)
        field += math.sqrt(fine_share) * _standardise(fine)
    brightness = _map_ranks(field, frost.quantiles)
    per_channel = torch.tensor([frost.mean_rgb, frost.rgb_per_brightness, frost.tint_rgb], dtype=torch.float32)[
        ..., None, None
    ]
    mean, slope, tint_rgb = per_channel.unbind(0)
    return (mean + slope * (brightness - brightness.mean()) + tint_rgb * tint).clamp_(0, 255)


def _enlarge(field, size):
    if list(field.shape) == list(size):
        return field
    return _standardise(interpolate(field[None, None], size, mode="bicubic")[0, 0])


def _standardise(field):
    return ((field - field.mean()) / field.std()).float()


def _clouds(draws, height, width, sigma):
    """Smooth normal noise (H,W): filtered on a wider field and cropped, so that the borders look like the rest."""
    margins = [2 * extent for extent in sigma]
    sides = [side + 2 * margin for side, margin in zip((height, width), margins, strict=True)]
    noise = draws.normal(0, 1, sides)[0].double()
    rows, columns = (
        axis_filter(side, tuple(gaussian_taps(s, truncate=4)), "edge", noise.device)
        for side, s in zip(sides, sigma, strict=True)
    )
    smooth = filter_image(noise, rows, columns)
    return _standardise(smooth[margins[0] : margins[0] + height, margins[1] : margins[1] + width])


def _crystals(draws, height, width, stroke_length):
    """Needles (H,W): the strongest of some layers of noise, each drawn out along a direction of its own."""
    angles = torch.arange(STROKE_DIRECTIONS) * (360 / STROKE_DIRECTIONS)
    margin = 2 * stroke_length
    noise = draws.normal(0, 1, (STROKE_DIRECTIONS, height + 2 * margin, width + 2 * margin)).transpose(0, 1)
    needles = motion_filter(noise, stroke_length, stroke_length, angles).amax((0, 1))
    return _standardise(needles[margin : margin + height, margin : margin + width])


def _map_ranks(field, quantiles):
    """Replace values by the levels of the same rank in a distribution given by its quantiles at PROBABILITIES."""
    ranks = torch.empty(field.numel(), dtype=torch.float32)
    ranks[field.flatten().argsort()] = torch.linspace(0, 1, field.numel(), dtype=torch.float32)
    probabilities, levels = torch.tensor([PROBABILITIES, quantiles], dtype=torch.float32)
    upper = torch.searchsorted(probabilities, ranks).clamp(1, len(quantiles) - 1)
    low, high = probabilities[upper - 1], probabilities[upper]
    return torch.lerp(levels[upper - 1], levels[upper], (ranks - low) / (high - low)).view_as(field)
