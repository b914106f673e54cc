"""Models that are quantized, stay quantized, and say so when they are not."""

import copy

import pytest
import torch
from torch import nn

from qreg_utils.models import build_model
from qreg_utils.quantize import (
    QuantizationError,
    QuantizedConv2d,
    QuantizedLinear,
    alpha_penalty,
    assert_quantized,
    calibrate,
    learned_scales,
    limit_scale_gradients,
    parameter_groups,
    quantize_model,
    quantized_layers,
    without_rounding,
)
from qreg_utils.quantizers import PARTS, QUANTIZERS, ActivationQuantizer

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
EVERY_METHOD = pytest.mark.parametrize("method", [name for name in QUANTIZERS if name not in PARTS])


def small(method="lsq", weight_bits=4, activation_bits=4, calibrated=True, **kwargs):
    model = quantize_model(build_model("resnet8", seed=0), method, weight_bits, activation_bits, **kwargs)
    if calibrated:
        calibrate(model, IMAGES)
    return model


@EVERY_METHOD
def test_every_convolution_and_linear_is_replaced_and_the_original_is_not_touched(method):
    original = build_model("resnet8", seed=0)
    before = copy.deepcopy(original.state_dict())
    model = quantize_model(original, method, 3, 5)
    widths = [(q.weight_quantizer.bits, q.activation_quantizer.bits) for _, q in quantized_layers(model)]
    assert widths == [(8, 8)] + [(3, 5)] * 6 + [(8, 8)]
    assert not any(quantized_layers(original))
    assert all(torch.equal(before[key], value) for key, value in original.state_dict().items())
    kinds = {type(layer) for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    assert kinds == {QuantizedConv2d, QuantizedLinear}


@EVERY_METHOD
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantized_model_trains_and_stays_quantized(method, bits):
    model = small(method, bits, bits)
    optimizer = torch.optim.SGD(parameter_groups(model, 1e-4), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(IMAGES).square().mean() + alpha_penalty(model)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    assert_quantized(model)


@EVERY_METHOD
def test_eight_bit_model_is_close_to_full_precision(method):
    """LSQ leaves the weights on their scale, so the outputs can be compared; DoReFa and PACT put other weights there,
    which batch norm undoes up to the last layer: compare those to a network of the targets."""
    model = small(method, 8, 8 if method != "dorefa" else None)  # DoReFa's clip at 1 is not small noise
    reference = build_model("resnet8", seed=0)
    for (name, layer), kept in zip(
        quantized_layers(model), [m for m in reference.modules() if isinstance(m, nn.Conv2d | nn.Linear)], strict=True
    ):
        assert name
        kept.weight.data = layer.weight_quantizer.unrounded(layer.weight).detach()
    ours, theirs = model(IMAGES), reference(IMAGES)
    if method == "pact":  # alpha clips the largest activations
        assert torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1] > 0.98
    else:
        assert (ours - theirs).std() < 0.05 * theirs.std()


def test_weights_only():
    model = quantize_model(build_model("resnet8", seed=0), "lsq", 4, activation_bits=None)
    assert all(layer.activation_quantizer is None for _, layer in quantized_layers(model))
    model(IMAGES)  # needs no calibration
    assert_quantized(model)


def test_the_networks_input_is_signed_and_what_follows_a_relu_is_not():
    model = small()
    signs = [layer.activation_quantizer.signed for _, layer in quantized_layers(model)]
    assert signs == [True] + [False] * 7


def test_negative_activations_survive_in_a_network_without_relu():
    model = quantize_model(nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2)), "lsq", 8, 8)
    x = torch.randn(64, 4)
    calibrate(model, x)
    assert [layer.activation_quantizer.signed for _, layer in quantized_layers(model)] == [True, True]
    hidden = model[1](model[0](x))
    assert (model[2].activation_quantizer(hidden) < 0).any()


@EVERY_METHOD
def test_calibration_leaves_running_statistics_and_mode_alone(method):
    model = small(method, calibrated=False).eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
    calibrate(model, IMAGES)
    assert not model.training
    assert all(torch.equal(before[name], dict(model.named_buffers())[name]) for name in before)


