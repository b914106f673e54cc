"""Digital: contrast, elastic transform, pixelate, JPEG compression, and saturate."""

import math
from functools import lru_cache

import torch
from torch.nn.functional import grid_sample, pad

from qreg_utils.corruptions.linear_filters import (
    gaussian_filter,
    snap,
    to_uint8,
)
from qreg_utils.corruptions.registry import severities


@severities(
    cifar={"factor": (0.75, 0.5, 0.4, 0.3, 0.15)},
    imagenet={"factor": (0.4, 0.3, 0.2, 0.1, 0.05)},
)
def contrast(images, draws, *, factor):
    """Less contrast: mean + factor * (x - mean), with the mean of each channel of each image."""
    pixels = images.shape[2] * images.shape[3]
    mean = images.sum((2, 3), keepdim=True).double() / 255 / pixels
    return images.double().div_(255).sub_(mean).mul_(factor).add_(mean)


@severities(
    cifar={"scale": (0.3, 0.1, 1.5, 2.0, 2.5), "shift": (0.0, 0.0, 0.0, 0.1, 0.2)},
    imagenet={"scale": (0.3, 0.1, 2.0, 5.0, 20.0), "shift": (0.0, 0.0, 0.0, 0.1, 0.2)},
)
def saturate(images, draws, *, scale, shift):
    """Paler or stronger colours: the HSV saturation s becomes clip(scale * s + shift, 0, 1).

    A channel is v * (1 - s * k) with k = (v - channel) / (max - min), which the change of s leaves alone. Greys have
    hue 0, so with a shift they turn reddish.
    """
    intensities = images.double() / 255
    value = intensities.amax(1, keepdim=True)
    spread = value - intensities.amin(1, keepdim=True)
    position = (value - intensities) / spread
    grey_is_red = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64, device=images.device)[:, None, None]
    position = torch.where(spread == 0, grey_is_red, position)
    saturation = (spread / value.clamp(min=1 / 255) * scale + shift).clamp_(0, 1)
    return value * (1 - saturation * position)


@severities(
    chunks=4,
    cifar={"scale": (0.95, 0.9, 0.85, 0.75, 0.65)},
    imagenet={"scale": (0.6, 0.5, 0.4, 0.3, 0.25)},
)
def pixelate(images, draws, *, scale):
    """Shrink to int(scale * size) by block means, and enlarge again by repeating pixels.

    Shrinking is Pillow's BOX filter: the mean of whole pixels with equal weights, without fractional coverage, rounded
    to 8 bits on each axis, columns first. Columns are worked on as rows, which are contiguous, hence much faster.
    """
    boxes, shown = zip(*(_shrink_and_enlarge(size, scale, images.device) for size in images.shape[-2:]), strict=True)
    narrow = _means_of_rows(images.mT.contiguous(), *boxes[1])
    small = _means_of_rows(narrow.mT.contiguous(), *boxes[0])
    return small.gather(3, shown[1].expand(*small.shape[:3], -1)).index_select(2, shown[0])


@lru_cache(maxsize=32)
def _shrink_and_enlarge(size, scale, device):
    """`box_means` of an axis of `size` pixels shrunk to int(scale * size), and which pixel each shows afterwards."""
    small = int(size * scale)
    return [part.to(device) for part in box_means(size, small)], nearest_pixels(small, size).to(device)


def box_means(size, new_size):
    """Which of `size` pixels Pillow's BOX filter averages when it shrinks to new_size: (most taps, new_size), and how
    many, (new_size, 1).

    Those whose centre lies inside the support; as in the Pillow of CIFAR-10-C's time a centre on either end does not
    count. `size`, which is no pixel, stands for those that do not count.
    """
    ratio = size / new_size
    centres = (torch.arange(new_size, dtype=torch.float64) + 0.5) * ratio
    reach = math.ceil(ratio / 2)
    reads = centres.floor() + torch.arange(-reach, reach + 1)[:, None]
    inside = (reads + 0.5 - centres).abs() / ratio < 0.5
    counts = inside.sum(0)
    return torch.where(inside, reads.long(), size).sort(0).values[: counts.max()], counts.float()[:, None]


