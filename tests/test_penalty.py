"""The additive-noise penalty: closed forms, brute force, and what its parts add up to."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.optim.swa_utils import update_bn

from qreg_utils.models import build_model
from qreg_utils.quantize import QuantizedLayer, calibrate, quantize_model, without_rounding
from qreg_utils.theory.noise import perturbed, quantization_noise
from qreg_utils.theory.penalty import (
    NORM_PROBES,
    estimated_gradient_norms,
    first_order_change,
    loss_change,
    mean_loss_change,
    penalty_rows,
    predicted_penalty,
    probabilities,
    residual_curvature,
    root_mean_squares,
    squared_gradient_norms,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(make, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def small_network(activation=nn.Tanh):
    return seeded(lambda: nn.Sequential(nn.Linear(3, 6), activation(), nn.Linear(6, 2)))


def convolutions():
    """Every geometry that a network here has: stride, groups, dilation, padding, batch norm, a skip of nothing."""
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.SiLU(),
            nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 1, groups=2),
            nn.Flatten(),
            nn.Linear(6 * 16, 3),
        )
    )
    model[1].running_mean.copy_(random(4))
    model[1].running_var.copy_(random(4).square() + 0.5)
    return model


def mean_squared_error(model, inputs, targets):
    with torch.no_grad():
        return (model(inputs).double() - targets).square().sum().item() / len(inputs)


# --- the prediction ---------------------------------------------------------------------------------------------------


def test_norms_of_a_linear_model_in_closed_form():
    inputs = random(20, 7)
    norms = squared_gradient_norms(nn.Linear(7, 3), inputs)
    assert norms == {"": pytest.approx(3 * inputs.square().sum(1).mean().item())}


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
@pytest.mark.parametrize("quantized", [False, True])
def test_norms_are_those_of_a_loop_over_samples_and_outputs(chunk_size, quantized):
    model, inputs = convolutions(), random(6, 3, 8, 8)
    if quantized:
        model = quantize_model(model, "lsq", 3, 3)
        calibrate(model, inputs)
        model = without_rounding(model)
    norms = squared_gradient_norms(model, inputs, chunk_size=chunk_size)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    expected = dict.fromkeys(layers, 0.0)
    for sample in inputs:
        for output in model.eval()(sample[None])[0]:
            gradients = torch.autograd.grad(output, [layer.weight for layer in layers.values()], retain_graph=True)
            for name, gradient in zip(layers, gradients, strict=True):
                expected[name] += gradient.double().square().sum().item() / len(inputs)
    assert len(norms) == 4
    assert norms == pytest.approx(expected, rel=1e-5)


def test_the_prediction_weights_every_layer_by_its_own_noise():
    assert predicted_penalty({"a": 3.0, "b": 5.0}, {"a": 0.1, "b": 2.0}) == pytest.approx(0.03 + 20)
    with pytest.raises(KeyError):
        predicted_penalty({"a": 3.0, "b": 5.0}, {"a": 0.1})


def test_sigma_is_the_root_mean_square():
    assert root_mean_squares({"fc.weight": torch.tensor([[1.0, 7.0]]), "weight": torch.ones(2)}) == {"fc": 5, "": 1}


# --- measured against predicted ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_on_a_linear_model_measured_is_predicted_to_sampling_error(distribution):
    model, inputs, targets = seeded(lambda: nn.Linear(10, 1)), random(50, 10), random(50, 1, seed=1)
    sigma = {"": 0.3}
    predicted = predicted_penalty(squared_gradient_norms(model, inputs), sigma)
    found = mean_loss_change(model, inputs, targets, sigma, draws=10_000, seed=0, distribution=distribution)
    assert found["measured"] == pytest.approx(predicted, rel=0.02)
    assert abs(found["measured"] - predicted) < 4 * found["standard_error"]
    assert found["standard_error"] < 0.01 * predicted
    assert found["squared_shift"] == pytest.approx(found["measured"])
    assert found["residual_shift"] == pytest.approx(0, abs=1e-6 * predicted)


def test_on_a_curved_model_both_parts_are_predicted():
    model, inputs = small_network().double(), random(30, 3).double() + 1
    targets = model(inputs).detach() + 5
    sigma = {"0": 0.02, "2": 0.01}
    penalty = predicted_penalty(squared_gradient_norms(model, inputs), sigma)
    traces = residual_curvature(model, inputs, targets, probes=1_500, seed=0)
    curvature = predicted_penalty(traces, sigma)
    found = mean_loss_change(model, inputs, targets, sigma, draws=1_500, seed=1)
    assert found["squared_shift"] == pytest.approx(penalty, rel=0.05)
    assert abs(curvature.mean()) > penalty / 2, "the test needs a curvature that matters"
    error = math.hypot(found["residual_error"], curvature.std().item() / math.sqrt(1_500))
    assert error < 0.2 * abs(curvature.mean())
    assert abs(found["residual_shift"] - curvature.mean()) < 4 * error


def test_the_curvature_is_the_trace_of_each_layers_hessian():
    model, inputs, targets = small_network().double(), random(8, 3).double(), random(8, 2, seed=1).double() + 2
    residuals = (model(inputs) - targets).detach()
    found = residual_curvature(model, inputs, targets, probes=2_000, seed=0, chunk_size=3)
    for layer in ("0", "2"):
        weight = model.get_submodule(layer).weight.detach()
        name = f"{layer}.weight"
        exact = jacrev(
            jacrev(lambda w, name=name: (residuals * functional_call(model, {name: w}, (inputs,))).sum() / 8)
        )
        trace = exact(weight).reshape(weight.numel(), weight.numel()).trace().item()
        error = found[layer].std().item() / math.sqrt(2_000)
        assert found[layer].mean().item() == pytest.approx(trace, abs=4 * error + 1e-12)
        assert error < 0.05
    assert abs(found["0"].mean()) > 0.3


def test_a_relu_has_no_curvature_that_derivatives_see_but_kinks_that_sampling_does():
    model, inputs = small_network(nn.ReLU).double(), random(2_000, 3).double()
    targets = model(inputs).detach() - 1  # residuals of 1: the mean of a convex function grows under noise
    with torch.no_grad():
        model[2].weight.abs_()
    traces = residual_curvature(model, inputs, targets, probes=5, seed=0, chunk_size=2_000)["0"]
    assert (traces == 0).all()
    found = mean_loss_change(model, inputs, targets, {"0": 0.1, "2": 0.0}, draws=50, seed=0)
    assert found["residual_shift"] > 5 * found["residual_error"] > 0


def test_the_two_parts_add_up_to_the_change_of_the_loss():
    model, inputs, targets = convolutions().eval(), random(6, 3, 8, 8), random(6, 3, seed=1)
    deltas = {"0.weight": 0.3 * random(4, 3, 3, 3, seed=2), "7.weight": 0.1 * random(3, 96, seed=3)}
    before = mean_squared_error(model, inputs, targets)
    found = loss_change(model, inputs, targets, deltas)
    assert found["measured"] == pytest.approx(found["squared_shift"] + found["residual_shift"])
    with perturbed(model, deltas):
        assert found["measured"] == pytest.approx(mean_squared_error(model, inputs, targets) - before, rel=1e-4)
    assert mean_squared_error(model, inputs, targets) == before


def test_first_order_is_what_small_noise_does():
    model, inputs, targets = convolutions().double(), random(6, 3, 8, 8).double(), random(6, 3, seed=1)
    deltas = {"0.weight": random(4, 3, 3, 3, seed=2).double(), "5.bias": random(6, seed=3).double()}
    small = {name: 1e-4 * delta for name, delta in deltas.items()}
    first_order, measured = (f(model, inputs, targets, small) for f in (first_order_change, loss_change))
    for name in ("squared_shift", "residual_shift"):
        assert first_order[name] == pytest.approx(measured[name], rel=0.01)
    twice = first_order_change(model, inputs, targets, {name: 2 * delta for name, delta in small.items()})
    assert twice["residual_shift"] == pytest.approx(2 * first_order["residual_shift"])
    assert twice["squared_shift"] == pytest.approx(4 * first_order["squared_shift"])


def test_first_order_says_nothing_on_stderr(recwarn):
    first_order_change(small_network(), random(4, 3), random(4, 2), {"0.weight": torch.ones(6, 3)})
    assert not recwarn.list


def test_mirrored_draws_leave_no_linear_term():
    """On a linear model with large residuals one draw alone would be far off."""
    model, inputs = seeded(lambda: nn.Linear(10, 1)).double(), random(50, 10).double()
    targets = torch.full((50, 1), 1e3)
    found = mean_loss_change(model, inputs, targets, {"": 1e-3}, draws=100, seed=0)
    predicted = predicted_penalty(squared_gradient_norms(model, inputs), {"": 1e-3})
    assert found["squared_shift"] == pytest.approx(predicted, rel=0.2)
    assert abs(found["residual_shift"]) < 0.1 * predicted


def test_the_seed_decides_the_draws():
    arguments = (small_network(), random(5, 3), random(5, 2, seed=1), {"0": 0.1, "2": 0.1})
    first, again, other = (mean_loss_change(*arguments, draws=3, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert math.isnan(mean_loss_change(*arguments, draws=1, seed=0)["standard_error"])


# --- trained networks -------------------------------------------------------------------------------------------------

NOISES = ["quantization", "normal", "uniform"]


def of(rows, noise, name):
    return [row[name] for row in rows if row["noise"] == noise]


def test_probabilities_are_those_of_the_classifier_and_its_layers_keep_their_names():
    model, images = build_model("resnet8", seed=0).eval(), random(2, 3, 32, 32)
    wrapped = probabilities(model)
    assert list(wrapped.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(wrapped(images), model(images).softmax(1))
    assert model(images).sum(1).sub(1).abs().max() > 0.1, "the model itself is left as it was"


def test_rows_of_a_full_precision_classifier(tiny):
    model = build_model("resnet8", seed=0)
    images, labels = tiny.normalise(tiny.test_images[:12]), tiny.test_labels[:12]
    rows = penalty_rows(model, images, labels, seed=0, draws=2, probes=2)
    assert [(row["bits"], row["noise"]) for row in rows] == [(bits, n) for bits in range(8, 1, -1) for n in NOISES]
    for row in rows:
        assert all(math.isfinite(value) for name, value in row.items() if name != "noise")
        assert row["measured"] == pytest.approx(row["squared_shift"] + row["residual_shift"])
    brier = mean_squared_error(probabilities(model.eval()), images, nn.functional.one_hot(labels, 10))
    assert [row["loss"] for row in rows] == pytest.approx([brier] * 21, rel=1e-5)
    uniform = of(rows, "uniform", "predicted")
    assert [low / high for high, low in pairwise(uniform)] == pytest.approx([4] * 6, rel=1e-4)
    assert of(rows, "normal", "predicted")[:4] == pytest.approx(uniform[:4], rel=0.1)
    assert of(rows, "quantization", "squared_shift")[0] == pytest.approx(
        of(rows, "quantization", "first_order")[0], rel=0.1
    )


@pytest.mark.parametrize("method", ["lsq", "dorefa"])
def test_rows_of_a_quantized_network_are_of_its_own_noise(tiny, method):
    model = quantize_model(build_model("resnet8", seed=0), method, 4, 4)
    images, labels = tiny.normalise(tiny.test_images[:12]), tiny.test_labels[:12]
    calibrate(model, images)
    rows = penalty_rows(model, images, labels, seed=0, draws=1, probes=1)
    assert [(row["bits"], row["noise"]) for row in rows] == [(4, noise) for noise in NOISES]
    unrounded, quantized = without_rounding(model), without_rounding(model, "quantized")
    update_bn([images], unrounded)  # the unrounded weights' own statistics, also after the weights have been rounded
    for name, buffer in unrounded.named_buffers():
        quantized.get_buffer(name).copy_(buffer)
    own = probabilities(unrounded)
    sigma = root_mean_squares(quantization_noise(model))
    exact = predicted_penalty(squared_gradient_norms(own, images), sigma)
    assert rows[0]["predicted"] == pytest.approx(exact, abs=4 * rows[0]["predicted_error"])
    estimated = estimated_gradient_norms(own, images, batch_size=12, probes=NORM_PROBES, seed=0)
    assert rows[0]["predicted"] == pytest.approx(predicted_penalty(estimated, sigma).mean().item(), rel=1e-5)
    targets = nn.functional.one_hot(labels, 10)
    change = mean_squared_error(probabilities(quantized), images, targets)
    change -= mean_squared_error(own, images, targets)
    assert rows[0]["measured"] == pytest.approx(change, rel=1e-3, abs=1e-5)


def test_rows_of_a_regression_are_of_its_squared_error():
    model, inputs, targets = small_network(), random(9, 3), random(9, 2, seed=1)
    rows = penalty_rows(model, inputs, targets, seed=0, draws=2)
    assert len(rows) == 21
    assert rows[0]["loss"] == pytest.approx(mean_squared_error(model, inputs, targets))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [0, -1, 1.5, True])
def test_no_draws_are_refused(draws):
    model, inputs, targets = small_network(), random(4, 3), random(4, 2)
    with pytest.raises(ValueError, match=f"draws={draws} is not allowed: an integer from 1"):
        mean_loss_change(model, inputs, targets, {"0": 0.1, "2": 0.1}, draws=draws, seed=0)
    with pytest.raises(ValueError, match="draws"):
        penalty_rows(model, inputs, targets, seed=0, draws=draws)
    with pytest.raises(ValueError, match=f"probes={draws} is not allowed"):
        residual_curvature(model, inputs, targets, probes=draws, seed=0)


def test_another_distribution_is_refused():
    with pytest.raises(ValueError, match="'laplace' is not allowed; choose from normal, uniform"):
        mean_loss_change(
            small_network(), random(4, 3), random(4, 2), {"0": 1, "2": 1}, draws=1, seed=0, distribution="laplace"
        )


def test_a_model_without_layers_or_with_rounding_ones_is_refused():
    with pytest.raises(ValueError, match="no Conv2d or Linear"):
        squared_gradient_norms(nn.ReLU(), random(4, 3))
    quantized = quantize_model(small_network(), "lsq", 4, None)
    assert isinstance(quantized[0], QuantizedLayer)
    with pytest.raises(ValueError, match=r"layer '0' rounds its weights.*without_rounding"):
        squared_gradient_norms(quantized, random(4, 3))


def test_targets_of_another_shape_are_refused():
    model, inputs = nn.Linear(3, 1), random(4, 3)
    for targets in (torch.zeros(4), torch.zeros(4, 2)):
        with pytest.raises(ValueError, match=r"outputs have shape \(4, 1\), targets"):
            loss_change(model, inputs, targets, {})
