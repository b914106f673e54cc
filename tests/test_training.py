"""The training loop: equal for all levels, the same numbers every time, and none lost when it is stopped."""

import math

import pytest
import torch

from qreg_utils import training
from qreg_utils.models import build_model
from qreg_utils.quantize import assert_quantized, quantize_model, quantized_layers
from qreg_utils.training import fit

RECIPE = {
    "epochs": 2,
    "batch_size": 32,
    "learning_rate": 0.05,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "alpha_decay": 5e-4,
    "schedule": "one-cycle",
    "augment": True,
}


def make(method="lsq", seed=0):
    model = build_model("resnet8", seed=seed)
    return model if method == "fp32" else quantize_model(model, method, 4, 4)


def without_speed(run):
    return {key: run[key] for key in ("history", "noise")}


@pytest.mark.parametrize("method", ["fp32", "lsq", "pact", "dorefa"])
def test_same_seed_same_numbers_bit_for_bit(tiny, method):
    first, second = make(method), make(method)
    runs = [without_speed(fit(model, tiny, seed=1, **RECIPE)) for model in (first, second)]
    assert runs[0] == runs[1]
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_another_seed_other_numbers(tiny):
    runs = [fit(make(), tiny, seed=seed, **RECIPE)["history"] for seed in (1, 2)]
    assert runs[0][-1]["loss"] != runs[1][-1]["loss"]


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine"])
def test_a_run_that_was_killed_ends_with_the_same_numbers(tiny, tmp_path, schedule, monkeypatch):
    recipe = RECIPE | {"epochs": 3, "schedule": schedule}
    undisturbed = make("pact")
    expected = fit(undisturbed, tiny, seed=0, **recipe)

    epochs = []

    def dies_in_the_third_epoch(*args):
        epochs.append(1)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return train_epoch(*args)

    train_epoch = training._train_epoch
    monkeypatch.setattr(training, "_train_epoch", dies_in_the_third_epoch)
    with pytest.raises(KeyboardInterrupt):
        fit(make("pact"), tiny, seed=0, checkpoint=tmp_path / "c.pt", **recipe)
    monkeypatch.setattr(training, "_train_epoch", train_epoch)

    resumed = make("pact")
    actual = fit(resumed, tiny, seed=0, checkpoint=tmp_path / "c.pt", **recipe)
    assert without_speed(actual) == without_speed(expected)
    assert len(actual["images_per_second"]) == 1  # only the last epoch was trained again
    for a, b in zip(undisturbed.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not list(tmp_path.glob("*.part"))


def test_a_finished_run_is_not_trained_again(tiny, tmp_path):
    first = fit(make(), tiny, seed=0, checkpoint=tmp_path / "c.pt", **RECIPE)
    second = fit(make(), tiny, seed=0, checkpoint=tmp_path / "c.pt", **RECIPE)
    assert without_speed(first) == without_speed(second)
    assert second["images_per_second"] == []


@pytest.mark.parametrize("change", ["learning rate", "model", "code", "damage"])
def test_a_checkpoint_of_something_else_is_not_resumed(tiny, tmp_path, change, monkeypatch, capsys):
    path = tmp_path / "c.pt"
    fit(make(), tiny, seed=0, checkpoint=path, **RECIPE)
    recipe, model = RECIPE, make()
    if change == "learning rate":
        recipe = RECIPE | {"learning_rate": 0.01}
    elif change == "model":
        model = make("dorefa")
    elif change == "code":
        monkeypatch.setattr(training, "SOURCES", ["training.py"])
    else:
        path.write_bytes(path.read_bytes()[:5000])
    run = fit(model, tiny, seed=0, checkpoint=path, **recipe)
    assert len(run["images_per_second"]) == RECIPE["epochs"]
    assert "starts over" in capsys.readouterr().out


def test_every_level_sees_the_same_batches(tiny):
    def batches(epoch):
        return [(x.sum().item(), y.tolist()) for x, y in training._batches(tiny, 5, epoch, 32, True)]

    assert batches(0) == batches(0)
    assert batches(0) != batches(1)
    assert sorted(label for _, labels in batches(0) for label in labels) == sorted(tiny.train_labels.tolist())


def test_history_and_noise_rows(tiny):
    model = make()
    run = fit(model, tiny, seed=3, **RECIPE)
    assert [(row["seed"], row["epoch"], row["split"]) for row in run["history"]] == [
        (3, epoch, split) for epoch in (0, 1) for split in ("train", "val")
    ]
    assert {row["layer"] for row in run["noise"]} == {name for name, _ in quantized_layers(model)}
    assert len(run["noise"]) == 2 * 8
    for row in run["noise"]:
        assert 0 < row["sigma"] < row["weight_sigma"]
        assert row["step"] > 0
    assert_quantized(model)
    assert fit(make("fp32"), tiny, seed=3, **RECIPE)["noise"] == []


def test_training_learns(tiny):
    run = fit(make(), tiny, seed=0, **RECIPE | {"epochs": 20, "augment": False})
    assert run["history"][-2]["metric"] > 80  # accuracy on the training images; chance is 10


def test_a_loss_that_is_not_finite_names_the_epoch(tiny):
    model = make("fp32")
    with torch.no_grad():
        model.fc.weight.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="epoch 0 of 2"):
        fit(model, tiny, seed=0, **RECIPE)


def test_alpha_decay_shrinks_alphas(tiny):
    def largest_alpha(decay):
        model = make("pact")
        fit(model, tiny, seed=0, **RECIPE | {"alpha_decay": decay})
        return max(layer.activation_quantizer.alpha.item() for _, layer in quantized_layers(model))

    assert largest_alpha(1.0) < 0.8 * largest_alpha(0.0)


def test_bad_arguments(tiny):
    with pytest.raises(ValueError, match="batch_size"):
        fit(make(), tiny, seed=0, **RECIPE | {"batch_size": 1000})
    with pytest.raises(ValueError, match=r"'linear'.*one-cycle"):
        fit(make(), tiny, seed=0, **RECIPE | {"schedule": "linear"})
