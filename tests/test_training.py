"""The training loop: equal for all levels, the same numbers every time, and none lost when it is stopped."""

import math
import os
import re
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.optim.swa_utils import update_bn

from qreg_utils import checkpoints, compiling, digest, training
from qreg_utils.checkpoints import CheckpointError
from qreg_utils.compiling import compiler_works
from qreg_utils.models import build_model, with_dropout
from qreg_utils.models.resnet import BasicBlock, PaddedShortcut, ResNet
from qreg_utils.quantize import (
    assert_quantized,
    calibrate,
    learned_scales,
    parameter_groups,
    quantize_model,
    quantized_layers,
)
from qreg_utils.recipe import ClassificationRecipe
from qreg_utils.training import fit, make_batch_loss, plain_backward, take_batch_norm_statistics, training_step

EVERY_SETTING = pytest.mark.parametrize("method", ["fp32", "lsq", "pact", "dorefa"])

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


def train(model, data, *, seed, control=None, checkpoint=None, like=None, runs=1, **recipe):
    options = {"control": control, "checkpoint": checkpoint, "like": like, "runs": runs}
    return fit(model, data, ClassificationRecipe(**recipe), seed=seed, **options)


def make(method="lsq", seed=0):
    return quantized(build_model("resnet8", seed=seed), method)


def make_two_stages(method="lsq", seed=0):
    """ResNet-8 without its last stage: each kind of layer is there, and there is half as much to compile."""
    torch.manual_seed(seed)
    return quantized(ResNet(BasicBlock, PaddedShortcut, [(1, 16), (1, 32)], num_classes=10), method)


def quantized(model, method):
    return model if method == "fp32" else quantize_model(model, method, 4, 4)


@pytest.fixture(scope="module")
def compiler():
    if not compiler_works(torch.device("cpu")):
        pytest.skip("needs a C++ compiler")


@pytest.fixture
def trained(monkeypatch):
    """A list that grows by one with every epoch that is trained."""
    epochs, train_epoch = [], training._train_epoch
    monkeypatch.setattr(training, "_train_epoch", lambda *args: epochs.append(1) or train_epoch(*args))
    return epochs


