"""The recipe: every hyperparameter once, frozen, and all of it in the fingerprint of a training run."""

import math

import pytest
import torch
from pydantic import Field, ValidationError

from qreg_utils.checkpoints import CheckpointError, load_checkpoint, save_checkpoint, training_fingerprint
from qreg_utils.digest import TRAINING
from qreg_utils.models import build_model
from qreg_utils.recipe import ClassificationRecipe, DetectionRecipe, Recipe, epoch_seed
from qreg_utils.study import Classification, Detection
from qreg_utils.training import fit

SHARED = {
    "epochs": 2,
    "batch_size": 32,
    "learning_rate": 0.05,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "alpha_decay": 1e-3,
    "augment": True,
}
CLASSIFICATION = ClassificationRecipe(**SHARED, schedule="one-cycle", compile=False)
DETECTION = DetectionRecipe(**SHARED, schedule="cosine", image_size=64, warmup_epochs=1.0, classes=["1", "7"])
RECIPES = {"classification": CLASSIFICATION, "detection": DETECTION}
# For every field another value than above
OTHER = {
    "epochs": 3,
    "batch_size": 16,
    "learning_rate": 0.051,
    "momentum": 0.8,
    "weight_decay": 4e-4,
    "alpha_decay": 0.0,
    "augment": False,
    "schedule": "linear",
    "compile": "auto",
    "precision": "bfloat16",
    "dropout": 0.5,
    "full_precision_epochs": 1,
    "image_size": 96,
    "warmup_epochs": 1.5,
    "classes": None,
}
CHANGES = [(task, name) for task, recipe in RECIPES.items() for name in type(recipe).model_fields]
HAVE_DEFAULTS = {"compile", "precision", "dropout", "full_precision_epochs"}
MODEL = torch.nn.Linear(3, 2)


def fingerprint(recipe, task="classification"):
    return training_fingerprint(MODEL, [b"data"], recipe, TRAINING[task], seed=0)


def changed(recipe, name):
    value = "cosine" if (recipe.schedule, name) == ("one-cycle", "schedule") else OTHER[name]
    return type(recipe)(**recipe.model_dump() | {name: value})


def test_every_field_of_the_recipes_is_changed_below():
    assert {name for _, name in CHANGES} == set(OTHER)


@pytest.mark.parametrize("task, name", CHANGES)
def test_every_field_reaches_the_fingerprint(task, name):
    recipe = RECIPES[task]
    ours, theirs = fingerprint(recipe, task), fingerprint(changed(recipe, name), task)
    assert {key for key in ours if ours[key] != theirs[key]} == {name}


def test_a_field_that_is_added_gives_another_fingerprint():
    class Longer(ClassificationRecipe):
        label_smoothing: float = Field(0.0, ge=0, lt=1)

    values = CLASSIFICATION.model_dump()
    prints = [
        fingerprint(recipe) for recipe in (CLASSIFICATION, Longer(**values), Longer(**values, label_smoothing=0.1))
    ]
    assert prints[0] != prints[1] != prints[2]
    assert set(prints[1]) - set(prints[0]) == {"label_smoothing"}


@pytest.mark.parametrize("task, name", CHANGES)
def test_a_checkpoint_of_another_value_is_refused_and_the_field_is_named(task, name, tmp_path):
    path, recipe = tmp_path / "checkpoint.pt", RECIPES[task]
    save_checkpoint(path, {"fingerprint": fingerprint(changed(recipe, name), task), "epochs_done": 1})
    difference = rf"\({name} [^;]*, not [^;]*\)"  # one, and no other
    with pytest.raises(CheckpointError, match=rf"checkpoint\.pt belongs to another configuration {difference}"):
        load_checkpoint(path, fingerprint(recipe, task))


