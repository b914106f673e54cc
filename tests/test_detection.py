"""YOLOv5n: trained alike at every level, resumed bit for bit, and measured as it was trained: ultralytics folds batch
norms, keeps a moving average and halves its checkpoints, and each of these can distort a quantized network silently."""

import contextlib
import copy
import functools
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torch.nn import functional as F

pytest.importorskip("qreg_utils.detection")  # before ultralytics: it sets the environment

from ultralytics.engine import trainer as ultralytics_trainer
from ultralytics.models.yolo.detect import DetectionPredictor, DetectionValidator
from ultralytics.nn.autobackend import AutoBackend
from ultralytics.nn.modules import DFL, Conv
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import nms, torch_utils

from qreg_utils.checkpoints import CheckpointError
from qreg_utils.corruptions import CORRUPTIONS, corrupt
from qreg_utils.detection import evaluation, training
from qreg_utils.detection.datasets import DetectionDataset, LabelledImage
from qreg_utils.detection.evaluation import BoxDataset, Validator, detect, evaluate
from qreg_utils.detection.training import YOLOTraining, fit
from qreg_utils.detection.yolo import (
    YOLOv5n,
    assert_as_trained,
    build_detector,
    constant_layers,
    head_outputs,
    quantize_detector,
)
from qreg_utils.names import CLEAN
from qreg_utils.quantize import QuantizationError, assert_quantized, calibrate, quantized_layers
from qreg_utils.quantizers import ActivationQuantizer
from qreg_utils.recipe import DetectionRecipe

EVERY_SETTING = pytest.mark.parametrize("method", ["fp32", "lsq", "pact", "dorefa"])
EVERY_METHOD = pytest.mark.parametrize("method", ["lsq", "pact", "dorefa"])
FP32_AND_LSQ = pytest.mark.parametrize("method", ["fp32", "lsq"])

CLASSES = ("cat", "dog", "cow")
EVENTS = "ultralytics.utils.events"  # disabled: see test_ultralytics_keeps_to_itself
SIZE = 32
RECIPE = {
    "image_size": SIZE,
    "epochs": 2,
    "batch_size": 4,
    "learning_rate": 0.002,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "alpha_decay": 7e-4,
    "schedule": "linear",
    "warmup_epochs": 0.5,
    "augment": True,
}


@pytest.fixture(scope="module", autouse=True)
def _offline_on_a_cpu():
    """No test talks to the world, whatever ultralytics tries (one test below sees to it that it does not try), and all
    compute on the CPU, where the same numbers come out bit for bit."""

    def refuse(*args, **kwargs):
        raise OSError("these tests run offline")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.getaddrinfo", refuse)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


