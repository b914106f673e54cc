"""A full-precision model in, a quantized one out; and the proof that it still is quantized."""

import copy
import functools
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, is_lazy

from qreg_utils.quantizers import (
    QUANTIZERS,
    ActivationQuantizer,
    FullPrecisionWeight,
    QuantizationError,
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
    Quantizer,
    WeightQuantizer,
)
from qreg_utils.quantizers.layers import make_plain, quantize_layer, weighted_layers, why_not
from qreg_utils.quantizers.watch import Watch

__all__ = [
    "BITS",
    "QuantizationError",
    "QuantizedConv2d",
    "QuantizedLayer",
    "QuantizedLinear",
    "alpha_penalty",
    "assert_quantized",
    "calibrate",
    "count_values",
    "dead_scales",
    "learned_scales",
    "limit_scale_gradients",
    "parameter_groups",
    "penalised_scales",
    "quantize_model",
    "quantized_layers",
    "start_quantizing",
    "stay_in_full_precision",
    "weights_quantized_once",
    "without_rounding",
]

BITS = range(2, 9)
BYPASSED = "the unquantized weight is read by something else"


def quantize_model(
    model: nn.Module,
    method: str = "lsq",
    weight_bits: int | None = 4,
    activation_bits: int | None = 4,
    first_last_bits: int = 8,
    *,
    last: Collection[str] = (),
    skip: Collection[str] = (),
    offset: bool = False,
) -> nn.Module:
    """Return a copy of ``model`` in which every Conv2d and Linear is quantized.

    ``method`` is "lsq", "pact", "dorefa", one of their parts, or a registered one; widths are 2..8 bits;
    ``activation_bits=None`` quantizes weights only, ``weight_bits=None`` activations only. The first and the last layer
    (in the order of ``model.modules()``) get ``first_last_bits``, as is usual in the papers; ``last`` names the layers
    that count as last where there are several, as in a detection head.
    With ``offset`` (LSQ only) activations get a learned offset, for networks whose activations have a short negative
    side, such as SiLU. Hooks and attributes of layers stay, and a layer that the model has twice is quantized once.
    Activation quantizers must see one batch before use: ``calibrate(model, images)``.

    Layers named in ``skip`` stay as they are: those that hold constants instead of learned weights, and those that
    cannot be quantized. These are layers with weights that are no Conv2d or Linear (ConvTranspose2d, Embedding,
    MultiheadAttention, ...), and Conv2d and Linear layers with a forward of their own, with a weight that is computed
    (weight_norm, pruning) or not there yet (lazy layers), or with weights that are all zero or not finite. The model is
    refused unless all of them are in ``skip``.

    Raises QuantizationError for such layers, an unknown method, another width, an offset with another method, a name in
    ``last`` or ``skip`` that is no layer with weights, or a model with nothing (left) to quantize.
    """
    _check_arguments(method, weight_bits, activation_bits, first_last_bits, offset)
    if any(quantized_layers(model)):
        raise QuantizationError("the model is quantized already")

    model = _copy(model)
    skipped, outer = _named(model, "skip", skip), _named(model, "last", last)
    layers = {layer: name for layer, name in weighted_layers(model).items() if layer not in skipped}
    _refuse({name: (layer, why_not(layer)) for layer, name in layers.items()}, "some layers cannot be quantized")
    if not layers:
        raise QuantizationError("the model has no Conv2d or Linear to quantize")
    if outer - layers.keys():
        raise QuantizationError(f"last={list(last)!r} names a layer that is not quantized")
    ordered = list(layers)
    outer = {ordered[0]} | (outer or {ordered[-1]})
    for layer in layers:
        w_bits, a_bits = (
            first_last_bits if bits is not None and layer in outer else bits for bits in (weight_bits, activation_bits)
        )
        quantize_layer(layer, *_make_quantizers(layer.weight, method, w_bits, a_bits, offset))
    dead = {name: (layer, "weights too small for a step") for layer, name in layers.items() if _has_dead_weights(layer)}
    _refuse(dead, "some layers cannot be quantized")
    return model


def _check_arguments(
    method: str, weight_bits: int | None, activation_bits: int | None, first_last_bits: int, offset: bool
) -> None:
    if method not in QUANTIZERS:
        raise QuantizationError(f"method {method!r} is unknown; choose from {', '.join(QUANTIZERS)}")
    if weight_bits is None and activation_bits is None:
        raise QuantizationError("weight_bits and activation_bits are both None: nothing to quantize")
    _check_bits("first_last_bits", first_last_bits)
    for name, bits in [("weight_bits", weight_bits), ("activation_bits", activation_bits)]:
        if bits is not None:
            _check_bits(name, bits)
    if offset and method != "lsq":
        raise QuantizationError(f"offset is for lsq; {method} has none")