def _means_of_rows(levels, reads, counts):
    """uint8 levels (..., H, W), averaged over up to 128 rows as `box_means` says, and rounded: (..., new H, W)."""
    with_nothing = pad(levels, (0, 0, 0, 1)).to(torch.int16)
    first, *others = reads
    total = with_nothing.index_select(-2, first)
    for rows in others:
        total += with_nothing.index_select(-2, rows)
    return to_uint8((total / counts).add_(0.5))


def nearest_pixels(size, new_size):
    """The source of each of new_size pixels by Pillow's NEAREST filter, which adds up the position step by step.

    BOX, which CIFAR-10-C used to enlarge, reads the same pixels, save for ties that its sizes do not have.
    """
    steps = torch.full((new_size,), size / new_size, dtype=torch.float64)
    steps[0] /= 2
    return steps.cumsum(0).long()


@severities(
    cifar={
        "alpha": (0.0, 1.6, 2.56, 3.2, 3.2),
        "sigma": (0.0, 6.4, 1.92, 1.28, 0.96),
        "jitter": (2.56, 2.24, 1.92, 1.6, 0.96),
        "reach": 1,
        "relative": False,
    },
    imagenet={
        "alpha": (12.5, 16.25, 21.25, 25.0, 30.0),
        "sigma": 0.01,
        "jitter": None,
        "reach": 0.005,
        "relative": True,
    },
)
def elastic_transform(images, draws, *, alpha, sigma, jitter, reach, relative):
    """Rubber sheet: displace each pixel by alpha * Gaussian blur(uniform(-reach, reach)) in both directions.

    Bilinear. Lengths are pixels, or if `relative` shares of the height and width; the reach is one of the height for
    both directions. With a `jitter` (CIFAR) a random affine map goes before, alone where alpha is 0. Outside the frame
    the displacement follows scipy 1.2, the library of CIFAR-10-C's time, whose "reflect" border is faulty for
    fractional positions (`_fold_like_scipy_1_2`).
    """
    height, width = images.shape[-2:]
    units = (height, width) if relative else (1, 1)
    warped = images.double()
    if jitter is not None:
        corner_shifts = draws.uniform(-jitter, jitter, (3, 2))
        warped = _sample(warped, *_affine_positions(corner_shifts, height, width))
    bound = reach * units[0]
    fields = [draws.uniform(-bound, bound, (height, width)).double() for _ in range(2)]
    sigmas = tuple(sigma * unit for unit in units)
    right, down = (alpha * gaussian_filter(field, sigmas, "symmetric", truncate=3) for field in fields)
    columns = _fold_like_scipy_1_2(torch.arange(width, device=images.device) + right, width)
    rows = _fold_like_scipy_1_2(torch.arange(height, device=images.device)[:, None] + down, height)
    return to_uint8(_sample(warped, columns, rows).clamp_(0, 255))


