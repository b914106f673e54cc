import math

import pytest

from qreg_utils.models import build_model
from qreg_utils.noise import overall_noise, weight_noise
from qreg_utils.quantize import quantize_model, quantized_layers


@pytest.mark.parametrize("method", ["lsq", "pact", "dorefa"])
def test_noise_is_that_of_the_weights_in_use(method):
    model = quantize_model(build_model("resnet8", seed=0), method, 4, None)
    rows = {row["layer"]: row for row in weight_noise(model)}
    for name, layer in quantized_layers(model):
        delta = layer.quantized_weight() - layer.weight_quantizer.target(layer.weight)
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


def test_full_precision_has_none():
    model = build_model("resnet8")
    assert weight_noise(model) == []
    assert overall_noise([]) == 0


def test_overall_noise_weights_layers_by_size():
    rows = [
        {"sigma": 0.1, "weight_sigma": 1.0, "weights": 100},
        {"sigma": 0.2, "weight_sigma": 0.5, "weights": 300},
    ]
    assert overall_noise(rows) == pytest.approx((0.1 * 100 + 0.4 * 300) / 400)
