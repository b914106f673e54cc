"""Sharpness against Hessians that are computed in full, and against what must not change it."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian
from torch.nn import functional as F

from qreg_utils.quantize import calibrate, quantize_model, quantized_layers, without_rounding
from qreg_utils.theory.sharpness import GROUP, LANCZOS_TOLERANCE, SIZES, sharpness

IMAGES = 20  # groups of 8, 8 and 4
assert 2 * GROUP < IMAGES < 3 * GROUP
QUICK = {"draws": 1, "probes": 1}


def examples(size=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(IMAGES, 3, size, size, generator=generator), torch.randint(4, (IMAGES,), generator=generator)


def network():
    """A smooth function of 81 + 12 weights, on different scales."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)
        )
    with torch.no_grad():
        model[5].weight *= 4
    return model


def measured(model, *args, kind="unrounded", **kwargs):
    """{measure or (loss_rise, size): value} for one kind of weights."""
    return by_measure(sharpness(model, *args, **(QUICK | kwargs)), kind)


def by_measure(rows, kind):
    rows = [row for row in rows if row["weights"] == kind]
    assert all(set(row) == {"weights", "measure", "size", "value"} for row in rows)
    assert all((row["size"] > 0) == (row["measure"] == "loss_rise") for row in rows)
    values = {(row["measure"], row["size"]) if row["size"] else row["measure"]: row["value"] for row in rows}
    assert len(values) == len(rows)
    return values


def refreshed(model, inputs):
    """A copy in evaluation mode, with the statistics of ``inputs`` in its batch norm."""
    model = copy.deepcopy(model).train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        model(inputs)
    return model.eval()


def full_hessian(model, inputs, labels):
    """(P, P) for the weights of Conv2d and Linear, and each weight's layer's deviation, (P,)."""
    weights = {name: p.detach() for name, p in model.named_parameters() if name in ("0.weight", "5.weight")}
    flat = torch.cat([weight.flatten() for weight in weights.values()])

    def loss(flat):
        parts = flat.split([weight.numel() for weight in weights.values()])
        shaped = {name: part.view_as(weights[name]) for name, part in zip(weights, parts, strict=True)}
        return F.cross_entropy(functional_call(model, shaped, inputs), labels)

    deviations = [weight.std(correction=0).expand(weight.numel()) for weight in weights.values()]
    return hessian(loss)(flat), torch.cat(deviations)


def test_agrees_with_the_full_hessian():
    inputs, labels = examples()
    model, probes = network(), 500
    values = measured(model, inputs, labels, probes=probes, draws=1)
    model = refreshed(model, inputs)
    assert values["loss"] == pytest.approx(F.cross_entropy(model(inputs), labels).item(), rel=1e-5)
    groups = list(zip(inputs.split(GROUP), labels.split(GROUP), strict=True))
    whole, units = full_hessian(model, inputs, labels)
    parts = [(len(y) / IMAGES, full_hessian(model, x, y)[0]) for x, y in groups]
    for prefix, scales in [("", torch.ones(len(whole))), ("relative_", units)]:
        scaled = whole * scales[:, None] * scales
        largest = torch.linalg.eigvalsh(scaled)[-1].item()
        eigenvalue = values[f"{prefix}largest_eigenvalue"]
        assert (1 - LANCZOS_TOLERANCE) * largest < eigenvalue < 1.0001 * largest
        # the variance of v^T A v for signs v is twice the squares of A's symmetric part, without its diagonal
        estimators = [share * (scales.square() / units)[:, None] * part * units for share, part in parts]
        variance = sum(((a + a.T) / 2).fill_diagonal_(0).square().sum() * 2 / probes for a in estimators)
        error = variance.sqrt().item()
        assert error < 0.1 * scaled.trace().abs()
        assert values[f"{prefix}trace"] == pytest.approx(scaled.trace().item(), abs=4 * error)
    assert values["relative_trace"] != pytest.approx(values["trace"], rel=0.2)


