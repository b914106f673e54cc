"""Noise: gaussian, shot, impulse, speckle."""

import torch

from qreg_utils.corruptions.registry import severities


@severities(cifar={"std": (0.04, 0.06, 0.08, 0.09, 0.10)})
def gaussian_noise(images, draws, *, std):
    """x + N(0, std), independent for each pixel and channel."""
    return images.float() / 255 + draws.normal(0, std, images.shape[1:])


@severities(cifar={"rate": (500, 250, 100, 75, 50)})
def shot_noise(images, draws, *, rate):
    """Poisson(rate * x) / rate for each channel value: a larger rate is less noise, and black stays black."""
    return draws.poisson(images, rate) / rate


@severities(cifar={"probability": (0.01, 0.02, 0.03, 0.05, 0.07)})
def impulse_noise(images, draws, *, probability):
    """Salt and pepper: a channel value (not a whole pixel) becomes 0 or 255 with probability / 2 each."""
    replaced = draws.uniform(0, 1, images.shape[1:]) < probability
    salt = draws.uniform(0, 1, images.shape[1:]) < 0.5
    return torch.where(replaced, salt.to(torch.uint8) * 255, images)


@severities(cifar={"std": (0.06, 0.10, 0.12, 0.16, 0.20)})
def speckle_noise(images, draws, *, std):
    """x + x * N(0, std), independent for each pixel and channel."""
    return images.float() / 255 * draws.normal(1, std, images.shape[1:])