def make_images(folder, seed, count, shapes=((SIZE, SIZE),)):
    """Blurred noise, tinted by its class. An object fills the image; every third has a small one too; one has none."""
    folder.mkdir()
    rng, images = np.random.default_rng(seed), []
    for number in range(count):
        height, width = shapes[number % len(shapes)]
        pixels = rng.integers(0, 200, (height // 4, width // 4, 3)).repeat(4, 0).repeat(4, 1)
        pixels[..., number % 3] += 55
        file = folder / f"{number:03}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(file)
        objects = [(number % 3, 0.5, 0.5, 1, 1), (rng.integers(3), 0.3, 0.4, 0.25, 0.5)]
        objects = np.array(objects[: 0 if number == 4 else 2 if number % 3 == 0 else 1]).reshape(-1, 5)
        boxes = objects[:, 1:].astype(np.float32)
        images.append(LabelledImage(file.absolute(), height, width, objects[:, 0].astype(np.int64), boxes))
    return tuple(images)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    train, test = make_images(folder / "train", 0, 10), make_images(folder / "test", 1, 9)
    return DetectionDataset("animals", train, test, CLASSES, flip=True)


@functools.cache
def first_model(seed):
    """A detector that sees objects as large as the image from the start, so that there is something to measure: batch
    norms have statistics, boxes of the coarsest scale span the image, the scores of the others are low."""
    model = build_detector(3, seed=seed)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momentum = norms[0].momentum
    pictures = torch.rand(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for share in (1.0, momentum):
        for norm in norms:
            norm.momentum = share
        model(F.interpolate(pictures, SIZE))
    head = model.model[-1]
    with torch.no_grad():
        for box, scores, level in zip(head.cv2, head.cv3, (-9, -9, -1), strict=True):
            box[2].bias.view(4, 16)[:] = torch.tensor([9.0, 9.0] + [0.0] * 14)  # half a stride to each side
            scores[2].bias.fill_(level)
    return model


def train(model, data, *, seed, checkpoint=None, **recipe):
    return fit(model, data, DetectionRecipe(**recipe), seed=seed, checkpoint=checkpoint)


def make(method="lsq", seed=0):
    model = copy.deepcopy(first_model(seed))
    return model if method == "fp32" else quantize_detector(model, method, 4, 4)


def pixels_of(images):
    """uint8 (N, 3, H, W) of the files."""
    return torch.stack([torch.from_numpy(np.array(Image.open(image.file))).permute(2, 0, 1) for image in images])


@contextlib.contextmanager
def stopped_after(epoch):
    """The run is interrupted when ``epoch`` (from 0) has been saved."""

    def show_progress(trainer):
        if trainer.epoch == epoch:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(YOLOTraining, "show_progress", show_progress)
        with pytest.raises(KeyboardInterrupt):
            yield


def keep_batches(model):
    """A list that grows with the images that ``model`` is trained on."""
    batches = []

    def keep(module, inputs):
        if isinstance(inputs[0], dict):  # measured images come as a tensor
            batches.append(inputs[0]["img"].clone())

    model.register_forward_pre_hook(keep)
    return batches


def same(first, second):
    return list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


def without_speed(record):
    return {key: record[key] for key in ("history", "noise")}


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """run(method): a finished run of two epochs, and what was seen of it."""
    done = {}

    def finished(method):
        if method not in done:
            seen = SimpleNamespace(copies=[], measured=[], live=[], rates=[])
            seen.checkpoint = tmp_path_factory.mktemp(method) / "c.pt"
            seen.model = make(method)
            seen.first = copy.deepcopy(seen.model.state_dict())
            seen.batches = keep_batches(seen.model)
            with pytest.MonkeyPatch.context() as patch:
                watch(seen, patch)
                seen.record = train(seen.model, data, seed=0, checkpoint=seen.checkpoint, **RECIPE)
            seen.model._forward_pre_hooks.clear()
            done[method] = seen
        return done[method]

    return finished


def watch(seen, patch):
    make_copy = ultralytics_trainer.ModelEMA
    init_metrics = Validator.init_metrics
    save_metrics, step = YOLOTraining.save_metrics, YOLOTraining.optimizer_step

    def copied(model, **options):
        ema = make_copy(model, **options)
        quantizers = [module for module in ema.ema.modules() if isinstance(module, ActivationQuantizer)]
        seen.copies.append(
            {
                "signed": [quantizer.signed for quantizer in quantizers],
                "ema": copy.deepcopy(ema.ema.state_dict()),
                "model": copy.deepcopy(model.state_dict()),
            }
        )
        return ema

    def measure(validator, model):
        seen.measured.append(model)
        init_metrics(validator, model)

    def saved(trainer, metrics):
        seen.trainer = trainer
        seen.live.append(copy.deepcopy(trainer.model.state_dict()))
        save_metrics(trainer, metrics)

    def stepped(trainer):
        seen.rates.append([(group["lr"], group["momentum"]) for group in trainer.optimizer.param_groups])
        step(trainer)

    patch.setattr(YOLOTraining, "optimizer_step", stepped)
    patch.setattr(ultralytics_trainer, "ModelEMA", copied)
    patch.setattr(Validator, "init_metrics", measure)
    patch.setattr(YOLOTraining, "save_metrics", saved)


# --- the model --------------------------------------------------------------------------------------------------------


def test_first_weights_depend_on_the_seed_alone_and_are_the_same_at_every_level():
    state = torch.get_rng_state()
    fp32 = build_detector(3, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    for method in ("lsq", "pact", "dorefa"):
        torch.manual_seed(123)
        model = quantize_detector(build_detector(3, seed=5), method, 4, 4)
        assert same(dict(fp32.named_parameters()), {n: p for n, p in model.named_parameters() if "quantizer" not in n})
    assert not torch.equal(fp32.model[0].conv.weight, build_detector(3, seed=6).model[0].conv.weight)


@EVERY_METHOD
def test_the_first_layer_and_the_outputs_of_the_head_have_8_bits_and_dfl_is_left_alone(method):
    fp32 = build_detector(3, seed=0)
    model = quantize_detector(fp32, method, 3, 5)
    outputs = [f"model.24.{branch}.{scale}.2" for branch in ("cv2", "cv3") for scale in (0, 1, 2)]
    assert head_outputs(fp32) == outputs
    assert [fp32.get_submodule(name).out_channels for name in outputs] == [64, 64, 64, 3, 3, 3]
    widths = {n: (q.weight_quantizer.bits, q.activation_quantizer.bits) for n, q in quantized_layers(model)}
    convolutions = [name for name, module in fp32.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert convolutions[0] == "model.0.conv"
    assert widths == {
        name: (8, 8) if name in ("model.0.conv", *outputs) else (3, 5)
        for name in convolutions
        if name != "model.24.dfl.conv"
    }
    assert constant_layers(model) == ["model.24.dfl.conv"]
    constants = model.get_submodule("model.24.dfl.conv")
    assert type(constants) is nn.Conv2d and isinstance(model.get_submodule("model.24.dfl"), DFL)
    assert constants.weight.flatten().tolist() == list(range(16))
    assert not any(quantized_layers(fp32))


@EVERY_METHOD
def test_only_lsq_has_offsets(method):
    model = quantize_detector(build_detector(3, seed=0), method, 4, 4)
    offsets = [name for name, _ in model.named_parameters() if name.endswith(".offset")]
    layers = [f"{name}.activation_quantizer.offset" for name, _ in quantized_layers(model)]
    assert offsets == (layers if method == "lsq" else [])


# --- trap: batch norms folded into convolutions -----------------------------------------------------------------------


def folded(model):
    """As ultralytics does it. Its function takes ``weight_quantizer`` for that of NVIDIA's ModelOpt, and wants one."""
    for _, layer in quantized_layers(model):
        layer.weight_quantizer.amax = torch.ones(layer.out_channels, 1, 1, 1)
    return DetectionModel.fuse(model)


@torch.inference_mode()
def outputs(model, images):
    """Before they are decoded to boxes."""
    raw = model.eval()(images.float() / 255)[1]
    return torch.cat([raw["boxes"], raw["scores"]], dim=1)


@EVERY_SETTING
def test_fuse_leaves_the_detector_as_it_was_trained(run, data, method):
    model, images = copy.deepcopy(run(method).model), pixels_of(data.test)
    before, weights = outputs(model, images), copy.deepcopy(model.state_dict())
    assert model.fuse() is model
    assert torch.equal(outputs(model, images), before)
    assert same(model.state_dict(), weights)
    assert all(hasattr(module, "bn") for module in model.modules() if isinstance(module, Conv))
    assert_as_trained(model)


def test_what_ultralytics_own_folding_does_to_a_quantized_detector(run, data):
    """Its layers still compute with 2^bits weights each, so counting levels does not notice, but with other weights."""
    images, error = pixels_of(data.test), {}
    for method in ("fp32", "lsq"):
        model = run(method).model
        expected = outputs(copy.deepcopy(model), images)
        damaged = folded(copy.deepcopy(model).eval())
        error[method] = ((outputs(damaged, images) - expected).norm() / expected.norm()).item()
        if method == "lsq":
            assert_quantized(damaged, skip=constant_layers(damaged))
        with pytest.raises(QuantizationError, match=r"the batch norm of model\.0 has been folded"):
            assert_as_trained(damaged)
    assert error["fp32"] < 1e-5 and error["lsq"] > 0.1


@FP32_AND_LSQ
def test_evaluate_measures_batch_norms_as_they_were_trained_and_nothing_else(run, data, method, monkeypatch):
    monkeypatch.setattr(evaluation, "PAPER_CORRUPTIONS", ("brightness",))
    measured = []
    forward = YOLOv5n.forward
    monkeypatch.setattr(YOLOv5n, "forward", lambda self, x, *a, **k: measured.append(self) or forward(self, x, *a, **k))
    model = copy.deepcopy(run(method).model)
    evaluate({0: model}, data, SIZE, [1])
    assert len(measured) >= 2
    for network in {id(network): network for network in measured}.values():
        assert not network.training
        assert all(hasattr(module, "bn") for module in network.modules() if isinstance(module, Conv))
        assert same(network.state_dict(), run(method).model.state_dict())
    with pytest.raises(QuantizationError, match="folded"):
        evaluate({0: folded(model.eval())}, data, SIZE, [1])


def test_nothing_that_lost_its_quantization_is_measured(run, data):
    model = copy.deepcopy(run("lsq").model)
    assert_as_trained(model)
    model.model[1].conv.weight_quantizer.forward = lambda weight: weight  # silently full precision
    with pytest.raises(QuantizationError, match=r"model\.1\.conv .* 4 bits allow 16"):
        evaluate({0: model}, data, SIZE, [1])
    with pytest.raises(QuantizationError, match=r"model\.1\.conv"):
        detect(model, pixels_of(data.test))
    model = copy.deepcopy(run("lsq").model)
    model.model[1].conv = nn.Conv2d(16, 32, 3, 2, 1, bias=False)
    with pytest.raises(QuantizationError, match=r"model\.1\.conv \(Conv2d\) is not quantized"):
        evaluate({0: model}, data, SIZE, [1])


def test_a_model_that_must_be_quantized_is_refused_when_it_is_not_or_not_ready(run, data):
    with pytest.raises(QuantizationError, match="no quantized layer"):
        evaluate({0: copy.deepcopy(run("fp32").model)}, data, SIZE, [1], quantized=True)
    with pytest.raises(QuantizationError, match=r"activation quantizer of model\.0\.conv is not calibrated"):
        evaluate({0: make("lsq")}, data, SIZE, [1])


def test_a_moving_average_that_lost_its_quantizers_is_not_measured(data, monkeypatch):
    make_copy = ultralytics_trainer.ModelEMA
    monkeypatch.setattr(ultralytics_trainer, "ModelEMA", lambda model: make_copy(make("fp32")))
    with pytest.raises(QuantizationError, match="no quantized layer"):
        train(make("lsq"), data, seed=0, **RECIPE)


# --- trap: the moving average -----------------------------------------------------------------------------------------


@EVERY_SETTING
def test_the_moving_average_is_a_copy_of_the_calibrated_model(run, method):
    (copied,) = run(method).copies
    assert same(copied["ema"], copied["model"])
    assert len(copied["signed"]) == (0 if method == "fp32" else 75)
    assert None not in copied["signed"]
    first = run(method).first
    changed = {name for name, value in copied["model"].items() if not torch.equal(value, first[name])}
    assert all("activation_quantizer." in name for name in changed)  # calibration, and nothing before it
    if method == "lsq":
        scales = [name for name in first if name.endswith(("activation_quantizer.step", "activation_quantizer.offset"))]
        assert len(scales) == 2 * 75
        assert changed.issuperset(name for name in scales if name != "model.0.conv.activation_quantizer.offset")


@EVERY_SETTING
def test_the_moving_average_is_what_is_measured_and_what_the_model_holds_in_the_end(run, method):
    seen = run(method)
    assert len(seen.measured) == RECIPE["epochs"]
    assert all(model is seen.trainer.ema.ema for model in seen.measured)
    assert same(seen.model.state_dict(), seen.trainer.ema.ema.state_dict())
    assert not same(seen.model.state_dict(), seen.live[-1])  # the weights that the optimizer moves are others
    assert_as_trained(seen.model)
    assert bool(list(quantized_layers(seen.model))) == (method != "fp32")


# --- trap: checkpoints in half precision ------------------------------------------------------------------------------


@EVERY_SETTING
def test_a_checkpoint_is_in_full_precision_and_no_pickle(run, method):
    seen = run(method)
    saved = torch.load(seen.checkpoint, weights_only=True)
    assert same(saved["ema"], seen.model.state_dict()) and same(saved["model"], seen.live[-1])
    momentum = [state["momentum_buffer"] for state in saved["optimizer"]["state"].values()]
    tensors = [*saved["model"].values(), *saved["ema"].values(), *momentum]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float32}
    assert len(momentum) > 150


def test_what_half_precision_does_to_a_quantized_detector(run, data):
    """Weights cross the borders between levels: it is not only the last digits that change."""
    model = run("lsq").model
    halved = copy.deepcopy(model).half()
    with pytest.raises(QuantizationError, match=r"is torch\.float16, not torch\.float32"):
        assert_as_trained(halved)
    with pytest.raises(QuantizationError, match="float16"):
        detect(halved, pixels_of(data.test))
    restored = halved.float()
    assert_quantized(restored, skip=constant_layers(restored))  # counting levels does not notice
    moved = 0
    for (_, layer), (_, other) in zip(quantized_layers(model), quantized_layers(restored), strict=True):
        levels = [q.quantized_weight() / q.weight_quantizer.step_size() for q in (layer, other)]
        moved += (levels[0].round() != levels[1].round()).sum().item()
    assert moved > 50


def test_evaluate_refuses_half_precision(run, data):
    with pytest.raises(QuantizationError, match="float16"):
        evaluate({0: copy.deepcopy(run("lsq").model).half()}, data, SIZE, [1])


# --- trap: reloading --------------------------------------------------------------------------------------------------


@FP32_AND_LSQ
def test_a_finished_run_is_reloaded_and_measures_the_same(run, data, method, monkeypatch):
    monkeypatch.setattr(evaluation, "PAPER_CORRUPTIONS", ("contrast",))
    monkeypatch.setattr(YOLOTraining, "train", None)  # nothing is trained again
    seen, model = run(method), make(method)
    record = train(model, data, seed=0, checkpoint=seen.checkpoint, **RECIPE)
    assert repr(record) == repr(seen.record)  # a string, for NaN equals NaN in it
    assert same(model.state_dict(), seen.model.state_dict())
    rows = evaluate({0: model}, data, SIZE, [2], classes=["cat", "cow"])
    assert rows == evaluate({0: seen.model}, data, SIZE, [2], classes=["cat", "cow"])
    assert all(0 < row["value"] < 100 for row in rows) and rows[0]["value"] != rows[2]["value"]


@FP32_AND_LSQ
def test_a_run_that_was_stopped_ends_with_the_same_numbers(run, data, tmp_path, method):
    path = tmp_path / "c.pt"
    with stopped_after(epoch=0):
        train(make(method), data, seed=0, checkpoint=path, **RECIPE)
    assert torch.load(path, weights_only=True)["epochs_done"] == 1
    model = make(method)
    batches = keep_batches(model)
    record = train(model, data, seed=0, checkpoint=path, **RECIPE)
    expected = run(method)
    assert len(batches) == 3  # only the second epoch
    assert repr(without_speed(record)) == repr(without_speed(expected.record))
    assert len(record["images_per_second"]) == len(record["seconds"]) == 2
    assert same(model.state_dict(), expected.model.state_dict())
    ours, theirs = (torch.load(file, weights_only=True) for file in (path, expected.checkpoint))
    assert same(ours["model"], theirs["model"]) and ours["updates"] == theirs["updates"] == 6
    assert repr(ours["optimizer"]) == repr(theirs["optimizer"])


@pytest.mark.parametrize("memory", ["all images", "a few images"])
def test_mosaics_of_a_resumed_run_are_those_of_a_run_never_stopped(data, tmp_path, memory, monkeypatch):
    if memory == "a few images":
        monkeypatch.setattr(evaluation, "RAM", 0)
    recipe = RECIPE | {"epochs": 12}  # the last ten have no mosaics
    undisturbed, stopped, resumed = make("fp32"), make("fp32"), make("fp32")
    expected = keep_batches(undisturbed)
    with stopped_after(epoch=1):
        train(undisturbed, data, seed=0, **recipe)
    with stopped_after(epoch=0):
        train(stopped, data, seed=0, checkpoint=tmp_path / "c.pt", **recipe)
    actual = keep_batches(resumed)
    with stopped_after(epoch=1):
        train(resumed, data, seed=0, checkpoint=tmp_path / "c.pt", **recipe)
    assert len(expected) == 6 and len(actual) == 3
    assert all(torch.equal(a, b) for a, b in zip(actual, expected[3:], strict=True))


# --- trap: prediction -------------------------------------------------------------------------------------------------


@FP32_AND_LSQ
def test_prediction_through_ultralytics_is_that_of_the_trained_model(run, data, method, tmp_path):
    model, images = run(method).model, pixels_of(data.test)
    found = detect(copy.deepcopy(model), images)
    assert sum(len(boxes) for boxes in found) > 3
    backend = AutoBackend(model=copy.deepcopy(model), channels_last=False, verbose=False)
    assert_as_trained(backend.model)
    assert torch.equal(outputs(backend.backend.model, images), outputs(copy.deepcopy(model), images))
    assert all(torch.equal(a, b) for a, b in zip(detect(backend.backend.model, images), found, strict=True))

    settings = {"imgsz": SIZE, "iou": 0.45, "channels_last": False, "device": "cpu", "verbose": False}
    predictor = DetectionPredictor(overrides=settings | {"save": False, "project": str(tmp_path)})
    predictor.setup_model(model)
    assert_as_trained(predictor.model.model)
    files = [np.ascontiguousarray(image.permute(1, 2, 0).numpy()[..., ::-1]) for image in images]
    for result, boxes in zip(predictor(files), found, strict=True):
        torch.testing.assert_close(result.boxes.data, boxes.clamp(min=0, max=SIZE), rtol=0, atol=1e-4)


# --- training ---------------------------------------------------------------------------------------------------------


@EVERY_SETTING
def test_history_and_noise_of_a_run(run, method):
    record, model = run(method).record, run(method).model
    assert [(row["seed"], row["epoch"], row["split"]) for row in record["history"]] == [
        (0, epoch, split) for epoch in (0, 1) for split in ("train", "val")
    ]
    assert all(math.isfinite(row["loss"]) and row["loss"] > 0 for row in record["history"])
    metrics = [row["metric"] for row in record["history"]]
    assert math.isnan(metrics[0]) and math.isnan(metrics[2]) and all(0 <= value < 100 for value in metrics[1::2])
    if method in ("fp32", "lsq"):  # DoReFa's weights are others than those that ``make`` prepared
        assert min(metrics[1::2]) > 1
    names = [name for name, _ in quantized_layers(model)]
    assert [row["layer"] for row in record["noise"]] == 2 * names
    assert len(names) == (0 if method == "fp32" else 75)
    assert all(0 < row["sigma"] < row["weight_sigma"] for row in record["noise"])
    assert all((row["noise"] > 0) == (method != "fp32") for row in record["history"])
    assert len(record["images_per_second"]) == len(record["seconds"]) == 2


@EVERY_SETTING
def test_training_moves_everything_that_is_learned_and_no_constant(run, method):
    seen = run(method)
    before, after = seen.copies[0]["model"], seen.live[-1]
    parameters = dict(seen.trainer.model.named_parameters())
    constants = "model.24.dfl.conv.weight"
    assert torch.equal(after[constants], before[constants])
    assert {name for name in parameters if parameters[name] not in seen.trainer.optimizer.state} == {constants}
    moved, there = Counter(), Counter()
    for name in parameters.keys() - {constants}:
        kind = name.rsplit(".", 2)[-2:] if "quantizer" in name else name.rsplit(".", 1)[-1:]
        moved[*kind] += not torch.equal(before[name], after[name])  # in six steps, some by less than the last digit
        there[*kind] += 1
    scales = {"lsq": 3, "pact": 1}.get(method, 0)  # two steps and an offset; alphas
    assert len(there) == 2 + scales and all(moved[kind] > there[kind] / 10 for kind in there), moved


@EVERY_SETTING
def test_weight_decay_spares_biases_batch_norms_and_scales(run, method):
    trainer = run(method).trainer
    decay = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    decays = {name: decay[id(parameter)] for name, parameter in trainer.model.named_parameters()}
    assert len(decays) == len(decay)
    kinds = {}
    for name, value in decays.items():
        spared = name.endswith(".bias") or ".bn." in name
        kind = name.rsplit(".", 1)[-1] if "quantizer" in name else "spared" if spared else "weight"
        kinds.setdefault(kind, set()).add(value)
    expected = {"weight": {5e-4}, "spared": {0.0}}
    expected |= {"lsq": {"step": {0.0}, "offset": {0.0}}, "pact": {"alpha": {7e-4}}}.get(method, {})
    assert kinds == expected
    for key in ("initial_lr", "nesterov", "dampening", "maximize"):
        assert len({group[key] for group in trainer.optimizer.param_groups}) == 1, key


@EVERY_SETTING
def test_every_parameter_has_the_same_learning_rate_and_momentum(run, method):
    """A step for each batch; of the six, two are warm-up. Biases and scales are no exception."""
    steps = run(method).rates
    assert len(steps) == 6 and all(len(set(groups)) == 1 for groups in steps)
    rates, momenta = zip(*(groups[0] for groups in steps), strict=True)
    assert rates[0] == 0 < rates[1] < rates[2] == pytest.approx(0.002) and rates[3] < rates[2]
    assert rates[3] == rates[5] == pytest.approx(0.002 * (0.5 * 0.99 + 0.01))  # linear, to a hundredth
    assert momenta[0] == 0.8 < momenta[1] < momenta[2] == momenta[5] == 0.9


def test_gradients_of_scales_are_limited_before_every_step(run, data, monkeypatch):
    """Without it a single large gradient can carry a step through zero."""
    steps, limit = [], training.limit_scale_gradients

    def limited(scales):
        for scale in scales[:2]:
            scale.grad.fill_(1e6)
        limit(scales)
        steps.extend((scale.grad / scale).abs().item() for scale in scales[:2])

    monkeypatch.setattr(training, "limit_scale_gradients", limited)
    with stopped_after(epoch=0):
        train(make("lsq"), data, seed=0, **RECIPE)
    assert steps == pytest.approx([0.1] * 3 * 2)  # three batches


def test_a_batch_size_that_ultralytics_would_halve_is_an_error(data, monkeypatch):
    """After half an epoch with less memory the levels of a seed would differ in more than their quantizers."""
    loss = YOLOv5n.loss
    asked = []

    def out_of_memory(model, batch, preds=None):
        asked.append(len(batch["img"]))
        if len(asked) == 2:
            raise RuntimeError("CUDA out of memory")
        return loss(model, batch, preds)

    monkeypatch.setattr(YOLOv5n, "loss", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory at batch_size=4"):
        train(make("fp32"), data, seed=0, **RECIPE)
    assert asked == [4, 4]  # nothing was trained with another one


def test_every_level_sees_the_same_images_and_another_seed_others(run, data):
    reference = run("fp32").batches
    assert [tuple(batch.shape) for batch in reference] == [(4, 3, 32, 32), (4, 3, 32, 32), (2, 3, 32, 32)] * 2
    for method in ("lsq", "pact", "dorefa"):
        assert all(torch.equal(a, b) for a, b in zip(run(method).batches, reference, strict=True))
    assert not torch.equal(reference[0], reference[3])  # shuffled and augmented anew
    other = make("fp32")
    batches = keep_batches(other)
    with stopped_after(epoch=0):
        train(other, data, seed=1, **RECIPE)
    assert not any(torch.equal(a, b) for a, b in zip(batches, reference[:3], strict=True))


def test_without_augmentation_the_images_are_the_files(data):
    model, files = make("fp32"), pixels_of(data.train).float() / 255
    batches = keep_batches(model)
    with stopped_after(epoch=1):
        train(model, data, seed=0, **RECIPE | {"augment": False, "epochs": 3})
    epochs = [torch.cat(batches[:3]), torch.cat(batches[3:])]
    order = [[int((files == image).flatten(1).all(1).nonzero()) for image in epoch] for epoch in epochs]
    assert sorted(order[0]) == sorted(order[1]) == list(range(10)) and order[0] != order[1]


def test_the_losses_are_those_of_ultralytics_on_images_that_are_not_augmented(run, data):
    """Of the test images, and of as many training images."""
    seen = run("fp32")
    model = copy.deepcopy(seen.model).eval()
    model.args = seen.trainer.args
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))[:9].sort().values.tolist()
    for row, images in zip(seen.record["history"][-2:], ([data.train[i] for i in order], data.test), strict=True):
        losses = []
        for start in (0, 8):  # batches for measuring are twice as large
            part = images[start : start + 8]
            batch = {"img": pixels_of(part).float() / 255}
            batch["cls"] = torch.cat([torch.from_numpy(image.classes).float()[:, None] for image in part])
            batch["bboxes"] = torch.cat([torch.from_numpy(image.boxes) for image in part])
            numbers = [torch.full((len(image.classes),), i) for i, image in enumerate(part)]
            batch["batch_idx"] = torch.cat(numbers).float()
            with torch.inference_mode():
                losses.append(sum(model.loss(batch)[1].values()).item())
        assert row["loss"] == pytest.approx(sum(losses) / 2, abs=2e-5), row["split"]


def test_a_loss_that_is_not_finite_names_the_epoch(data, monkeypatch):
    model = make("fp32")
    with torch.no_grad():
        model.model[-1].cv3[0][2].bias.fill_(math.inf)
    monkeypatch.setattr(YOLOTraining, "validate", None)  # it is said before the test images are measured
    with pytest.raises(FloatingPointError, match=r"epoch 0 of 2 \(seed 0\)"):
        train(model, data, seed=0, **RECIPE)


def test_a_last_step_that_diverges_is_an_error_too(data, monkeypatch):
    """The loss of the epoch's only batch was finite; that of the trained network is not."""
    step = YOLOTraining.optimizer_step

    def diverge(trainer):
        trainer.model.model[0].conv.weight.grad.fill_(math.nan)
        step(trainer)

    monkeypatch.setattr(YOLOTraining, "optimizer_step", diverge)
    with pytest.raises(FloatingPointError, match="epoch 0 of 1"):
        train(make("fp32"), data, seed=0, **RECIPE | {"epochs": 1, "batch_size": 10})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 0.02}, r"learning_rate 0\.002, not 0\.02"),
        ({"image_size": 64}, "image_size 32, not 64"),
        ({"augment": False}, "augment True, not False"),
        ({"classes": ["cat"]}, r"classes None, not \['cat'\]"),
        ({"method": "pact"}, "another model, method or bit width"),
        ({"first_seed": 1}, "other first weights"),
        ({"test_images": 8}, "other data"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_configuration_is_an_error(run, data, change, named):
    path = run("lsq").checkpoint
    before = path.read_bytes()
    change = dict(change)
    model = make(change.pop("method", "lsq"), change.pop("first_seed", 0))
    data = data.subset(None, change.pop("test_images", None))
    with pytest.raises(CheckpointError, match=rf"c\.pt belongs to another configuration \({named}"):
        train(model, data, seed=0, checkpoint=path, **RECIPE | change)
    assert path.read_bytes() == before


def torch_settings():
    deterministic = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    names = ("CUBLAS_WORKSPACE_CONFIG", "PYTHONHASHSEED", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    return {
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "cudnn": deterministic,
        "environment": {name: os.environ.get(name) for name in names},
        "inference": torch.is_inference_mode_enabled(),
        "grad": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("deterministic", [False, True])
def test_threads_and_determinism_are_left_as_they_were(data, deterministic, monkeypatch):
    monkeypatch.setattr(evaluation, "PAPER_CORRUPTIONS", ())
    monkeypatch.setattr(torch_utils, "NUM_THREADS", torch.get_num_threads() + 1)  # what ultralytics would set
    if deterministic:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        monkeypatch.setenv("PYTHONHASHSEED", "3")
    try:
        torch.use_deterministic_algorithms(deterministic)
        before, model = torch_settings(), make("fp32")
        train(model, data, seed=0, **RECIPE | {"epochs": 1})
        assert torch_settings() == before
        evaluate({0: model}, data, SIZE, [])
        assert torch_settings() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_ultralytics_integrations_are_not_asked(run):
    """MLflow, ClearML and others are on by default where they are installed; its own platform always."""
    callbacks = [function.__module__ for functions in run("fp32").trainer.callbacks.values() for function in functions]
    assert "qreg_utils.detection.training" in callbacks
    assert set(callbacks) <= {"qreg_utils.detection.training", "ultralytics.utils.callbacks.base", EVENTS}
    assert run("fp32").trainer.args.augmentations == []  # None means albumentations' where that is installed


# --- what leaves the process ------------------------------------------------------------------------------------------

WATCHED = {"writes": None, "world": None}  # lists while a test watches


def _audit(event, arguments):
    if WATCHED["writes"] is None:
        return
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        WATCHED["world"].append(f"{event} {arguments[1:2]}")
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
        WATCHED["world"].append(f"{event} {arguments[:2]}")
    elif event == "open" and isinstance(arguments[0], str | bytes) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        WATCHED["writes"].append(os.fsdecode(arguments[0]))
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"):
        WATCHED["writes"] += [os.fsdecode(path) for path in arguments[:2] if isinstance(path, str | bytes)]


@pytest.fixture
def watched(monkeypatch):
    sys.addaudithook(_audit)  # for good: there is no way to remove one
    for name in WATCHED:
        monkeypatch.setitem(WATCHED, name, [])
    return WATCHED


def test_training_and_evaluation_write_only_the_checkpoint_and_talk_to_nobody(data, tmp_path, monkeypatch, watched):
    monkeypatch.setattr(evaluation, "PAPER_CORRUPTIONS", ("frost", "jpeg_compression"))
    for name in ("cwd", "home", "tmp", "out"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    model = make("lsq")
    train(model, data, seed=0, checkpoint=tmp_path / "out" / "c.pt", **RECIPE | {"epochs": 1})
    evaluate({0: model}, data, SIZE, [1])
    detect(model, pixels_of(data.test))
    assert watched["world"] == []
    written = {path for path in watched["writes"] if "__pycache__" not in path and path != os.devnull}
    assert written and all(Path(path).is_relative_to(tmp_path) for path in written if os.path.isabs(path)), written
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["out/c.pt"] and not list((tmp_path / "tmp").iterdir()) and not list((tmp_path / "cwd").iterdir())


ALONE = """
import json, sys
world = []
sys.addaudithook(lambda event, arguments: world.append(event) if event in {events} else None)
import qreg_utils.detection.training
from ultralytics import utils
from ultralytics.utils.events import events
settings = {{"online": utils.ONLINE, "autoinstall": utils.AUTOINSTALL, "events": events.enabled}}
print(json.dumps(settings | {{"tests": utils.TESTS_RUNNING, "file": str(utils.SETTINGS_FILE), "world": world}}))
"""


def test_ultralytics_keeps_to_itself(tmp_path):
    """In a process of its own, for it behaves well when it notices pytest."""
    folders = {name: tmp_path / name for name in ("data", "home", "cwd")}
    for folder in folders.values():
        folder.mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("YOLO_", "PYTEST", "GITHUB_"))}
    root = str(Path(evaluation.__file__).parent.parent.parent)
    environment = kept | {"QREG_DATA": str(folders["data"]), "HOME": str(folders["home"]), "PYTHONPATH": root}
    environment["MPLCONFIGDIR"] = str(tmp_path / "matplotlib")
    events = {"socket.connect", "socket.getaddrinfo", "socket.sendto"}
    command = [sys.executable, "-c", ALONE.format(events=events)]
    done = subprocess.run(command, env=environment, cwd=folders["cwd"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert not said.pop("tests")  # or the rest would say nothing
    file = str(folders["data"] / "Ultralytics" / "settings.json")
    assert said == {"online": False, "autoinstall": False, "events": False, "file": file, "world": []}
    assert not list(folders["home"].iterdir()) and not list(folders["cwd"].iterdir())
    assert [str(path) for path in folders["data"].rglob("*") if path.is_file()] == [file]


# --- evaluation -------------------------------------------------------------------------------------------------------


class Oracle(nn.Module):
    """Finds one object that fills the image: of the class that ``answer`` gives for each image, as sure as it says."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.names = answer, dict(enumerate(CLASSES))
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, *args, **kwargs):
        output = torch.zeros(len(x), 7, 5)
        for i, image in enumerate(x):
            for number, (animal, score) in enumerate(self.answer(image)):
                output[i, :4, number] = torch.tensor([image.shape[2] / 2, image.shape[1] / 2, *image.shape[:0:-1]])
                output[i, 4 + animal, number] = score
        return output, None

    def loss(self, batch, preds=None):
        return torch.zeros(()), {}


def tint(image):
    """The class of an image of ``make_images``: its tint."""
    return int(image.mean((1, 2)).argmax())


def rows_and_images(data, batch_size, severities, monkeypatch):
    """The rows of ``evaluate``, and what the network is shown in each setting: a list of batches, as uint8."""
    shown = []
    preprocess, init_metrics = DetectionValidator.preprocess, Validator.init_metrics
    monkeypatch.setattr(Validator, "init_metrics", lambda self, model: shown.append([]) or init_metrics(self, model))

    def keep(self, batch):
        shown[-1].append(batch["img"].clone())
        return preprocess(self, batch)

    monkeypatch.setattr(DetectionValidator, "preprocess", keep)
    rows = evaluate({3: Oracle(lambda image: [(tint(image), 0.5)])}, data, SIZE, severities, batch_size=batch_size)
    return rows, shown


def test_every_corruption_is_that_of_the_whole_test_set_at_once(data, monkeypatch):
    """In batches of 4, 4 and 1: an image's noise depends on its place among all test images, not in its batch."""
    rows, shown = rows_and_images(data, 4, [2], monkeypatch)
    files = pixels_of(data.test)
    assert len(shown) == 1 + 19
    for (name, severity), batches in zip([(CLEAN, 0), *((name, 2) for name in CORRUPTIONS)], shown, strict=True):
        assert [len(batch) for batch in batches] == [4, 4, 1]
        assert batches[0].dtype == torch.uint8
        expected = files if name == CLEAN else corrupt(files, name, severity, family="imagenet")
        assert torch.equal(torch.cat(batches), expected), name
    keys = [(row["seed"], row["corruption"], row["severity"], row["metric"]) for row in rows]
    settings = [(CLEAN, 0), *((name, 2) for name in CORRUPTIONS)]
    assert keys == [(3, *setting, metric) for setting in settings for metric in ("map50", "map50_95")]
    assert all(set(row) == {"seed", "corruption", "severity", "metric", "value"} for row in rows)
    assert all(type(row["value"]) is float and 0 <= row["value"] <= 100 for row in rows)


def test_rows_of_several_models_and_severities(data, monkeypatch):
    monkeypatch.setattr(evaluation, "PAPER_CORRUPTIONS", ("brightness", "fog"))
    blind, sees = Oracle(lambda image: []), Oracle(lambda image: [(tint(image), 0.9)])
    rows = evaluate({0: sees, 1: blind, 2: sees}, data, SIZE, [1, 5])
    keys = [(row["corruption"], row["severity"], row["seed"], row["metric"]) for row in rows]
    settings = [(CLEAN, 0), ("brightness", 1), ("brightness", 5), ("fog", 1), ("fog", 5)]
    assert keys == [(*setting, seed, m) for setting in settings for seed in (0, 1, 2) for m in ("map50", "map50_95")]
    values = {key: row["value"] for key, row in zip(keys, rows, strict=True)}
    assert all(values[*setting, 1, "map50"] == 0 for setting in settings)  # not what was measured before
    assert all(values[*setting, 0, "map50"] == values[*setting, 2, "map50"] for setting in settings)
    assert values[CLEAN, 0, 0, "map50"] > 50


def test_mean_ap_over_some_classes_is_the_mean_of_theirs(data, monkeypatch):
    """Cats are all found, dogs never, and cows where there is an object of another class too."""
    monkeypatch.setattr(evaluation, "PAPER_CORRUPTIONS", ())
    large = replace(data, test=tuple(replace(i, classes=i.classes[:1], boxes=i.boxes[:1]) for i in data.test))
    answers = {0: [(0, 0.9)], 1: [(0, 0.1), (2, 0.8)], 2: [(2, 0.5)]}
    model = Oracle(lambda image: answers[tint(image)])

    def value(classes=None, metric="map50"):
        rows = evaluate({0: model}, large, SIZE, [], classes=classes)
        return next(row["value"] for row in rows if row["metric"] == metric)

    cat, dog, cow = value(["cat"]), value(["dog"]), value(["cow"])
    assert cat == pytest.approx(99.5) and dog == 0  # 99.5 is ultralytics' area under a perfect curve
    # three dogs taken for cows come before the three cows: precision 3/6 at full recall at best
    assert cow == pytest.approx(50, abs=1)
    assert value(["dog", "cow"]) == pytest.approx((dog + cow) / 2)
    assert value(["cow", "cat"]) == pytest.approx((cat + cow) / 2)
    assert value() == value(["cat", "dog", "cow"]) == pytest.approx((cat + dog + cow) / 3)
    assert value(["cat"], "map50_95") == pytest.approx(99.5)  # boxes fit exactly


def test_the_clean_value_is_what_ultralytics_measures_by_itself(run, data, tmp_path, monkeypatch):
    """From image and label files, with its own data set and validator; batch norms are left alone there too."""
    monkeypatch.setattr(evaluation, "PAPER_CORRUPTIONS", ())
    for image in data.test:
        for kind in ("images", "labels"):
            (tmp_path / kind / "test").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / "test" / image.file.name).symlink_to(image.file)
        lines = [" ".join(map(str, [n, *box])) for n, box in zip(image.classes, image.boxes.tolist(), strict=True)]
        (tmp_path / "labels" / "test" / image.file.with_suffix(".txt").name).write_text("\n".join(lines))
    names = dict(enumerate(CLASSES))
    description = {"path": str(tmp_path), "train": "images/test", "val": "images/test", "names": names}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(description))
    settings = {"data": str(tmp_path / "data.yaml"), "imgsz": SIZE, "batch": 9, "plots": False, "verbose": False}
    settings |= {"channels_last": False, "device": "cpu", "workers": 0}
    for method in ("fp32", "lsq"):
        theirs = DetectionValidator(save_dir=tmp_path / "runs", args=settings)(model=run(method).model)
        rows = evaluate({0: run(method).model}, data, SIZE, [], batch_size=9)
        assert rows[0]["value"] == pytest.approx(100 * theirs["metrics/mAP50(B)"])
        assert rows[1]["value"] == pytest.approx(100 * theirs["metrics/mAP50-95(B)"])
        assert 0 < rows[1]["value"] < rows[0]["value"] < 100
        history = run(method).record["history"][-1]
        assert rows[0]["value"] == pytest.approx(history["metric"])


def test_evaluation_leaves_model_and_data_as_they_were(run, data, monkeypatch):
    monkeypatch.setattr(evaluation, "PAPER_CORRUPTIONS", ("fog",))
    model = make("lsq")
    calibrate(model, pixels_of(data.train).float() / 255)
    before = copy.deepcopy(model.state_dict())
    boxes = [image.boxes.copy() for image in data.test]
    evaluate({0: model}, data, SIZE, [1])
    detect(model, pixels_of(data.test))
    assert same(model.state_dict(), before)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in make("lsq").parameters()]
    assert all(np.array_equal(a, image.boxes) for a, image in zip(boxes, data.test, strict=True))


def test_a_model_that_was_measured_can_be_trained(run, data, monkeypatch):
    """And becomes the one that it would have been."""
    monkeypatch.setattr(evaluation, "PAPER_CORRUPTIONS", ())
    model = make("fp32")
    evaluate({0: model}, data, SIZE, [])
    detect(model, pixels_of(data.test))
    train(model, data, seed=0, **RECIPE)
    assert same(model.state_dict(), run("fp32").model.state_dict())


def test_a_slow_machine_measures_the_same(data, monkeypatch):
    """ultralytics stops looking for boxes after some seconds; the images that are left would count as not found."""
    monkeypatch.setattr(evaluation, "PAPER_CORRUPTIONS", ())
    model = Oracle(lambda image: [(tint(image), 0.9)])
    expected = evaluate({0: model}, data, SIZE, [])
    clock = iter(range(0, 10**9, 100))
    monkeypatch.setattr(nms, "time", SimpleNamespace(time=lambda: next(clock)))
    assert evaluate({0: model}, data, SIZE, []) == expected
    assert next(clock) > 0


def test_images_are_measured_in_the_same_order_everywhere(tmp_path, monkeypatch):
    """By shape, then as they come: their noise depends on it. numpy's default sort of equal keys depends on the CPU."""
    monkeypatch.setattr(evaluation, "RAM", 0)  # the files are not read
    shapes = [random.Random(i).choice([(32, 64), (64, 64), (64, 32)]) for i in range(500)]
    nothing = {"classes": np.zeros(0, np.int64), "boxes": np.zeros((0, 4), np.float32)}
    images = [LabelledImage(tmp_path / f"{i}.png", *shape, **nothing) for i, shape in enumerate(shapes)]
    args = evaluation.get_cfg(overrides={"imgsz": 64})
    dataset = BoxDataset(images, args, {"names": {}, "channels": 3}, False, 16)
    expected = sorted(range(500), key=lambda i: shapes[i][0] / shapes[i][1])
    assert [int(Path(file).stem) for file in dataset.im_files] == expected


def test_images_of_different_shapes_are_letterboxed_with_their_boxes(tmp_path, monkeypatch):
    """An oracle that answers with boxes as large as the batch's images is right where nothing is padded."""
    monkeypatch.setattr(evaluation, "PAPER_CORRUPTIONS", ("pixelate",))
    shapes = ((64, 64), (32, 64), (64, 32), (128, 64))
    images = [image for image in make_images(tmp_path / "images", 2, 8, shapes) if len(image.classes)]
    images = tuple(replace(image, classes=image.classes[:1], boxes=image.boxes[:1]) for image in images)
    data = DetectionDataset("shapes", images, images, CLASSES, flip=False)
    model = Oracle(lambda image: [(tint(image), 0.9)])
    shown = []
    monkeypatch.setattr(Oracle, "loss", lambda self, batch, preds: (shown.append(batch["img"].shape), {}))
    rows = evaluate({0: model}, data, 64, [1], batch_size=1)
    assert {tuple(shape[2:]) for shape in shown} == {(64, 64), (32, 64), (64, 32)}
    assert rows[0]["value"] == pytest.approx(99.5) and rows[1]["value"] == pytest.approx(99.5)