@EVERY_METHOD
def test_state_dict_round_trip(method, tmp_path):
    model = small(method).eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = small(method, calibrated=False).eval()
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(fresh(IMAGES), model(IMAGES))
    uncalibrated = small(method, calibrated=False)
    uncalibrated.load_state_dict(small(method, calibrated=False).state_dict())
    with pytest.raises(RuntimeError, match="calibrate"):
        uncalibrated(IMAGES)


@EVERY_METHOD
def test_no_weight_decay_on_steps_and_alphas(method):
    model = small(method)
    decayed, *spared = parameter_groups(model, 5e-4)
    assert decayed["weight_decay"] == 5e-4
    names = {id(p): name for name, p in model.named_parameters()}
    scales = {name for name in names.values() if name.endswith((".step", ".alpha"))}
    assert {names[id(p)] for group in spared for p in group["params"]} == scales
    assert all(group["weight_decay"] == 0 for group in spared)
    assert len(scales) == {"lsq": 16, "pact": 8, "dorefa": 0}[method]
    assert sum(len(group["params"]) for group in [decayed, *spared]) == len(names)


@pytest.mark.parametrize("method", ["lsq", "pact"])
def test_one_large_gradient_cannot_throw_a_scale_through_zero(method):
    """A gradient that is a million times too large, and the momentum that it leaves: a change of a tenth in all."""
    model = small(method)
    scales = learned_scales(model)
    before = [scale.item() for scale in scales]
    optimizer = torch.optim.SGD(scales, 0.1, 0.9)
    for gradient in [1e6] + [0.0] * 99:
        for scale in scales:
            scale.grad = torch.full_like(scale, gradient)
        limit_scale_gradients(scales)
        optimizer.step()
    assert [scale.item() for scale in scales] == pytest.approx([0.9 * value for value in before], rel=1e-3)
    for scale in scales:
        scale.grad = -0.01 * scale.detach()
    limit_scale_gradients(scales)  # an ordinary gradient is left alone
    assert [scale.grad.item() for scale in scales] == pytest.approx([-0.01 * scale.item() for scale in scales])


def test_alpha_penalty_is_the_sum_of_squares():
    model = small("pact")
    alphas = [layer.activation_quantizer.alpha for _, layer in quantized_layers(model)]
    assert alpha_penalty(model).item() == pytest.approx(sum(a.item() ** 2 for a in alphas))
    assert alpha_penalty(small("lsq")) == 0.0


@EVERY_METHOD
def test_under_autocast_quantizers_compute_in_float32(method):
    """bfloat16 has 8 significant bits: x / step would round before the quantizer does."""
    model, seen = small(method), []
    for module in model.modules():
        if isinstance(module, ActivationQuantizer):
            module.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(IMAGES)
    assert logits.dtype == torch.bfloat16  # the network itself does not
    assert seen == [(torch.float32, torch.float32)] * 8


