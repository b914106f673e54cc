import copy
import shutil
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from qreg_utils import evaluation
from qreg_utils.compiling import compiler_works
from qreg_utils.corruptions import CORRUPTIONS, corrupt
from qreg_utils.evaluation import corrupted_test_images, evaluate
from qreg_utils.metrics import CLEAN
from qreg_utils.models import build_model
from qreg_utils.quantize import (
    QuantizationError,
    assert_quantized,
    calibrate,
    quantize_model,
    quantized_layers,
    weights_quantized_once,
)
from qreg_utils.training import measure


@pytest.fixture(scope="module")
def compiler():
    if not compiler_works(torch.device("cpu")):
        pytest.skip("needs a C++ compiler")


@pytest.fixture(scope="module")
def model(tiny):
    model = quantize_model(build_model("resnet8", seed=0), "lsq", 4, 4)
    calibrate(model, tiny.normalise(tiny.train_images))
    return model


@pytest.fixture
def corrupted(tiny, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("QREG_DATA", str(tmp_path_factory.getbasetemp() / "data"))
    return corrupted_test_images(tiny)


def test_measure_is_accuracy_and_mean_cross_entropy(tiny, model):
    result = measure(model, tiny, tiny.test_images, tiny.test_labels, batch_size=7)
    logits = model.eval()(tiny.normalise(tiny.test_images))
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, tiny.test_labels).item(), rel=1e-5)
    correct = (logits.argmax(1) == tiny.test_labels).float().mean().item()
    assert result["accuracy"] == pytest.approx(100 * correct)


def test_rows_cover_clean_and_every_corruption_and_severity_of_each_seed(tiny, model, corrupted):
    rows = evaluate({0: model, 7: copy.deepcopy(model)}, tiny, corrupted, [1, 4], quantized=True)
    keys = [(row["seed"], row["corruption"], row["severity"], row["metric"]) for row in rows]
    assert len(set(keys)) == len(keys) == 2 * (1 + 19 * 2) * 2
    assert {key[1] for key in keys} == {CLEAN, *CORRUPTIONS}
    values = {key: row["value"] for key, row in zip(keys, rows, strict=True)}
    fog = measure(model, tiny, corrupt(tiny.test_images, "fog", 4), tiny.test_labels)
    assert values[7, "fog", 4, "accuracy"] == fog["accuracy"]
    clean = measure(model, tiny, tiny.test_images, tiny.test_labels)
    assert values[0, CLEAN, 0, "loss"] == clean["loss"]


def test_a_model_that_lost_its_quantization_is_not_measured(tiny, model, corrupted):
    broken = copy.deepcopy(model)
    broken.fc.weight_quantizer = torch.nn.Identity()
    broken.fc.weight_quantizer.bits = 2
    with pytest.raises(QuantizationError, match="fc"):
        evaluate({0: broken}, tiny, corrupted, [1], quantized=True)
    with pytest.raises(QuantizationError):
        evaluate({0: build_model("resnet8")}, tiny, corrupted, [1], quantized=True)


def test_weights_are_quantized_once_for_an_evaluation(tiny, model, corrupted, monkeypatch):
    calls, quantize = [], type(model.fc.weight_quantizer).forward
    monkeypatch.setattr(type(model.fc.weight_quantizer), "forward", lambda *args: calls.append(1) or quantize(*args))
    evaluate({0: model}, tiny, corrupted, [1], quantized=True)
    assert len(calls) == len(dict(quantized_layers(model)))
    assert all(layer.kept_weight is None for _, layer in quantized_layers(model))


def test_what_is_kept_is_what_is_checked(model):
    with weights_quantized_once(model):
        model.fc.kept_weight = model.fc.kept_weight + torch.randn_like(model.fc.kept_weight)
        with pytest.raises(QuantizationError, match="fc computes with"):
            assert_quantized(model)
    assert_quantized(model)


def test_after_an_error_weights_are_quantized_in_every_pass_again(model):
    with pytest.raises(ZeroDivisionError), weights_quantized_once(model):
        raise ZeroDivisionError
    assert model.fc.kept_weight is None


@pytest.mark.parametrize("method", ["fp32", "lsq"])
def test_compiled_and_eager_agree(tiny, corrupted, compiler, method):
    """Logits to 1e-4 in float32. 48 images, batches of 128: a batch that is not full is filled up, and cut again."""
    model = build_model("resnet8", seed=0)
    model = model if method == "fp32" else quantize_model(model, method, 4, 4)
    calibrate(model, tiny.normalise(tiny.train_images))
    x = tiny.normalise(tiny.test_images).contiguous(memory_format=torch.channels_last)
    model.eval().to(memory_format=torch.channels_last)
    logits = evaluation._logits_of(model, True, torch.device("cpu"))
    with torch.inference_mode(), weights_quantized_once(model):
        torch.testing.assert_close(logits(model, x), model(x), rtol=0, atol=1e-4)
    eager, compiled = (
        evaluate({0: model}, tiny, corrupted, [3], quantized=method != "fp32", corruptions=["fog"], compile=compile)
        for compile in (False, True)
    )
    for a, b in zip(eager, compiled, strict=True):
        assert b == {**a, "value": pytest.approx(a["value"], abs=1e-3)}


def test_long_evaluations_are_compiled(tiny, model, corrupted, monkeypatch):
    asked, logits_of = [], evaluation._logits_of
    monkeypatch.setattr(evaluation, "compiler_works", lambda device: True)
    monkeypatch.setattr(
        evaluation,
        "_logits_of",
        lambda model, compile, device: asked.append(compile) or logits_of(model, False, device),
    )
    images = 2 * len(tiny.test_labels)  # of the clean set and of fog
    for compiled_from in (images, images + 1):
        monkeypatch.setattr(evaluation, "COMPILE_FROM_IMAGES", compiled_from)
        evaluate({0: model}, tiny, corrupted, [1], quantized=True, corruptions=["fog"], compile="auto")
    evaluate({0: model}, tiny, corrupted, [1], quantized=True, corruptions=["fog"], compile=True)
    evaluate({0: model}, tiny, corrupted, [1], quantized=True, corruptions=["fog"])
    assert asked == [True, False, True, False]


def test_corrupted_images_are_ours_unless_the_published_ones_are_there(tiny, corrupted, monkeypatch, tmp_path):
    assert corrupted.source.startswith("made by qreg")
    cifar10 = replace(tiny, name="cifar10")
    monkeypatch.setenv("QREG_DATA", str(tmp_path))
    assert corrupted_test_images(cifar10).folder.is_relative_to(tmp_path / "corrupted" / "cifar10")
    shutil.copytree(corrupted.folder, tmp_path / "CIFAR-10-C")
    found = corrupted_test_images(cifar10)
    assert (found.folder, found.source) == (tmp_path / "CIFAR-10-C", "CIFAR-10-C, as downloaded")
    assert torch.equal(found.images("fog", 2), corrupted.images("fog", 2))


def test_of_a_part_of_the_test_images_the_same_corrupted_images_are_measured(tiny, model, corrupted):
    part = tiny.subset(None, 20)
    rows = evaluate({0: model}, part, corrupted, [2], quantized=True)
    loss = {row["corruption"]: row["value"] for row in rows if row["metric"] == "loss"}
    expected = measure(model, tiny, corrupted.images("fog", 2)[:20], tiny.test_labels[:20])
    assert loss["fog"] == expected["loss"]
    assert loss[CLEAN] == measure(model, tiny, tiny.test_images[:20], tiny.test_labels[:20])["loss"]
