"""A full-precision model in, a quantized one out; and the proof that it still is quantized."""

import copy
import functools
from collections.abc import Collection, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qreg_utils.quantizers import QUANTIZERS, ActivationQuantizer, Quantizer, WeightQuantizer

BITS = range(2, 9)


class QuantizationError(ValueError):
    """A model cannot be quantized as asked, or is not quantized where it must be."""


class QuantizedLayer:
    """What the quantized layers share. ``weight`` is the latent, full-precision weight that the optimizer updates."""

    weight_quantizer: WeightQuantizer
    activation_quantizer: ActivationQuantizer | None

    def quantized_weight(self) -> Tensor:
        """The weight that the layer computes with: same shape as ``weight``, at most 2^bits values (per
        channel, where the quantizer has a step for each)."""
        return self.weight_quantizer(self.weight)

    def quantized_input(self, x: Tensor) -> Tensor:
        """``x`` as the layer computes with it. Rounding is done in the weights' precision, under autocast too."""
        return x if self.activation_quantizer is None else self.activation_quantizer(x.to(self.weight.dtype))


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.quantized_input(x), self.quantized_weight(), self.bias)


class QuantizedLinear(QuantizedLayer, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.quantized_input(x), self.quantized_weight(), self.bias)


def quantize_model(
    model: nn.Module,
    method: str = "lsq",
    weight_bits: int = 4,
    activation_bits: int | None = 4,
    first_last_bits: int = 8,
    *,
    last: Collection[str] = (),
    skip: Collection[str] = (),
    offset: bool = False,
) -> nn.Module:
    """Return a copy of ``model`` in which every Conv2d and Linear is quantized.

    ``method`` is "lsq", "pact", "dorefa" or a registered one; widths are 2..8 bits; ``activation_bits=None`` quantizes
    weights only. The first and the last layer (in the order of ``model.modules()``) get ``first_last_bits``, as is
    usual in the papers; ``last`` names the layers that count as last where there are several, as in a detection head.
    Layers named in ``skip`` stay as they are: for layers that hold constants instead of learned weights. With
    ``offset`` (LSQ only) activations get a learned offset, for networks whose activations have a short negative side,
    such as SiLU. Activation quantizers must see one batch before use: ``calibrate(model, images)``. Raises
    QuantizationError for an unknown method, another width, an offset with another method, a name in ``last`` or
    ``skip`` that is no Conv2d or Linear, or a model with nothing (left) to quantize.
    """
    if method not in QUANTIZERS:
        raise QuantizationError(f"method {method!r} is unknown; choose from {', '.join(QUANTIZERS)}")
    for name, bits in [("weight_bits", weight_bits), ("first_last_bits", first_last_bits)]:
        _check_bits(name, bits)
    if activation_bits is not None:
        _check_bits("activation_bits", activation_bits)
    if offset and method != "lsq":
        raise QuantizationError(f"offset is for lsq; {method} has none")
    if any(quantized_layers(model)):
        raise QuantizationError("the model is quantized already")

    model = copy.deepcopy(model)
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for name in (*last, *skip):
        if name not in layers:
            raise QuantizationError(f"layer {name!r} is no Conv2d or Linear of the model")
    names = [name for name in layers if name not in skip]
    if not names:
        raise QuantizationError("the model has no Conv2d or Linear to quantize")
    for name in names:
        outer = name in (names[0], *(last or names[-1:]))
        w_bits = first_last_bits if outer else weight_bits
        a_bits = None if activation_bits is None else first_last_bits if outer else activation_bits
        quantized = _quantize_layer(model.get_submodule(name), method, w_bits, a_bits, offset)
        if name:
            model.set_submodule(name, quantized)
        else:
            model = quantized
    return model


def _check_bits(name: str, bits: int) -> None:
    if isinstance(bits, bool) or bits not in BITS:
        raise QuantizationError(f"{name}={bits!r} is not allowed; choose from {BITS[0]}..{BITS[-1]}")


def _quantize_layer(
    layer: nn.Module, method: str, weight_bits: int, activation_bits: int | None, offset: bool
) -> QuantizedLayer:
    if isinstance(layer, nn.Conv2d):
        quantized = QuantizedConv2d(*_geometry(layer), device="meta")
    else:
        quantized = QuantizedLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    quantized.weight, quantized.bias = layer.weight, layer.bias
    make_weight_quantizer, make_activation_quantizer = QUANTIZERS[method]
    quantized.weight_quantizer = make_weight_quantizer(weight_bits, layer.weight)
    quantized.activation_quantizer = None
    if activation_bits is not None:
        options = {"offset": True} if offset else {}
        quantized.activation_quantizer = make_activation_quantizer(activation_bits, **options)
    return quantized.to(layer.weight.device).train(layer.training)


