"""What was called quantized and was not, or not as said: each ends in the right numbers, or in an error with a name."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torchvision.models.feature_extraction import create_feature_extractor

from qreg_utils import training
from qreg_utils.quantize import (
    QuantizationError,
    QuantizedConv2d,
    assert_quantized,
    calibrate,
    dead_scales,
    learned_scales,
    limit_scale_gradients,
    parameter_groups,
    quantize_model,
    quantized_layers,
    without_rounding,
)
from qreg_utils.quantizers import PARTS, QUANTIZERS, LSQActivation
from qreg_utils.recipe import ClassificationRecipe

SETTINGS = [("lsq", {}), ("lsq", {"offset": True}), ("pact", {}), ("dorefa", {})]
EVERY_SETTING = pytest.mark.parametrize(("method", "options"), SETTINGS, ids=["lsq", "lsq+", "pact", "dorefa"])
EVERY_METHOD = pytest.mark.parametrize("method", [name for name in QUANTIZERS if name not in PARTS])


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


IMAGES = random(4, 3, 8, 8)


def network(layer=None):
    """Two convolutions and a Linear, with batch norm; ``layer`` takes the place of the second convolution, "3"."""
    torch.manual_seed(0)
    layer = layer or nn.Conv2d(4, 4, 3, padding=1)
    first = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
    return nn.Sequential(*first, layer, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5))


def quantized(model, *args, images=IMAGES, skip=(), **options):
    model = quantize_model(model, *args, skip=skip, **options)
    calibrate(model, images)
    assert_quantized(model, skip=skip)
    return model


def refused(*words):
    return pytest.raises(QuantizationError, match="[\\s\\S]*".join(words))


# --- 1. quantized is what computes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation_bits", [2, None])
def test_swin_whose_attention_reads_the_weights_itself(activation_bits):
    swin = torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [4, 4], num_classes=10)
    images = random(2, 3, 32, 32)
    model = quantize_model(swin, "lsq", 2, activation_bits)
    with refused(
        r"features\.1\.0\.attn\.qkv \(QuantizedLinear\)", "unquantized weight is read by something else", "skip"
    ):
        calibrate(model, images)
    with refused("features"):  # whoever goes on is stopped
        assert_quantized(model)
    reads = [name for name, _ in swin.named_modules() if name.endswith((".qkv", ".attn.proj"))]
    assert len(reads) == 4
    model = quantized(swin, "lsq", 2, activation_bits, images=images, skip=reads)
    assert not set(reads) & dict(quantized_layers(model)).keys()


def test_weights_only_and_never_calibrated():
    model = quantize_model(network(), "lsq", 2, None)
    with refused("layer 0 has computed nothing so far"):
        assert_quantized(model)
    model(IMAGES)
    assert_quantized(model)
    again = quantize_model(network(), "lsq", 2, None)
    again.load_state_dict(model.state_dict())  # which says that they have
    assert_quantized(again)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.auxiliary = nn.Conv2d(3, 3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize("activation_bits", [4, None])
def test_a_layer_that_is_never_called(activation_bits):
    model = quantize_model(Unused(), "lsq", 4, activation_bits).eval()
    before = copy.deepcopy(model.state_dict())
    with refused(r"auxiliary \(QuantizedLinear\): never called"):
        calibrate(model, IMAGES)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if "activation" in name)  # scales as before
    assert not model.training
    with refused("is not calibrated" if activation_bits else "auxiliary has computed nothing so far"):
        assert_quantized(model)
    quantized(Unused(), "lsq", 4, activation_bits, skip=["auxiliary"])


class Autoencoder(nn.Module):
    """Its decoder uses the encoder's weight."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(8, 4)

    def forward(self, x):
        return F.linear(self.encoder(x).relu(), self.encoder.weight.t())


@pytest.mark.parametrize("activation_bits", [4, None])
def test_tied_weights_that_are_read_a_second_time_without_the_layer(activation_bits):
    model = quantize_model(Autoencoder(), "lsq", 4, activation_bits)
    with refused("encoder", "read by something else"):
        calibrate(model, random(4, 8))
    if activation_bits is None:
        model(random(4, 8))
    with refused("encoder: the unquantized weight is read by something else"):
        assert_quantized(model)


