"""Noise: gaussian, shot, impulse, speckle."""

import torch

from qreg_utils.corruptions.registry import severities


@severities(
    cifar={"std": (0.04, 0.06, 0.08, 0.09, 0.10)},
    imagenet={"std": (0.08, 0.12, 0.18, 0.26, 0.38)},
)
def gaussian_noise(images, draws, *, std):
    """Normal noise on each channel value x: x + N(0, std)."""
    return images.float() / 255 + draws.normal(0, std, images.shape[1:])


@severities(
    cifar={"rate": (500, 250, 100, 75, 50)},
    imagenet={"rate": (60, 25, 12, 5, 3)},
)
def shot_noise(images, draws, *, rate):
    """Photon noise: each channel value x becomes Poisson(rate * x) / rate.

    A larger rate is less noise, and black stays black.
    """
    return draws.poisson(images, rate) / rate


@severities(
    cifar={"probability": (0.01, 0.02, 0.03, 0.05, 0.07)},
    imagenet={"probability": (0.03, 0.06, 0.09, 0.17, 0.27)},
)
def impulse_noise(images, draws, *, probability):
    """Salt and pepper: each channel value (not a whole pixel) becomes 0 or 255 with probability / 2 each."""
    replaced = draws.uniform(0, 1, images.shape[1:]) < probability
    salt = draws.coins(images.shape[1:])
    return torch.where(replaced, salt.to(torch.uint8).neg_(), images)


@severities(
    cifar={"std": (0.06, 0.10, 0.12, 0.16, 0.20)},
    imagenet={"std": (0.15, 0.20, 0.35, 0.45, 0.60)},
)
def speckle_noise(images, draws, *, std):
    """Normal noise in proportion to each channel value x: x + x * N(0, std)."""
    return images.float() / 255 * draws.normal(1, std, images.shape[1:])
