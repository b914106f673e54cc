"""Networks for small images, built by name."""

import torch
from torch import nn

from qreg_utils.models.resnet import CifarResNet

MODELS = {
    "resnet8": lambda num_classes: CifarResNet(blocks=1, num_classes=num_classes),
    "resnet20": lambda num_classes: CifarResNet(blocks=3, num_classes=num_classes),
}


def build_model(name: str, num_classes: int = 10, *, seed: int | None = None) -> nn.Module:
    """A freshly initialised network for images (N, 3, H, W), returning logits (N, num_classes).

    ``name`` is a key of MODELS. With a ``seed`` the weights depend on it alone, and the global random state is
    left as it was. Raises ValueError for an unknown name or fewer than 2 classes.
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r} is unknown; choose from {', '.join(MODELS)}")
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes} is not allowed; at least 2")
    if seed is None:
        return MODELS[name](num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name](num_classes)