@contextmanager
def stopped_after(epochs):
    """Training is interrupted when so many epochs have been trained and saved."""
    begun, train_epoch = [], training._train_epoch

    def interrupted(*args):
        if len(begun) == epochs:
            raise KeyboardInterrupt
        begun.append(1)
        return train_epoch(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_train_epoch", interrupted)
        yield


def without_speed(run):
    return {key: run[key] for key in ("history", "noise")}


@EVERY_SETTING
def test_same_seed_same_numbers_bit_for_bit(tiny, method):
    first, second = make(method), make(method)
    runs = [without_speed(train(model, tiny, seed=1, **RECIPE)) for model in (first, second)]
    assert runs[0] == runs[1]
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_another_seed_other_numbers(tiny):
    runs = [train(make(), tiny, seed=seed, **RECIPE)["history"] for seed in (1, 2)]
    assert runs[0][-1]["loss"] != runs[1][-1]["loss"]


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine"])
def test_a_run_that_was_killed_ends_with_the_same_numbers(tiny, tmp_path, schedule, monkeypatch):
    recipe = RECIPE | {"epochs": 3, "schedule": schedule}
    undisturbed = make("pact")
    expected = train(undisturbed, tiny, seed=0, **recipe)

    epochs = []

    def dies_in_the_third_epoch(*args):
        epochs.append(1)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return train_epoch(*args)

    train_epoch = training._train_epoch
    monkeypatch.setattr(training, "_train_epoch", dies_in_the_third_epoch)
    with pytest.raises(KeyboardInterrupt):
        train(make("pact"), tiny, seed=0, checkpoint=tmp_path / "c.pt", **recipe)
    trained = []
    monkeypatch.setattr(training, "_train_epoch", lambda *args: trained.append(1) or train_epoch(*args))
    resumed = make("pact")
    actual = train(resumed, tiny, seed=0, checkpoint=tmp_path / "c.pt", **recipe)
    assert without_speed(actual) == without_speed(expected)
    assert len(trained) == 1  # only the last epoch was trained again
    assert len(actual["images_per_second"]) == len(actual["seconds"]) == 3
    for a, b in zip(undisturbed.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not list(tmp_path.glob("*.part"))


def test_a_finished_run_is_not_trained_again(tiny, tmp_path):
    first = train(make(), tiny, seed=0, checkpoint=tmp_path / "c.pt", **RECIPE)
    second = train(make(), tiny, seed=0, checkpoint=tmp_path / "c.pt", **RECIPE)
    assert first == second  # the measured speed too: nothing was trained


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("learning rate", "learning_rate 0.05, not 0.01"),
        ("model", "another model, method or bit width"),
        ("weights", "other first weights"),
        ("data", "other data"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_an_error(tiny, tmp_path, change, named):
    path = tmp_path / "c.pt"
    train(make(), tiny, seed=0, checkpoint=path, **RECIPE)
    before = path.read_bytes()
    recipe, model, data = RECIPE, make(), tiny
    if change == "learning rate":
        recipe = RECIPE | {"learning_rate": 0.01}
    elif change == "model":
        model = make("dorefa")
    elif change == "weights":
        model = make(seed=1)
    else:
        data = tiny.subset(80, None)
    with pytest.raises(CheckpointError, match=rf"c\.pt belongs to another configuration \({named}.*delete c\*\.pt"):
        train(model, data, seed=0, checkpoint=path, **recipe)
    assert path.read_bytes() == before


def test_a_checkpoint_of_other_code_is_not_resumed(tiny, tmp_path, monkeypatch, capsys):
    train(make(), tiny, seed=0, checkpoint=tmp_path / "c.pt", **RECIPE)
    monkeypatch.setitem(digest.TRAINING, "classification", ("training.py",))
    train(make(), tiny, seed=0, checkpoint=tmp_path / "c.pt", **RECIPE)
    assert "c.pt was made by other code: training starts over" in capsys.readouterr().out


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "missing":  # killed between the two renames
        path.rename(path.with_name("c.pt.part"))
        return
    if how == "cut short":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = b""
    else:  # one bit, in the middle of the largest tensor
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        content[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut short", "empty", "one bit", "missing"])
def test_of_a_damaged_checkpoint_the_one_before_is_used(tiny, tmp_path, how, trained, capsys):
    recipe, path = RECIPE | {"epochs": 3}, tmp_path / "c.pt"
    undisturbed = make()
    expected = train(undisturbed, tiny, seed=0, checkpoint=path, **recipe)
    damage(path, how)
    trained.clear()
    resumed = make()
    actual = train(resumed, tiny, seed=0, checkpoint=path, **recipe)
    assert len(trained) == 1  # epochs 0 and 1 come from the checkpoint before
    assert without_speed(actual) == without_speed(expected)
    for a, b in zip(undisturbed.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert how == "missing" or "c.pt is damaged" in capsys.readouterr().out


def test_two_damaged_checkpoints_start_over(tiny, tmp_path):
    path = tmp_path / "c.pt"
    expected = train(make(), tiny, seed=0, checkpoint=path, **RECIPE)
    damage(path, "cut short")
    damage(tmp_path / "c.previous.pt", "one bit")
    assert without_speed(train(make(), tiny, seed=0, checkpoint=path, **RECIPE)) == without_speed(expected)


def killed_at_rename(number, path, tiny, recipe, monkeypatch):
    """A run that is killed right before its ``number``-th rename (from 0): it does not tidy up either."""
    renamed, rename = [], Path.replace

    def replace(self, target):
        renamed.append(target)
        if len(renamed) == number + 1:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: self.suffix == ".part" or os.unlink(self))
        with pytest.raises(KeyboardInterrupt):
            train(make(), tiny, seed=0, checkpoint=path, **recipe)
    assert path.with_name("c.pt.part").exists()


@pytest.mark.parametrize(("number", "again"), [(0, 3), (1, 2), (2, 2), (3, 1), (4, 1)])
def test_a_run_killed_while_it_saves_goes_on_with_the_same_numbers(tiny, tmp_path, number, again, trained, monkeypatch):
    """The first save has one rename, every later one two; at each at most the epoch that was being saved is lost."""
    recipe = RECIPE | {"epochs": 3}
    expected = train(make(), tiny, seed=0, **recipe)
    killed_at_rename(number, tmp_path / "c.pt", tiny, recipe, monkeypatch)
    trained.clear()
    actual = train(make(), tiny, seed=0, checkpoint=tmp_path / "c.pt", **recipe)
    assert without_speed(actual) == without_speed(expected)
    assert len(trained) == again


def test_a_damaged_checkpoint_never_takes_the_place_of_a_good_one(tiny, tmp_path, monkeypatch):
    path, recipe = tmp_path / "c.pt", RECIPE | {"epochs": 3}
    train(make(), tiny, seed=0, checkpoint=path, **recipe)
    good = (tmp_path / "c.previous.pt").read_bytes()
    damage(path, "one bit")
    killed_at_rename(0, path, tiny, recipe, monkeypatch)
    assert not path.exists()
    assert (tmp_path / "c.previous.pt").read_bytes() == good


def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged(tiny, tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    train(make(), tiny, seed=0, checkpoint=path, **RECIPE)
    before = path.read_bytes()

    def unreadable(*args):
        raise PermissionError("the disk is away")

    monkeypatch.setattr(checkpoints.zipfile, "ZipFile", unreadable)
    with pytest.raises(PermissionError):
        train(make(), tiny, seed=0, checkpoint=path, **RECIPE)
    assert path.read_bytes() == before


def twenty_steps(method, data, compiled, dtype):
    """The losses and the final weights."""
    model = make_two_stages(method).to(memory_format=torch.channels_last).to(dtype)
    images = data.normalise(data.train_images.repeat(7, 1, 1, 1)[: 20 * 32]).to(dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = data.train_labels.repeat(7)[: 20 * 32]
    calibrate(model, images[:32])
    optimizer = torch.optim.SGD(parameter_groups(model, 5e-4), 0.05, 0.9)
    batch_loss, losses = make_batch_loss(model.train(), 5e-4, torch.device("cpu"), compiled), []

    def recorded(*batch):
        losses.append(batch_loss(*batch))
        return losses[-1]

    for batch in zip(images.split(32), labels.split(32), strict=True):
        training_step(plain_backward(recorded), optimizer, learned_scales(model), *batch)
    return torch.stack(losses).detach(), torch.cat([p.detach().flatten() for p in model.parameters()])


@EVERY_SETTING
def test_compiled_and_eager_agree_over_20_steps(tiny, method, compiler):
    """In double precision, where they compute the same to the last digits."""
    runs = [twenty_steps(method, tiny, compiled, torch.float64) for compiled in (False, True)]
    (losses, weights), (compiled_losses, compiled_weights) = runs
    assert losses[0] != losses[-1]
    torch.testing.assert_close(compiled_losses, losses, rtol=1e-6, atol=0)
    assert (compiled_weights - weights).norm() < 1e-9 * weights.norm()


def test_compiled_and_eager_agree_in_single_precision(tiny, compiler):
    """To 1% in the first step and 5% in the mean of 20: rounding differences grow by chaos, in FP32 too, as they do
    between two numbers of threads."""
    (losses, _), (compiled, _) = (twenty_steps("lsq", tiny, compiled, torch.float32) for compiled in (False, True))
    torch.testing.assert_close(compiled[0], losses[0], rtol=0.01, atol=0)
    torch.testing.assert_close(compiled.mean(), losses.mean(), rtol=0.05, atol=0)


def test_a_compiled_run_is_resumed_and_is_as_good(tiny, tmp_path, compiler):
    recipe = RECIPE | {"epochs": 3, "learning_rate": 0.01}
    eager = train(make_two_stages(), tiny, seed=0, **recipe)
    compiled = train(make_two_stages(), tiny, seed=0, checkpoint=tmp_path / "c.pt", compile=True, **recipe)
    assert (eager["compiled"], compiled["compiled"]) == (False, True)
    for a, b in zip(eager["history"], compiled["history"], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.1)
    (tmp_path / "c.pt").unlink()  # goes on from the second epoch
    again = train(make_two_stages(), tiny, seed=0, checkpoint=tmp_path / "c.pt", compile=True, **recipe)
    assert without_speed(again) == without_speed(compiled)
    assert again["seconds"][:2] == compiled["seconds"][:2]  # these were not trained again
    with pytest.raises(CheckpointError, match="compile True, not False"):
        train(make_two_stages(), tiny, seed=0, checkpoint=tmp_path / "c.pt", compile=False, **recipe)


def test_all_seeds_of_an_experiment_are_trained_by_one_graph(tiny, compiler):
    from torch._dynamo.utils import counters

    recipe = RECIPE | {"epochs": 1, "compile": True}
    train(make_two_stages(seed=0), tiny, seed=0, **recipe)
    made = counters["stats"]["unique_graphs"]
    train(make_two_stages(seed=1), tiny, seed=1, **recipe)
    assert counters["stats"]["unique_graphs"] == made > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@EVERY_SETTING
def test_on_a_gpu_compiled_training_is_as_good(tiny, method):
    recipe = RECIPE | {"epochs": 10, "learning_rate": 0.01}
    runs = [train(make(method), tiny.to("cuda"), seed=0, compile=compile, **recipe) for compile in (False, True)]
    eager, compiled = (run["history"][-2]["loss"] for run in runs)  # of the training images
    assert eager < 1.5 and compiled == pytest.approx(eager, rel=0.3)


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(compiling.time, "perf_counter", lambda: self.now)

    def call(self, seconds):
        def takes_seconds():
            self.now += seconds

        return takes_seconds


@pytest.mark.parametrize(
    "eager, compiled, calls, expected",
    [(1.0, 0.9, 1000, True), (1.0, 1.1, 1000, False), (1.0, 0.1, 500, False), (9.0, 0.1, 100, False)],
)
def test_compiling_pays_where_much_work_is_faster(eager, compiled, calls, expected, monkeypatch):
    clock, cpu = Clock(monkeypatch), torch.device("cpu")
    monkeypatch.setattr(compiling, "compiler_works", lambda device: True)
    assert compiling.pays(clock.call(eager), clock.call(compiled), calls, cpu) is expected
    monkeypatch.setattr(compiling, "compiler_works", lambda device: False)
    assert not compiling.pays(clock.call(eager), clock.call(compiled), calls, cpu)


def test_auto_is_decided_once_for_an_experiment_and_kept_by_a_checkpoint(tiny, tmp_path, monkeypatch):
    asked, steps = [], 6  # of RECIPE

    def pays(eager, compiled, calls, device):
        asked.append(calls)
        eager()
        return False

    monkeypatch.setattr(training, "pays", pays)
    monkeypatch.setattr(training, "FEWEST_CALLS", 1)
    auto = RECIPE | {"compile": "auto"}
    expected = without_speed(train(make(), tiny, seed=0, **RECIPE | {"compile": False}))
    first = train(make(), tiny, seed=0, checkpoint=tmp_path / "c.pt", runs=3, **auto)
    assert without_speed(first) == expected
    train(make(), tiny, seed=1, like=first, runs=3, **auto)
    train(make(), tiny, seed=0, checkpoint=tmp_path / "c.pt", runs=3, **auto)
    assert asked == [3 * steps]


@pytest.fixture
def untried():
    """Whether there is a compiler has not been tried yet, and what this test finds is forgotten after it."""
    compiler_works.cache_clear()
    yield
    compiler_works.cache_clear()


def test_without_a_compiler_training_is_eager_and_says_so(tiny, untried, capsys):
    import torch._inductor.config as inductor

    expected = without_speed(train(make(), tiny, seed=0, **RECIPE))
    with inductor.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        actual = train(make(), tiny, seed=0, compile=True, **RECIPE)
    assert without_speed(actual) == expected and actual["compiled"] is False
    assert re.search(r"nothing is compiled: .*compiler", capsys.readouterr().out)


def test_a_compiler_that_fails_without_a_word_is_not_used(monkeypatch, untried, capsys):
    def fails(function):
        raise NotImplementedError

    monkeypatch.setattr(torch, "compile", fails)
    assert not compiler_works(torch.device("cpu"))
    assert "nothing is compiled: NotImplementedError" in capsys.readouterr().out


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
        train(model, tiny, seed=5, **RECIPE)
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
    run = train(model, tiny, seed=0, **RECIPE | {"epochs": 1})
    expected = training.measure(model, tiny, tiny.train_images, tiny.train_labels)
    assert run["history"][0]["split"] == "train"
    assert run["history"][0]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert run["history"][0]["metric"] == pytest.approx(expected["accuracy"])


def test_of_a_large_training_set_a_random_sample_is_measured(tiny, monkeypatch):
    sizes = []
    monkeypatch.setattr(training, "CURVE_IMAGES", 40)
    measure = training.measure
    monkeypatch.setattr(training, "measure", lambda m, d, x, y: sizes.append(y.tolist()) or measure(m, d, x, y))
    train(make("fp32"), tiny, seed=0, **RECIPE | {"epochs": 2})
    assert len(sizes[0]) == 40 and sizes[0] != tiny.train_labels[:40].tolist()
    assert sizes[0] == sizes[2]  # the same sample every time
    assert len(sizes[1]) == 40 and sizes[1] == sizes[3]  # so of the test images


def test_batch_norm_is_measured_without_what_is_random_in_training():
    """Statistics of a dithered network are those of its own range without rounding; of a plain one, update_bn's."""
    batches = [(torch.randn(16, 3, 32, 32), torch.zeros(16)) for _ in range(3)]
    plain, theirs = build_model("resnet8", seed=0), build_model("resnet8", seed=0)
    take_batch_norm_statistics(plain, batches)
    update_bn(batches, theirs)
    for ours, expected in zip(plain.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(ours, expected)

    dithered = quantize_model(build_model("resnet8", seed=0), "lsq-dithered", 2, 2)
    calibrate(dithered, batches[0][0])
    dithered.train()
    found = []
    for _ in range(2):
        take_batch_norm_statistics(dithered, batches)
        found.append([buffer.clone() for buffer in dithered.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(module.training for module in dithered.modules())


def test_dropout_and_dither_draw_the_same_for_a_seed_and_leave_the_global_numbers_alone(tiny):
    torch.manual_seed(5)
    expected = torch.rand(3)
    runs = []
    for global_seed in (5, 6):
        torch.manual_seed(global_seed)
        model = with_dropout(quantize_model(build_model("resnet8", seed=0), "lsq-dithered", 4, 4), 0.5)
        runs.append(without_speed(train(model, tiny, seed=1, dropout=0.5, **RECIPE)))
        if global_seed == 5:
            assert torch.equal(torch.rand(3), expected)
    assert runs[0] == runs[1]


def test_the_first_epochs_may_be_in_full_precision(tiny, tmp_path):
    """They are those of FP32; then the network is quantized, and a run that was stopped there goes on the same."""
    whole, resumed = make("lsq"), make("lsq")
    recipe = RECIPE | {"epochs": 3, "full_precision_epochs": 2}
    run = train(whole, tiny, seed=1, **recipe)
    fp32 = train(make("fp32"), tiny, seed=1, **RECIPE | {"epochs": 3})
    losses = [[row["loss"] for row in found["history"]] for found in (run, fp32)]
    assert losses[0][:4] == pytest.approx(losses[1][:4], rel=1e-4) and losses[0][4:] != pytest.approx(losses[1][4:])
    sigmas = {epoch: {row["sigma"] for row in run["noise"] if row["epoch"] == epoch} for epoch in range(3)}
    assert sigmas[0] == sigmas[1] == {0.0} and 0.0 not in sigmas[2]
    assert_quantized(whole)

    with pytest.raises(KeyboardInterrupt), stopped_after(2):
        train(resumed, tiny, seed=1, checkpoint=tmp_path / "c.pt", **recipe)
    again = train(make("lsq"), tiny, seed=1, checkpoint=tmp_path / "c.pt", **recipe)
    assert without_speed(again) == without_speed(run)


def test_noise_rows_say_what_happens_to_the_inputs_of_layers(tiny):
    run = train(make("lsq"), tiny, seed=1, **RECIPE)
    first, last = run["noise"][0], run["noise"][-1]
    for row in (first, last):
        assert 0 < row["input_noise"] < row["input_sigma"] and 0 <= row["input_clipped"] < 1
        assert 1 < row["effective_bits"] <= row["bits"] and 1 < row["input_effective_bits"] <= row["bits"]
        assert row["step_moved"] == pytest.approx(1, abs=0.5) and row["input_step_moved"] == pytest.approx(1, abs=0.5)
    assert "kurtosis" in last and "kurtosis" not in first


def test_history_and_noise_rows(tiny):
    model = make()
    run = train(model, tiny, seed=3, **RECIPE)
    assert [(row["seed"], row["epoch"], row["split"]) for row in run["history"]] == [
        (3, epoch, split) for epoch in (0, 1) for split in ("train", "val")
    ]
    assert {row["layer"] for row in run["noise"]} == {name for name, _ in quantized_layers(model)}
    assert len(run["noise"]) == 2 * 8
    for row in run["noise"]:
        assert 0 < row["sigma"] < row["weight_sigma"]
        assert row["step"] > 0
    assert_quantized(model)
    assert train(make("fp32"), tiny, seed=3, **RECIPE)["noise"] == []


def test_training_learns(tiny):
    run = train(make(), tiny, seed=0, **RECIPE | {"epochs": 20, "augment": False})
    assert run["history"][-2]["metric"] > 80  # accuracy on the training images; chance is 10


def test_a_loss_that_is_not_finite_names_the_epoch(tiny):
    model = make("fp32")
    with torch.no_grad():
        model.fc.weight.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="epoch 0 of 2"):
        train(model, tiny, seed=0, **RECIPE)


def test_alpha_decay_shrinks_alphas(tiny):
    def largest_alpha(decay):
        model = make("pact")
        train(model, tiny, seed=0, **RECIPE | {"alpha_decay": decay, "epochs": 10})
        return max(layer.activation_quantizer.alpha.item() for _, layer in quantized_layers(model))

    assert largest_alpha(0.1) < 0.8 * largest_alpha(0.0)


def test_a_model_with_another_number_of_classes_is_an_error(tiny):
    with pytest.raises(ValueError, match=r"7 outputs \(num_classes\), but digits has 10"):
        train(build_model("resnet8", 7), tiny, seed=0, **RECIPE)


def test_bad_arguments(tiny):
    with pytest.raises(ValueError, match="batch_size"):
        train(make(), tiny, seed=0, **RECIPE | {"batch_size": 1000})
    with pytest.raises(ValueError, match=r"compile[\s\S]*'auto'[\s\S]*'always'"):
        train(make(), tiny, seed=0, compile="always", **RECIPE)
    with pytest.raises(ValueError, match=r"schedule[\s\S]*'one-cycle' or 'cosine'[\s\S]*'linear'"):
        train(make(), tiny, seed=0, **RECIPE | {"schedule": "linear"})