def test_a_checkpoint_without_a_field_that_was_added_is_refused(tmp_path):
    class Longer(ClassificationRecipe):
        label_smoothing: float = 0.0

    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"fingerprint": fingerprint(CLASSIFICATION), "epochs_done": 1})
    assert load_checkpoint(path, fingerprint(CLASSIFICATION))["epochs_done"] == 1
    with pytest.raises(CheckpointError, match=r"\(label_smoothing None, not 0\.0\)"):
        load_checkpoint(path, fingerprint(Longer(**CLASSIFICATION.model_dump())))


@pytest.mark.slow
def test_fit_refuses_a_checkpoint_of_another_recipe_by_the_fields_name(tiny, tmp_path):
    path = tmp_path / "checkpoint.pt"
    recipe = CLASSIFICATION.model_copy(update={"epochs": 1})
    fit(build_model("resnet8", seed=0), tiny, recipe, seed=0, checkpoint=path)
    for name in ("momentum", "alpha_decay"):
        with pytest.raises(CheckpointError, match=rf"\({name} "):
            fit(build_model("resnet8", seed=0), tiny, changed(recipe, name), seed=0, checkpoint=path)
    automatic = changed(
        recipe, "compile"
    )  # what is done counts, not what was asked for: so short a run is not compiled
    assert fit(build_model("resnet8", seed=0), tiny, automatic, seed=0, checkpoint=path)["compiled"] is False


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_hyperparameters_are_frozen(recipe):
    for name in type(recipe).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(recipe, name, getattr(recipe, name))


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"epochs": 2.0},
        {"batch_size": 1},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"learning_rate": "5e-4"},
        {"momentum": 1.0},
        {"weight_decay": -1e-4},
        {"alpha_decay": 1.1},
        {"augment": 1},
        {"schedule": "linear"},
        {"compile": "always"},
        {"epocs": 2},
    ],
)
def test_what_is_not_allowed_is_refused(change):
    with pytest.raises(ValidationError, match=next(iter(change))):
        ClassificationRecipe(**CLASSIFICATION.model_dump() | change)


@pytest.mark.parametrize("name", sorted(set(ClassificationRecipe.model_fields) - HAVE_DEFAULTS))
def test_a_hyperparameter_that_is_forgotten_is_missed(name):
    values = CLASSIFICATION.model_dump()
    del values[name]
    with pytest.raises(ValidationError, match=rf"{name}\n  Field required"):
        ClassificationRecipe(**values)


@pytest.mark.parametrize(
    "kind, given",
    [
        (Classification, {"dataset": "digits", "model": "resnet8", **CLASSIFICATION.model_dump()}),
        (Detection, {"dataset": "digit_scenes", "model": "yolov5n", **DETECTION.model_dump()}),
    ],
)
def test_an_experiment_has_every_field_and_gives_them_all_to_the_training(kind, given):
    experiment = kind(method="fp32", seeds=[0], severities=[1], **given)
    recipe = experiment.recipe
    assert type(recipe) is kind.recipe_type and issubclass(kind, kind.recipe_type)
    assert recipe.model_dump() == {name: given[name] for name in kind.recipe_type.model_fields}
    assert set(kind.recipe_type.model_fields) < set(kind.model_fields)


def test_settings_that_are_compared_have_the_same_recipe():
    given = {"dataset": "digits", "model": "resnet8", "seeds": [0], "severities": [1], **CLASSIFICATION.model_dump()}
    fp32 = Classification(method="fp32", **given)
    lsq = Classification(method="lsq", weight_bits=4, **given)
    assert fp32.recipe == lsq.recipe == CLASSIFICATION
    assert fp32.recipe.settings() == lsq.recipe.settings()


def test_both_tasks_share_their_common_hyperparameters():
    shared = set(ClassificationRecipe.model_fields) & set(DetectionRecipe.model_fields)
    assert shared == {*Recipe.model_fields, "schedule"}


def test_epochs_have_random_numbers_of_their_own():
    seeds = {epoch_seed(seed, epoch) for seed in range(20) for epoch in range(200)}
    assert len(seeds) == 20 * 200
    assert epoch_seed(3, 7) == 3 * 1_000_003 + 7  # as in all results so far
