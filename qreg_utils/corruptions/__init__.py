"""The 19 common image corruptions of Hendrycks & Dietterich (2019, arXiv:1903.12261), batched in PyTorch.

Constants and quirks are those of the program that made CIFAR-10-C (hendrycks/robustness, make_cifar_c.py) on the
libraries of its time. One deliberate departure: `frost` lays synthetic textures over the image instead of photographs.
"""

from numbers import Integral

import torch

from qreg_utils.corruptions import blur, digital, noise, weather  # noqa: F401  (importing them fills the registry)
from qreg_utils.corruptions.counter_rng import CounterGenerator
from qreg_utils.corruptions.registry import REGISTRY, SEVERITIES

__all__ = ["CORRUPTIONS", "FAMILIES", "corrupt"]

CORRUPTIONS = tuple(sorted(REGISTRY))
FAMILIES = ("cifar",)
MIN_SIDE = 32
CHUNK_PIXELS = 64 * 32 * 32  # worked on at a time: bounds the memory, and fits the caches of a CPU core


def corrupt(images, name, severity, *, seed=0, family="cifar"):
    """Corrupt uint8 images (N,3,H,W), H and W at least 32: returns uint8 (N,3,H,W) on the same device.

    name is one of CORRUPTIONS, severity 1..5, family names the constants ("cifar": those of CIFAR-10-C). Image i of
    the result depends on the pixels of image i, name, severity, seed and i alone: corrupt(x)[:k] == corrupt(x[:k]).
    Raises TypeError or ValueError, saying what was given and what is allowed.
    """
    _validate(images, name, severity, seed, family)
    parameters = REGISTRY[name].parameters(family, severity)
    corrupted = torch.empty_like(images, memory_format=torch.contiguous_format)
    chunk_size = max(1, CHUNK_PIXELS // (images.shape[2] * images.shape[3]))
    for start in range(0, len(images), chunk_size):
        chunk = images[start : start + chunk_size].contiguous()
        draws = CounterGenerator(name, severity, seed, start, len(chunk), images.device)
        corrupted[start : start + chunk_size] = finish(REGISTRY[name].function(chunk, draws, **parameters))
    return corrupted


def finish(result):
    """Intensities -> uint8 levels: clip to 0..1, times 255, drop the fraction. uint8 passes through."""
    return result if result.dtype == torch.uint8 else result.clamp(0, 1).mul_(255).to(torch.uint8)


def _validate(images, name, severity, seed, family):
    if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8:
        given = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        raise TypeError(f"images must be a torch.uint8 tensor, got {given}")
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < MIN_SIDE:
        shape = tuple(images.shape)
        raise ValueError(f"images must have shape (N, 3, H, W) with H, W >= {MIN_SIDE}, got {shape}")
    if name not in REGISTRY:
        raise ValueError(f"unknown corruption {name!r}; allowed: {', '.join(CORRUPTIONS)}")
    for argument, value in (("severity", severity), ("seed", seed)):
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"{argument} must be an int, got {value!r}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be one of {SEVERITIES}, got {severity}")
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; allowed: {', '.join(FAMILIES)}")