def _check_bits(name: str, bits: int) -> None:
    if isinstance(bits, bool) or bits not in BITS:
        raise QuantizationError(f"{name}={bits!r} is not allowed; choose from {BITS[0]}..{BITS[-1]}")


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy, also of what torch does not copy: weights that are computed (weight_norm, pruning), of which it has
    the value, and buffers of lazy layers."""
    attributes = (value for module in model.modules() for value in vars(module).values())
    copies = {id(x): x.detach().clone() for x in attributes if isinstance(x, Tensor) and not x.is_leaf}
    lazy = (buffer for buffer in model.buffers() if is_lazy(buffer))
    copies |= {id(x): UninitializedBuffer(device=x.device, dtype=x.dtype) for x in lazy}
    return copy.deepcopy(model, copies)


def _named(model: nn.Module, argument: str, names: Collection[str]) -> set[nn.Module]:
    """The layers with weights that an argument of that name names."""
    if isinstance(names, str):
        raise QuantizationError(f"{argument}={names!r} is one string, not a collection of names: [{names!r}]")
    modules = dict(model.named_modules(remove_duplicate=False))  # a layer may have several names
    layers = weighted_layers(model)
    for name in names:
        if modules.get(name) not in layers and not isinstance(modules.get(name), nn.Linear):
            raise QuantizationError(
                f"layer {name!r} is no Conv2d or Linear, nor another layer with weights, of the model"
            )
    return {modules[name] for name in names}


def _refuse(layers: Mapping[str, tuple[nn.Module, str | None]], problem: str) -> None:
    """Raise QuantizationError if any of these layers, by their names, comes with a reason to."""
    reasons: dict[str, list[str]] = {}
    for name, (layer, reason) in layers.items():
        if reason:
            reasons.setdefault(reason, []).append(f"{name or 'the model'} ({type(layer).__name__})")
    if reasons:
        listed = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
        raise QuantizationError(f"{problem}: {listed}. What is named in skip is left in full precision")


def _has_dead_weights(layer: QuantizedLayer) -> bool:
    return not layer.weight.is_meta and layer.weight_quantizer.is_dead()


def _make_quantizers(
    weight: Tensor, method: str, weight_bits: int | None, activation_bits: int | None, offset: bool
) -> tuple[WeightQuantizer, ActivationQuantizer | None]:
    make_weight_quantizer, make_activation_quantizer = QUANTIZERS[method]
    weights, inputs = FullPrecisionWeight(), None
    if weight_bits is not None:
        weights = make_weight_quantizer(weight_bits, weight)
        weights.method = method
    if activation_bits is not None:
        inputs = make_activation_quantizer(activation_bits, **({"offset": True} if offset else {}))
        inputs.method = method
    return weights, inputs


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
    model = _copy(model).eval()
    for _, layer in list(quantized_layers(model)):
        unrounded = layer.weight_quantizer.unrounded(layer.weight)
        weight = unrounded if weights == "unrounded" else layer.quantized_weight()
        layer.weight = nn.Parameter(weight.detach().clone())
        if layer.activation_quantizer is not None:
            low, high = layer.activation_quantizer.limits()
            clip = functools.partial(_clip_input, low=float(low), high=float(high))
            layer.register_forward_pre_hook(clip, with_kwargs=True)
        make_plain(layer)
    return model


def _clip_input(layer: nn.Module, inputs: tuple, keywords: dict, low: float, high: float) -> tuple[tuple, dict]:
    (x,) = (*inputs, *keywords.values())
    return (x.clamp(low, high),), {}


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor) -> None:
    """Set sign and scale of every activation quantizer from one batch; call it before the optimizer is made.

    ``images`` is a batch as the model expects it. Layers are set in the order in which they run, each on what the
    quantized layers before it produce; a layer that runs several times on all its inputs. Running statistics (batch
    norm), the training modes and the global random state are left as they were.

    The model is run in training and in evaluation mode, and watched. Raises QuantizationError, naming the layer, where
    a quantized layer is not called, or its unquantized weight is read by anything else, as attention layers do that use
    the weight of a Linear; and where a layer's input is empty, all zero, not finite, or gives no usable scale. The
    scales are as before, then. A full-precision model is not run.
    """
    layers, quantizers = dict(quantized_layers(model)), _activation_quantizers(model)
    if not (layers or quantizers):
        return
    with _left_alone(model), _own_random_state(model), Watch(model, layers) as watch:
        with _calibrating(quantizers) as calibrated:
            model.train()(images)
        called = {n for n, layer in layers.items() if layer.activation_quantizer in (None, *calibrated)}
        if len(called) == len(layers):  # or the others would fail now
            model.eval()(images)
        rounded = {n for n, layer in layers.items() if not isinstance(layer.weight_quantizer, FullPrecisionWeight)}
        bypassed = watch.read & rounded
        for name, layer in layers.items():
            layer.weight_quantizer.bypassed = name in bypassed
        reasons = {name: None if name in called & watch.used else "never called" for name in layers}
        reasons |= dict.fromkeys(bypassed, BYPASSED)
        _refuse(
            {name: (layer, reasons[name]) for name, layer in layers.items()},
            "some layers do not compute with their quantized weights",
        )


def stay_in_full_precision(model: nn.Module) -> None:
    """Let the quantized layers of ``model`` compute with their latent weights and their inputs as they are, until
    ``start_quantizing``."""
    for _, layer in quantized_layers(model):
        layer.full_precision = True


@torch.no_grad()
def start_quantizing(model: nn.Module, images: Tensor) -> None:
    """End ``stay_in_full_precision``: scales are set anew, from the weights as they are now, and from ``images``.

    Raises QuantizationError as ``calibrate`` does.
    """
    for _, layer in quantized_layers(model):
        layer.full_precision, quantizer = False, layer.weight_quantizer
        if not isinstance(quantizer, FullPrecisionWeight):
            fresh = type(quantizer)(quantizer.bits, layer.weight)
            for name, parameter in fresh.named_parameters():
                quantizer.get_parameter(name).copy_(parameter)
    calibrate(model, images)


def _activation_quantizers(model: nn.Module) -> dict[ActivationQuantizer, str]:
    """Those of layers, and those that a model has by itself, with their names."""
    return {module: name for name, module in model.named_modules() if isinstance(module, ActivationQuantizer)}


@contextmanager
def _calibrating(quantizers: Mapping[ActivationQuantizer, str]) -> Iterator[Collection[ActivationQuantizer]]:
    """In the block every quantizer is set by its inputs, before it is used. Yields those that have been."""
    calls: dict[ActivationQuantizer, list[Tensor]] = {}

    def set_scale(quantizer: ActivationQuantizer, inputs: tuple[Tensor]) -> None:
        seen = calls.setdefault(quantizer, [])
        seen.append(inputs[0].clone())  # what comes after may change it in place
        try:
            quantizer.calibrate(inputs[0] if len(seen) == 1 else torch.cat([x.flatten() for x in seen])[:, None])
        except QuantizationError as error:
            layer = quantizers[quantizer].removesuffix("activation_quantizer").removesuffix(".")
            raise QuantizationError(f"layer {layer or 'the model'}: {error}") from None

    hooks = [quantizer.register_forward_pre_hook(set_scale) for quantizer in quantizers]
    try:
        yield calls.keys()
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """After the block each module of ``model`` is in training or evaluation mode as before."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """After the block the modes are as before, and so are the buffers, but for the activation quantizers' own; after an
    error all that is the quantizers' as well."""
    buffers = {name: x.clone() for name, x in model.named_buffers() if not is_lazy(x)}
    scales = {name: x.clone() for name, x in _scales(model).items()}

    def put_back(before: Mapping[str, Tensor]) -> None:
        now = dict(model.named_buffers()) | _scales(model)
        for name in before.keys() & now.keys():
            now[name].copy_(before[name])

    with modes_kept(model):
        try:
            yield
        except BaseException:
            put_back(scales)
            raise
        finally:
            put_back({name: buffer for name, buffer in buffers.items() if name not in scales})