def _affine_positions(corner_shifts, height, width):
    """Where each output pixel reads the image: columns, rows (N,H,W), rounded to 1/32 pixel as OpenCV does.

    The map takes the centre + (r, r), + (r, -r), + (-r, -r) to those points plus the shifts (N,3,2), all (x, y);
    r is a third of the shorter side.
    """
    reach = min(height, width) // 3
    centre = torch.tensor([width // 2, height // 2], dtype=torch.float64, device=corner_shifts.device)
    corners = torch.tensor([[1, 1], [1, -1], [-1, -1]], dtype=torch.float64, device=corner_shifts.device) * reach
    moved = (centre + corners).float() + corner_shifts.float()
    first, second, third = moved.double().unbind(1)
    along_x, along_y = (second - third) / (2 * reach), (first - second) / (2 * reach)
    determinant = along_x[:, :1] * along_y[:, 1:] - along_x[:, 1:] * along_y[:, :1]
    to_column = torch.cat((along_y[:, 1:], -along_y[:, :1]), 1) / determinant
    to_row = torch.cat((-along_x[:, 1:], along_x[:, :1]), 1) / determinant
    moved_origin = first - (centre + reach)[0] * along_x - (centre + reach)[1] * along_y
    x = torch.arange(width, device=corner_shifts.device)
    y = torch.arange(height, device=corner_shifts.device)[:, None]
    positions = []
    for inverse in (to_column, to_row):
        from_x, from_y = inverse[:, 0, None, None], inverse[:, 1, None, None]
        offset = -(inverse * moved_origin).sum(1)[:, None, None]
        fixed_point = torch.round((from_y * y + offset) * 1024) + torch.round(from_x * x * 1024)
        positions.append(((fixed_point + 16) / 32).floor_() / 32)
    return positions


def _fold_like_scipy_1_2(position, size):
    """scipy 1.2's map_coordinates(mode="reflect"): half-sample symmetric, but not for the part just outside.

    Positions in (-1, 0) become -position - 1, again in (-1, 0), those in (size - 1, size) stay, and then the
    interpolation reads index 1 for -1 and size - 2 for size, as grid_sample's "reflection" does. Positions must lie
    less than `size` outside.
    """
    position = torch.where(position >= size, 2 * size - 1 - position, position)
    return torch.where(position < 0, -1 - position, position)


def _sample(images, columns, rows):
    """Bilinear sampling of (N,3,H,W) at positions (N,H,W), mirrored at the centres of the border pixels."""
    height, width = images.shape[-2:]
    grid = torch.stack((columns * (2 / (width - 1)) - 1, rows * (2 / (height - 1)) - 1), -1)
    return snap(grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=True))


# The tables of the JPEG standard's Annex K, at quality 50.
LUMINANCE_STEPS = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE_STEPS = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
# Whole numbers of 2**-16, as the library has them.
RGB_TO_YCBCR = ((19595, 38470, 7471), (-11059, -21709, 32768), (32768, -27439, -5329))
YCBCR_TO_RGB = ((0, 91881), (-22554, -46802), (116130, 0))  # Cb and Cr; Y counts for all


@severities(
    cifar={"quality": (80, 65, 58, 50, 40)},
    imagenet={"quality": (25, 18, 15, 10, 7)},
)
def jpeg_compression(images, draws, *, quality):
    """JPEG at the given quality, chroma at half resolution (4:2:0), as IJG libjpeg 9 does it.

    YCbCr in 8 bits; 8x8 DCT of Y, and for Cb and Cr the low 8x8 part of a 16x16 DCT; coefficients rounded to
    multiples of the quantisation steps; inverse transforms of the same sizes, rounded to 8 bits; RGB.
    Entropy coding loses nothing and is left out. All of it is arithmetic with whole numbers, as in the library, which
    floats do exactly: float32 the colours, which have up to 24 bits, and float64 the transforms. Of Y it is the very
    same, for the 16x16 transforms the library's constants are a little different.
    """
    height, width = images.shape[-2:]
    levels = images.float()
    if height % 16 or width % 16:
        levels = pad(levels, (0, -width % 16, 0, -height % 16), mode="replicate")
    # Y less 128, Cb and Cr less 128; their halves are rounded down
    planes = _mixed(levels, RGB_TO_YCBCR, (0.5 - 128, 0.5 - 2**-16, 0.5 - 2**-16)).floor_()
    luma = _code_blocks(planes[:, :1], 8, LUMINANCE_STEPS, quality)
    chroma = _code_blocks(planes[:, 1:], 16, CHROMINANCE_STEPS, quality)
    # below 256 the sums have 24 bits at most, above it they are clipped
    decoded = _mixed(chroma, YCBCR_TO_RGB, (0.5, 0.5, 0.5)).add_(luma.add_(128)).clamp_(0, 255)
    return to_uint8(decoded[..., :height, :width])


def _mixed(planes, weights, offsets):
    """Weighted sums of planes (N, C, H, W), weights in 2**-16: not a product with a matrix, which TF32 would round."""
    mixtures = []
    for row, offset in zip(weights, offsets, strict=True):
        mixture = torch.full_like(planes[:, 0], offset)
        for plane, weight in zip(planes.unbind(1), row, strict=True):
            mixture.add_(plane, alpha=weight / 2**16)
        mixtures.append(mixture)
    return torch.stack(mixtures, 1)


def _code_blocks(planes, block, steps, quality):
    """Planes (N, C, H, W) after their blocks' low 8x8 DCT coefficients have been quantised, clipped to -128..127.

    Coefficients are in eighths, and have two fractional bits more between the two passes of a transform: columns and
    then rows of a block there, rows and then columns back.
    """
    count, channels, height, width = planes.shape
    tiles = (count, channels, height // block, block, width // block, block)
    dct = _dct_matrix(block, planes.device)
    steps = _scaled_steps(steps, quality, planes.device).mT[..., None]
    levels = planes.reshape(tiles).permute(5, 3, 0, 1, 2, 4).flatten(2).double()  # columns, rows, blocks
    narrow = _rounded(_along_columns(dct * 2**-11, levels))
    eighths = _rounded(dct * (2**-15 * (8 / block) ** 2) @ narrow)
    # a little longer than they are, so that ties are rounded away from zero
    quantised = eighths.mul_((1 + 2**-40) / 8 / steps).round_().mul_(steps)
    tall = _rounded(dct.mT * 2**-11 @ quantised)
    decoded = _rounded(_along_columns(dct.mT * 2**-18, tall)).float().clamp_(-128, 127)
    in_tiles = decoded.view(block, block, count, channels, height // block, width // block)
    return in_tiles.permute(2, 3, 4, 1, 5, 0).reshape(planes.shape)


def _along_columns(matrix, values):
    """matrix @ values along the first dimension of (n, rows, blocks)."""
    return (matrix @ values.flatten(1)).view(-1, *values.shape[1:])


def _rounded(values):
    return values.add_(0.5).floor_()


# Left halves of the rows of the library's 8-point DCT (Loeffler, Ligtenberg and Moschytz, 1989), in 2**-13: sums of
# constants that were rounded one by one. The right halves mirror them, with the other sign in odd rows.
DCT_8 = (
    (8192, 8192, 8192, 8192),
    (11363, 9633, 6437, 2260),
    (10703, 4433, -4433, -10703),
    (9633, -2259, -11362, -6436),
    (8192, -8192, -8192, 8192),
    (6437, -11362, 2261, 9633),
    (4433, -10704, 10704, -4433),
    (2260, -6436, 9633, -11363),
)


@lru_cache(maxsize=4)
def _dct_matrix(block, device):
    """(8, block): the eight lowest basis functions of the DCT on 8 or 16 points, whole numbers, the first one 2**13."""
    if block == 8:
        half = torch.tensor(DCT_8, dtype=torch.float64)
    else:
        frequency = torch.arange(8, dtype=torch.float64)[:, None]
        half = torch.cos(math.pi / block * frequency * (torch.arange(block // 2, dtype=torch.float64) + 0.5))
        half = (half * 2**13 * frequency.clamp(max=1).add(1).sqrt()).round()
    signs = torch.tensor([1, -1] * 4)[:, None]
    return torch.cat((half, half.flip(1) * signs), 1).to(device)


@lru_cache(maxsize=16)
def _scaled_steps(steps, quality, device):
    """The quantisation steps (8, 8) at a quality of 1..100: libjpeg's scaling rule."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    scaled = (torch.tensor(steps) * percent + 50) // 100
    return scaled.clamp_(1, 255).double().to(device)
