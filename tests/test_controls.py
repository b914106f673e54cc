"""The controls: noise that is given back, a penalty that is what noise does, and the noise of LSQ, not any other."""

import copy
import json

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qreg_utils.controls import Control, ControlError, gradient_penalty, load_controls, noisy_inputs
from qreg_utils.models import build_model
from qreg_utils.study import Classification
from tests.test_study import COMMON
from tests.test_training import RECIPE, train

LAYERS = ("conv1", "blocks.0.conv1", "fc")
CONTROLS = pytest.mark.parametrize("method", ["gaussian-noise", "gradient-penalty"])


def control(method, relative=0.2, epochs=2):
    return Control(method, tuple(dict.fromkeys(LAYERS, relative) for _ in range(epochs)))


def linear_classifier():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 5, generator=generator)
    weight = torch.randn(4, 5, generator=generator, requires_grad=True)
    return x, weight


def penalty_in_closed_form(x, weight, sigma):
    """sigma^2 / (2 m) * sum_i |x_i|^2 * trace(diag(p_i) - p_i p_i^T) of a linear classifier."""
    p = (x @ weight.T).softmax(1)
    return sigma**2 / 2 * (x.square().sum(1) * (1 - p.square().sum(1))).mean()


def test_the_penalty_has_the_closed_form_as_its_mean_and_so_has_its_gradient():
    x, weight = linear_classifier()
    generator, draws, sigma = torch.Generator().manual_seed(1), 4000, 0.3
    estimates = [gradient_penalty(x @ weight.T, {"fc": weight}, {"fc": sigma}, generator) for _ in range(draws)]
    estimate = sum(estimates) / draws
    exact = penalty_in_closed_form(x, weight, sigma)
    assert estimate.item() == pytest.approx(exact.item(), rel=0.03)
    gradients = [torch.autograd.grad(value, weight)[0] for value in (estimate, exact)]
    assert (gradients[0] - gradients[1]).norm() < 0.1 * gradients[1].norm()


