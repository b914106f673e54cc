"""The penalty that weight noise adds to the loss: predicted from gradients, and measured by adding the noise.

A network y(w) with squared-error loss L = 1/m sum_i sum_k (y_ik - t_ik)^2 over m samples and k outputs; noise d is
added to the weights of every Conv2d and Linear, independent, with mean 0 and variance sigma_l^2 in layer l. Identically

    L(w + d) - L(w)  =  1/m sum (y(w + d) - y(w))^2  +  2/m sum (y(w) - t) (y(w + d) - y(w))
                        squared shift                    residual shift

and to order sigma^2 the expectations of the two are

    penalty    = sum_l sigma_l^2 / m sum_ik ||grad_l y_ik||^2                first order: the paper's regularizer
    curvature  = sum_l sigma_l^2 / m sum_ik (y_ik - t_ik) trace_l Hess y_ik  of the same order, dropped by the paper

Within one layer a ReLU network in evaluation mode is piecewise linear in its weights: the Hessian of its logits has a
trace of 0 wherever it exists. What its kinks contribute to the residual shift, in proportion to sigma^2 as well where
the noise is small enough, no derivative at w can see; only sampling does.

Here sigma is the root mean square of the noise, not its standard deviation: E d^2 is what the expectations contain.
(For rounding the two differ little: its mean is small.) Layers are named as in the model ("conv1"), noise by its
parameter ("conv1.weight"). Models are plain ones: full precision, or ``without_rounding(model)``; they are put into
evaluation mode. Targets are numbers of the outputs' shape (m, k). Sums over samples are made in float64.

Networks with batch norm are trained with the statistics of each batch, in which noise on the weights changes what it is
normalised by; frozen statistics, as in evaluation, are another landscape, with gradients several times as large.
``with_batch_statistics`` gives the network as it is trained: its outputs are those of whole batches, and the norms of
their gradients are estimated (``estimated_gradient_norms``), for the samples of a batch are not apart any more.
"""

import copy
import math
import statistics
import warnings
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from qreg_utils.precision import ieee_float32
from qreg_utils.quantize import BITS, quantized_layers, without_rounding
from qreg_utils.theory.noise import layer_weights, perturbed, quantization_noise, rounded

EVALUATION_BATCH = 256  # samples at once where nothing is differentiated
NORM_PROBES = 16  # of gradient norms that are estimated
NO_ERROR = {"standard_error": 0.0, "residual_error": 0.0}  # of noise that is not random


@torch.no_grad()
def squared_gradient_norms(model: nn.Module, inputs: Tensor, *, chunk_size: int = 32) -> dict[str, float]:
    """1/m sum_ik ||grad_l y_ik||^2 for each layer l, over samples (m, ...) and outputs k, exactly.

    The gradient of every sample and output by itself, with respect to the layer's weights. One pass serves every sigma
    (``predicted_penalty``). ``chunk_size`` samples are differentiated at once: their gradients take chunk_size times
    the memory of the weights, their activations about as much again as in training.
    Raises ValueError for a model with no Conv2d or Linear, or with quantized layers.
    """
    weights = _weights(model)

    def of_one_sample(sample: Tensor) -> dict[str, Tensor]:
        y, pull_back = vjp(lambda w: functional_call(model, w, (sample[None],))[0], weights)
        totals = dict.fromkeys(weights, torch.zeros((), device=y.device))
        for output in torch.eye(len(y), device=y.device):  # one at a time: all at once take 10 times the memory
            for name, gradient in pull_back(output)[0].items():
                totals[name] = totals[name] + gradient.square().sum()
        return totals

    norms = vmap(of_one_sample, chunk_size=chunk_size)(inputs)
    return {_layer(name): values.double().mean().item() for name, values in norms.items()}