def _geometry(layer: nn.Conv2d) -> tuple:
    """The positional arguments of Conv2d that make another one like ``layer``."""
    sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return (*sizes, layer.groups, layer.bias is not None, layer.padding_mode)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Every quantized layer with its name, in the order of ``model.modules()``."""
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, QuantizedLayer))


@torch.no_grad()
def without_rounding(model: nn.Module, weights: Literal["unrounded", "quantized"] = "unrounded") -> nn.Module:
    """A copy of ``model`` in evaluation mode that rounds nothing: differentiable, in plain Conv2d and Linear layers.

    Activations are clipped where their quantizers clip. Weights are "unrounded" (for LSQ the latent weights; DoReFa's
    and PACT's are squashed and normalised), or "quantized", the levels themselves as constants.
    Of the first, rounding the weights is the perturbation that the noise theory speaks of. Layer names stay the same.
    A full-precision model gives a plain copy.
    """
    if weights not in ("unrounded", "quantized"):
        raise ValueError(f"weights={weights!r} is not allowed; choose from unrounded, quantized")
    model = copy.deepcopy(model).eval()
    for name, layer in list(quantized_layers(model)):
        plain = _plain_layer(layer)
        unrounded = layer.weight_quantizer.unrounded(layer.weight)
        weight = unrounded if weights == "unrounded" else layer.quantized_weight()
        plain.weight, plain.bias = nn.Parameter(weight.detach().clone()), layer.bias
        if layer.activation_quantizer is not None:
            low, high = layer.activation_quantizer.limits()
            plain.register_forward_pre_hook(functools.partial(_clip_input, low=float(low), high=float(high)))
        if name:
            model.set_submodule(name, plain)
        else:
            model = plain
    return model.eval()


def _plain_layer(layer: QuantizedLayer) -> nn.Conv2d | nn.Linear:
    """A full-precision layer of the same geometry; its weight and bias are still to be set."""
    if isinstance(layer, nn.Conv2d):
        return nn.Conv2d(*_geometry(layer), device="meta")
    return nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")


def _clip_input(layer: nn.Module, inputs: tuple[Tensor], low: float, high: float) -> tuple[Tensor]:
    return (inputs[0].clamp(low, high),)


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor) -> None:
    """Set sign and scale of every activation quantizer from one batch; call it before the optimizer is made.

    ``images`` is a batch as the model expects it. Layers are set in the order in which they run, each on what the
    quantized layers before it produce. Running statistics (batch norm) and the training mode are left as they were.
    """

    def calibrate_quantizer(quantizer: ActivationQuantizer, inputs: tuple[Tensor]) -> None:
        quantizer.calibrate(inputs[0])

    quantizers = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
    if not quantizers:  # full precision, or weights only
        return
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "activation_quantizer." not in name}
    training = model.training
    hooks = [quantizer.register_forward_pre_hook(calibrate_quantizer) for quantizer in quantizers]
    try:
        model.train()(images)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
        for name, buffer in model.named_buffers():
            if name in before:
                buffer.copy_(before[name])


def assert_quantized(model: nn.Module, *, skip: Collection[str] = ()) -> None:
    """Raise QuantizationError unless every Conv2d and Linear computes with at most 2^bits different weights.

    ``skip`` names the layers that ``quantize_model`` was told to skip.
    """
    if not any(quantized_layers(model)):
        raise QuantizationError("the model has no quantized layer")
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and not isinstance(layer, QuantizedLayer) and name not in skip:
            raise QuantizationError(f"layer {name} ({type(layer).__name__}) is not quantized")
    for name, layer in quantized_layers(model):
        bits, per_channel = layer.weight_quantizer.bits, getattr(layer.weight_quantizer, "per_channel", False)
        values = count_values(layer.quantized_weight(), per_channel)
        if values > 2**bits:
            channel = " in one channel" if per_channel else ""
            raise QuantizationError(
                f"layer {name} computes with {values} weights{channel}; {bits} bits allow {2**bits}"
            )


def count_values(weight: Tensor, per_channel: bool) -> int:
    """How many different values a weight has; ``per_channel`` the most that any one channel has."""
    parts = weight if per_channel else [weight]
    return max(part.unique().numel() for part in parts)


def penalised_scales(model: nn.Module) -> list[nn.Parameter]:
    """The learned scales that have an L2 penalty of their own: PACT's alphas."""
    return [s for module in model.modules() if isinstance(module, Quantizer) for s in module.penalised_scales()]


def alpha_penalty(model: nn.Module) -> Tensor | float:
    """Sum of alpha^2 over PACT's clipping levels (0.0 without any): the L2 term of the PACT paper's section 3.1."""
    return sum((alpha.square() for alpha in penalised_scales(model)), start=0.0)


def learned_scales(model: nn.Module) -> list[nn.Parameter]:
    """LSQ's steps and offsets, and PACT's alphas."""
    return [p for module in model.modules() if isinstance(module, Quantizer) for p in module.parameters()]


@torch.no_grad()
def limit_scale_gradients(scales: list[nn.Parameter], ratio: float = 0.1) -> None:
    """Clip each scale's gradient to ``ratio`` times its magnitude; call it between backward and the optimizer's step.

    Adaptive gradient clipping (Brock et al. 2021, arXiv 2102.06171). The papers start from trained networks; from
    random weights a single large gradient can carry a small step through zero and leave it 50 times too large. An
    offset that is 0, as that of a network's input may be, stays 0.
    """
    if not scales:
        return
    gradients = [scale.grad for scale in scales]  # all at once: a loop of small operations would stall a GPU
    limits = torch._foreach_mul(torch._foreach_abs(scales), ratio)
    torch._foreach_minimum_(gradients, limits)
    torch._foreach_maximum_(gradients, torch._foreach_neg(limits))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer groups: weight decay for the network's parameters, none for steps and alphas."""
    scales = learned_scales(model)
    spared = {id(p) for p in scales}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in spared], "weight_decay": weight_decay},
        {"params": scales, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
