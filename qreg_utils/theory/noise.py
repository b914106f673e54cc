"""Quantization noise: what a weight quantizer adds to the weights, layer by layer; and weights with noise added.

Noise is always the quantized minus the unrounded weight, on the quantizer's own scale. LSQ rounds the weight itself.
DoReFa and PACT round a transformed one, tanh(w) / max|tanh(w)| in [-1, 1], so theirs is taken against that: against the
raw weight most of the "noise" would be the transformation.

Whether noise is normal or uniform is judged by distances, not by tests: with the 36,864 weights of one layer every test
rejects every exact hypothesis. A Kolmogorov distance is the largest difference between two distribution functions, from
0 to 1. It estimates a property of the distribution, which does not grow with the number of weights n. Only its floor
depends on n: where the hypothesis is true it is about 0.87 / sqrt(n) on average (0.62 / sqrt(n) for the normal, whose
mean and sigma are fitted), 0.003 to 0.005 for 36,864 weights and 0.03 to 0.04 for 432.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from qreg_utils.quantize import QuantizationError, QuantizedLayer, quantize_model, quantized_layers
from qreg_utils.quantizers.base import EPSILON, ActivationQuantizer

CLIPPED_FROM = 0.501  # steps: rounding moves a weight by at most half a step, but for float32's own rounding


@torch.no_grad()
def weight_noise(model: nn.Module, shape: bool = True) -> list[dict]:
    """One row for each quantized layer, in the order of ``model.modules()``; empty for a full-precision model.

    =====================  =======================================================================================
    layer, bits, weights   its name, its width, how many weights it has
    sigma, mean            of the noise; weights' scale
    step                   between neighbouring levels, the mean over channels; weights' scale
    weight_sigma           standard deviation of the weights that are rounded
    effective_bits         log2 of how many levels there are from the smallest to the largest weight
    kurtosis               excess kurtosis of the noise: 0 if normal, -1.2 if uniform; 0 if the noise is constant
    clipped                share of weights outside the levels: moved by more than half a step
    correlation            Pearson's, of noise and weights; 0 where one of them is constant
    distance_to_normal     Kolmogorov distance to the normal of the noise's own mean and sigma
    distance_to_uniform    Kolmogorov distance to the uniform over one step around 0, what rounding in the middle of
                           many levels gives; nothing is fitted, so a wrong width or mean counts as distance
    =====================  =======================================================================================

    Distances are at least 0.5 where the noise is a constant. Without ``shape`` the last five are left out. Weights that
    are in full precision, as where activations alone are quantized, have a sigma of 0, and NaN where a step is needed.
    """
    rows = []
    for name, layer in quantized_layers(model):
        unrounded, noise, noise_in_steps = _unrounded_and_noise(layer)
        step = layer.weight_quantizer.step_size().to(noise).mean()
        statistics = {
            "sigma": _sigma(noise),
            "mean": noise.mean(),
            "step": step,
            "weight_sigma": _sigma(unrounded),
            "effective_bits": _effective_bits(unrounded + noise, step),
        }
        if shape:
            statistics |= _shape(_standardised(noise), _standardised(unrounded), noise_in_steps)
        values = torch.stack(list(statistics.values())).tolist()  # all at once: every transfer would stall a GPU
        row = {"layer": name, "bits": layer.weight_quantizer.bits, "weights": noise.numel()}
        rows.append(row | dict(zip(statistics, values, strict=True)))
    return rows


@torch.no_grad()
def input_noise(model: nn.Module, images: Tensor) -> dict[str, dict[str, float]]:
    """What the activation quantizers of a model do to the inputs of their layers, by the layer's name.

    ``images`` is a batch as the model expects it; it is run once, in the mode in which the model is.

    ====================  ======================================================================
    input_noise           standard deviation of what quantization adds, on the input's scale
    input_sigma           standard deviation of the input
    input_step            between neighbouring levels
    input_clipped         share of inputs that are moved by more than half a step
    input_effective_bits  log2 of how many levels there are from the smallest to the largest
    ====================  ======================================================================
    """
    found: dict[str, dict[str, float]] = {}

    def note(name: str, quantizer: ActivationQuantizer, inputs: tuple[Tensor], output: Tensor) -> None:
        x, step = inputs[0].float(), quantizer.step_size().float()
        noise = output - x
        values = {
            "input_noise": _sigma(noise),
            "input_sigma": _sigma(x),
            "input_step": step,
            "input_clipped": (noise.abs() > CLIPPED_FROM * step).float().mean(),
            "input_effective_bits": _effective_bits(output, step),
        }
        found[name] = dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))

    hooks = [
        layer.activation_quantizer.register_forward_hook(
            lambda quantizer, inputs, output, name=name: note(name, quantizer, inputs, output)
        )
        for name, layer in quantized_layers(model)
        if layer.activation_quantizer is not None
    ]
    try:
        if hooks:
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _effective_bits(quantized: Tensor, step: Tensor) -> Tensor:
    return ((quantized.amax() - quantized.amin()) / step + 1).log2()


@torch.no_grad()
def pooled_noise(model: nn.Module) -> dict:
    """The noise of all layers as one sample: weights, noise, kurtosis, clipped, correlation and the two distances.

    Layers differ in scale, so each is standardised first: by its own mean and sigma for kurtosis, correlation and the
    distance to the normal, by its own step for the distance to the uniform. ``noise`` is ``overall_noise``. Raises
    QuantizationError for a model with no quantized layer.
    """
    layers = []
    for _, layer in _layers_with_noise(model):
        unrounded, noise, in_steps = _unrounded_and_noise(layer)
        layers.append((_standardised(noise), _standardised(unrounded), in_steps))
    statistics = _shape(*(torch.cat(parts) for parts in zip(*layers, strict=True)))
    pooled = {"weights": sum(len(noise) for noise, _, _ in layers), "noise": overall_noise(weight_noise(model))}
    return pooled | {name: value.item() for name, value in statistics.items()}


def overall_noise(rows: list[dict]) -> float:
    """Noise relative to the weights, sigma / weight_sigma, averaged over layers by number of weights; 0 for FP32."""
    weights = sum(row["weights"] for row in rows)
    relative = (row["sigma"] / row["weight_sigma"] * row["weights"] for row in rows if row["weight_sigma"])
    return sum(relative) / weights if rows else 0.0


@torch.no_grad()
def quantization_noise(model: nn.Module) -> dict[str, Tensor]:
    """The noise itself, by the name of the weight: "conv1.weight" -> quantized - unrounded, in the weight's shape.

    It is what ``perturbed`` takes: ``without_rounding(model)`` perturbed by it computes with the rounded weights.
    Raises QuantizationError for a model with no quantized layer.
    """
    return {
        _parameter(name): layer.quantized_weight() - layer.weight_quantizer.unrounded(layer.weight)
        for name, layer in _layers_with_noise(model)
    }


@torch.no_grad()
def rounded(model: nn.Module, bits: int) -> nn.Module:
    """A copy of a full-precision ``model`` with its weights rounded to ``bits``, all layers alike; activations are not.

    The step of a layer is max|w| / 2^(bits-1): the levels cover all its weights, and one bit less doubles every step
    exactly. (There is one level less above zero than below: only weights within half a step of max|w|, on the positive
    side, are clipped.) Nothing is trained. Raises QuantizationError for a width outside 2..8, or a model that is
    quantized already or has no Conv2d or Linear.
    """
    model = quantize_model(model, "lsq", bits, None, first_last_bits=bits)
    for _, layer in quantized_layers(model):
        layer.weight_quantizer.step.copy_(layer.weight.abs().amax().clamp_min(EPSILON) / 2 ** (bits - 1))
    return model


@contextmanager
def perturbed(model: nn.Module, deltas: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block ``model`` computes with ``deltas`` added to its parameters, in place; then with the old ones.

    ``deltas`` maps names of parameters ("conv1.weight") to tensors of the same shape, on the same device. What was
    there before is put back bit for bit, also after an exception. Gradients taken in the block are those at the
    perturbed weights. Raises ValueError for a name that is no parameter, or another shape.
    """
    parameters = dict(model.named_parameters())
    for name, delta in deltas.items():
        if name not in parameters:
            raise ValueError(f"{name!r} is no parameter of the model")
        if delta.shape != parameters[name].shape:
            raise ValueError(f"{name} has shape {tuple(parameters[name].shape)}, its delta {tuple(delta.shape)}")
    if not deltas:
        yield
        return
    changed = [parameters[name] for name in deltas]
    before = [parameter.detach().clone() for parameter in changed]
    try:
        with torch.no_grad():
            torch._foreach_add_(changed, list(deltas.values()))
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(changed, before)