def test_agrees_with_the_closed_form_of_a_linear_model():
    """Softmax of equal logits: the Hessian is (1 - 1/C) / C on the classes' contrasts, times the inputs' E[x x^T]."""
    inputs, labels = examples(size=1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 4))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -2.0, 3.0]).expand(4, 3))
        model[1].bias.zero_()
    values = measured(model, inputs, labels, probes=2000, draws=1)
    moments = inputs[:, :, 0, 0].T @ inputs[:, :, 0, 0] / IMAGES
    assert values["loss"] == pytest.approx(math.log(4))
    assert values["largest_eigenvalue"] == pytest.approx(torch.linalg.eigvalsh(moments)[-1].item() / 4, rel=0.05)
    assert values["trace"] == pytest.approx(moments.trace().item() * 3 / 4, rel=0.05)
    variance = 14 / 3 - (2 / 3) ** 2
    for measure in ("largest_eigenvalue", "trace"):
        assert values[f"relative_{measure}"] == pytest.approx(variance * values[measure], rel=0.02)


def test_the_rise_of_the_loss_is_that_of_the_perturbed_network():
    inputs, labels = examples()
    model = network()
    values = measured(model, inputs, labels, sizes=(0.3,), draws=2, seed=7)
    model, rises, generator = refreshed(model, inputs), [], torch.Generator().manual_seed(7)
    with torch.no_grad():
        for x, y in zip(inputs.split(GROUP), labels.split(GROUP), strict=True):
            before = F.cross_entropy(model(x), y)
            for _ in range(2):
                up, down = copy.deepcopy(model), copy.deepcopy(model)
                for layer in (0, 5):
                    weight = model[layer].weight
                    noise = 0.3 * weight.std(correction=0) * torch.randn(weight.shape, generator=generator)
                    up[layer].weight += noise
                    down[layer].weight -= noise
                rise = (F.cross_entropy(up(x), y) + F.cross_entropy(down(x), y)) / 2 - before
                rises.append(rise.item() * len(y) / IMAGES / 2)
    assert values["loss_rise", 0.3] == pytest.approx(sum(rises), rel=1e-3)
    assert abs(values["loss_rise", 0.3]) > 0.001


def test_a_small_perturbation_raises_the_loss_by_half_its_square_times_the_relative_trace():
    inputs, labels = examples()
    model, draws, size = network().double(), 300, 0.01
    values = measured(model, inputs.double(), labels, sizes=(size,), draws=draws)
    whole, deviations = full_hessian(refreshed(model, inputs.double()), inputs.double(), labels)
    scaled = whole * deviations[:, None] * deviations
    error = (2 * scaled.square().sum() / draws).sqrt().item()  # at most: both batches draw
    assert error < 0.1 * scaled.trace()
    assert 2 * values["loss_rise", size] / size**2 == pytest.approx(scaled.trace().item(), abs=4 * error)


def test_the_scale_of_a_layer_before_batch_norm_matters_only_to_the_absolute_measures():
    inputs, labels = examples()
    model = network()
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled[0].weight *= 10
    ours, theirs = measured(model, inputs, labels), measured(scaled, inputs, labels)
    for measure in ours:
        if measure not in ("largest_eigenvalue", "trace"):
            assert theirs[measure] == pytest.approx(ours[measure], rel=0.01), measure
    for measure in ("largest_eigenvalue", "trace"):  # 100 times less, but for the other layer's part
        assert abs(theirs[measure]) < 0.5 * abs(ours[measure])


def test_batch_norm_uses_the_statistics_of_the_inputs():
    inputs, labels = examples()
    model = network()
    expected = measured(model, inputs, labels)
    model[1].running_mean += 3
    model[1].running_var *= 100
    assert measured(model, inputs, labels) == expected


