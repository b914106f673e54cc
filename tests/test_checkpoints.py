"""A finished experiment, loaded from its folder. (Checkpoints of a run under way: test_training.py.)"""

import json
import pathlib
import pickle

import pytest
import torch
import yaml

from qreg_utils.checkpoints import CheckpointError, load_checkpoint, load_experiment
from qreg_utils.models import build_model
from qreg_utils.quantize import calibrate, quantize_model, quantized_layers
from qreg_utils.study import Classification
from qreg_utils.theory.noise import weight_noise

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def parameters(**changes):
    values = {"dataset": "digits", "model": "resnet8", "method": "lsq", "weight_bits": 3, "activation_bits": 3}
    values |= {"seeds": [4], "epochs": 1, "batch_size": 32, "learning_rate": 0.1, "momentum": 0.9, "alpha_decay": 0.0}
    values |= {"weight_decay": 0.0, "schedule": "cosine", "augment": False, "severities": [1]} | changes
    return Classification.model_validate(values).model_dump()


FP32 = {"method": "fp32", "weight_bits": None, "activation_bits": None}


@pytest.fixture
def finished(tmp_path):
    """A function that leaves the folder of an experiment, and returns its network."""

    def leave(**changes):
        values = parameters(**changes)
        model = build_model("resnet8", seed=9)
        if values["method"] != "fp32":
            model = quantize_model(model, values["method"], values["weight_bits"], values["activation_bits"])
            calibrate(model, IMAGES)
        state = {"fingerprint": {"code": "of another day"}, "model": model.state_dict(), "noise": weight_noise(model)}
        state["epochs_done"] = values["epochs"]
        torch.save(state, tmp_path / "checkpoint-seed4.pt")
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
        return model.eval()

    return leave


def assert_refused(folder, seed, message):
    with pytest.raises(CheckpointError, match=message):
        load_experiment(folder, seed)


def change(path, **parts):
    torch.save(torch.load(path, weights_only=True) | parts, path)


def test_a_training_that_was_stopped_is_not_a_finished_experiment(finished, tmp_path):
    finished(epochs=3)
    change(tmp_path / "checkpoint-seed4.pt", epochs_done=2)
    assert_refused(tmp_path, 4, r"checkpoint-seed4\.pt is unfinished: 2 of 3 epochs")


@pytest.mark.parametrize("level", [FP32, {}, {"method": "pact"}, {"method": "dorefa", "activation_bits": None}])
def test_the_network_is_the_one_that_was_left(finished, tmp_path, level):
    model = finished(**level)
    experiment, loaded, noise = load_experiment(tmp_path, 4)
    assert experiment.method == level.get("method", "lsq")
    assert not loaded.training
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert noise == weight_noise(model)
    assert bool(noise) == any(quantized_layers(loaded)) == (level is not FP32)


def test_run_json_will_do_where_params_yaml_is_missing(finished, tmp_path):
    finished()
    (tmp_path / "params.yaml").unlink()
    (tmp_path / "run.json").write_text(json.dumps({"parameters": parameters()}))
    assert load_experiment(tmp_path, 4)[0].weight_bits == 3


@pytest.mark.parametrize("noise", [[], None])
def test_a_checkpoint_without_the_layer_statistics(finished, tmp_path, noise):
    finished()
    change(tmp_path / "checkpoint-seed4.pt", noise=noise)
    assert_refused(tmp_path, 4, r"checkpoint-seed4\.pt is without the layer statistics")


def test_no_checkpoint_of_this_seed(finished, tmp_path):
    finished()
    assert_refused(tmp_path, 5, r"checkpoint-seed5\.pt: no such file; .*in that folder: checkpoint-seed4\.pt")


@pytest.mark.parametrize("content", [b"", b"not a zip file"])
def test_a_damaged_checkpoint(finished, tmp_path, content):
    finished()
    (tmp_path / "checkpoint-seed4.pt").write_bytes(content)
    assert_refused(tmp_path, 4, r"checkpoint-seed4\.pt is damaged")
    assert (tmp_path / "checkpoint-seed4.pt").exists()


class Evil:
    """What a pickle does when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return pathlib.Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["model", "fingerprint", "optimizer"])
def test_a_checkpoint_cannot_execute_code(finished, tmp_path, name):
    finished()
    path, marker = tmp_path / "checkpoint-seed4.pt", tmp_path / "executed"
    change(path, **{name: Evil(marker)})
    assert_refused(tmp_path, 4, r"checkpoint-seed4\.pt is damaged \(UnpicklingError")
    assert load_checkpoint(path, {"code": "of another day"}) is None
    assert not path.exists() and not marker.exists()
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists()  # the object is as evil as it says


@pytest.mark.parametrize("model", [None, {}])
def test_a_checkpoint_without_a_model(finished, tmp_path, model):
    finished()
    change(tmp_path / "checkpoint-seed4.pt", model=model)
    assert_refused(tmp_path, 4, r"checkpoint-seed4\.pt holds no model")


def test_a_checkpoint_of_another_model(finished, tmp_path):
    finished()
    change(tmp_path / "checkpoint-seed4.pt", model=build_model("resnet20").state_dict())
    assert_refused(tmp_path, 4, r"checkpoint-seed4\.pt holds another model than digits-resnet8-lsq")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no experiment in that folder: neither params.yaml nor run.json"),
        ("method: [", "params.yaml does not say what a classification experiment was"),
        (yaml.safe_dump(parameters() | {"dataset": "voc"}), "params.yaml does not say .*: dataset: "),
    ],
)
def test_a_folder_that_is_no_experiments(finished, tmp_path, content, message):
    finished()
    (tmp_path / "params.yaml").unlink()
    if content:
        (tmp_path / "params.yaml").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_experiment(tmp_path, 4)
