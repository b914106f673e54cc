"""Quantizers with a part left out: what each still does, and the gradients that it keeps."""

import math

import pytest
import torch

from qreg_utils.models import build_model
from qreg_utils.names import METHODS, PART
from qreg_utils.quantize import (
    QuantizationError,
    assert_quantized,
    calibrate,
    learned_scales,
    quantize_model,
    quantized_layers,
    start_quantizing,
    stay_in_full_precision,
)
from qreg_utils.quantizers import QUANTIZERS, lsq
from qreg_utils.quantizers.parts import PARTS

EVERY_PART = pytest.mark.parametrize("method", PARTS)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_quantizer(method, bits=3, step=0.5):
    quantizer = QUANTIZERS[method][0](bits, normal(40, 50))
    quantizer.step.data.fill_(step)
    return quantizer


def gradients(quantizer, x, upstream):
    x = x.clone().requires_grad_()
    return torch.autograd.grad((quantizer(x) * upstream).sum(), (x, quantizer.step))


def test_every_part_is_named_and_belongs_to_a_quantizer():
    assert set(PARTS) == {name for name, row in METHODS.items() if row.kind == PART}
    for name in PARTS:
        for part, whole in zip(PARTS[name], QUANTIZERS[METHODS[name].of], strict=True):
            assert issubclass(part, whole)


def test_unrounded_clips_at_the_range_and_leaves_what_is_inside():
    x, quantizer = normal(40, 50), weight_quantizer("lsq-unrounded")
    assert torch.allclose(quantizer(x), x.clamp(-4 * 0.5, 3 * 0.5), atol=1e-6)


def test_the_steps_gradient_without_rounding_is_the_ends_of_the_range_outside_and_zero_inside():
    x, quantizer, upstream = normal(40, 50), weight_quantizer("lsq-unrounded"), normal(40, 50, seed=1)
    grad_x, grad_step = gradients(quantizer, x, upstream)
    below, above = x < -2, x > 1.5
    assert torch.allclose(grad_x, torch.where(below | above, 0, upstream), atol=1e-6)
    closed_form = (-4 * upstream[below].sum() + 3 * upstream[above].sum()) * quantizer.gradient_scale
    assert grad_step.item() == pytest.approx(closed_form.item(), rel=1e-4)


def test_unclipped_rounds_beyond_the_range():
    x, quantizer = 3 * normal(40, 50), weight_quantizer("lsq-unclipped")
    assert torch.allclose(quantizer(x), (x / 0.5).round() * 0.5, atol=1e-6)
    upstream = normal(40, 50, seed=1)
    grad_x, grad_step = gradients(quantizer, x, upstream)
    assert torch.allclose(grad_x, upstream, atol=1e-6)
    closed_form = (upstream * ((x / 0.5).round() - x / 0.5)).sum() * quantizer.gradient_scale
    assert grad_step.item() == pytest.approx(closed_form.item(), rel=1e-3)


def test_dither_is_uniform_over_a_step_independent_of_the_weight_and_drawn_anew():
    quantizer, x = weight_quantizer("lsq-dithered", bits=8).train(), normal(200, 500)
    quantizer.step.data.fill_(0.25)
    torch.manual_seed(0)
    noise = (quantizer(x) - x).detach()
    assert noise.std().item() == pytest.approx(0.25 / math.sqrt(12), rel=0.01)
    assert noise.abs().max() <= 0.125 + 1e-4 and abs(noise.mean()) < 1e-3
    rounding = lsq(x, quantizer.step, -128, 127) - x
    position = x / 0.25 - (x / 0.25).floor()
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), position.flatten()]))[0, 1]) < 0.01
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), rounding.detach().flatten()]))[0, 1]) < 0.01
    assert not torch.equal(noise, quantizer(x) - x)


def test_dither_has_the_gradients_of_lsq_with_its_own_levels():
    x, quantizer, upstream = normal(40, 50), weight_quantizer("lsq-dithered").train(), normal(40, 50, seed=1)
    torch.manual_seed(3)
    grad_x, grad_step = gradients(quantizer, x, upstream)
    torch.manual_seed(3)
    value = quantizer(x).detach()
    inside = ((x / 0.5) > -4) & ((x / 0.5) < 3)
    assert torch.allclose(grad_x, torch.where(inside, upstream, 0), atol=1e-6)
    closed_form = (upstream * torch.where(inside, (value - x) / 0.5, value / 0.5)).sum() * quantizer.gradient_scale
    assert grad_step.item() == pytest.approx(closed_form.item(), rel=1e-3)


def test_without_training_dither_adds_nothing():
    x, quantizer = normal(40, 50), weight_quantizer("lsq-dithered").eval()
    assert torch.allclose(quantizer(x), weight_quantizer("lsq-unrounded")(x))


@EVERY_PART
@pytest.mark.parametrize("bits", [(4, 4), (4, None), (None, 4)])
def test_a_network_of_parts_trains_every_scale(method, bits):
    images = normal(8, 3, 32, 32)
    model = quantize_model(build_model("small_resnet8", seed=0), method, *bits)
    calibrate(model, images)
    model.train()(images).square().sum().backward()
    assert all(scale.grad is not None and scale.grad.isfinite() for scale in learned_scales(model))
    assert all(layer.weight.grad.any() for _, layer in quantized_layers(model))


def test_activations_alone_leave_the_weights_as_they_are():
    images = normal(8, 3, 32, 32)
    model = quantize_model(build_model("small_resnet8", seed=0), "lsq", None, 2)
    calibrate(model, images)
    assert_quantized(model)
    for _, layer in quantized_layers(model):
        assert torch.equal(layer.quantized_weight(), layer.weight)
        assert len(layer.activation_quantizer(normal(4, 3, 8, 8)).unique()) <= 2**layer.activation_quantizer.bits
    with pytest.raises(QuantizationError, match="both None"):
        quantize_model(build_model("small_resnet8", seed=0), "lsq", None, None)


def test_in_full_precision_for_a_while_then_with_scales_of_the_weights_as_they_are():
    images, plain = normal(8, 3, 32, 32), build_model("small_resnet8", seed=0).eval()
    model = quantize_model(plain, "lsq", 4, 4)
    calibrate(model, images)
    stay_in_full_precision(model)
    assert torch.equal(model.eval()(images), plain(images))
    with torch.no_grad():
        for parameter in (layer.weight for _, layer in quantized_layers(model)):
            parameter.mul_(3)
    expected = quantize_model(plain, "lsq", 4, 4)
    with torch.no_grad():
        for parameter in (layer.weight for _, layer in quantized_layers(expected)):
            parameter.mul_(3)
    for _, layer in quantized_layers(expected):
        layer.weight_quantizer.step.data.mul_(3)
    calibrate(expected, images)
    start_quantizing(model, images)
    for (name, ours), (_, theirs) in zip(quantized_layers(model), quantized_layers(expected), strict=True):
        torch.testing.assert_close(ours.weight_quantizer.step, theirs.weight_quantizer.step, msg=name)
    torch.testing.assert_close(model(images), expected.eval()(images))
    assert_quantized(model)