@pytest.mark.parametrize("method", ["lsq", "dorefa"])
def test_unrounded_and_quantized_weights_are_each_measured(method):
    """As two full-precision networks, one with the weights before they are rounded, one with the levels."""
    inputs, labels = examples()
    model = quantize_model(network(), method, 2, None, 2)
    rows = sharpness(model, inputs, labels, **QUICK)
    assert [row["weights"] for row in rows] == ["unrounded"] * 8 + ["quantized"] * 8
    unrounded, quantized = by_measure(rows, "unrounded"), by_measure(rows, "quantized")
    for kind, values in {"unrounded": unrounded, "quantized": quantized}.items():
        plain = network()
        with torch.no_grad():
            for name, layer in quantized_layers(model):
                expected = layer.weight_quantizer.unrounded(layer.weight)
                plain.get_submodule(name).weight.copy_(expected if kind == "unrounded" else layer.quantized_weight())
        assert values == pytest.approx(measured(plain, inputs, labels))
    assert all(unrounded[measure] != quantized[measure] for measure in unrounded)


def test_activations_are_clipped_but_not_rounded():
    inputs, labels = examples()
    model = quantize_model(network(), "lsq", 8, 2)
    calibrate(model, inputs)
    expected = F.cross_entropy(refreshed(without_rounding(model), inputs)(inputs), labels).item()
    assert measured(model, inputs, labels)["loss"] == pytest.approx(expected, rel=1e-5)
    assert F.cross_entropy(refreshed(model, inputs)(inputs), labels).item() != pytest.approx(expected, rel=1e-3)


def test_full_precision_has_one_set_of_weights_and_rows_fit_a_table():
    rows = sharpness(network(), *examples(), **QUICK)
    assert {row["weights"] for row in rows} == {"unrounded"}
    sizes = [row["size"] for row in rows if row["measure"] == "loss_rise"]
    assert tuple(sizes) == SIZES and len(rows) == 5 + len(SIZES)
    assert all(isinstance(row["value"], float) and np.isfinite(row["value"]) for row in rows)


def test_the_seed_decides_and_the_global_random_state_is_left_alone():
    model, (inputs, labels) = network(), examples()
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = sharpness(model, inputs, labels, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert sharpness(model, inputs, labels, seed=3) == first
    other = {
        row["measure"]
        for row, again in zip(first, sharpness(model, inputs, labels, seed=4), strict=True)
        if row != again
    }
    assert other >= {"trace", "relative_trace", "loss_rise"} and "loss" not in other


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training):
    inputs, labels = examples()
    model = quantize_model(network(), "lsq", 4, 4)
    calibrate(model, inputs)
    model.train(training).to(memory_format=torch.channels_last)
    before = copy.deepcopy(model.state_dict())
    sharpness(model, inputs, labels)
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dead_units_are_as_flat_as_can_be():
    model = nn.Sequential(nn.Conv2d(3, 4, 5, bias=False), nn.ReLU(), nn.Flatten())
    with torch.no_grad():
        model[0].weight.fill_(-1.0)
    values = measured(model, examples()[0].abs(), examples()[1])
    assert values.pop("loss") == pytest.approx(math.log(4))
    assert set(values.values()) == {0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draws": 0}, "draws=0"),
        ({"probes": 0}, "probes=0"),
        ({"sizes": (0.1, 0.0)}, r"sizes=\(0.1, 0.0\)"),
        ({"inputs": torch.zeros(0, 3, 5, 5), "labels": torch.zeros(0, dtype=torch.long)}, "0 inputs and 0 labels"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "20 inputs and 3 labels"),
        ({"inputs": torch.full((IMAGES, 3, 5, 5), math.nan)}, "loss with unrounded weights is nan"),
        ({"model": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())}, "no Conv2d or Linear"),
    ],
)
def test_bad_arguments(change, message):
    inputs, labels = examples()
    with pytest.raises(ValueError, match=message):
        sharpness(**({"model": network(), "inputs": inputs, "labels": labels} | change))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cpu_and_cuda_agree():
    inputs, labels = examples()
    expected = measured(network(), inputs, labels)
    assert measured(network().cuda(), inputs.cuda(), labels.cuda()) == pytest.approx(expected, rel=1e-2)
