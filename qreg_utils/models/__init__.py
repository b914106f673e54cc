"""Networks for small images, built by name."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from qreg_utils.models.mobilenet import MobileNetV1
from qreg_utils.models.resnet import cifar_resnet, resnet18, resnet50, small_resnet8
from qreg_utils.names import CLASSIFICATION, MODELS, Model

# model -> a network for a number of classes
BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    "resnet8": lambda num_classes: cifar_resnet(1, num_classes),
    "small_resnet8": small_resnet8,
    "resnet18": resnet18,
    "resnet20": lambda num_classes: cifar_resnet(3, num_classes),
    "resnet50": resnet50,
    "mobilenet_v1": MobileNetV1,
}


def build_model(name: str, num_classes: int = 10, *, seed: int | None = None) -> nn.Module:
    """A freshly initialised network for images (N, 3, H, W), returning logits (N, num_classes).

    ``name`` is a key of BUILDERS. With a ``seed`` the weights depend on it alone, and the global random state is
    left as it was. Raises ValueError for an unknown name, or a ``num_classes`` that is no integer from 2.
    """
    if name not in BUILDERS:
        raise ValueError(f"model {name!r} is unknown; choose from {', '.join(BUILDERS)}")
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(f"num_classes={num_classes!r} is not allowed: an integer from 2")
    if seed is None:
        return _initialised(BUILDERS[name](num_classes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _initialised(BUILDERS[name](num_classes))


def with_dropout(model: nn.Module, p: float) -> nn.Module:
    """``model``, in which each input of its last Linear layer is dropped with probability ``p`` in training.

    Source: Srivastava et al. 2014. Raises ValueError for a model without a Linear layer.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise ValueError("dropout is of the last Linear layer's inputs, and the model has none")
    if p:
        layers[-1].register_forward_pre_hook(lambda layer, inputs: (F.dropout(inputs[0], p, layer.training),))
    return model


def _initialised(model: nn.Module) -> nn.Module:
    """He normal weights (He et al. 2015, arXiv 1502.01852, eq. 10). Fan-in counts a depthwise layer's inputs right."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return model


def register_model(row: Model, build: Callable[[int], nn.Module] | None = None) -> None:
    """Make a classifier known by the name in ``row``: ``build(num_classes)`` returns it, for images (N, 3, H, W).

    Its Conv2d and Linear layers get He normal weights (``build_model``). Raises NamesError, in one line, for a piece
    that is missing, or a name that is taken.
    """
    if row.task != CLASSIFICATION.name:
        raise row.error(f"task {row.task!r} is not allowed: register_model is for {CLASSIFICATION.name}")
    if not callable(build):
        raise row.error("build is missing: a function of the number of classes that returns a network")
    MODELS.add(row)
    BUILDERS[row.name] = build
