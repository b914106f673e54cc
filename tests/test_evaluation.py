import copy
import shutil
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from qreg_utils.corruptions import CORRUPTIONS, corrupt
from qreg_utils.evaluation import corrupted_test_images, evaluate
from qreg_utils.metrics import CLEAN
from qreg_utils.models import build_model
from qreg_utils.quantize import QuantizationError, calibrate, quantize_model
from qreg_utils.training import measure


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