def _scales(model: nn.Module) -> dict[str, Tensor]:
    """What calibration sets: the parameters and buffers of activation quantizers, by their names in the model."""
    quantizers = _activation_quantizers(model).items()
    return {
        k: x for module, name in quantizers for k, x in (*module.named_parameters(name), *module.named_buffers(name))
    }


@contextmanager
def _own_random_state(model: nn.Module) -> Iterator[None]:
    """What is drawn in the block, by dropout, is not missing from the global generators after it."""
    gpus = {parameter.device.index for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(sorted(gpus)):
        yield


def assert_quantized(model: nn.Module, *, skip: Collection[str] = ()) -> None:
    """Raise QuantizationError unless every layer with weights computes with at most 2^bits different weights where they
    are quantized, and with at most 2^bits different inputs where its activations are.

    That a layer computes at all, and nothing else with its weight, is what ``calibrate`` has made sure of; where only
    weights are quantized, running the model will do. ``skip`` names the layers that ``quantize_model`` had to skip.
    """
    if not any(quantized_layers(model)):
        raise QuantizationError("the model has no quantized layer")
    skipped = _named(model, "skip", skip)
    for layer, name in weighted_layers(model).items():
        if not isinstance(layer, QuantizedLayer) and layer not in skipped:
            raise QuantizationError(f"layer {name} ({type(layer).__name__}) is not quantized")
    for name, layer in quantized_layers(model):
        _assert_computes_quantized(name, layer)


@torch.no_grad()
def _assert_computes_quantized(name: str, layer: QuantizedLayer) -> None:
    weights, inputs = layer.weight_quantizer, layer.activation_quantizer
    if "forward" in vars(layer):
        raise QuantizationError(f"layer {name} has been given another forward")
    if not (isinstance(weights, WeightQuantizer) and isinstance(inputs, ActivationQuantizer | None)):
        raise QuantizationError(f"layer {name} has lost a quantizer")
    if weights.bypassed:
        raise QuantizationError(f"layer {name}: {BYPASSED}")
    if inputs is None and not weights.used:
        raise QuantizationError(f"layer {name} has computed nothing so far: calibrate(model, images) runs the model")
    if inputs is not None and inputs.signed is None:
        raise QuantizationError(f"the activation quantizer of {name} is not calibrated")
    counts = {}
    if not isinstance(weights, FullPrecisionWeight):
        counts["weights"] = (weights, count_values(layer.quantized_weight(), weights.per_channel))
    if inputs is not None:
        counts["inputs"] = (inputs, count_values(inputs(_every_level(inputs)), False))
    for what, (quantizer, values) in counts.items():
        if values > 2**quantizer.bits:
            channel = " in one channel" if getattr(quantizer, "per_channel", False) else ""
            raise QuantizationError(
                f"layer {name} computes with {values} {what}{channel}; {quantizer.bits} bits allow {2**quantizer.bits}"
            )


def _every_level(quantizer: ActivationQuantizer) -> Tensor:
    """Inputs (4 * 2^bits, 1) from below the lowest level to above the highest."""
    low, high = (limit.item() for limit in quantizer.limits())
    span, like = high - low, quantizer.step_size()
    places = torch.linspace(low - span / 2, high + span / 2, 4 * 2**quantizer.bits, dtype=torch.float64)
    return places[:, None].to(like)


@contextmanager
@torch.no_grad()
def weights_quantized_once(model: nn.Module) -> Iterator[None]:
    """In the block each layer's weight is quantized once, not in every forward pass; it must not be changed there.

    For evaluation: no gradient reaches the weights. ``assert_quantized`` looks at what is kept, which is what the
    layers compute with.
    """
    layers = [layer for _, layer in quantized_layers(model) if layer.kept_weight is None]
    for layer in layers:
        layer.kept_weight = layer.quantized_weight().detach()
    try:
        yield
    finally:
        for layer in layers:
            layer.kept_weight = None


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
    offset that is 0, as that of a network's input may be, stays 0. A scale without a gradient (frozen, or of a layer
    that was not used) is left alone.

    A GradScaler multiplies gradients by a large number, and these would all be clipped; so limit them after
    ``unscale_``::

        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        limit_scale_gradients(learned_scales(model))
        scaler.step(optimizer)
        scaler.update()
    """
    scales = [scale for scale in scales if scale.grad is not None]
    if not scales:
        return
    gradients = [scale.grad for scale in scales]  # all at once: a loop of small operations would stall a GPU
    limits = torch._foreach_mul(torch._foreach_abs(scales), ratio)
    torch._foreach_minimum_(gradients, limits)
    torch._foreach_maximum_(gradients, torch._foreach_neg(limits))


def dead_scales(model: nn.Module) -> list[str]:
    """The quantizers, by name, whose scale has died in training: its step is at its floor, or not finite. Everything
    is clipped then, and as gradients are limited to a part of the scale it stays so."""
    quantizers = ((name, module) for name, module in model.named_modules() if isinstance(module, Quantizer))
    return [name for name, quantizer in quantizers if quantizer.is_dead()]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer groups: weight decay for the network's parameters, none for steps and alphas."""
    scales = learned_scales(model)
    spared = {id(p) for p in scales}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in spared], "weight_decay": weight_decay},
        {"params": scales, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
