"""Weather: snow, frost, fog, brightness, and spatter."""

import math

import torch

from qreg_utils.corruptions.frost_textures import TEXTURE_OF_FILE, enlarged_textures, reduced_textures
from qreg_utils.corruptions.linear_filters import (
    clipped_zooms,
    filter_image,
    gaussian_filter,
    motion_filter,
    snap,
    to_uint8,
)
from qreg_utils.corruptions.registry import severities
from qreg_utils.corruptions.water import lit_water

GREY_WEIGHTS = (0.299, 0.587, 0.114)


@severities(
    cifar={"shift": (0.05, 0.1, 0.15, 0.2, 0.3)},
    imagenet={"shift": (0.1, 0.2, 0.3, 0.4, 0.5)},
)
def brightness(images, draws, *, shift):
    """Raise the HSV value v to min(v + shift, 1): channels keep their ratios to the largest one."""
    intensities = images.double() / 255
    value = intensities.amax(1, keepdim=True)
    brighter = (value + shift).clamp_(max=1)
    # Written as v' * (1 - (v - c) / v), so that the largest channel becomes exactly v' before it is truncated.
    return brighter * (1 - (value - intensities) / value.clamp(min=1 / 255))


@severities(
    cifar={
        "loc": (0.1, 0.1, 0.15, 0.25, 0.3),
        "scale": (0.2, 0.2, 0.3, 0.3, 0.3),
        "zoom": (1, 1, 1.75, 2.25, 1.25),
        "threshold": (0.6, 0.5, 0.55, 0.6, 0.65),
        "radius": (8, 10, 10, 12, 14),
        "sigma": (3, 4, 4, 6, 12),
        "image_weight": (0.95, 0.9, 0.9, 0.85, 0.8),
        "trim": True,
        "whole_levels": True,
    },
    imagenet={
        "loc": (0.1, 0.2, 0.55, 0.55, 0.55),
        "scale": 0.3,
        "zoom": (3, 2, 4, 4.5, 2.5),
        "threshold": (0.5, 0.5, 0.9, 0.85, 0.85),
        "radius": (10, 12, 12, 12, 12),
        "sigma": (4, 4, 8, 8, 12),
        "image_weight": (0.8, 0.7, 0.7, 0.65, 0.55),
        "trim": False,
        "whole_levels": False,
    },
)
def snow(images, draws, *, loc, scale, zoom, threshold, radius, sigma, image_weight, trim, whole_levels):
    """Snowfall: a paler image, plus flakes, plus the same flakes turned by 180 degrees.

    Paler: image_weight * x + (1 - image_weight) * max(x, 1.5 * grey + 0.5). Flakes: normal noise, magnified, cut off
    below the threshold, motion-blurred at uniform(-135, -45) degrees. `trim` says whether the magnified noise is cut to
    size before the motion blur (in the middle) or after it (top left), `whole_levels` whether the flakes are truncated
    to 8 bits before it, as ImageMagick's input had to be.
    """
    height, width = images.shape[-2:]
    layer = draws.normal(loc, scale, (height, width))[:, None]
    if zoom != 1:
        rows, columns = (clipped_zooms(size, (zoom,), images.device, trim) for size in (height, width))
        layer = snap(filter_image(layer.double(), rows, columns))
    flakes = torch.where(layer < threshold, 0, layer).clamp_(0, 1).mul_(255)
    if whole_levels:
        flakes.floor_()
    flakes = motion_filter(flakes, radius, sigma, draws.uniform(-135, -45, ())).add_(0.5).floor_() / 255
    flakes = flakes[..., :height, :width]
    intensities = images.float() / 255
    grey = sum(weight * intensities[:, c : c + 1] for c, weight in enumerate(GREY_WEIGHTS))
    pale = torch.maximum(intensities, grey * 1.5 + 0.5)
    return intensities * image_weight + pale * (1 - image_weight) + (flakes + flakes.flip(2, 3))


@severities(
    cifar={
        "image_weight": (1, 1, 0.9, 0.85, 0.75),
        "frost_weight": (0.2, 0.3, 0.4, 0.4, 0.45),
        "full_size": False,
    },
    imagenet={
        "image_weight": (1, 0.8, 0.7, 0.65, 0.6),
        "frost_weight": (0.4, 0.6, 0.7, 0.7, 0.75),
        "full_size": True,
    },
)
def frost(images, draws, *, image_weight, frost_weight, full_size):
    """Frost on the window: image_weight * image + frost_weight * a random window of a random frost texture.

    A deliberate departure: the original's photographs are not part of this package. `frost_textures` makes textures
    with their sizes, mean colours, contrast and correlations. As there, textures have weights 1/5, 2/5, 1/5, 1/5.
    CIFAR-10-C shrinks them to one fifth; at `full_size` they are enlarged a little, or as much as the image needs.
    """
    height, width = images.shape[-2:]
    textures = enlarged_textures if full_size else reduced_textures
    canvas, sizes = textures(height, width, images.device)
    texture = torch.tensor(TEXTURE_OF_FILE, device=images.device)[draws.integers(0, len(TEXTURE_OF_FILE), ())]
    row = draws.integers(0, sizes[texture, 0] - height, ())
    column = draws.integers(0, sizes[texture, 1] - width, ())
    windows = canvas.unfold(2, height, 1).unfold(3, width, 1)
    overlay = windows[texture, :, row, column]
    return to_uint8((image_weight * images + frost_weight * overlay).clamp_(0, 255))


