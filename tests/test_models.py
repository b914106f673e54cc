"""The networks: their known sizes, their shapes, and every one of them quantized by every method."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qreg_utils.models import BUILDERS, build_model
from qreg_utils.quantize import assert_quantized, calibrate, quantize_model
from qreg_utils.quantizers import PARTS, QUANTIZERS

# Known for 10 classes: ResNet-20 is He et al.'s 0.27 M, the three large ones are those of the usual CIFAR versions.
# ResNet-8 by hand: a convolution 3-16, two convolutions in each of three stages, two numbers for each batch-norm
# channel, and the linear layer; shortcuts have no parameters.
STAGES = 2 * 9 * 16 * 16 + 9 * (16 * 32 + 32 * 32) + 9 * (32 * 64 + 64 * 64)
PARAMETERS = {
    "resnet8": 9 * 3 * 16 + STAGES + 2 * (3 * 16 + 2 * 32 + 2 * 64) + 650,
    "small_resnet8": 9 * 3 * 16 + STAGES + 2 * (3 * 16 + 2 * 32 + 2 * 64) + 650,
    "resnet18": 11_173_962,
    "resnet20": 269_722,
    "resnet50": 23_520_842,
    "mobilenet_v1": 3_217_226,
}
FEATURES = {
    "resnet8": (64, 8),
    "small_resnet8": (64, 4),
    "resnet18": (512, 4),
    "resnet20": (64, 8),
    "resnet50": (2048, 4),
}
FEATURES |= {"mobilenet_v1": (1024, 2)}  # channels and side of what the last layer averages, for 32x32 images
LAYERS = {
    "resnet8": 8,
    "small_resnet8": 8,
    "resnet18": 21,
    "resnet20": 20,
    "resnet50": 54,
    "mobilenet_v1": 28,
}  # with the projections
EVERY_MODEL = pytest.mark.parametrize("name", BUILDERS)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@EVERY_MODEL
def test_parameter_count_is_the_known_one(name):
    assert sum(p.numel() for p in build_model(name).parameters()) == PARAMETERS[name]


@EVERY_MODEL
@torch.no_grad()
def test_shapes(name):
    model = build_model(name, num_classes=10).eval()
    channels, side = FEATURES[name]
    stem = 16 if name == "small_resnet8" else 32  # in others nothing is lost there
    assert model.bn1(model.conv1(IMAGES)).shape[2:] == (stem, stem)
    assert model.blocks(model.conv1(IMAGES)).shape == (2, channels, side, side)
    assert model(IMAGES).shape == (2, 10)
    assert build_model(name, num_classes=100).eval()(IMAGES).shape == (2, 100)


@EVERY_MODEL
def test_every_layer_is_there_once_and_the_classifier_comes_last(name):
    layers = [
        layer
        for _, layer in build_model(name).named_modules(remove_duplicate=False)
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    assert len(layers) == len({id(layer) for layer in layers}) == LAYERS[name]
    assert isinstance(layers[0], nn.Conv2d) and layers[0].in_channels == 3  # the layers that get first_last_bits
    assert isinstance(layers[-1], nn.Linear)


@EVERY_MODEL
def test_weights_are_he_normal(name):
    for layer in build_model(name, seed=0).modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan_in = layer.weight[0].numel()
            assert layer.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.15)


@EVERY_MODEL
def test_a_seed_fixes_the_weights_and_leaves_the_global_state_alone(name):
    state = torch.get_rng_state()
    first, second, other = (build_model(name, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


@EVERY_MODEL
@pytest.mark.parametrize("method", ["fp32", *QUANTIZERS])
def test_every_model_trains_with_every_method(name, method):
    model = build_model(name, num_classes=100, seed=0)
    if method != "fp32":
        model = quantize_model(model, method, weight_bits=4, activation_bits=4)
    calibrate(model, IMAGES)
    loss = F.cross_entropy(model(IMAGES), torch.tensor([3, 97]))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if method != "fp32" and method not in PARTS:
        assert_quantized(model)


@pytest.mark.parametrize("num_classes", [1, 0, -3, True, None, 10.0, "10"])
def test_numbers_of_classes_that_do_not_fit(num_classes):
    with pytest.raises(ValueError, match=f"num_classes={num_classes!r} is not allowed"):
        build_model("resnet8", num_classes=num_classes)


@pytest.mark.parametrize("name", ["resnet19", "", None])
def test_an_unknown_model_is_named_with_those_that_are_known(name):
    with pytest.raises(ValueError, match=rf"{name!r} is unknown.*resnet18.*mobilenet_v1"):
        build_model(name)


def test_models_do_not_need_torchvision():
    """Importing it takes seconds, for every experiment."""
    code = "import sys, qreg_utils.models; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@torch.no_grad()
def test_small_resnet8_does_not_see_an_images_level_and_contrast():
    model = build_model("small_resnet8", seed=0).eval()
    torch.testing.assert_close(model(3 * IMAGES + 1), model(IMAGES), rtol=1e-3, atol=1e-4)
