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
    trained = []
    monkeypatch.setattr(training, "_train_epoch", lambda *args: trained.append(1) or train_epoch(*args))
    resumed = make("pact")
    actual = fit(resumed, tiny, seed=0, checkpoint=tmp_path / "c.pt", **recipe)
    assert without_speed(actual) == without_speed(expected)
    assert len(trained) == 1  # only the last epoch was trained again
    assert len(actual["images_per_second"]) == 3
    for a, b in zip(undisturbed.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not list(tmp_path.glob("*.part"))


def test_a_finished_run_is_not_trained_again(tiny, tmp_path):
    first = fit(make(), tiny, seed=0, checkpoint=tmp_path / "c.pt", **RECIPE)
    second = fit(make(), tiny, seed=0, checkpoint=tmp_path / "c.pt", **RECIPE)
    assert first == second  # the measured speed too: nothing was trained


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
    fit(model, tiny, seed=0, checkpoint=path, **recipe)
    assert "starts over" in capsys.readouterr().out


def test_every_level_starts_from_the_same_weights_and_sees_the_same_batches(tiny, monkeypatch):
    seen = []

    def record(model, batches, *rest):
        seen[-1].extend((images.clone(), labels.clone()) for images, labels in batches)
        return 1

    monkeypatch.setattr(training, "_train_epoch", record)
    starts = []
    for method in ("fp32", "lsq", "pact", "dorefa"):
        seen.append([])
        model = make(method)
        starts.append([p.clone() for name, p in model.named_parameters() if "quantizer" not in name])
        fit(model, tiny, seed=5, **RECIPE)
    reference, *others = seen
    assert len(reference) == RECIPE["epochs"] * 3
    for batches in others:
        for (images, labels), (expected, expected_labels) in zip(batches, reference, strict=True):
            assert torch.equal(images, expected) and torch.equal(labels, expected_labels)
    for weights in starts[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights, starts[0], strict=True))
    epochs = [torch.cat([labels for _, labels in reference[i : i + 3]]).tolist() for i in (0, 3)]
    assert epochs[0] != epochs[1]  # shuffled anew
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(tiny.train_labels.tolist())


def test_the_training_loss_is_that_of_the_whole_training_set(tiny):
    model = make("fp32")
    run = fit(model, tiny, seed=0, **RECIPE | {"epochs": 1})
    expected = training.measure(model, tiny, tiny.train_images, tiny.train_labels)
    assert run["history"][0]["split"] == "train"
    assert run["history"][0]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert run["history"][0]["metric"] == pytest.approx(expected["accuracy"])


def test_of_a_large_training_set_a_random_sample_is_measured(tiny, monkeypatch):
    sizes = []
    monkeypatch.setattr(training, "GAP_IMAGES", 40)
    measure = training.measure
    monkeypatch.setattr(training, "measure", lambda m, d, x, y: sizes.append(y.tolist()) or measure(m, d, x, y))
    fit(make("fp32"), tiny, seed=0, **RECIPE | {"epochs": 2})
    assert len(sizes[0]) == 40 and sizes[0] != tiny.train_labels[:40].tolist()
    assert sizes[0] == sizes[2]  # the same sample every time


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
        fit(model, tiny, seed=0, **RECIPE | {"alpha_decay": decay, "epochs": 10})
        return max(layer.activation_quantizer.alpha.item() for _, layer in quantized_layers(model))

    assert largest_alpha(0.1) < 0.8 * largest_alpha(0.0)


def test_bad_arguments(tiny):
    with pytest.raises(ValueError, match="batch_size"):
        fit(make(), tiny, seed=0, **RECIPE | {"batch_size": 1000})
    with pytest.raises(ValueError, match=r"'linear'.*one-cycle"):
        fit(make(), tiny, seed=0, **RECIPE | {"schedule": "linear"})
