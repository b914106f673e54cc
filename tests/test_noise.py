import math

import pytest
import torch
from scipy.stats import kstest
from torch import nn

from qreg_utils.models import build_model
from qreg_utils.quantize import QuantizationError, quantize_model, quantized_layers, without_rounding
from qreg_utils.theory.noise import (
    kolmogorov_distance,
    overall_noise,
    perturbed,
    pooled_noise,
    quantization_noise,
    rounded,
    weight_noise,
)

METHODS = pytest.mark.parametrize("method", ["lsq", "pact", "dorefa"])


def with_weights(weights, bits=8, step=1.0):
    """A network of one LSQ layer that rounds ``weights`` (n,) to multiples of ``step``."""
    model = quantize_model(nn.Linear(len(weights), 1, bias=False), "lsq", bits, None, first_last_bits=bits)
    with torch.no_grad():
        model.weight.copy_(weights[None])
        model.weight_quantizer.step.fill_(step)
    return model


def with_noise(noise):
    """A network of one layer whose noise is ``noise`` (n,), which must lie within half a step of 1."""
    levels = torch.randint(-100, 100, noise.shape, generator=torch.Generator().manual_seed(1))
    return with_weights(levels - noise)


def uniform(n, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) - 0.5


def normal(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


# --- layer by layer ---------------------------------------------------------------------------------------------------


@METHODS
def test_noise_is_that_of_the_weights_in_use(method):
    model = quantize_model(build_model("resnet8", seed=0), method, 4, None)
    rows = {row["layer"]: row for row in weight_noise(model)}
    for name, layer in quantized_layers(model):
        delta = layer.quantized_weight() - layer.weight_quantizer.unrounded(layer.weight)
        assert rows[name]["sigma"] == pytest.approx(delta.std(correction=0).item())
        assert rows[name]["mean"] == pytest.approx(delta.mean().item(), abs=1e-9)
        assert rows[name]["bits"] == (8 if name in ("conv1", "fc") else 4)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_dorefa_noise_is_that_of_uniform_rounding(bits):
    """On a fixed range the rounding error is uniform within a step: sigma = step / sqrt(12)."""
    model = quantize_model(build_model("resnet20", seed=0), "dorefa", bits, None)
    for row in weight_noise(model):
        if row["weights"] > 5000:
            assert row["sigma"] == pytest.approx(row["step"] / math.sqrt(12), rel=0.03)
            assert row["kurtosis"] == pytest.approx(-1.2, abs=0.05)
            assert row["distance_to_uniform"] < 0.02 < 0.05 < row["distance_to_normal"]


def test_full_precision_has_none():
    model = build_model("resnet8")
    assert weight_noise(model) == []
    assert overall_noise([]) == 0


@METHODS
def test_only_lsq_clips(method):
    model = quantize_model(build_model("resnet8", seed=0), method, 2, None)
    clipped = [row["clipped"] for row in weight_noise(model)]
    assert max(clipped) > 0.003 if method == "lsq" else max(clipped) == 0


# --- its statistics ---------------------------------------------------------------------------------------------------


def test_uniform_noise_is_known_as_such():
    row = weight_noise(with_noise(uniform(40_000)))[0]
    assert row["sigma"] == pytest.approx(1 / math.sqrt(12), rel=0.01)
    assert row["kurtosis"] == pytest.approx(-1.2, abs=0.03)
    assert row["distance_to_uniform"] < 0.01
    # the largest difference of Phi(z) and 1/2 + z / sqrt(12), where the densities cross
    z = math.sqrt(math.log(6 / math.pi))
    assert row["distance_to_normal"] == pytest.approx(0.5 * math.erf(z / math.sqrt(2)) - z / math.sqrt(12), abs=0.01)


def test_normal_noise_is_known_as_such():
    row = weight_noise(with_noise(0.1 * normal(40_000)))[0]
    assert row["kurtosis"] == pytest.approx(0, abs=0.1)
    assert row["distance_to_normal"] < 0.01
    z = math.sqrt(2 * math.log(10 / math.sqrt(2 * math.pi)))
    assert row["distance_to_uniform"] == pytest.approx(0.5 * math.erf(z / math.sqrt(2)) - z / 10, abs=0.01)


def test_a_wrong_width_or_mean_counts_as_distance_to_uniform():
    for noise in (0.25 * uniform(20_000), 0.3 * uniform(20_000) + 0.2):
        assert weight_noise(with_noise(noise))[0]["distance_to_uniform"] > 0.2


def test_distances_do_not_grow_with_the_number_of_weights():
    """Triangular noise: a test would accept it as normal with 1,000 weights, and reject it with 100,000."""
    few, many = (weight_noise(with_noise((uniform(n) + uniform(n, 1)) / 2))[0] for n in (1_000, 100_000))
    for name in ("distance_to_normal", "distance_to_uniform", "kurtosis"):
        assert few[name] == pytest.approx(many[name], abs=0.03 if "distance" in name else 0.2)
    assert many["distance_to_uniform"] == pytest.approx(0.125, abs=0.005)  # at 1/4: 7/8 - 3/4


def test_where_the_hypothesis_is_true_distances_are_as_the_docs_say():
    n, repeats = 400, 300
    distances = [kolmogorov_distance(uniform(n, seed) + 0.5).item() for seed in range(repeats)]
    fitted = [weight_noise(with_noise(0.1 * normal(n, seed)))[0]["distance_to_normal"] for seed in range(repeats)]
    assert sum(distances) / repeats == pytest.approx(0.87 / math.sqrt(n), rel=0.06)
    assert sum(fitted) / repeats == pytest.approx(0.62 / math.sqrt(n), rel=0.06)


@pytest.mark.parametrize("points", [uniform(50) + 0.5, torch.tensor([0.2]), torch.full((9,), 0.3), torch.zeros(4)])
def test_kolmogorov_distance_is_scipys(points):
    assert kolmogorov_distance(points).item() == pytest.approx(kstest(points.numpy(), "uniform").statistic, abs=1e-6)


def test_clipped_weights_are_those_beyond_the_levels():
    weights = torch.cat([torch.linspace(-8.4, 7.4, 90), torch.full((6,), 7.6), torch.full((4,), -9.0)])
    assert weight_noise(with_weights(weights, bits=4))[0]["clipped"] == pytest.approx(0.10)


def test_noise_of_weights_that_round_to_zero_is_minus_the_weights():
    row = weight_noise(with_weights(0.2 * uniform(1_000)))[0]
    assert row["correlation"] == pytest.approx(-1)
    assert row["sigma"] == pytest.approx(row["weight_sigma"])
    assert weight_noise(with_noise(uniform(40_000)))[0]["correlation"] == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_constant_weights_give_numbers(value):
    model = with_weights(torch.full((7,), value))
    row = weight_noise(model)[0]
    assert all(math.isfinite(number) for name, number in row.items() if name != "layer")
    assert row["sigma"] == row["kurtosis"] == row["correlation"] == row["weight_sigma"] == 0
    assert min(row["distance_to_normal"], row["distance_to_uniform"]) >= 0.5 - 1e-6
    assert overall_noise([row]) == pooled_noise(model)["noise"] == 0


def test_overall_noise_weights_layers_by_size():
    rows = [
        {"sigma": 0.1, "weight_sigma": 1.0, "weights": 100},
        {"sigma": 0.2, "weight_sigma": 0.5, "weights": 300},
    ]
    assert overall_noise(rows) == pytest.approx((0.1 * 100 + 0.4 * 300) / 400)


def test_pooled_layers_are_put_on_one_scale():
    fine, coarse = with_noise(uniform(20_000)), with_noise(uniform(20_000, 1))
    with torch.no_grad():
        fine.weight.mul_(0.001)
        fine.weight_quantizer.step.mul_(0.001)
    model = nn.Sequential(fine, nn.Flatten(), coarse)
    pooled, row = pooled_noise(model), weight_noise(coarse)[0]
    assert pooled["weights"] == 40_000
    assert pooled["distance_to_uniform"] < 0.01
    for name in ("kurtosis", "distance_to_normal", "clipped", "correlation"):
        assert pooled[name] == pytest.approx(row[name], abs=0.02)
    assert pooled["noise"] == overall_noise(weight_noise(model))


@pytest.mark.parametrize("function", [pooled_noise, quantization_noise])
def test_a_full_precision_model_has_no_noise_to_analyse(function):
    with pytest.raises(QuantizationError, match="no quantized layer"):
        function(build_model("resnet8"))


# --- the noise itself, put on --------------------------------------------------------------------------------------


@METHODS
def test_unrounded_weights_with_the_noise_are_the_rounded_ones(method):
    model = quantize_model(build_model("resnet8", seed=0), method, 3, None)
    unrounded, quantized = without_rounding(model), without_rounding(model, "quantized")
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = unrounded(images)
        with perturbed(unrounded, quantization_noise(model)):
            torch.testing.assert_close(unrounded(images), quantized(images), rtol=1e-4, atol=1e-4)
            assert not torch.allclose(unrounded(images), before)
        assert torch.equal(unrounded(images), before)


def test_a_model_that_is_one_layer_has_a_weight_without_a_prefix():
    model = with_noise(uniform(10))
    assert quantization_noise(model)["weight"].shape == (1, 10)


def test_perturbed_weights_come_back_bit_for_bit():
    model = nn.Sequential(nn.Linear(3, 50), nn.Linear(50, 1))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    deltas = {"0.weight": 1e6 * torch.randn(50, 3), "1.bias": torch.full((1,), math.nan)}
    with perturbed(model, deltas):
        torch.testing.assert_close(model[0].weight, before[0] + deltas["0.weight"])
        assert model[1].bias.isnan()
        assert torch.equal(model[1].weight, before[2])
    with pytest.raises(KeyboardInterrupt), perturbed(model, deltas):
        raise KeyboardInterrupt
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.requires_grad


def test_gradients_are_those_at_the_perturbed_weights():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(2.0)
    with perturbed(model, {"weight": torch.ones(1, 1)}):
        model(torch.ones(1, 1)).square().sum().backward()
    assert model.weight.grad.item() == 6  # of w^2 at 3
    with perturbed(model, {}):
        assert model.weight.item() == 2


@pytest.mark.parametrize(
    ("deltas", "message"),
    [({"0.wieght": torch.zeros(2, 3)}, "no parameter"), ({"0.weight": torch.zeros(3)}, r"\(2, 3\), its delta \(3,\)")],
)
def test_a_delta_of_nothing_or_of_another_shape_is_refused(deltas, message):
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=message), perturbed(model, deltas):
        raise AssertionError("must not be reached")


# --- rounding to a width ----------------------------------------------------------------------------------------------


def test_a_bit_less_doubles_every_step_and_the_levels_cover_all_weights():
    model = build_model("resnet8", seed=0)
    wide, narrow = (list(quantized_layers(rounded(model, bits))) for bits in (5, 4))
    for (name, five), (_, four) in zip(wide, narrow, strict=True):
        assert four.weight_quantizer.step_size() == 2 * five.weight_quantizer.step_size()
        weight = model.get_submodule(name).weight
        assert five.weight_quantizer.step_size() * 2**4 == weight.abs().max()
        assert five.activation_quantizer is None
        assert (five.quantized_weight() - weight).abs().max() <= five.weight_quantizer.step_size() * 1.001
    assert max(row["clipped"] for row in weight_noise(rounded(model, 5))) < 0.01
    assert not list(quantized_layers(model))


@pytest.mark.parametrize("bits", [1, 9, True])
def test_rounding_to_another_width_is_refused(bits):
    with pytest.raises(QuantizationError, match="not allowed"):
        rounded(build_model("resnet8"), bits)


def test_rounding_twice_is_refused():
    with pytest.raises(QuantizationError, match="quantized already"):
        rounded(rounded(build_model("resnet8"), 4), 4)
