"""YOLOv5n from ultralytics' own definition, quantized, and guarded against what would silently undo that."""

from collections.abc import Callable

import torch
from torch import nn
from ultralytics.nn.modules import DFL, Conv
from ultralytics.nn.tasks import DetectionModel

from qreg_utils.quantize import QuantizationError, assert_quantized, quantize_model, quantized_layers


class YOLOv5n(DetectionModel):
    """ultralytics' YOLOv5n, from scratch: the backbone and neck of YOLOv5 v6 with today's anchor-free head.

    The paper (July 2022) can only have had the anchor-based head of that time.
    """

    def fuse(self, verbose: bool = True, imgsz: int = 640) -> "YOLOv5n":
        """Leave the batch norms where they are.

        ultralytics folds them into the convolutions, in place, before it validates or predicts. A learned step would
        then round other weights than those it was learned for: still 2^bits values, but not the network's.
        """
        return self


# model -> a detector for a number of classes
BUILDERS: dict[str, Callable[[int], DetectionModel]] = {
    "yolov5n": lambda num_classes: YOLOv5n("yolov5n.yaml", nc=num_classes, verbose=False),
}


def build_detector(num_classes: int, *, seed: int, name: str = "yolov5n") -> DetectionModel:
    """A freshly initialised detector for images (N, 3, H, W) in [0, 1], H and W multiples of 32.

    The weights depend on the seed alone; the global random state is left as it was. No weights are downloaded.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BUILDERS[name](num_classes)


def quantize_detector(
    model: YOLOv5n, method: str, weight_bits: int, activation_bits: int | None, first_last_bits: int = 8
) -> YOLOv5n:
    """``quantize_model`` for a detector: the outputs of its head (a box and a class branch for each of three scales)
    count as last layers; the DFL layer, which holds the constants 0..15, is skipped; LSQ's activations get an offset
    (LSQ+), because SiLU is negative down to -0.28 only. PACT's and DoReFa's are signed."""
    bits = (weight_bits, activation_bits, first_last_bits)
    layers = {"last": head_outputs(model), "skip": constant_layers(model)}
    return quantize_model(model, method, *bits, **layers, offset=method == "lsq")


def head_outputs(model: YOLOv5n) -> list[str]:
    """Names of the convolutions that the detections come from."""
    head = f"model.{len(model.model) - 1}"
    return [f"{head}.{branch}.{scale}.2" for branch in ("cv2", "cv3") for scale in range(model.model[-1].nl)]


def constant_layers(model: nn.Module) -> list[str]:
    """Names of the convolutions that are a sum with constant weights (distribution focal loss, arXiv 2006.04388)."""
    return [f"{name}.conv" for name, module in model.named_modules() if isinstance(module, DFL)]


def assert_as_trained(model: nn.Module, *, quantized: bool = False) -> None:
    """Raise QuantizationError unless ``model`` has its batch norms and float32 weights and, when it is a quantized one
    (with ``quantized`` it must be), its activation quantizers are calibrated and every layer computes with at most
    2^bits different weights.

    Folded batch norms and half precision leave the number of values as it is, and change which values they are.
    """
    for name, module in model.named_modules():
        if isinstance(module, Conv) and not hasattr(module, "bn"):
            raise QuantizationError(f"the batch norm of {name} has been folded into its convolution")
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise QuantizationError(f"{name} is {parameter.dtype}, not torch.float32")
    if quantized or any(quantized_layers(model)):
        assert_quantized(model, skip=constant_layers(model))