def test_assert_quantized_notices_a_layer_that_is_not():
    with pytest.raises(QuantizationError, match="no quantized layer"):
        assert_quantized(build_model("resnet8"))
    model = small()
    model.blocks[1].conv2 = nn.Conv2d(32, 32, 3, padding=1)
    with pytest.raises(QuantizationError, match=r"blocks\.1\.conv2"):
        assert_quantized(model)
    model = small(weight_bits=2)
    model.blocks[0].conv1.weight_quantizer.forward = lambda weight: weight  # silently full precision
    with pytest.raises(QuantizationError, match=r"blocks\.0\.conv1 .* 2 bits allow 4"):
        assert_quantized(model)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"method": "lsqq"}, "'lsqq'.*lsq, pact, dorefa"),
        ({"weight_bits": 1}, r"weight_bits=1 .*2\.\.8"),
        ({"weight_bits": 33}, "weight_bits=33"),
        ({"weight_bits": True}, "weight_bits=True"),
        ({"weight_bits": None, "activation_bits": None}, "both None"),
        ({"activation_bits": 9}, "activation_bits=9"),
        ({"first_last_bits": 16}, "first_last_bits=16"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(QuantizationError, match=message):
        quantize_model(build_model("resnet8"), **arguments)


def test_nothing_to_quantize_and_quantized_already():
    with pytest.raises(QuantizationError, match="no Conv2d or Linear"):
        quantize_model(nn.Sequential(nn.ReLU()))
    with pytest.raises(QuantizationError, match="already"):
        quantize_model(small())


def test_a_single_layer_and_a_bias_are_fine():
    layer = nn.Linear(3, 2)
    quantized = quantize_model(layer, "lsq", 8, None)
    assert isinstance(quantized, QuantizedLinear)
    assert torch.equal(quantized.bias, layer.bias)


@EVERY_METHOD
def test_compiles_without_a_graph_break_and_agrees_with_eager(method):
    assert_agrees_with_eager(small(method))


def assert_agrees_with_eager(model):
    """aot_eager traces forward and backward as a compiler would, and needs no C++ compiler."""
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    ours, theirs = model(IMAGES), compiled(IMAGES)
    torch.testing.assert_close(ours, theirs)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    for p, q in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@EVERY_METHOD
def test_cpu_and_cuda_agree(method):
    model = small(method).eval()
    expected = model(IMAGES)
    torch.testing.assert_close(model.cuda()(IMAGES.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)


# --- layers by name, and offsets --------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Two outputs, and a layer with constants."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.SiLU())
        self.boxes, self.scores = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 1)
        self.constants = nn.Conv2d(4, 1, 1, bias=False)

    def forward(self, x):
        x = self.body(self.stem(x))
        return self.constants(self.boxes(x)), self.scores(x)


def widths(model):
    return {name: (q.weight_quantizer.bits, q.activation_quantizer.bits) for name, q in quantized_layers(model)}


@EVERY_METHOD
def test_layers_named_as_last_have_their_bits_and_skipped_ones_are_left_alone(method):
    original = Branches()
    model = quantize_model(original, method, 2, 3, 7, last=["boxes", "scores"], skip=["constants"])
    assert widths(model) == {"stem": (7, 7), "body.0": (2, 3), "boxes": (7, 7), "scores": (7, 7)}
    assert type(model.constants) is nn.Conv2d and torch.equal(model.constants.weight, original.constants.weight)
    calibrate(model, IMAGES)
    assert_quantized(model, skip=["constants"])
    with pytest.raises(QuantizationError, match=r"layer constants \(Conv2d\) is not quantized"):
        assert_quantized(model)


def test_without_names_the_layer_before_a_skipped_one_is_the_last():
    assert widths(quantize_model(Branches(), "lsq", 2, 3, 7, skip=["constants"]))["scores"] == (7, 7)
    assert widths(quantize_model(Branches(), "lsq", 2, 3, 7))["constants"] == (7, 7)
    assert widths(quantize_model(Branches(), "lsq", 2, 3, 7, skip=["stem"]))["body.0"] == (
        7,
        7,
    )  # the first that is left


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"last": ["scroes"]}, "'scroes' is no Conv2d or Linear"),
        ({"skip": ["body"]}, "'body' is no Conv2d or Linear"),  # a container
        ({"skip": ["body.1"]}, r"'body\.1' is no Conv2d or Linear"),  # a SiLU
        ({"last": "scores"}, r"last='scores' is one string, not a collection of names: \['scores'\]"),
        ({"skip": ["stem", "body.0", "boxes", "scores", "constants"]}, "no Conv2d or Linear to quantize"),
        ({"method": "pact", "offset": True}, "offset is for lsq; pact has none"),
        ({"method": "dorefa", "offset": True}, "offset is for lsq; dorefa has none"),
    ],
)
def test_bad_names_and_offsets(arguments, message):
    with pytest.raises(QuantizationError, match=message):
        quantize_model(Branches(), **arguments)


def offsets(model):
    return [p for name, p in model.named_parameters() if name.endswith("activation_quantizer.offset")]


def test_offsets_are_learned_scales_without_weight_decay():
    model = small(offset=True)
    assert len(offsets(model)) == 8 and offsets(small()) == []
    assert len(learned_scales(model)) == 3 * 8
    assert {id(p) for p in offsets(model)} < {id(p) for p in learned_scales(model)}
    _, spared = parameter_groups(model, 5e-4)
    assert spared["weight_decay"] == 0 and len(spared["params"]) == 3 * 8
    weights_only = quantize_model(build_model("resnet8", seed=0), "lsq", 4, None, offset=True)
    assert offsets(weights_only) == []


