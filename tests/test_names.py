"""The one table of names: complete, in agreement with what is implemented, and light enough for anybody to import."""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from qreg_utils import datasets, models, names, quantizers
from qreg_utils.corruptions.registry import REGISTRY, SEVERITIES
from qreg_utils.names import (
    CLASSIFICATION,
    CLEAN,
    CONTROL,
    CORRUPTIONS,
    DATASETS,
    DETECTION,
    FULL_PRECISION,
    METHODS,
    MODELS,
    PAPER_CORRUPTIONS,
    PART,
    QUANTIZER,
    REGULARIZER,
    SCORES,
    TASKS,
    Corruption,
    Dataset,
    Method,
    Model,
    NamesError,
    Table,
    task_of,
)
from qreg_utils.recipe import ClassificationRecipe

ROOT = Path(__file__).resolve().parent.parent
HAS_ULTRALYTICS = importlib.util.find_spec("ultralytics") is not None
WITH_ULTRALYTICS = pytest.mark.skipif(not HAS_ULTRALYTICS, reason="needs the extra 'detection'")


def of_task(table, task):
    return [name for name, row in table.items() if row.task == task.name]


# --- every row has an implementation, and every implementation a row ---


def test_every_quantizer_is_implemented_and_named():
    rows = [name for name, row in METHODS.items() if row.kind == QUANTIZER]
    parts = [name for name, row in METHODS.items() if row.kind == PART]
    assert rows == ["lsq", "pact", "dorefa"] and [*rows, *parts] == list(quantizers.QUANTIZERS)
    assert {METHODS[METHODS[name].of].kind for name in parts} == {QUANTIZER}


def test_an_ordinary_regularizer_says_which_parameter_is_its_strength():
    strengths = {name: row.strength for name, row in METHODS.items() if row.kind == REGULARIZER}
    assert strengths == {"weight-decay": "weight_decay", "dropout": "dropout"}
    assert set(strengths.values()) <= set(ClassificationRecipe.model_fields)
    assert names.kind_of("dropout-0.5") == names.kind_of("dropout") == REGULARIZER
    assert names.kind_of("lsq-unrounded") == PART and names.kind_of("of-somebody-else") == QUANTIZER


def test_every_other_method_is_full_precision_or_has_the_noise_of_a_quantizer():
    assert [name for name, row in METHODS.items() if row.kind == FULL_PRECISION] == ["fp32"]
    controls = {name: row for name, row in METHODS.items() if row.kind == CONTROL}
    assert list(controls) == ["gaussian-noise", "gradient-penalty"]  # as in controls.Control
    assert {METHODS[row.noise_source].kind for row in controls.values()} == {QUANTIZER}


def test_every_classifier_is_implemented_and_named():
    assert of_task(MODELS, CLASSIFICATION) == list(models.BUILDERS)


@pytest.mark.slow
@WITH_ULTRALYTICS
def test_every_detector_is_implemented_and_named():
    from qreg_utils.detection import yolo

    assert of_task(MODELS, DETECTION) == list(yolo.BUILDERS)


def test_every_classification_data_set_can_be_loaded_and_is_named():
    assert of_task(DATASETS, CLASSIFICATION) == list(datasets.LOADERS)


@pytest.mark.slow
@WITH_ULTRALYTICS
def test_every_detection_data_set_can_be_loaded(tmp_path, monkeypatch):
    from qreg_utils.detection.datasets import load_detection_dataset

    monkeypatch.setenv("QREG_DATA", str(tmp_path))
    for name in of_task(DATASETS, DETECTION):
        try:
            assert load_detection_dataset(name).name == name
        except datasets.DatasetError as error:  # VOC is not there; its name is known
            assert name == "voc" and "is missing" in str(error)
    with pytest.raises(ValueError, match="unknown"):
        load_detection_dataset("nope")


def test_the_numbers_of_images_are_those_of_the_data():
    digits, row = datasets.load_dataset("digits"), DATASETS["digits"]
    assert (len(digits.train_labels), len(digits.test_labels)) == (row.train_images, row.test_images)


def test_every_corruption_is_implemented_for_every_family_and_named():
    assert set(CORRUPTIONS) == set(REGISTRY) and len(REGISTRY) == 19
    for name, corruption in REGISTRY.items():
        assert set(corruption.tables) == {"cifar", "imagenet"}, name
        assert all(len(values) == len(SEVERITIES) for t in corruption.tables.values() for values in t.values()), name


def test_the_papers_corruptions_are_its_19_in_alphabetical_order():
    assert len(PAPER_CORRUPTIONS) == 19 and list(PAPER_CORRUPTIONS) == sorted(PAPER_CORRUPTIONS)
    with (ROOT / "results" / "published" / "heatmap.csv").open(encoding="utf-8") as file:
        cells = {row["cell"] for row in csv.DictReader(file)}
    assert cells == {CLEAN, *PAPER_CORRUPTIONS}


def test_a_registered_corruption_is_none_of_the_papers():
    CORRUPTIONS.add(Corruption("test_only", "test only", "noise"))
    try:
        assert "test_only" in CORRUPTIONS and "test_only" not in PAPER_CORRUPTIONS
    finally:
        CORRUPTIONS.remove("test_only")


def test_tasks_have_a_notebook_and_a_score_each():
    for task in TASKS.values():
        assert (ROOT / "notebooks" / task.notebook).exists()
        assert SCORES[task.score] == task.score_label
    assert len(SCORES) == len(TASKS)


