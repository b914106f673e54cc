"""Synthetic frost textures: stand-ins for the photographs of the original `frost`, which are not part of this package.

Each texture is a smooth field (clouds of ice) plus fine crystals (short strokes in random directions), whose ranks are
mapped to given quantiles of brightness; colours follow from the brightness. The numbers below (sizes, mean colours,
quantiles, correlation lengths) were measured on the effect of the original textures at one fifth of their size.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from qreg_utils.corruptions.counter_rng import CounterGenerator
from qreg_utils.corruptions.linear_filters import axis_filter, gaussian_taps, motion_filter, separable

PROBABILITIES = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1)
STROKE_DIRECTIONS = 7


@dataclass(frozen=True)
class Frost:
    """The measured properties of one texture; lengths in pixels, colours in levels."""

    size: tuple[int, int]
    mean_rgb: tuple[float, float, float]
    quantiles: tuple[float, ...]  # of the brightness (mean of R, G, B) at PROBABILITIES
    rgb_per_brightness: tuple[float, float, float]
    cloud_share: float  # of the variance
    cloud_sigma: tuple[float, float]  # along rows and columns
    stroke_length: int
    tint_rgb: tuple[float, float, float] = (0, 0, 0)  # standard deviation of a colour change at constant brightness


FROSTS = (
    Frost((120, 180), (77.7, 149.1, 165.7), (88, 97, 103, 108, 116, 128, 142, 155, 163, 179, 217), (1.38, 0.9, 0.72),
          0.70, (26, 9), 2, (11, -3, -8)),
    Frost((63, 112), (200.8, 205.4, 214.5), (57, 144, 167, 179, 195, 210, 222, 229, 233, 240, 248), (0.97, 1.0, 1.03),
          0.42, (10, 22), 3),
    Frost((70, 105), (137.6, 152.8, 165.2), (41, 83, 108, 121, 137, 154, 169, 185, 197, 232, 253), (0.99, 0.99, 1.02),
          0.32, (24, 11), 2),
    Frost((99, 132), (112.4, 123.4, 134.8), (29, 46, 61, 71, 91, 119, 148, 176, 195, 230, 255), (1.02, 1.0, 0.97),
          0.28, (14, 30), 8),
)  # fmt: skip
# The original draws one of five files, of which the second and third hold the same picture.
TEXTURE_OF_FILE = (0, 1, 1, 2, 3)


@lru_cache(maxsize=4)
def frost_textures(height, width, device):
    """Textures for images of height x width: float32 (4,3,h,w) on one canvas, and each one's own size, int64 (4,2).

    Outside a texture's own size the canvas is zero. A texture that is not larger than the image is made twice as high
    or as wide as the image instead.
    """
    sizes = [
        [own if own > side else 2 * side for own, side in zip(f.size, (height, width), strict=True)] for f in FROSTS
    ]
    canvas = torch.zeros(len(FROSTS), 3, *(max(extents) for extents in zip(*sizes, strict=True)), dtype=torch.float32)
    for number, (frost, (rows, columns)) in enumerate(zip(FROSTS, sizes, strict=True)):
        canvas[number, :, :rows, :columns] = _synthesise(frost, number, rows, columns)
    return canvas.to(device), torch.tensor(sizes, device=device)


def _synthesise(frost, number, height, width):
    """One texture, float32 (3,H,W) in levels."""
    draws = CounterGenerator("frost texture", number, 0, 0, 1, torch.device("cpu"))
    clouds = _clouds(draws, height, width, frost.cloud_sigma)
    crystals = _crystals(draws, height, width, frost.stroke_length)
    field = math.sqrt(frost.cloud_share) * clouds + math.sqrt(1 - frost.cloud_share) * crystals
    brightness = _map_ranks(field, frost.quantiles)
    tint = _clouds(draws, height, width, frost.cloud_sigma)
    per_channel = torch.tensor([frost.mean_rgb, frost.rgb_per_brightness, frost.tint_rgb], dtype=torch.float32)[
        ..., None, None
    ]
    mean, slope, tint_rgb = per_channel.unbind(0)
    return (mean + slope * (brightness - brightness.mean()) + tint_rgb * tint).clamp_(0, 255)


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
    smooth = separable(noise, rows, columns)
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