def layer_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of every Conv2d and Linear of a plain model by the parameters' names: what noise is added to.

    Raises ValueError for a model without such layers, or with quantized ones.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    if not layers:
        raise ValueError("the model has no Conv2d or Linear, so it has no weights to perturb")
    for name, layer in layers.items():
        if isinstance(layer, QuantizedLayer):
            raise ValueError(f"layer {name!r} rounds its weights, so it has no gradient: take without_rounding(model)")
    return {_parameter(name): layer.weight for name, layer in layers.items()}


def _parameter(layer: str) -> str:
    """The name of a layer's weight; a model that is one layer has no name."""
    return f"{layer}.weight" if layer else "weight"


def _layers_with_noise(model: nn.Module) -> list[tuple[str, QuantizedLayer]]:
    layers = list(quantized_layers(model))
    if not layers:
        raise QuantizationError("the model has no quantized layer, so it has no quantization noise")
    return layers


def _unrounded_and_noise(layer: QuantizedLayer) -> tuple[Tensor, Tensor, Tensor]:
    """The weights that are rounded, what rounding adds to them, and that in units of the step, each (weights,)."""
    unrounded = layer.weight if layer.full_precision else layer.weight_quantizer.unrounded(layer.weight)
    noise = layer.quantized_weight() - unrounded
    in_steps = noise / layer.weight_quantizer.step_size().to(noise)
    return unrounded.flatten(), noise.flatten(), in_steps.flatten()