@pytest.mark.parametrize(
    "model, dataset, task",
    [
        ("resnet8", "digits", CLASSIFICATION),
        ("yolov5n", "voc", DETECTION),
        ("resnet8", "voc", DETECTION),  # a mistake that validation is to explain
        ("yolov5n", "digits", DETECTION),
        ("nope", "nope", CLASSIFICATION),
        (["resnet8"], None, CLASSIFICATION),
    ],
)
def test_a_task_is_known_by_model_and_data_set(model, dataset, task):
    assert task_of(model, dataset) is task


# --- incomplete rows ---

METHOD = {"name": "mine", "label": "Mine", "colour": "#123456"}
DATASET = {"name": "mine", "label": "Mine", "task": "classification", "corruption_family": "cifar"}
CORRUPTION = {"name": "mine", "label": "mine", "group": "noise"}


@pytest.mark.parametrize(
    "kind, complete, change, message",
    [
        (Method, METHOD, {"name": ""}, r"method \(without a name\): name '' is not allowed: 1 to 50 of a-z 0-9 _ -"),
        (Method, METHOD, {"name": "My quantizer"}, "method My quantizer: name 'My quantizer' is not allowed"),
        (Method, METHOD, {"name": "-p"}, "method -p: name '-p' is not allowed: .* beginning with no _ or -"),
        (Method, METHOD, {"name": "mine\n"}, r"method 'mine\\n': name .* is not allowed"),
        (Method, METHOD, {"label": ""}, "method mine: label is missing: what figures and tables call it"),
        (Method, METHOD, {"colour": ""}, "method mine: colour is missing: such as #1b7f5c"),
        (Method, METHOD, {"colour": "red"}, "method mine: colour 'red' is not allowed: such as #1b7f5c"),
        (
            Method,
            METHOD,
            {"kind": "magic"},
            "mine: kind 'magic' is not allowed: full precision, quantizer, part of a quantizer, control, ordinary reg",
        ),
        (Method, METHOD, {"tasks": ()}, r"method mine: tasks \(\) is not allowed: some of classification, detection"),
        (Method, METHOD, {"tasks": ("sorting",)}, r"tasks \('sorting',\) is not allowed"),
        (Method, METHOD, {"kind": CONTROL}, "method mine: a control, and nothing else, has a noise_source"),
        (Method, METHOD, {"noise_source": "lsq"}, "method mine: a control, and nothing else, has a noise_source"),
        (Model, {"name": "mine", "label": "Mine"}, {}, "model mine: task is missing: classification, detection"),
        (Model, {"name": "mine", "task": "classification"}, {}, "model mine: label is missing"),
        (Dataset, DATASET, {"label": ""}, "dataset mine: label is missing"),
        (Dataset, DATASET, {"task": ""}, "dataset mine: task is missing: classification, detection"),
        (Dataset, DATASET, {"corruption_family": ""}, "dataset mine: corruption_family is missing: cifar, imagenet"),
        (Dataset, DATASET, {"corruption_family": "mnist"}, "corruption_family 'mnist' is not allowed: cifar, imagenet"),
        (Dataset, DATASET, {"train_images": 1}, "dataset mine: train_images 1 is not allowed: an integer from 2"),
        (Dataset, DATASET, {"test_images": "9"}, "dataset mine: test_images '9' is not allowed: an integer from 2"),
        (Dataset, DATASET, {"task": "detection"}, "dataset mine: classes is missing: the names of what is detected"),
        (Corruption, CORRUPTION, {"group": ""}, "corruption mine: group is missing: noise, blur, weather, digital"),
        (Corruption, CORRUPTION, {"group": "rain"}, "corruption mine: group 'rain' is not allowed: noise, blur"),
    ],
)
def test_an_incomplete_row_says_in_one_line_what_is_missing(kind, complete, change, message):
    if change:
        kind(**complete)  # nothing else is wrong with it
    with pytest.raises(NamesError, match=message) as found:
        kind(**complete | change)
    assert len(str(found.value).splitlines()) == 1


def test_a_name_twice_is_refused_and_leaves_the_table_as_it_was():
    table = Table(Model("one", "One", "classification"), Model("two", "Two", "classification"))
    with pytest.raises(NamesError, match="model two: the name is registered already") as found:
        table.add(Model("two", "Second", "classification"))
    assert len(str(found.value).splitlines()) == 1
    assert list(table) == ["one", "two"] and table["two"].label == "Two"
    with pytest.raises(NamesError, match="method lsq: the name is registered already"):
        METHODS.add(Method("lsq", "LSQ again", QUANTIZER, "#000000"))


def test_a_name_without_a_row_stands_for_itself_and_comes_last():
    table = Table(Model("one", "One", "classification"), Model("two", "Two", "classification"))
    assert [table.label(name) for name in ("two", "nope")] == ["Two", "nope"]
    assert [table.position(name) for name in ("one", "two", "nope")] == [0, 1, 2]
    table.remove("one")
    assert table.position("two") == 0 and len(table) == 1


# --- light ---


def test_the_table_of_names_imports_nothing_heavy():
    code = "import qreg_utils.names, sys; print(*(name.partition('.')[0] for name in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"torch", "torchvision", "numpy", "pandas", "pydantic", "yaml", "matplotlib", "scipy", "ultralytics"}
    assert not heavy & set(loaded.stdout.split())
