"""The 19 common image corruptions of Hendrycks & Dietterich (2019, arXiv:1903.12261), batched in PyTorch.

Constants and quirks are those of the program that made CIFAR-10-C (hendrycks/robustness, make_cifar_c.py) or, with the
constants of ImageNet-C and for images of any size, those of imagecorruptions 1.1.2 (PyPI), on the libraries of
CIFAR-10-C's time. One deliberate departure: `frost` lays synthetic textures over the image instead of photographs.
"""

from contextlib import contextmanager
from numbers import Integral

import torch

from qreg_utils.corruptions import blur, digital, noise, weather  # noqa: F401  (importing them fills the registry)
from qreg_utils.corruptions.counter_rng import CounterGenerator
from qreg_utils.corruptions.linear_filters import to_uint8
from qreg_utils.corruptions.registry import REGISTRY, SEVERITIES, register_corruption
from qreg_utils.names import FAMILIES
from qreg_utils.names import PAPER_CORRUPTIONS as CORRUPTIONS

__all__ = ["CORRUPTIONS", "FAMILIES", "corrupt", "register_corruption"]

MIN_SIDE = 32
MAX_IMAGES = 2**62  # their numbers are 64-bit integers
CHUNK_PIXELS = 64 * 32 * 32  # worked on at a time: bounds the memory, and fits the caches of a CPU core


def corrupt(images, name, severity, *, seed=0, family="cifar", first_image=0):
    """Corrupt uint8 images (N,3,H,W), H and W at least 32: returns uint8 (N,3,H,W) on the same device.

    name is one of CORRUPTIONS or a registered one, severity 1..5. family names the constants: "cifar" those of
    CIFAR-10-C, made for 32x32 pixels; "imagenet" those of ImageNet-C, as imagecorruptions applies them to photographs
    of any size. Both take any size from 32x32 on; lengths such as blur radii are in pixels and do not grow with the
    image. Image i of the result depends on the pixels of image i, name, severity, seed, family and i alone:
    corrupt(x)[:k] == corrupt(x[:k]). A large set may be corrupted piece by piece: first_image says where in it `images`
    begin, corrupt(x)[k:] == corrupt(x[k:], first_image=k). Raises TypeError or ValueError, saying what was given and
    what is allowed; floating-point images are refused.
    """
    _validate(images, name, severity, seed, family, first_image)
    corruption = REGISTRY[name]
    parameters = corruption.parameters(family, severity)
    corrupted = torch.empty_like(images, memory_format=torch.contiguous_format)
    chunk_size = max(1, corruption.chunks * CHUNK_PIXELS // (images.shape[2] * images.shape[3]))
    with _default_dtype(torch.float32):
        for start in range(0, len(images), chunk_size):
            chunk = images[start : start + chunk_size].contiguous()
            draws = CounterGenerator(name, severity, seed, first_image + start, len(chunk), images.device)
            corrupted[start : start + chunk_size] = finish(corruption.function(chunk, draws, **parameters))
    return corrupted


@contextmanager
def _default_dtype(dtype):
    """Within the block ``dtype`` is torch's default, whatever the caller has set; then the caller's is again."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def finish(result):
    """Intensities -> uint8 levels, in place: clip to 0..1, times 255, drop the fraction. uint8 passes through."""
    return result if result.dtype == torch.uint8 else to_uint8(result.clamp_(0, 1).mul_(255))


def _validate(images, name, severity, seed, family, first_image):
    if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8:
        given = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        raise TypeError(f"images must be a torch.uint8 tensor, got {given}")
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < MIN_SIDE:
        shape = tuple(images.shape)
        raise ValueError(f"images must have shape (N, 3, H, W) with H, W >= {MIN_SIDE}, got {shape}")
    if not isinstance(name, str) or name not in REGISTRY:
        raise ValueError(f"unknown corruption {name!r}; allowed: {', '.join(sorted(REGISTRY))}")
    integers = {"severity": severity, "seed": seed, "first_image": first_image}
    for argument, value in integers.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            kind = f"an int of {SEVERITIES}" if argument == "severity" else "an int"
            raise TypeError(f"{argument} must be {kind}, got {value!r}")
    if not 0 <= first_image < MAX_IMAGES:
        raise ValueError(f"first_image must be from 0 to 2**62 - 1, got {first_image}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be one of {SEVERITIES}, got {severity}")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; allowed: {', '.join(FAMILIES)}")
    if family not in REGISTRY[name].tables:
        raise ValueError(f"{name} has no constants of family {family!r}; it has {', '.join(REGISTRY[name].tables)}")
