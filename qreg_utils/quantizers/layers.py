"""Layers that compute with quantized weights and inputs; which layers of a model can become one, and which cannot."""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from qreg_utils.quantizers.base import ActivationQuantizer, WeightQuantizer

# what a class must not have of its own: it would be lost, or would compute with something else than quantized weights
FORWARD = ("forward", "_conv_forward", "__call__", "_call_impl")
WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag)
WEIGHTED += (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
NORMS = (nn.LayerNorm, nn.RMSNorm)  # their weights are scales, whatever their shape
PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class QuantizedLayer:
    """What the quantized layers share. ``weight`` is the latent, full-precision weight that the optimizer updates."""

    plain: type[nn.Module]  # what the layer was before
    sample_dims: int  # dimensions of an input that is not a batch
    weight_quantizer: WeightQuantizer
    activation_quantizer: ActivationQuantizer | None
    kept_weight: Tensor | None = None  # the quantized weight, while it is known not to change
    full_precision: bool = False  # whether it computes as before it was quantized, for the time being

    def quantized_weight(self) -> Tensor:
        """The weight that the layer computes with: same shape as ``weight``, at most 2^bits values (per
        channel, where the quantizer has a step for each)."""
        if self.full_precision:
            return self.weight
        return self.weight_quantizer(self.weight) if self.kept_weight is None else self.kept_weight

    def quantized_input(self, x: Tensor) -> Tensor:
        """``x`` as the layer computes with it. Rounding is done in the weights' precision, under autocast too."""
        if self.full_precision:
            return x
        if self.activation_quantizer is None:
            if not self.weight_quantizer.used:
                self.weight_quantizer.used = True
            return x
        return self.activation_quantizer(x.to(self.weight.dtype))


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    plain, sample_dims = nn.Conv2d, 3

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)


class QuantizedLinear(QuantizedLayer, nn.Linear):
    plain, sample_dims = nn.Linear, 1

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)


KINDS = (QuantizedConv2d, QuantizedLinear)


def quantize_layer(layer: nn.Module, weights: WeightQuantizer, inputs: ActivationQuantizer | None) -> None:
    """Make ``layer`` a quantized one, in place: its hooks and attributes stay, and all that refer to it have it."""
    layer.__class__ = _quantized_class(type(layer))
    layer.weight_quantizer, layer.activation_quantizer = weights, inputs
    if inputs is not None:
        inputs.sample_dims = layer.sample_dims
    for quantizer in filter(None, (weights, inputs)):
        quantizer.to(layer.weight.device, layer.weight.dtype).train(layer.training)


def make_plain(layer: QuantizedLayer) -> None:
    """The reverse of ``quantize_layer``. The weight stays what it is."""
    del layer.weight_quantizer, layer.activation_quantizer
    layer.__class__ = layer.plain


@functools.cache
def _quantized_class(plain: type[nn.Module]) -> type[QuantizedLayer]:
    """What a layer of the class ``plain`` becomes. One that is derived from Conv2d or Linear keeps its methods."""
    (quantized,) = (kind for kind in KINDS if issubclass(plain, kind.plain))
    if plain is quantized.plain:
        return quantized
    return type(f"Quantized{plain.__name__}", (quantized, plain), {"plain": plain, "__module__": plain.__module__})


def weighted_layers(model: nn.Module) -> dict[nn.Module, str]:
    """Every layer that has weights, quantized or not, with its name, in the order of ``model.modules()``."""
    parts = {
        part for module in model.modules() if isinstance(module, nn.MultiheadAttention) for part in module.children()
    }
    return {layer: name for name, layer in model.named_modules() if layer not in parts and _has_weights(layer)}


def _has_weights(layer: nn.Module) -> bool:
    """Whether a layer is one of PyTorch's that multiply by weights, or one of somebody's own that has something called
    so, which is more than a scale for each channel."""
    if isinstance(layer, WEIGHTED) or _is_lazy(layer):
        return True
    if isinstance(layer, NORMS):
        return False
    computed = layer.parametrizations if is_parametrized(layer) else ()
    own = (name for name, x in layer.named_parameters(recurse=False) if sum(size > 1 for size in x.shape) > 1)
    return any("weight" in name for name in (*computed, *own))


def _is_lazy(layer: nn.Module) -> bool:
    return any(is_lazy(x) for x in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)))


def why_not(layer: nn.Module) -> str | None:
    """Why a layer with weights cannot be quantized; None if it can."""
    if _is_lazy(layer):
        return "no weight before the model has seen a batch"
    kind = next((kind.plain for kind in KINDS if isinstance(layer, kind.plain)), None)
    if kind is None:
        return "no Conv2d or Linear"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "the weight is computed (weight norm, spectral norm, pruning, a parametrization)"
    if "forward" in vars(layer) or any(
        getattr(type(layer), name, None) is not getattr(kind, name, None) for name in FORWARD
    ):
        return "a forward of its own"
    return None if weight.is_meta else _why_not_these(weight)


def _why_not_these(weight: Tensor) -> str | None:
    if weight.dtype not in PRECISIONS:
        return f"weights of {weight.dtype}"
    if not weight.isfinite().all():
        return "weights that are not finite"
    return None if weight.any() else "weights that are all zero, from which no step follows"