def _sigma(x: Tensor) -> Tensor:
    """The standard deviation; exactly 0 for a constant, where rounding would leave a little."""
    return x.std(correction=0).where(x.amin() < x.amax(), 0)


def _standardised(x: Tensor) -> Tensor:
    """With mean 0 and standard deviation 1; a constant becomes 0."""
    sigma = _sigma(x)
    return (x - x.mean()) / sigma.where(sigma > 0, torch.inf)


def _shape(noise_in_sigmas: Tensor, weights_in_sigmas: Tensor, noise_in_steps: Tensor) -> dict[str, Tensor]:
    """Scalars that do not depend on the scale of the noise."""
    kurtosis = noise_in_sigmas.square().square().mean() - 3
    return {
        "kurtosis": kurtosis.where(noise_in_sigmas.any(), 0),
        "clipped": (noise_in_steps.abs() > CLIPPED_FROM).to(kurtosis).mean(),
        "correlation": (noise_in_sigmas * weights_in_sigmas).mean(),
        "distance_to_normal": kolmogorov_distance(torch.special.ndtr(noise_in_sigmas)),
        "distance_to_uniform": kolmogorov_distance((noise_in_steps + 0.5).clamp(0, 1)),
    }


def kolmogorov_distance(probabilities: Tensor) -> Tensor:
    """The largest difference between a sample's distribution function and a hypothesis F, from 0 to 1, a scalar.

    ``probabilities`` (n,) are F at the points of the sample, in any order. At each point the sample's function jumps,
    and both sides count.
    """
    if probabilities.is_cuda:
        expected = probabilities.sort().values
    else:
        expected = torch.from_numpy(np.sort(probabilities.numpy()))  # ten times as fast
    n = len(expected)
    above = torch.arange(1, n + 1, device=expected.device) / n - expected
    return torch.maximum(above.amax(), (1 / n - above).amax())