def test_the_penalty_is_what_noise_adds_to_the_loss():
    """To first order in sigma^2; a linear classifier has no other term of that order."""
    x, weight = linear_classifier()
    labels, sigma = torch.arange(12) % 4, 0.03
    noise = sigma * torch.randn(20_000, *weight.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        loss = F.cross_entropy(x @ weight.T, labels)
        logits = torch.stack([x @ (weight + noise).mT, x @ (weight - noise).mT])  # mirrored: the linear term cancels
        noisy = F.cross_entropy(logits.reshape(-1, 4), labels.repeat(40_000))
    assert (noisy - loss).item() == pytest.approx(penalty_in_closed_form(x, weight, sigma).item(), rel=0.03)


def test_a_probability_that_underflows_gives_no_nan():
    weight = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    penalty = gradient_penalty(torch.ones(2, 1) @ weight.T, {"w": weight}, {"w": 1.0}, torch.Generator().manual_seed(0))
    penalty.backward()
    assert penalty == 0 and weight.grad.isfinite().all()


def test_noise_gives_the_gradient_at_the_perturbed_weights_and_leaves_the_weights(tiny):
    model = build_model("resnet8", seed=0).train()
    before = copy.deepcopy(model.state_dict())
    images, labels = tiny.normalise(tiny.train_images[:32]), tiny.train_labels[:32]
    seen = []

    def batch_loss(images, labels):
        seen.append({layer: model.get_submodule(layer).weight.detach().clone() for layer in LAYERS})
        return F.cross_entropy(model(images), labels)

    backward = control("gaussian-noise").backward(model, batch_loss, seed=0, epoch=0)
    backward(images, labels)
    gradient = model.conv1.weight.grad.clone()
    for layer in LAYERS:
        weight = model.get_submodule(layer).weight.detach()
        assert torch.equal(weight, before[f"{layer}.weight"])
        noise = seen[0][layer] - weight
        assert noise.std().item() == pytest.approx(0.2 * weight.std().item(), rel=0.12)
    untouched = model.blocks[0].conv2.weight
    assert torch.equal(untouched, before["blocks.0.conv2.weight"])

    moved = build_model("resnet8", seed=0).train()
    for layer in LAYERS:
        moved.get_submodule(layer).weight.data.copy_(seen[0][layer])
    F.cross_entropy(moved(images), labels).backward()
    assert torch.allclose(moved.conv1.weight.grad, gradient)

    first = (seen[0]["conv1"] - before["conv1.weight"]) / (0.2 * before["conv1.weight"].std(correction=0))
    order_of_the_data = torch.randn(first.shape, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(first, order_of_the_data, atol=1e-4)

    backward(images, labels)
    assert not torch.equal(seen[0]["fc"], seen[1]["fc"])  # drawn again for each batch
    control("gaussian-noise").backward(model, batch_loss, seed=0, epoch=0)(images, labels)
    assert torch.equal(seen[0]["fc"], seen[2]["fc"])
    control("gaussian-noise").backward(model, batch_loss, seed=0, epoch=1)(images, labels)
    assert not torch.equal(seen[0]["fc"], seen[3]["fc"])


@CONTROLS
def test_with_no_noise_it_is_full_precision_training(method, tiny):
    plain, controlled = build_model("resnet8", seed=0), build_model("resnet8", seed=0)
    train(plain, tiny, seed=0, **RECIPE)
    train(controlled, tiny, seed=0, control=control(method, 0.0), **RECIPE)
    for (name, theirs), ours in zip(plain.named_parameters(), controlled.parameters(), strict=True):
        assert torch.allclose(theirs, ours, atol=1e-6), name


@CONTROLS
def test_a_stopped_run_goes_on_to_the_same_numbers(method, tiny, tmp_path):
    whole, stopped, resumed = (build_model("resnet8", seed=0) for _ in range(3))
    run = train(whole, tiny, seed=0, control=control(method), **RECIPE)
    assert any(not torch.equal(a, b) for a, b in zip(whole.parameters(), stopped.parameters(), strict=True))

    class Stop(Exception):
        pass

    class StopsInTheSecondEpoch(Control):
        def backward(self, model, batch_loss, seed, epoch):
            if epoch == 1:
                raise Stop
            return super().backward(model, batch_loss, seed, epoch)

        def __repr__(self):
            return repr(control(method))

    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(Stop):
        stops = StopsInTheSecondEpoch(method, control(method).relative_sigma)
        train(stopped, tiny, seed=0, control=stops, checkpoint=checkpoint, **RECIPE)
    again = train(resumed, tiny, seed=0, control=control(method), checkpoint=checkpoint, **RECIPE)
    assert again["history"] == run["history"]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_batch_norm_is_measured_without_the_noise(tiny):
    """The running statistics are those of the clean network over the last epoch's batches."""
    model = build_model("resnet8", seed=0)
    train(model, tiny, seed=0, control=control("gaussian-noise", 1.0), **RECIPE | {"augment": False, "batch_size": 96})
    kept = model.bn1.running_mean.clone()
    images = tiny.normalise(tiny.train_images)
    with torch.no_grad():
        clean = model.conv1(images).mean((0, 2, 3))
    assert torch.allclose(kept, clean, atol=1e-4)
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_the_penalty_is_not_compiled(tiny):
    run = train(build_model("resnet8"), tiny, seed=0, control=control("gradient-penalty"), **RECIPE, compile=True)
    assert not run["compiled"]


PARAMETERS = {**COMMON, "method": "gaussian-noise", "weight_bits": 4, "seeds": [0, 1], "epochs": 2}


def noise_rows(seeds=(0, 1), epochs=2):
    rows = [
        {"seed": seed, "epoch": epoch, "layer": layer, "sigma": 0.1 * (seed + 1), "weight_sigma": 2.0**epoch}
        for seed in seeds
        for epoch in range(epochs)
        for layer in LAYERS
    ]
    return pd.DataFrame(rows)


def test_the_noise_is_that_of_lsq_seed_by_seed_and_epoch_by_epoch(tmp_path):
    folder = tmp_path / "digits-resnet8-lsq-w4"
    folder.mkdir()
    noise_rows().to_csv(folder / "noise.csv", index=False)
    finish(folder)
    controls = load_controls(tmp_path, Classification.model_validate(PARAMETERS))
    assert set(controls) == {0, 1} and controls[0].method == "gaussian-noise"
    for seed, run in controls.items():
        for epoch, layers in enumerate(run.relative_sigma):
            assert layers == pytest.approx(dict.fromkeys(LAYERS, 0.1 * (seed + 1) / 2**epoch))
    assert load_controls(tmp_path, Classification.model_validate({**COMMON, "method": "fp32"})) == {0: None, 1: None}


def finish(folder, **changed):
    noise_source = Classification.model_validate(PARAMETERS).noise_source.model_dump() | changed
    (folder / "run.json").write_text(json.dumps({"parameters": noise_source}))


def test_noise_of_a_run_with_other_parameters_is_not_used(tmp_path):
    folder = tmp_path / "digits-resnet8-lsq-w4"
    folder.mkdir()
    noise_rows().to_csv(folder / "noise.csv", index=False)
    finish(folder, learning_rate=0.3)
    with pytest.raises(ControlError, match=r"run\.json: .*other parameters \(learning_rate: 0\.3, not 0\.1\)"):
        load_controls(tmp_path, Classification.model_validate(PARAMETERS))
    finish(folder, seeds=[0, 1, 2])  # more seeds do no harm
    assert set(load_controls(tmp_path, Classification.model_validate(PARAMETERS))) == {0, 1}


def test_noise_of_a_run_older_than_a_parameter_is_used(tmp_path):
    folder = tmp_path / "digits-resnet8-lsq-w4"
    folder.mkdir()
    noise_rows().to_csv(folder / "noise.csv", index=False)
    finish(folder)
    run = json.loads((folder / "run.json").read_text())
    for name in ("extra_corruptions", "variant"):
        del run["parameters"][name]
    (folder / "run.json").write_text(json.dumps(run))
    assert set(load_controls(tmp_path, Classification.model_validate(PARAMETERS))) == {0, 1}


@pytest.mark.parametrize(
    "rows, message",
    [
        (
            None,
            "finished run; digits-resnet8-gaussian-noise-w4 has its noise from there: run digits-resnet8-lsq-w4 first",
        ),
        (noise_rows().drop(columns="sigma"), "no layer statistics: the columns sigma are missing"),
        (noise_rows(seeds=(0,)), "no layer statistics of seed 1 for each of 2 epochs"),
        (noise_rows(epochs=1), "no layer statistics of seed 0 for each of 2 epochs"),
    ],
)
def test_noise_that_is_not_there_is_an_error_that_names_the_file(rows, message, tmp_path):
    path = tmp_path / "digits-resnet8-lsq-w4" / "noise.csv"
    path.parent.mkdir()
    if rows is not None:
        rows.to_csv(path, index=False)
        finish(path.parent)
    with pytest.raises(ControlError) as error:
        load_controls(tmp_path, Classification.model_validate(PARAMETERS))
    assert str(error.value).startswith(str(path)) and message in str(error.value)


def test_noise_on_inputs_is_relative_to_them_and_its_gradient_passes_through(tiny):
    model = build_model("resnet8", seed=0).eval()
    images, seen = tiny.normalise(tiny.train_images[:16]), []
    hook = model.blocks[1].conv1.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0].detach()))
    model(images)
    with noisy_inputs(model, {"blocks.1.conv1": 0.3}, torch.Generator().manual_seed(0)):
        model(images).sum().backward()
    model(images)
    hook.remove()
    clean, noisy, after = seen
    assert torch.equal(clean, after)
    assert ((noisy - clean).std() / clean.std()).item() == pytest.approx(0.3, rel=0.02)
    assert model.conv1.weight.grad.any()