def test_shapes_and_types_of_weights_may_be_asked_for():
    class Asks(nn.Linear):
        pass

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = Asks(8, 4)

        def forward(self, x):
            weight = self.fc.weight
            return self.fc(x.to(weight.dtype) + weight.new_zeros(8) + torch.zeros_like(weight[:1]) * len(weight))

    with refused("fc"):  # weight[:1] is a read
        calibrate(quantize_model(Model()), random(4, 8))
    Model.forward = lambda self, x: self.fc(x.to(self.fc.weight.dtype) + self.fc.weight.new_zeros(8))
    quantized(Model(), images=random(4, 8))


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.body(self.embedding(tokens)))


def test_an_embedding_that_shares_its_weight_with_a_linear():
    tokens = torch.arange(10).reshape(2, 5)
    with refused(r"embedding \(Embedding\): no Conv2d or Linear"):
        quantize_model(Language())
    model = quantized(Language(), images=tokens, skip=["embedding"])
    assert model.head.weight is model.embedding.weight


def test_attention_and_a_transformer_that_skips_its_layers_in_evaluation_mode():
    """nn.TransformerEncoderLayer calls its Linear layers in training, and a fused kernel on their weights in evaluation
    mode."""
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), random(2, 5, 8)
    with refused(r"self_attn \(MultiheadAttention\)"):
        quantize_model(layer)
    with refused("linear1", "linear2", "read by something else"):
        calibrate(quantize_model(layer, skip=["self_attn"]), x)
    layer = nn.TransformerEncoderLayer(8, 2, 16)  # has no fused kernel
    model = quantized(layer, images=x, skip=["self_attn"])
    assert dict(quantized_layers(model)).keys() == {"linear1", "linear2"}
    quantized(layer, images=x, skip=["self_attn", "self_attn.out_proj"])  # its parts may be named too


def damage_forward(layer):
    layer.forward = lambda x: F.conv2d(x, layer.weight, layer.bias, padding=1)


def damage_weights(layer):
    layer.weight_quantizer.forward = lambda weight: weight


def damage_inputs(layer):
    layer.activation_quantizer.forward = lambda x: x


def lose_weight_quantizer(layer):
    layer.weight_quantizer = nn.Identity()


def lose_activation_quantizer(layer):
    layer.activation_quantizer = nn.Identity()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_forward, "layer 3 has been given another forward"),
        (damage_weights, "layer 3 computes with 144 weights; 2 bits allow 4"),
        (damage_inputs, "layer 3 computes with 16 inputs; 2 bits allow 4"),
        (lose_weight_quantizer, "layer 3 has lost a quantizer"),
        (lose_activation_quantizer, "layer 3 has lost a quantizer"),
    ],
)
@EVERY_METHOD
def test_a_layer_that_computes_something_else_later(damage, message, method):
    model = quantized(network(), method, 2, 2)
    damage(model[3])
    with refused(message):
        assert_quantized(model)


# --- 2. carried over rightly, or refused by name ----------------------------------------------------------------------


