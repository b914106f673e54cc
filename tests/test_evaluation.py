import base64
import copy
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from qreg_utils import evaluation
from qreg_utils.compiling import compiler_works
from qreg_utils.corruptions import CORRUPTIONS, corrupt
from qreg_utils.evaluation import (
    best_temperature,
    calibration_error,
    corrupted_test_images,
    evaluate,
    rotating_severities,
    scores_of,
)
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
from qreg_utils.training import measure, outputs_on


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
    rows = evaluate({0: model, 7: copy.deepcopy(model)}, tiny, corrupted, [1, 4], quantized=True)["metrics"]
    keys = [(row["seed"], row["corruption"], row["severity"], row["metric"]) for row in rows]
    assert len(set(keys)) == len(keys) == 2 * (1 + 19 * 2) * 4
    assert {key[1] for key in keys} == {CLEAN, *CORRUPTIONS}
    values = {key: row["value"] for key, row in zip(keys, rows, strict=True)}
    fog = measure(model, tiny, corrupt(tiny.test_images, "fog", 4), tiny.test_labels)
    assert values[7, "fog", 4, "accuracy"] == pytest.approx(fog["accuracy"])
    clean = measure(model, tiny, tiny.test_images, tiny.test_labels)
    assert values[0, CLEAN, 0, "loss"] == pytest.approx(clean["loss"])


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
        evaluate({0: model}, tiny, corrupted, [3], quantized=method != "fp32", corruptions=["fog"], compile=compile)[
            "metrics"
        ]
        for compile in (False, True)
    )
    for a, b in zip(eager, compiled, strict=True):
        assert b == {**a, "value": pytest.approx(a["value"], abs=1e-2 if a["metric"] == "ece" else 1e-3)}


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
    rows = evaluate({0: model}, part, corrupted, [2], quantized=True)["metrics"]
    loss = {row["corruption"]: row["value"] for row in rows if row["metric"] == "loss"}
    expected = measure(model, tiny, corrupted.images("fog", 2)[:20], tiny.test_labels[:20])
    assert loss["fog"] == pytest.approx(expected["loss"])
    clean = measure(model, tiny, tiny.test_images[:20], tiny.test_labels[:20])
    assert loss[CLEAN] == pytest.approx(clean["loss"])


def unpacked(row):
    """Which images a row says are classified right: bool (N,)."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(row["correct"]), dtype=np.uint8), count=row["images"])
    return torch.from_numpy(bits.astype(bool))


def test_which_images_are_right_is_kept(tiny, model, corrupted):
    found = evaluate({0: model}, tiny, corrupted, [3], quantized=True, corruptions=["fog"])
    accuracy = {row["corruption"]: row["value"] for row in found["metrics"] if row["metric"] == "accuracy"}
    assert [row["corruption"] for row in found["images"]] == [CLEAN, "fog"]
    for row in found["images"]:
        right = unpacked(row)
        assert len(right) == len(tiny.test_labels)
        assert 100 * right.double().mean().item() == pytest.approx(accuracy[row["corruption"]])
    logits = outputs_on(model, tiny, corrupted.images("fog", 3))
    assert torch.equal(unpacked(found["images"][1]), logits.argmax(1) == tiny.test_labels)


def test_with_rotating_severities_each_image_is_measured_at_one_of_each_corruption(tiny, model, corrupted):
    names = ["fog", "snow", "spatter"]
    rotating = evaluate({0: model}, tiny, corrupted, "rotating", quantized=True, corruptions=names)
    every = evaluate({0: model}, tiny, corrupted, [1, 2, 3, 4, 5], quantized=True, corruptions=names)
    right = {(row["corruption"], row["severity"]): unpacked(row) for row in every["images"]}
    count = len(tiny.test_labels)
    for position, name in enumerate(names, start=1):
        severities = rotating_severities(count, position)
        assert severities.bincount(minlength=6)[1:].tolist() == pytest.approx([count / 5] * 5, abs=1)
        for severity in range(1, 6):
            (row,) = [r for r in rotating["images"] if (r["corruption"], r["severity"]) == (name, severity)]
            assert torch.equal(unpacked(row), right[name, severity][severities == severity])
    assert rotating_severities(5, 0).tolist() != rotating_severities(5, 1).tolist()
    clean = [
        {row["metric"]: row["value"] for row in found["metrics"] if not row["severity"]} for found in (rotating, every)
    ]
    assert clean[0] == clean[1]


def test_the_calibration_error_is_that_of_its_definition():
    """Two bins by hand: 4 images of confidence 0.9, of which 3 are right, and 2 of 0.6, of which none is."""
    confidence, right = torch.tensor([0.9] * 4 + [0.6] * 2), torch.tensor([1, 1, 1, 0, 0, 0])
    outputs = torch.stack([confidence, 1 - confidence], 1).log()
    assert calibration_error(outputs, 1 - right) == pytest.approx(100 * (4 * 0.15 + 2 * 0.6) / 6, rel=1e-5)


def test_the_temperature_undoes_what_logits_were_multiplied_by():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    assert best_temperature(logits, labels) == pytest.approx(1, rel=0.1)
    assert best_temperature(3 * logits, labels) == pytest.approx(3 * best_temperature(logits, labels), rel=1e-3)
    scaled = scores_of(3 * logits, labels, best_temperature(3 * logits, labels))
    assert scaled["scaled_loss"] == pytest.approx(scores_of(logits, labels, 1.0)["loss"], abs=0.01)
    assert scaled["scaled_loss"] < scaled["loss"]