def test_noise_on_inputs_is_drawn_for_each_batch_and_the_same_for_a_seed_and_an_epoch(tiny):
    model, seen = build_model("resnet8", seed=0).eval(), []
    images, labels = tiny.normalise(tiny.train_images[:16]), tiny.train_labels[:16]
    inputs_alone = Control("gaussian-noise", ({}, {}), ({"conv1": 0.3}, {"conv1": 0.3}))
    assert not inputs_alone.can_be_compiled and control("gaussian-noise").can_be_compiled

    def batch_loss(images, labels):
        loss = F.cross_entropy(model(images), labels)
        seen.append(loss.item())
        return loss

    for epoch in (0, 0, 1):
        backward = inputs_alone.backward(model, batch_loss, seed=0, epoch=epoch)
        backward(images, labels)
        backward(images, labels)
    assert seen[0] == seen[2] and seen[1] == seen[3] and len(set(seen)) == 4


@pytest.mark.parametrize("bits", [{"weight_bits": 4}, {"weight_bits": None}])
def test_the_noise_on_inputs_is_that_of_the_source(tmp_path, bits):
    experiment = Classification(**COMMON, method="gaussian-noise", activation_bits=4, **bits)
    source = experiment.noise_source
    folder = tmp_path / source.id
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"parameters": source.model_dump()}))
    layer = {"layer": "fc", "sigma": 0.1, "weight_sigma": 0.5, "input_noise": 0.3, "input_sigma": 2.0}
    rows = [{"seed": s, "epoch": e, **layer} for s in experiment.seeds for e in range(experiment.epochs)]
    pd.DataFrame(rows).to_csv(folder / "noise.csv")
    found = load_controls(tmp_path, experiment)[experiment.seeds[0]]
    assert [dict(epoch) for epoch in found.relative_input_sigma] == [{"fc": pytest.approx(0.15)}] * experiment.epochs
    weights = {"fc": pytest.approx(0.2)} if bits["weight_bits"] else {}
    assert [dict(epoch) for epoch in found.relative_sigma] == [weights] * experiment.epochs

    pd.DataFrame(rows).drop(columns="input_noise").to_csv(folder / "noise.csv")
    with pytest.raises(ControlError, match="the columns input_noise are missing"):
        load_controls(tmp_path, experiment)