@severities(
    cifar={"amplitude": (0.2, 0.5, 0.75, 1.0, 1.5), "decay": (3, 3, 2.5, 2, 1.75)},
    imagenet={"amplitude": (1.5, 2.0, 2.5, 2.5, 3.0), "decay": (2, 2, 1.7, 1.5, 1.4)},
)
def fog(images, draws, *, amplitude, decay):
    """Fog, (x + amplitude * plasma) * M / (M + amplitude), with M the largest value of the image.

    The plasma is colourless diamond-square noise in 0..1.
    """
    height, width = images.shape[-2:]
    intensities = images.float() / 255
    largest = intensities.amax((1, 2, 3), keepdim=True)
    side = 1 << (max(height, width) - 1).bit_length()
    plasma = _plasma(draws, side, decay, images.device)[:, None, :height, :width]
    return (intensities + amplitude * plasma) * (largest / (largest + amplitude))


def _plasma(draws, side, decay, device):
    """Diamond-square noise on a torus, (N, side, side) in 0..1, side a power of two.

    From one point on, each step halves the spacing: every new point is the mean of its four neighbours plus
    uniform(-w, w) * w, and w, 100 at first, is divided by `decay`.
    """
    points, width = torch.zeros(1, 1, 1, device=device), 100.0
    while points.shape[-1] < side:
        cells = points.shape[-2:]
        along_rows = points + points.roll(-1, 2)
        centres = (along_rows + along_rows.roll(-1, 1)) / 4 + width * draws.uniform(-width, width, cells)
        on_rows = (along_rows + centres + centres.roll(1, 1)) / 4 + width * draws.uniform(-width, width, cells)
        along_columns = points + points.roll(-1, 1)
        on_columns = (along_columns + centres + centres.roll(1, 2)) / 4 + width * draws.uniform(-width, width, cells)
        even_rows = torch.stack((points.expand_as(on_rows), on_rows), -1).flatten(2)
        odd_rows = torch.stack((on_columns, centres), -1).flatten(2)
        points, width = torch.stack((even_rows, odd_rows), 2).flatten(1, 2), width / decay
    points = points - points.amin((1, 2), keepdim=True)
    return points / points.amax((1, 2), keepdim=True)


WATER = (175, 238, 238)
MUD = (63, 42, 20)


@severities(
    cifar={
        "loc": (0.62, 0.65, 0.65, 0.65, 0.65),
        "scale": (0.1, 0.1, 0.3, 0.1, 0.1),
        "sigma": (0.7, 0.8, 1.0, 0.7, 0.5),
        "threshold": (0.7, 0.7, 0.69, 0.69, 0.68),
        "water_opacity": (0.5, 0.5, 0.5, None, None),
        "mud_sigma": (None, None, None, 0.6, 0.6),
    },
    imagenet={
        "loc": (0.65, 0.65, 0.65, 0.65, 0.67),
        "scale": (0.3, 0.3, 0.3, 0.3, 0.4),
        "sigma": (4, 3, 2, 1, 1),
        "threshold": (0.69, 0.68, 0.68, 0.65, 0.65),
        "water_opacity": (0.6, 0.6, 0.5, None, None),
        "mud_sigma": (None, None, None, 1.5, 1.5),
    },
)
def spatter(images, draws, *, loc, scale, sigma, threshold, water_opacity, mud_sigma):
    """Drops on the lens, blurred normal noise above a threshold: of water (severities 1-3) or mud (4, 5).

    Water adds its colour, as strong as the blob and its light (`lit_water`); mud replaces the image where it is opaque.
    """
    layer = gaussian_filter(255 * draws.normal(loc, scale, images.shape[2:]).double(), sigma)
    if mud_sigma is None:
        # Blobs brighter than white wrap around, as in the original's conversion to 8 bits: one pixel in 50,000 or so.
        blobs = to_uint8(torch.nn.functional.threshold(layer, math.nextafter(255 * threshold, 0), 0))
        water = lit_water(blobs).mul_(water_opacity)[:, None] * _colour(WATER, images.device)
        return water.add_(images.float().div_(255))
    mask = gaussian_filter((layer > 255 * threshold).double(), mud_sigma).float()
    mask = torch.where(mask < 0.8, 0, mask)[:, None]
    return images.float() / 255 * (1 - mask) + mask * _colour(MUD, images.device)


def _colour(rgb, device):
    return torch.tensor(rgb, dtype=torch.float32, device=device)[:, None, None] / 255