def test_a_model_with_offsets_trains_and_stays_quantized():
    layers = nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 3)
    model = quantize_model(nn.Sequential(*layers), "lsq", 2, 2, offset=True)
    calibrate(model, IMAGES)
    before = [offset.item() for offset in offsets(model)]
    assert before[0] == IMAGES.min() and before[1] == pytest.approx(-0.2785, abs=1e-3)  # SiLU's minimum
    optimizer = torch.optim.SGD(parameter_groups(model, 1e-4), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(IMAGES).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        limit_scale_gradients(learned_scales(model))
        optimizer.step()
    assert_quantized(model)
    assert offsets(model)[1].item() != before[1]


def test_a_model_with_offsets_is_saved_and_restored(tmp_path):
    model = small(offset=True).eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = small(offset=True, calibrated=False).eval()
    with pytest.raises(RuntimeError, match="calibrate"):
        fresh(IMAGES)
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(fresh(IMAGES), model(IMAGES))
    with pytest.raises(RuntimeError, match=r"activation_quantizer\.offset"):
        small(calibrated=False).load_state_dict(model.state_dict())


def test_with_offsets_it_compiles_without_a_graph_break_and_agrees_with_eager():
    assert_agrees_with_eager(small(offset=True))


def test_with_offsets_quantizers_compute_in_float32_under_autocast():
    model, seen = small(offset=True), []
    for module in model.modules():
        if isinstance(module, ActivationQuantizer):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(IMAGES).dtype == torch.bfloat16
    assert seen == [torch.float32] * 8


def trained_a_little(method, offset=False):
    """Steps, alphas and batch norm away from their first values."""
    model = quantize_model(build_model("resnet8", seed=0), method, 4, 4, offset=offset)
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    calibrate(model, images)
    with torch.no_grad():
        for scale in learned_scales(model):
            scale.mul_(1.3)
    model.train()(images)
    return model, images


@pytest.mark.parametrize("method, offset", [("lsq", False), ("lsq", True), ("pact", False), ("dorefa", False)])
def test_without_rounding_is_the_limit_of_many_levels(method, offset):
    """With 16 bits in the same range the rounded network is the unrounded one."""
    model, images = trained_a_little(method, offset)
    many = copy.deepcopy(model).eval()
    for _, layer in quantized_layers(many):
        weights, inputs = layer.weight_quantizer, layer.activation_quantizer
        weights.bits = 16
        if method == "lsq":  # its range is in steps; that of its weights is to be full, because clipping is noise too
            weights.q_min, weights.q_max = -(2**15), 2**15 - 1
            weights.step.data = layer.weight.abs().max() / 2**15
            inputs.step.data *= inputs.levels() / (2**15 - 1 if inputs.signed and not offset else 2**16 - 1)
        inputs.bits = 16
    smooth = without_rounding(model)
    exact, rounded = smooth(images), many(images)
    assert (model.eval()(images) - exact).abs().max() > 0.02
    assert torch.allclose(exact, rounded, atol=2e-3)
    assert not any(quantized_layers(smooth)) and any(quantized_layers(model))


def test_without_rounding_can_hold_the_quantized_weights():
    model, _ = trained_a_little("dorefa")
    unrounded, quantized = (without_rounding(model, weights) for weights in ("unrounded", "quantized"))
    for name, layer in quantized_layers(model):
        expected = layer.weight_quantizer.unrounded(layer.weight)
        assert torch.equal(unrounded.get_submodule(name).weight, expected)
        assert torch.equal(quantized.get_submodule(name).weight, layer.quantized_weight())
    names = [name for name, _ in build_model("resnet8").named_parameters()]
    assert [name for name, _ in unrounded.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in unrounded.parameters())


def test_without_rounding_of_full_precision_is_a_copy():
    model = build_model("resnet8", seed=0)
    images = torch.randn(4, 3, 32, 32)
    smooth = without_rounding(model)
    assert smooth is not model and not smooth.training and model.training
    assert torch.equal(smooth(images), model.eval()(images))


def test_without_rounding_of_a_single_layer():
    layer = quantize_model(torch.nn.Linear(4, 2), "lsq", 4, None)
    smooth = without_rounding(layer)
    assert type(smooth) is torch.nn.Linear and torch.equal(smooth.weight, layer.weight)