def with_batch_statistics(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose batch norms normalise each batch by its own mean and variance, as in training, in
    evaluation mode too. What it is measured on must come in batches as large as those of the training."""
    model = copy.deepcopy(model)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.track_running_stats = False
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    return model.eval()


def estimated_gradient_norms(
    model: nn.Module, inputs: Tensor, *, batch_size: int, probes: int, seed: int
) -> dict[str, Tensor]:
    """``squared_gradient_norms`` of a network whose outputs are those of whole batches: ``probes`` independent
    estimates for each layer, (probes,).

    With v of random signs, E ||J^T v||^2 is the sum of all squared entries of the Jacobian J, of which each row is the
    gradient of an output of a sample (Hutchinson 1989). Raises ValueError for no probes, and as
    ``squared_gradient_norms``.
    """
    _check_count("probes", probes)
    weights = layer_weights(model.eval())
    generator = torch.Generator().manual_seed(seed)
    estimates = {_layer(name): torch.zeros(probes, dtype=torch.float64) for name in weights}
    for x in inputs.split(batch_size):
        y = model(x)
        for probe in range(probes):
            signs = _random_signs(y.detach(), generator)
            gradients = torch.autograd.grad(y, list(weights.values()), signs, retain_graph=probe < probes - 1)
            for name, gradient in zip(weights, gradients, strict=True):
                estimates[_layer(name)][probe] += gradient.square().double().sum().cpu() / len(inputs)
    return estimates


@torch.no_grad()
def residual_curvature(
    model: nn.Module, inputs: Tensor, targets: Tensor, *, probes: int, seed: int, chunk_size: int = 32
) -> dict[str, Tensor]:
    """1/m sum_ik (y_ik - t_ik) trace_l Hess y_ik for each layer l: ``probes`` independent estimates, (probes,).

    Hutchinson's estimator: E v.Hv is the trace of H for v of random signs. Their mean is the estimate, their spread
    its error; one pass serves every sigma (``predicted_penalty`` takes them as it takes the norms). One layer is probed
    at a time: together, what is between the layers would be most of the error. It sees the smooth curvature alone, not
    a ReLU's kinks. Raises ValueError for no probes, and as ``squared_gradient_norms``.
    """
    _check_count("probes", probes)
    weights = _weights(model)
    generator = torch.Generator().manual_seed(seed)
    signs = [{name: _random_signs(weight, generator) for name, weight in weights.items()} for _ in range(probes)]
    estimates = {name: torch.zeros(probes, dtype=torch.float64) for name in weights}
    none = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for x, t in zip(inputs.split(chunk_size), targets.split(chunk_size), strict=True):
        residuals = _outputs_and_residuals(model, x, t)[1].to(x)  # held fixed: only y is differentiated

        def residual_times_output(w: dict[str, Tensor], x: Tensor = x, residuals: Tensor = residuals) -> Tensor:
            return (residuals * functional_call(model, w, (x,))).sum() / len(inputs)

        _, times_hessian = vjp(grad(residual_times_output), weights)
        for probe, v in enumerate(signs):
            for name in weights:
                hv = times_hessian(none | {name: v[name]})[0][name]
                estimates[name][probe] += (v[name] * hv).double().sum().cpu()
    return {_layer(name): values for name, values in estimates.items()}


@torch.no_grad()
def unperturbed_outputs(model: nn.Module, inputs: Tensor, *, batch_size: int = EVALUATION_BATCH) -> Tensor:
    """y(w) of all samples in evaluation mode, (m, k) in float64."""
    return _outputs(model.eval(), inputs, batch_size)


def predicted_penalty(norms: Mapping[str, float | Tensor], sigma: Mapping[str, float]) -> float | Tensor:
    """sum_l sigma_l^2 norms_l: the penalty, from ``squared_gradient_norms``; the curvature from ``residual_curvature``.

    ``sigma`` is that of the noise in each layer, in the weights' units. Raises KeyError for a layer without one.
    """
    return sum(sigma[layer] ** 2 * norm for layer, norm in norms.items())


def root_mean_squares(deltas: Mapping[str, Tensor]) -> dict[str, float]:
    """Each layer's sigma, as it is meant here, of noise given by the parameters' names."""
    return {_layer(name): delta.square().mean().sqrt().item() for name, delta in deltas.items()}


@torch.no_grad()
def loss_change(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    deltas: Mapping[str, Tensor],
    *,
    outputs: Tensor | None = None,
    batch_size: int = EVALUATION_BATCH,
) -> dict[str, float]:
    """What one given noise does to the loss: ``measured``, and its two parts ``squared_shift``, ``residual_shift``.

    ``outputs``, where they are known already, are ``unperturbed_outputs``.
    """
    _weights(model)
    y, residuals = _outputs_and_residuals(model, inputs, targets, outputs, batch_size)
    with perturbed(model, deltas):
        shift = _outputs(model, inputs, batch_size) - y
    return _loss_change_parts(residuals, shift, shift.square())


@torch.no_grad()
def first_order_change(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    deltas: Mapping[str, Tensor],
    *,
    outputs: Tensor | None = None,
    batch_size: int = EVALUATION_BATCH,
) -> dict[str, float]:
    """``loss_change`` with y(w + d) - y(w) replaced by its first-order term, the exact directional derivative along d.

    Where its squared shift differs from the measured one, first order fails; where it differs from the predicted
    penalty, it is the assumption of independent noise that fails.
    """
    _weights(model)
    _, residuals = _outputs_and_residuals(model, inputs, targets, outputs, batch_size)
    base = {name: model.get_parameter(name).detach() for name in deltas}
    slopes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own use of what it deprecates
        for x in inputs.split(batch_size):
            slopes.append(jvp(lambda w, x=x: functional_call(model, w, (x,)), (base,), (dict(deltas),))[1].double())
    slope = torch.cat(slopes)
    return _loss_change_parts(residuals, slope, slope.square())


@torch.no_grad()
def mean_loss_change(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    sigma: Mapping[str, float],
    *,
    draws: int,
    seed: int,
    distribution: Literal["normal", "uniform"] = "normal",
    outputs: Tensor | None = None,
    batch_size: int = EVALUATION_BATCH,
) -> dict[str, float]:
    """The mean change of the loss under random noise of ``sigma`` in each layer, measured.

    Of each draw d both d and -d are used, which cancels the term linear in d exactly. ``distribution`` is "normal" or
    "uniform"; uniform noise over one step has sigma = step / sqrt(12). Both are made of the same random numbers: with
    one seed they differ by their shape, not by luck. Returns ``measured``, its two parts ``squared_shift`` and
    ``residual_shift``, and, over the draws (NaN for one), the ``standard_error`` of the first and the
    ``residual_error`` of the last. Raises ValueError for no draws or another distribution.
    """
    _check_count("draws", draws)
    if distribution not in ("normal", "uniform"):
        raise ValueError(f"distribution={distribution!r} is not allowed; choose from normal, uniform")
    weights = _weights(model)
    generator = torch.Generator().manual_seed(seed)
    y, residuals = _outputs_and_residuals(model, inputs, targets, outputs, batch_size)
    results = []
    for _ in range(draws):
        deltas = {
            name: sigma[_layer(name)] * _random(weight, generator, distribution) for name, weight in weights.items()
        }
        shifts = []
        for sign in (1, -1):
            with perturbed(model, {name: sign * delta for name, delta in deltas.items()}):
                shifts.append(_outputs(model, inputs, batch_size) - y)
        plus, minus = shifts
        results.append(_loss_change_parts(residuals, (plus + minus) / 2, (plus.square() + minus.square()) / 2))
    means = {name: statistics.fmean(result[name] for result in results) for name in results[0]}
    errors = {"standard_error": "measured", "residual_error": "residual_shift"}
    return means | {error: _standard_error([result[name] for result in results]) for error, name in errors.items()}


def probabilities(model: nn.Module) -> nn.Module:
    """A copy of a classifier that returns probabilities (N, classes), the softmax of its logits; layer names stay.

    Its squared error against one-hot targets is the Brier score. That of logits would mean nothing: a network trained
    with cross-entropy does not aim at logits of 0 and 1.
    """
    model = copy.deepcopy(model)
    model.register_forward_hook(_softmax)
    return model


def _softmax(model: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> Tensor:
    return logits.softmax(1)


@ieee_float32()
def penalty_rows(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    seed: int,
    draws: int = 8,
    probes: int = 2,
    batch_size: int | None = None,
) -> list[dict]:
    """Predicted and measured penalty of a trained network, as tidy rows.

    With a ``batch_size`` batch norm has the statistics of each batch of so many of ``inputs``, as in training (those of
    a last, smaller batch are left out); without, those that it has collected, frozen, as in evaluation.

    A full-precision network is rounded to 8, 7, ... 2 bits (``noise.rounded``). A quantized one is taken as trained:
    its own noise around its own unrounded weights, activations clipped but not rounded; frozen statistics are taken
    again from ``inputs``: those of the training belong to the quantized weights. ``bits`` is the width that most
    of its layers have. Targets are class labels, int64 (m,), of a classifier, whose loss is then the Brier score, or
    numbers (m, k) as for a regression. Three rows for each width:

    ==================  ==========================================================================================
    bits, noise         "normal": of the same sigma (root mean square) as the quantization noise, layer by layer;
                        "uniform": over one step, sigma = step / sqrt(12); "quantization": the noise itself
    loss                before noise is added
    predicted           the penalty, of independent noise of this sigma, estimated, with its ``predicted_error``
    first_order         the squared shift to first order: of this very noise, or, for random noise, in expectation,
                        which is ``predicted``
    linear              2/m sum (y - t) grad y . d, of this very noise; 0 for random noise
    curvature           residuals times smooth curvature, of independent noise, with its ``curvature_error``; NaN with
                        a ``batch_size``, for which it is not measured
    measured            change of the loss with its ``standard_error`` (0 for the one quantization)
    squared_shift       the part of it that ``first_order`` predicts
    residual_shift      the other part, which ``linear + curvature`` predicts, with its ``residual_error``
    ==================  ==========================================================================================

    ``draws`` are mirrored pairs, the same (but for their scale) at every width. Raises ValueError for no draws or
    probes, or a model with no Conv2d or Linear.
    """
    _check_count("draws", draws)
    plain = without_rounding(model)
    if batch_size:
        inputs = inputs[: len(inputs) // batch_size * batch_size or len(inputs)]
        targets, plain = targets[: len(inputs)], with_batch_statistics(plain)
    elif any(quantized_layers(model)):  # batch norm's statistics belong to the quantized weights
        update_bn([inputs], plain)
    if not targets.is_floating_point():
        plain = probabilities(plain)
        targets = F.one_hot(targets, _outputs(plain, inputs[:2]).shape[1])
    batches = {"batch_size": batch_size or EVALUATION_BATCH}
    outputs = unperturbed_outputs(plain, inputs, **batches)
    loss = (outputs - targets).square().sum().item() / len(inputs)
    same = {"outputs": outputs, **batches}
    norms, traces = _derivatives(plain, inputs, targets, batch_size, probes, seed)
    rows = []
    for bits, quantized in _quantizations(model):
        deltas = quantization_noise(quantized)
        own = root_mean_squares(deltas)
        steps = {name: _step(layer.weight_quantizer.step_size()) for name, layer in quantized_layers(quantized)}
        over_a_step = {layer: step / math.sqrt(12) for layer, step in steps.items()}
        slope = first_order_change(plain, inputs, targets, deltas, **same)
        exact = {"first_order": slope["squared_shift"], "linear": slope["residual_shift"]} | NO_ERROR
        found = {"quantization": (own, exact | loss_change(plain, inputs, targets, deltas, **same))}
        for noise, sigma in {"normal": own, "uniform": over_a_step}.items():
            expected = {"first_order": predicted_penalty(norms, sigma).mean().item(), "linear": 0.0}
            options = {"draws": draws, "seed": seed, "distribution": noise, **same}
            found[noise] = (sigma, expected | mean_loss_change(plain, inputs, targets, sigma, **options))
        for noise, (sigma, columns) in found.items():
            penalty, curvature = predicted_penalty(norms, sigma), predicted_penalty(traces, sigma)
            predicted = {
                "predicted": penalty.mean().item(),
                "predicted_error": _standard_error(penalty.tolist()),
                "curvature": curvature.mean().item(),
                "curvature_error": _standard_error(curvature.tolist()),
            }
            rows.append({"bits": bits, "noise": noise, "loss": loss, **predicted, **columns})
    return rows


def _derivatives(
    plain: nn.Module, inputs: Tensor, targets: Tensor, batch_size: int | None, probes: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Squared gradient norms and residuals times curvature of each layer, several estimates or one: (n,)."""
    size = batch_size or EVALUATION_BATCH
    norms = estimated_gradient_norms(plain, inputs, batch_size=size, probes=NORM_PROBES, seed=seed)
    if batch_size:
        return norms, {layer: torch.full_like(norm, math.nan) for layer, norm in norms.items()}
    return norms, residual_curvature(plain, inputs, targets, probes=probes, seed=seed)


def _step(step: Tensor) -> float:
    """A layer's step; of steps for each channel the root mean square, which has the variance of all of them."""
    return step.item() if step.numel() == 1 else step.square().mean().sqrt().item()


def _quantizations(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """Bits and quantized network: a quantized network itself, or a full-precision one rounded to every width."""
    widths = [layer.weight_quantizer.bits for _, layer in quantized_layers(model)]
    if widths:
        yield statistics.mode(widths), model
    else:
        yield from ((bits, rounded(model, bits)) for bits in reversed(BITS))


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that noise is added to, by the parameters' names. Puts the model into evaluation mode."""
    return {name: weight.detach() for name, weight in layer_weights(model.eval()).items()}


def _layer(parameter: str) -> str:
    """The layer's name, of its weight's."""
    return parameter.removesuffix("weight").removesuffix(".")


def _outputs(model: nn.Module, inputs: Tensor, batch_size: int = EVALUATION_BATCH) -> Tensor:
    return torch.cat([model(x) for x in inputs.split(batch_size)]).double()


def _outputs_and_residuals(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    outputs: Tensor | None = None,
    batch_size: int = EVALUATION_BATCH,
) -> tuple[Tensor, Tensor]:
    y = _outputs(model, inputs, batch_size) if outputs is None else outputs
    if y.shape != targets.shape:  # they might broadcast
        raise ValueError(f"outputs have shape {tuple(y.shape)}, targets {tuple(targets.shape)}")
    return y, y - targets


def _loss_change_parts(residuals: Tensor, shift: Tensor, squared_shift: Tensor) -> dict[str, float]:
    """The change of the loss and its two parts, from residuals and shifts of the outputs, all (m, k)."""
    squared = squared_shift.sum().item() / len(residuals)
    residual = 2 * (residuals * shift).sum().item() / len(residuals)
    return {"measured": squared + residual, "squared_shift": squared, "residual_shift": residual}


def _standard_error(values: list[float]) -> float:
    """Of the mean of independent ``values``; NaN for one."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _random(weight: Tensor, generator: torch.Generator, distribution: str) -> Tensor:
    """Noise of variance 1 in the weight's shape, drawn on the CPU, so that every device sees the same."""
    uniform = torch.rand(weight.shape, generator=generator, dtype=torch.float64)  # in float32 it would sometimes be 0
    noise = torch.special.ndtri(uniform) if distribution == "normal" else math.sqrt(12) * (uniform - 0.5)
    return noise.to(weight)


def _random_signs(weight: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1).to(weight)


def _check_count(name: str, count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{name}={count!r} is not allowed: an integer from 1")