class Padded(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class PaddedInside(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(F.pad(x, (1, 1, 1, 1)), weight, bias)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, (self.weight - self.weight.mean()) / self.weight.std(), self.bias)


class Raw(nn.Module):
    """A layer that is nobody's subclass."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(random(4, 4, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight)


def given_forward():
    layer = nn.Conv2d(4, 4, 3)
    layer.forward = lambda x: F.conv2d(x, layer.weight)
    return layer


def filled(value):
    layer = nn.Conv2d(4, 4, 3)
    nn.init.constant_(layer.weight, value)
    return layer


COMPUTED = "weight is computed"
REFUSED = {
    "padding in forward": (lambda: Padded(4, 4, 3), "Padded", "a forward of its own"),
    "padding in _conv_forward": (lambda: PaddedInside(4, 4, 3), "PaddedInside", "a forward of its own"),
    "weight standardisation": (lambda: Standardised(4, 4, 3), "Standardised", "a forward of its own"),
    "forward replaced": (given_forward, "Conv2d", "a forward of its own"),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 3), "ConvTranspose2d", "no Conv2d or Linear"),
    "no subclass": (Raw, "Raw", "no Conv2d or Linear"),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), "ParametrizedConv2d", COMPUTED),
    "old weight norm": (lambda: nn.utils.weight_norm(nn.Conv2d(4, 4, 3)), "Conv2d", COMPUTED),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), "ParametrizedConv2d", COMPUTED),
    "old spectral norm": (lambda: nn.utils.spectral_norm(nn.Conv2d(4, 4, 3)), "Conv2d", COMPUTED),
    "pruned": (lambda: prune.l1_unstructured(nn.Conv2d(4, 4, 3), "weight", 0.5), "Conv2d", COMPUTED),
    "norm and transposed": (lambda: nn.utils.weight_norm(nn.ConvTranspose2d(4, 4, 3)), "ConvTranspose2d", "no Conv2d"),
    "lazy": (lambda: nn.LazyConv2d(4, 3), "LazyConv2d", "no weight before the model has seen a batch"),
    "zero": (lambda: filled(0.0), "Conv2d", "weights that are all zero"),
    "tiny": (lambda: filled(1e-12), "QuantizedConv2d", "weights too small for a step"),
    "not finite": (lambda: filled(float("nan")), "Conv2d", "weights that are not finite"),
    "complex": (lambda: nn.Conv2d(4, 4, 3, dtype=torch.complex64), "Conv2d", r"weights of torch\.complex64"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated", "ignore:Lazy modules")
def test_a_layer_that_cannot_be_quantized_is_named_and_can_be_skipped(kind):
    make, name, reason = REFUSED[kind]
    with refused(rf"3 \({name}\)", reason, "skip"):
        quantize_model(network(make()))
    if kind in ("not finite", "complex"):  # nothing can be computed with it
        return
    model = network(make())
    expected = copy.deepcopy(type(model[3]))
    skipped = quantized(model, skip=["3"])
    assert type(skipped[3]) is expected or kind == "lazy"
    assert skipped(IMAGES).sum().backward() is None
    with refused(r"layer 3 \(.*\) is not quantized"):
        assert_quantized(skipped)


def test_every_layer_with_weights_is_named_and_nothing_else():
    refuse = nn.Conv1d(1, 1, 1), nn.Conv3d(1, 1, 1), nn.Bilinear(2, 2, 2), nn.Embedding(3, 1), nn.LSTM(2, 2)
    accept = nn.PReLU(4), nn.LayerNorm([3, 3]), nn.GroupNorm(2, 4), nn.InstanceNorm2d(3, affine=True), nn.Linear(2, 2)
    quantize_model(nn.Sequential(*accept))
    names = [rf"{i} \({type(layer).__name__}\)" for i, layer in enumerate(refuse)]
    with refused(*names):
        quantize_model(nn.Sequential(*refuse, *accept))
    with refused(r"1 \(LazyBatchNorm2d\)", "no weight before"):
        quantize_model(nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm2d()))


class Annotated(nn.Conv2d):
    """Derived, and computes as Conv2d does."""

    def __init__(self, *args, note, **options):
        super().__init__(*args, **options)
        self.note = note

    def describe(self):
        return f"{self.note}: {self.out_channels}"


def test_a_subclass_that_only_adds_to_conv2d_keeps_what_it_adds():
    layer = Annotated(4, 4, 3, note="mine")
    model = quantized(network(layer), "lsq", 2, 2)
    kept = model[3]
    assert isinstance(kept, QuantizedConv2d) and isinstance(kept, Annotated) and kept.describe() == "mine: 4"
    assert type(copy.deepcopy(model)[3]) is type(kept)
    plain = without_rounding(model)[3]
    assert type(plain) is Annotated and plain.describe() == "mine: 4" and type(layer) is Annotated


def test_hooks_attributes_and_what_is_frozen_stay():
    layer, calls = nn.Conv2d(4, 4, 3), []
    layer.register_forward_pre_hook(lambda module, inputs: calls.append("before"))
    layer.register_forward_hook(lambda module, inputs, output: calls.append("after") or 2 * output)
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    layer.learning_rate, layer.weight.requires_grad = 0.3, False
    model = quantized(network(layer))
    calls.clear()
    doubled = model[3](model[:3](IMAGES))
    doubled.sum().backward()
    assert calls == ["before", "after", "backward"]
    assert model[3].learning_rate == 0.3 and not model[3].weight.requires_grad
    expected = F.conv2d(model[3].activation_quantizer(model[:3](IMAGES)), model[3].quantized_weight(), model[3].bias)
    assert torch.equal(doubled, 2 * expected)
    smooth = without_rounding(model)
    calls.clear()
    smooth(IMAGES)
    assert calls == ["before", "after"] and smooth[3].learning_rate == 0.3


def test_a_pruned_bias_stays_pruned():
    layer = prune.l1_unstructured(nn.Conv2d(4, 4, 3), "bias", 0.5)
    model = quantized(network(layer))
    assert (model[3].bias == 0).sum() == 2


class TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = self.again = nn.Conv2d(3, 3, 3, padding=1)
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(self.again(self.first(x)).mean((2, 3)))


def test_a_layer_under_two_names_is_quantized_under_both():
    model = quantized(TwoNames(), "lsq", 2, 2)
    assert model.first is model.again and type(model.again) is QuantizedConv2d
    assert len(list(quantized_layers(model))) == 2
    smooth = without_rounding(model)
    assert smooth.first is smooth.again and type(smooth.again) is nn.Conv2d
    for name in ("first", "again"):
        skipped = quantized(TwoNames(), skip=[name])
        assert type(skipped.first) is type(skipped.again) is nn.Conv2d
    bits = [layer.weight_quantizer.bits for _, layer in quantized_layers(quantize_model(TwoNames(), last=["again"]))]
    assert bits == [8, 4]


@pytest.mark.parametrize("argument", ["skip", "last"])
def test_one_string_is_no_collection_of_names(argument):
    with refused(rf"{argument}='7' is one string", r"\['7'\]"):
        quantize_model(network(), **{argument: "7"})
    model = quantized(network())
    with refused("skip='7' is one string"):
        assert_quantized(model, skip="7")


def test_names_that_contradict_or_are_of_nothing():
    with refused("last=.'3'. names a layer that is not quantized"):
        quantize_model(network(), skip=["3"], last=["3"])
    for name in ("", "1", "2", "8", "weight"):
        with refused(f"layer {name!r} is no Conv2d or Linear, nor another layer with weights"):
            quantize_model(network(), skip=[name])
    with refused("layer '8' is no Conv2d or Linear"):
        assert_quantized(quantized(network()), skip=["8"])


def test_a_model_that_is_one_layer():
    model = quantized(nn.Linear(3, 2), images=random(4, 3))
    assert type(without_rounding(model)) is nn.Linear
    with refused("no Conv2d or Linear to quantize"):
        quantize_model(nn.Linear(3, 2), skip=[""])


def test_a_layer_may_be_called_by_keyword():
    model = quantized(nn.Linear(3, 2), images=random(4, 3))
    x = random(4, 3)
    assert torch.equal(model(input=x), model(x))
    smooth = without_rounding(model)
    assert torch.equal(smooth(input=x), smooth(x))


# --- 3. all calls of a layer count ------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One layer that sees wide inputs first, and narrow ones that are not negative at last."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        narrow = x[:, :, ::2, ::2].abs() / 100
        x = 10 * x
        return self.conv(x).mean() + self.conv(narrow).mean()


@pytest.mark.parametrize(
    ("method", "options", "scale"),
    [
        ("lsq", {}, lambda x: 2 * x.abs().mean() / 127**0.5),
        ("lsq", {"offset": True}, lambda x: 2 * (x - x.min()).mean() / 255**0.5),
        ("pact", {}, lambda x: 4 * x.square().mean().sqrt()),
        ("dorefa", {}, lambda x: x.abs().max()),
    ],
    ids=["lsq", "lsq+", "pact", "dorefa"],
)
def test_a_layer_that_is_called_twice_is_calibrated_by_both(method, options, scale):
    quantizer = quantized(Twice(), method, **options).conv.activation_quantizer
    inputs = torch.cat([(10 * IMAGES).flatten(), (IMAGES[:, :, ::2, ::2].abs() / 100).flatten()])
    found = quantizer.step if method == "lsq" else quantizer.alpha
    assert quantizer.signed and found.item() == pytest.approx(scale(inputs).item(), rel=1e-5)


def test_inputs_that_are_changed_in_place_count_as_they_were():
    class InPlace(Twice):
        def forward(self, x):
            x = x.clone()
            first = self.conv(x)
            return first.mean() + self.conv(x.mul_(0.001)).mean()

    quantizer = quantized(InPlace()).conv.activation_quantizer
    inputs = torch.cat([IMAGES, IMAGES * 0.001])
    assert quantizer.step.item() == pytest.approx(2 * inputs.abs().mean().item() / 127**0.5, rel=1e-5)


# --- 4. nothing to calibrate with, and scales that die ----------------------------------------------------------------


@EVERY_METHOD
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(4, 3, 8, 8), "all zero"),
        (torch.full((4, 3, 8, 8), float("nan")), "not finite"),
        (IMAGES.where(IMAGES < 2, float("inf")), "not finite"),
        (IMAGES[:0], "empty"),
    ],
    ids=["zeros", "NaN", "infinite", "empty"],
)
def test_a_batch_that_says_nothing_about_scales(method, images, message):
    model = quantized(network(), method)
    before = copy.deepcopy(model.state_dict())
    with refused(rf"layer 0: the calibration batch .*{message}"):
        calibrate(model, images)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert_quantized(model)  # with the scales that it had


def test_a_layer_whose_input_is_dead_is_named():
    model = network()
    nn.init.constant_(model[1].weight, 0.0)
    nn.init.constant_(model[1].bias, -1.0)
    with refused("layer 3: the calibration batch is all zero"):
        calibrate(quantize_model(model), IMAGES)


@pytest.mark.parametrize(("method", "options"), SETTINGS[:3], ids=["lsq", "lsq+", "pact"])
def test_inputs_too_small_for_a_step(method, options):
    with refused("layer 0: the calibration batch gives no usable step"):
        calibrate(quantize_model(network(), method, **options), IMAGES * 1e-9)


def test_a_quantizer_that_a_model_has_by_itself_is_calibrated_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), LSQActivation(4), nn.Flatten(), nn.Linear(144, 2))
    calibrate(model, IMAGES)
    assert model[1].signed and model[1].step != 1
    with refused("layer 1: the calibration batch has values that are not finite"):
        calibrate(model, IMAGES / 0)
    calibrate(quantize_model(model), IMAGES)


def test_calibrating_again_replaces_what_was_there():
    model = quantized(network(), "dorefa")
    calibrate(model, IMAGES.abs())
    assert model[0].activation_quantizer.signed is False
    assert model[0].activation_quantizer.alpha == 1  # DoReFa's own range, not that of the signed inputs before


RECIPE = {"epochs": 2, "batch_size": 32, "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
RECIPE |= {"alpha_decay": 5e-4, "schedule": "one-cycle", "augment": False}


@pytest.mark.parametrize("value", [0.0, 1e-8, float("nan")])
@pytest.mark.parametrize(("method", "dies"), [("lsq", "0.weight_quantizer"), ("pact", "3.activation_quantizer")])
def test_training_ends_with_the_epoch_in_which_a_scale_dies(tiny, monkeypatch, method, dies, value):
    model = quantize_model(nn.Sequential(*network()[:-1], nn.Linear(16, 10)), method)
    train_epoch, epochs = training._train_epoch, []

    def kill(trained, *rest):
        epochs.append(1)
        images = train_epoch(trained, *rest)
        with torch.no_grad():
            if len(epochs) == 2:
                next(trained.get_submodule(dies).parameters()).fill_(value)
        return images

    monkeypatch.setattr(training, "_train_epoch", kill)
    monkeypatch.setattr(training, "_epoch_rows", lambda *_: [{"split": "val", "loss": 1.0}])
    with pytest.raises(FloatingPointError, match=rf"a scale has died after epoch 1 of 2 \(seed 3\): {dies}$"):
        training.fit(model, tiny, ClassificationRecipe(**RECIPE), seed=3)


def test_a_detectors_training_ends_with_the_epoch_in_which_a_scale_dies():
    YOLOTraining = pytest.importorskip("qreg_utils.detection.training").YOLOTraining
    model = quantized(network())
    trainer = SimpleNamespace(epoch_started=0.0, tloss={}, model=model, epoch=4, epochs=9, args=SimpleNamespace(seed=3))
    trainer.fail = lambda problem: YOLOTraining.fail(trainer, problem)
    YOLOTraining.check_epoch(trainer)
    model[3].activation_quantizer.step.data.fill_(1e-8)
    with pytest.raises(FloatingPointError, match=r"died \(3\.activation_quantizer\) in epoch 4 of 9 \(seed 3\)"):
        YOLOTraining.check_epoch(trainer)


def test_a_healthy_model_has_no_dead_scales():
    for method, options in SETTINGS:
        assert dead_scales(quantized(network(), method, **options)) == []
    assert dead_scales(network()) == []


# --- 5. bits, method and sign travel with the state -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved", "loaded", "difference"),
    [
        (("lsq", 8, 8), ("lsq", 2, 2), r"3\.weight_quantizer: .*bits 8, not 2"),
        (("lsq", 4, 8), ("lsq", 4, 2), r"3\.activation_quantizer: .*bits 8, not 2"),
        (("pact", 4, 4), ("dorefa", 4, 4), r"3\.activation_quantizer: .*method pact, not dorefa"),
        (("dorefa", 4, None), ("pact", 4, None), r"3\.weight_quantizer: .*method dorefa, not pact"),
        (("lsq", 4, 4, 8), ("lsq", 4, 4, 4), r"0\.weight_quantizer: .*bits 8, not 4"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_state_of_other_bits_or_another_method(saved, loaded, difference, strict):
    state = quantized(network(), *saved).state_dict()
    with pytest.raises(RuntimeError, match=difference):
        quantize_model(network(), *loaded).load_state_dict(state, strict=strict)
    quantize_model(network(), *saved).load_state_dict(state, strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_with_and_without_offsets(strict):
    states = {offset: quantized(network(), offset=offset).state_dict() for offset in (True, False)}
    for offset in (True, False):
        with pytest.raises(RuntimeError, match=rf"3\.activation_quantizer: .*offset {offset}, not {not offset}"):
            quantize_model(network(), offset=not offset).load_state_dict(states[offset], strict=strict)


def test_a_signed_state_and_an_unsigned_model():
    signed = quantized(network())
    unsigned = quantized(network(), images=IMAGES.abs())
    with pytest.raises(RuntimeError, match=r"0\.activation_quantizer: .*signed levels.*calibrated to unsigned ones"):
        unsigned.load_state_dict(signed.state_dict())
    fresh = quantize_model(network())
    fresh.load_state_dict(signed.state_dict())
    assert [layer.activation_quantizer.signed for _, layer in quantized_layers(fresh)] == [True, False, False]
    fresh.eval(), signed.eval()
    assert torch.equal(fresh(IMAGES), signed(IMAGES))
    assigned = quantize_model(network())
    assigned.load_state_dict(signed.state_dict(), assign=True)
    assert torch.equal(assigned.eval()(IMAGES), signed(IMAGES))


def test_a_state_that_does_not_say_what_it_is_of():
    state = quantized(network()).state_dict()
    for damaged in (
        {name: value for name, value in state.items() if "_extra_state" not in name},
        state | {name: torch.tensor(1) for name in state if "_extra_state" in name},
    ):
        with pytest.raises(RuntimeError, match=r"3\.weight_quantizer: the state has neither method nor bits"):
            quantize_model(network()).load_state_dict(damaged, strict=False)
    weights = {name: value for name, value in state.items() if "quantizer" not in name}
    quantize_model(network()).load_state_dict(weights, strict=False)  # of a full-precision network, say


def test_bits_may_be_numbers_of_numpy():
    model = quantize_model(network(), "lsq", np.int64(4), np.int64(4))
    model.load_state_dict(quantize_model(network(), "lsq", 4, 4).state_dict())


def test_every_entry_of_the_state_is_a_tensor_and_a_model_can_be_pickled():
    """Moving averages and other tools ask every entry for its type."""
    model = quantized(network(), "pact").eval()
    assert all(isinstance(value, torch.Tensor) for value in model.state_dict().values())
    assert torch.equal(pickle.loads(pickle.dumps(model))(IMAGES), model(IMAGES))


def wrap_on_each_rank(rank, folder):
    """Saves, for each case, the signs of the model and its outputs."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = []
    for calibrated, compiled in (((0, 1), True), ((0, 1), False), ((0,), False)):
        model = quantize_model(network()).eval()
        if rank in calibrated:
            calibrate(model, IMAGES if rank else IMAGES.abs())
        wrapped = nn.parallel.DistributedDataParallel(model)
        first = torch.compile(wrapped, backend="eager") if compiled else wrapped
        outputs = first(IMAGES).detach(), model(IMAGES).detach()
        found.append(([layer.activation_quantizer.signed for _, layer in quantized_layers(model)], outputs))
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_after_ddp_every_rank_has_the_signs_of_the_first(tmp_path):
    """Whether the others calibrated on images with another sign or not at all, compiled or not."""
    context = torch.multiprocessing.get_context("spawn")
    ranks = [context.Process(target=wrap_on_each_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=500)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for (signs, outputs), (other_signs, other_outputs) in zip(first, second, strict=True):
        assert signs == other_signs == [False, False, False]
        for output in (*outputs, *other_outputs):
            torch.testing.assert_close(output, outputs[0])


# --- 6. gradients of scales -------------------------------------------------------------------------------------------


def test_scales_without_a_gradient_are_left_alone():
    model = quantized(network())
    frozen = model[3].activation_quantizer.step.requires_grad_(False)
    model(IMAGES).sum().backward()
    model[0].weight_quantizer.step.grad = None  # of a layer that was not used
    before = frozen.item()
    optimizer = torch.optim.SGD(parameter_groups(model, 0.0), 0.1)
    limit_scale_gradients(learned_scales(model))
    optimizer.step()
    assert frozen.item() == before and model[3].weight_quantizer.step.grad is not None
    optimizer.zero_grad()
    limit_scale_gradients(learned_scales(model))  # not one has


def step_of_the_optimizer(scaler):
    """The docstring's order."""
    model = quantized(network())
    optimizer = torch.optim.SGD(parameter_groups(model, 0.0), 0.1)
    loss = model(IMAGES).square().mean()
    if scaler:
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        limit_scale_gradients(learned_scales(model))
        scaler.step(optimizer)
        scaler.update()
    else:
        loss.backward()
        limit_scale_gradients(learned_scales(model))
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_with_a_grad_scaler_the_steps_are_those_without():
    scaled = step_of_the_optimizer(torch.amp.GradScaler("cpu", init_scale=2.0**16))
    torch.testing.assert_close(scaled, step_of_the_optimizer(None))


# --- 7. tracing, export, per-sample gradients, precisions -------------------------------------------------------------


def gradients_of(model, images):
    model.zero_grad()
    model(images).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@EVERY_SETTING
def test_fx_traces_values_and_gradients(method, options):
    """Of a Function's inside fx would record the rounding, whose derivative is 0."""
    model = quantized(network(), method, **options).eval()
    traced = fx.symbolic_trace(copy.deepcopy(model))
    for images in (IMAGES, IMAGES[:1]):  # the batch is not a constant
        assert torch.equal(traced(images), model(images))
        expected, found = gradients_of(model, images), gradients_of(traced, images)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


@EVERY_SETTING
def test_feature_extraction_of_torchvision(method, options):
    model = quantized(network(), method, **options).eval()
    features = create_feature_extractor(model, {"2": "relu", "7": "classes"})(IMAGES)
    assert torch.equal(features["relu"], model[:3](IMAGES)) and torch.equal(features["classes"], model(IMAGES))


DYNAMIC = ({0: torch.export.Dim("batch", min=1)},)


@EVERY_SETTING
@pytest.mark.parametrize("activation_bits", [4, None])
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch(method, options, activation_bits, strict):
    model = quantized(network(), method, 4, activation_bits, **options).eval()
    exported = torch.export.export(model, (IMAGES,), dynamic_shapes=DYNAMIC, strict=strict).module()
    for count in (1, 3, 4):
        torch.testing.assert_close(exported(IMAGES[:count]), model(IMAGES[:count]))


def test_a_model_that_has_just_been_loaded_can_be_exported():
    saved, model = quantized(network()).eval(), quantize_model(network()).eval()
    model.load_state_dict(saved.state_dict())
    torch.testing.assert_close(torch.export.export(model, (IMAGES,)).module()(IMAGES), saved(IMAGES))


@EVERY_SETTING
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_agrees_with_eager(method, options, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = quantized(network(), method, **options).eval()
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (IMAGES,), path, dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)
    session = onnxruntime.InferenceSession(path)
    for count in (1, 4):
        (found,) = session.run(None, {session.get_inputs()[0].name: IMAGES[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(IMAGES[:count]), rtol=0, atol=1e-5)


@EVERY_SETTING
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_per_sample_gradients_by_vmap(method, options):
    model = quantized(network().double(), method, images=IMAGES.double(), **options).eval()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, IMAGES.double())
    for i, image in enumerate(IMAGES.double()):
        for name, expected in gradients_of(model, image[None]).items():
            torch.testing.assert_close(found[name][i], expected)


@EVERY_METHOD
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_an_ensemble_by_vmap_cannot_have_signs_of_its_own(method):
    model = quantized(network(), method).eval()
    parameters, buffers = torch.func.stack_module_state([model, model])

    def outputs(parameters, buffers):
        return torch.func.functional_call(model, (parameters, buffers), (IMAGES,))

    with pytest.raises(RuntimeError, match="buffer 'sign' of an activation quantizer"):
        torch.func.vmap(outputs)(parameters, buffers)
    shared = {name: value for name, value in buffers.items() if not name.endswith(".sign")}
    torch.testing.assert_close(torch.func.vmap(outputs)(parameters, shared)[1], model(IMAGES))


@EVERY_SETTING
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_other_precisions(method, options, dtype, scale):
    """Also with scales that have become 0: 1e-8, their floor, is 0 in half precision."""
    images = IMAGES.to(dtype)
    model = quantized(network().to(dtype), method, images=images, **options)
    with torch.no_grad():
        for parameter in learned_scales(model):
            parameter.mul_(scale)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    output = model(images)
    output.float().square().mean().backward()
    assert output.dtype == dtype and output.isfinite().all()
    if scale:
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_calibration_in_half_precision_does_not_overflow():
    images = 1000 * IMAGES.half()
    quantizer = quantized(network().half(), "pact", images=images)[0].activation_quantizer
    assert quantizer.alpha.item() == pytest.approx(4000 * IMAGES.square().mean().sqrt().item(), rel=0.01)


@EVERY_SETTING
def test_an_image_without_a_batch_has_the_gradients_of_a_batch_of_one(method, options):
    model = quantized(network()[3:5], method, images=random(2, 4, 8, 8), **options)
    image = random(4, 8, 8)
    expected, found = gradients_of(model, image[None]), gradients_of(model, image)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    model = quantized(nn.Linear(5, 3), method, images=random(4, 5), **options)
    expected, found = gradients_of(model, random(1, 5)), gradients_of(model, random(5))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@EVERY_SETTING
def test_a_batch_without_images(method, options):
    model = quantized(network(), method, **options).eval()
    output = model(IMAGES[:0])
    output.sum().backward()
    assert output.shape == (0, 5) and all(not parameter.grad.any() for parameter in model.parameters())


def test_the_gradient_scale_of_a_sequence_counts_its_whole_sample():
    quantizer = LSQActivation(4)
    quantizer.calibrate(random(2, 7, 5).abs())
    quantizer(torch.full((3, 7, 5), 100.0)).sum().backward()
    assert quantizer.step.grad.item() == pytest.approx(3 * 7 * 5 * 15 / (7 * 5 * 15) ** 0.5)


# --- calibration leaves everything else alone -------------------------------------------------------------------------


def test_calibration_draws_nothing_from_the_global_random_state():
    model = quantize_model(network(nn.Sequential(nn.Dropout(0.5), nn.Conv2d(4, 4, 3))))
    state = torch.get_rng_state()
    calibrate(model, IMAGES)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("activation_bits", [4, None])
def test_calibration_leaves_every_mode_and_statistic(activation_bits):
    model = quantize_model(network(), "lsq", 4, activation_bits).train()
    model[1].eval()  # a frozen batch norm
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if name.startswith("1.")}
    calibrate(model, IMAGES)
    assert [module.training for module in model] == [True, False] + [True] * 6
    assert all(torch.equal(model.get_buffer(name), value) for name, value in before.items())
    assert not model[0]._forward_pre_hooks and "quantized_weight" not in vars(model[0])
