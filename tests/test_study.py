"""Params files: what is accepted, and what is said about what is not."""

import itertools
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qreg_utils import names
from qreg_utils.names import DATASETS, METHODS
from qreg_utils.study import (
    Classification,
    Detection,
    StudyError,
    load_study,
    write_params,
)

ROOT = Path(__file__).resolve().parent.parent
COMMON = {
    "dataset": "digits",
    "model": "resnet8",
    "seeds": [0, 1],
    "epochs": 3,
    "batch_size": 32,
    "learning_rate": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "alpha_decay": 5e-4,
    "schedule": "one-cycle",
    "augment": True,
    "severities": [1, 3],
}
SCENES = {
    "dataset": "digit_scenes",
    "model": "yolov5n",
    "image_size": 64,
    "schedule": "cosine",
    "warmup_epochs": 0.5,
    "train_images": 16,
    "test_images": 8,
}
FP32 = {"method": "fp32"}
LSQ = {"method": "lsq", "weight_bits": 4}


def study_file(folder, grid=(FP32,), **common):
    path = folder / "toy.yaml"
    content = {"common": {**COMMON, **common}, "grid": list(grid)}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "params").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_committed_study_is_valid(path):
    study = load_study(path)
    assert study.name == path.stem and study.description
    assert any(experiment.method == "fp32" for experiment in study.experiments)


def test_the_quick_study_is_the_whole_grid():
    experiments = load_study(ROOT / "params" / "quick.yaml").experiments
    settings = [f"{method}-w{bits}a{bits}" for method in ("lsq", "pact", "dorefa") for bits in (8, 4, 2)]
    assert [e.id for e in experiments] == [f"few_digits-small_resnet8-{setting}" for setting in ["fp32", *settings]]
    assert {(e.method, len(e.seeds)) for e in experiments} == {("fp32", 10), ("lsq", 10), ("pact", 5), ("dorefa", 5)}


def test_the_theory_and_the_detectors_have_studies_of_their_own():
    settings = [f"{method}-w{bits}" for method in ("lsq", "gaussian-noise", "gradient-penalty") for bits in (8, 4, 2)]
    theory = load_study(ROOT / "params" / "theory.yaml").experiments
    assert [e.id for e in theory] == [f"few_digits-small_resnet8-{setting}" for setting in ["fp32", *settings]]
    scenes = load_study(ROOT / "params" / "scenes.yaml").experiments
    assert [e.setting for e in scenes] == ["fp32", "lsq-w8a8", "lsq-w4a4", "lsq-w2a2"]


@pytest.mark.parametrize("dataset, model", [("cifar10", "resnet20"), ("cifar100", "resnet18")])
def test_the_cifar_studies_are_the_papers_settings(dataset, model):
    study = load_study(ROOT / "params" / f"{dataset}.yaml")
    assert [e.setting for e in study.experiments] == ["fp32", "lsq-w8a8", "lsq-w4a4", "lsq-w2a2"]
    assert {(e.dataset, e.model, e.epochs, len(e.seeds)) for e in study.experiments} == {(dataset, model, 200, 3)}


def test_the_paper_study_is_every_model_on_every_data_set_at_every_setting():
    study = load_study(ROOT / "params" / "paper.yaml")
    models, datasets = ("resnet18", "resnet20", "resnet50", "mobilenet_v1"), ("cifar10", "cifar100")
    settings = ["fp32", *(f"{method}-w{bits}a{bits}" for method in ("lsq", "pact", "dorefa") for bits in (8, 4, 2))]
    grid = itertools.product(datasets, models, settings)
    assert {(e.dataset, e.model, e.setting) for e in study.experiments} == set(grid)
    assert f"{len(study.experiments)} experiments" in study.description
    assert f"{sum(len(e.seeds) for e in study.experiments)} training runs" in study.description


def test_the_paper_study_has_the_recipe_of_the_smaller_ones():
    recipes = {name: load_study(ROOT / "params" / f"{name}.yaml").experiments for name in ("cifar10", "cifar100")}
    for experiment in load_study(ROOT / "params" / "paper.yaml").experiments:
        assert experiment.recipe == recipes[experiment.dataset][0].recipe


def test_theory_is_measured_only_where_it_is_asked_for():
    studies = {path.stem: load_study(path).experiments for path in (ROOT / "params").glob("*.yaml")}
    asked = {name for name, found in studies.items() if any(getattr(e, "theory", False) for e in found)}
    assert asked == {"theory", "cifar10", "cifar100", "paper"}
    assert all(experiment.theory for experiment in studies["theory"])


def test_a_control_and_the_source_of_its_noise_may_differ_in_theory(tmp_path):
    weights = {"weight_bits": 4, "activation_bits": None}
    noise = {"method": "gaussian-noise", **weights, "theory": True, "theory_images": 8}
    study = load_study(study_file(tmp_path, [FP32, {"method": "lsq", **weights}, noise]))
    assert [experiment.theory for experiment in study.experiments] == [False, False, True]


def test_networks_are_trained_in_float32_unless_bfloat16_is_asked_for(tmp_path):
    assert {e.precision for e in load_study(study_file(tmp_path, [FP32, LSQ])).experiments} == {"float32"}
    study = load_study(study_file(tmp_path, [FP32, LSQ], precision="bfloat16"))
    assert {e.recipe.precision for e in study.experiments} == {"bfloat16"}


def test_names_in_the_schema_are_those_of_the_library():
    from qreg_utils.datasets import LOADERS
    from qreg_utils.models import BUILDERS
    from qreg_utils.quantizers import QUANTIZERS

    def choices(field):
        with pytest.raises(ValidationError) as error:
            Classification.model_validate({**COMMON, "method": "fp32", field: "nothing"})
        (problem,) = error.value.errors()
        return set(re.findall("'([^']+)'", problem["msg"]))

    others = {name for name, row in METHODS.items() if row.kind in (names.CONTROL, names.REGULARIZER)}
    assert choices("dataset") == set(LOADERS)
    assert choices("model") == set(BUILDERS)
    assert choices("method") == {"fp32", *QUANTIZERS, *others}


@pytest.mark.parametrize("name", ["digits", "cifar10", "cifar100", "digit_scenes"])
def test_the_schema_knows_how_many_images_there_are(name):
    known = (DATASETS[name].train_images, DATASETS[name].test_images)
    if name == "digits":
        from qreg_utils.datasets import load_dataset

        data = load_dataset(name)
        assert known == (
            len(data.train_labels),
            len(data.test_labels),
        )
    elif name == "digit_scenes":
        pytest.importorskip("qreg_utils.detection.datasets")
        from qreg_utils.detection.datasets import SCENES

        assert known == (SCENES["train"], SCENES["test"])
    else:
        assert known == (
            50_000,
            10_000,
        )  # torchvision's documentation


@pytest.mark.parametrize("task, module", [(Classification, "training"), (Detection, "detection.training")])
def test_the_recipe_is_what_fit_takes(task, module):
    import importlib
    import inspect

    if task is Detection:
        pytest.importorskip("qreg_utils.detection")
    fit = importlib.import_module(f"qreg_utils.{module}").fit
    assert inspect.signature(fit).parameters["recipe"].annotation is task.recipe_type


def test_one_study_may_hold_both_tasks(tmp_path):
    study = load_study(study_file(tmp_path, [FP32, {**SCENES, **FP32}]))
    assert [type(experiment) for experiment in study.experiments] == [Classification, Detection]
    assert study.experiments[1].id == "digit_scenes-yolov5n-fp32"
    assert "compile" not in type(study.experiments[1].recipe).model_fields


def test_classes_and_splits_stay_together_on_the_grid(tmp_path):
    voc = {**SCENES, **FP32, "dataset": "voc", "classes": ["cat", "dog"], "train_split": ["train2012", "mine.txt"]}
    (experiment,) = load_study(study_file(tmp_path, [voc])).experiments
    assert experiment.classes == ["cat", "dog"] and experiment.train_split == ["train2012", "mine.txt"]


def test_an_experiment_knows_what_it_is_compared_with(tmp_path):
    fp32, lsq = load_study(study_file(tmp_path, [FP32, LSQ])).experiments
    assert lsq.in_full_precision == fp32 == fp32.in_full_precision


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_size": 100}, "image_size: 100 is not allowed: a multiple of 32"),
        ({"image_size": None}, "image_size: None is not allowed: a multiple of 32"),
        ({"classes": []}, "classes: [] is not allowed: an empty list makes no experiment"),
        ({"classes": ["3", "3"]}, "classes: ['3', '3'] is not allowed: it names one twice"),
        ({"classes": "cat"}, "classes: 'cat' is not allowed: a list of class names"),
        ({"train_split": "train2012"}, "train_split: 'train2012' is not allowed: a list of folders"),
        ({"schedule": "one-cycle"}, "schedule: 'one-cycle' is not allowed: 'linear' or 'cosine'"),
        ({"compile": True}, "compile: unknown key"),
        ({"model": "resnet8"}, "model: 'resnet8' is not allowed: 'yolov5n'"),
        ({"dataset": "digits"}, "dataset: 'digits' is not allowed: 'digit_scenes' or 'voc'"),
        ({"classes": ["cat"]}, "classes: 'cat' is not allowed for digit_scenes: 0, 1, 2"),
        ({"dataset": "voc", "classes": ["katze"]}, "classes: 'katze' is not allowed for voc: aeroplane, bicycle"),
        ({"train_split": ["train2012"]}, "train_split: ['train2012'] is not allowed: digit_scenes has its own splits"),
        ({"train_images": 401}, "train_images: 401 is not allowed: digit_scenes has 400"),
        (
            {"dataset": "voc", "train_images": 10**9 + 1},
            "1000000001 is not allowed: an integer from 2, or null (all); at",
        ),
        (
            {"dataset": "voc", "train_split": ["a"] * 101},
            "list files (.txt) in VOC, at most 100",
        ),
        ({"warmup_epochs": -1.0}, "warmup_epochs: -1.0 is not allowed: a number from 0"),
    ],
)
def test_bad_parameters_of_detection_are_named(tmp_path, change, message):
    with pytest.raises(StudyError) as error:
        load_study(study_file(tmp_path, [{**SCENES, **FP32, **change}]))
    assert message in str(error.value)
    assert str(tmp_path / "toy.yaml") in str(error.value)


def test_settings_of_a_detector_need_the_same_data(tmp_path):
    with pytest.raises(StudyError, match=r"image_size: 64 for .*fp32 but 96 for .*lsq-w4a4"):
        load_study(study_file(tmp_path, [{**SCENES, **FP32}, {**SCENES, **LSQ, "image_size": 96}]))


def test_lists_on_the_grid_expand_and_ids_read_as_sentences(tmp_path):
    grid = [FP32, {"method": ["lsq", "pact"], "weight_bits": [8, 2]}]
    ids = [experiment.id for experiment in load_study(study_file(tmp_path, grid)).experiments]
    expected = ["fp32", "lsq-w8a8", "lsq-w2a2", "pact-w8a8", "pact-w2a2"]
    assert ids == [f"digits-resnet8-{setting}" for setting in expected]


def test_activations_follow_the_weights_unless_told_otherwise(tmp_path):
    grid = [{**LSQ, "activation_bits": [None, "same", 8]}]
    experiments = load_study(study_file(tmp_path, grid)).experiments
    assert [experiment.activation_bits for experiment in experiments] == [None, 4, 8]
    assert [experiment.setting for experiment in experiments] == ["lsq-w4", "lsq-w4a4", "lsq-w4a8"]
    assert [experiment.columns["activation_bits"] for experiment in experiments] == [32, 4, 8]


def test_severities_on_the_grid_stay_together(tmp_path):
    (experiment,) = load_study(study_file(tmp_path, [{**FP32, "severities": [2, 4]}])).experiments
    assert experiment.severities == [2, 4] and experiment.id == "digits-resnet8-fp32"


def test_settings_may_have_some_of_full_precisions_seeds(tmp_path):
    few = load_study(study_file(tmp_path, [FP32, {**LSQ, "seeds": [[0]]}])).experiments[1]
    assert few.seeds == [0]
    two = load_study(study_file(tmp_path, [{**FP32, "seeds": [[0, 1, 2]]}, {**LSQ, "seeds": [[0, 1]]}])).experiments
    assert [e.seeds for e in two] == [[0, 1, 2], [0, 1]]
    with pytest.raises(StudyError, match="need the same"):  # no full precision to be compared with
        load_study(study_file(tmp_path, [LSQ, {**LSQ, "weight_bits": 8, "seeds": [[0]]}]))


@pytest.mark.parametrize("looks", [[10, 6], [6, 6], [1, 6], ["6"], [], 6, [6, 2000], [True, 6]])
def test_looks_that_are_no_growing_numbers_of_seeds_are_refused(tmp_path, looks):
    path = study_file(tmp_path, [FP32])
    path.write_text(path.read_text() + f"looks: {looks!r}\n".replace("True", "true"))
    with pytest.raises(StudyError, match=r"looks: .* is not allowed: a list of growing integers from 2 to 1000"):
        load_study(path)
    path.write_text(path.read_text().rpartition("looks:")[0] + "looks: [6, 10]\n")
    assert load_study(path).looks == (6, 10)


def test_seeds_on_the_grid_become_jobs_of_their_own(tmp_path):
    experiments = load_study(study_file(tmp_path, [{**LSQ, "seeds": [0, 5]}])).experiments
    assert [(e.id, e.seeds) for e in experiments] == [
        ("digits-resnet8-lsq-w4a4-seed0", [0]),
        ("digits-resnet8-lsq-w4a4-seed5", [5]),
    ]


@pytest.mark.parametrize(
    "common, grid, message",
    [
        ({"epocs": 3}, [FP32], "common: epocs: unknown key; did you mean 'epochs'?"),
        ({}, [{**FP32, "zebra": 3}], r"grid\[0\]: zebra: unknown key; allowed: dataset, model"),
        ({}, [FP32, {**LSQ, "weight_bits": 1}], r"grid\[1\]: weight_bits: 1 is not allowed: an integer from 2 to 8"),
        ({}, [{**LSQ, "weight_bits": [4, 33]}], r"grid\[0\]: weight_bits: 33 is not allowed: an integer from 2 to 8"),
        ({}, [{**LSQ, "weight_bits": 4.0}], r"weight_bits: 4\.0 is not allowed"),
        (
            {},
            [{"method": "lsqq", "weight_bits": 4}],
            "method: 'lsqq' is not allowed: 'fp32', 'lsq', 'pact', 'dorefa', 'lsq-unrounded', 'lsq-unclipped', "
            "'lsq-dithered', 'pact-unrounded', 'dorefa-unrounded', 'gaussian-noise', 'gradient-penalty', "
            "'weight-decay' or 'dropout'",
        ),
        ({"compile": "always"}, [FP32], "common: compile: 'always' is not allowed: auto, true or false"),
        ({"train_images": 0}, [FP32], r"train_images: 0 is not allowed: an integer from 2, or null \(all\)"),
        ({}, [FP32, {**LSQ, "test_images": 300}], "test_images: None for digits-resnet8-fp32 but 300 for .*the same"),
        ({}, [FP32, {**LSQ, "compile": True}], "compile: 'auto' for digits-resnet8-fp32 but True for .*need the same"),
        ({}, [{"method": "lsq"}], "method lsq needs weight_bits"),
        ({}, [{**FP32, "weight_bits": 4}], "method fp32 takes neither"),
        ({"model": "resnet19"}, [FP32], "model: 'resnet19' is not allowed: 'resnet8', .* or 'mobilenet_v1'"),
        ({"dataset": "mnist"}, [FP32], "dataset: 'mnist' is not allowed"),
        ({"epochs": "many"}, [FP32], "epochs: 'many' is not allowed: an integer from 1 to 10000"),
        ({"epochs": True}, [FP32], "epochs: True is not allowed"),
        ({"epochs": 0}, [FP32], "epochs: 0 is not allowed"),
        ({"learning_rate": "5e-4"}, [FP32], r"write 5\.0e-4"),
        ({"learning_rate": float("nan")}, [FP32], "learning_rate: nan is not allowed"),
        ({"augment": "yes please"}, [FP32], "augment: 'yes please' is not allowed: true or false"),
        ({"seeds": []}, [FP32], r"seeds: \[\] is not allowed"),
        ({"seeds": [1, 1]}, [FP32], r"seeds: \[1, 1\] is not allowed: it names one twice"),
        ({"seeds": [2**31]}, [FP32], r"seeds: \[2147483648\] is not allowed: .* from 0 to 2147483647, at most 1000"),
        ({"train_images": 1443}, [FP32], "train_images: 1443 is not allowed: digits has 1442"),
        ({"test_images": 356}, [FP32], "test_images: 356 is not allowed: digits has 355"),
        ({"batch_size": 1443}, [FP32], "batch_size: 1443 is not allowed: there are 1442 training images"),
        ({"train_images": 31}, [FP32], "batch_size: 32 is not allowed: there are 31 training images"),
        ({"severities": [0]}, [FP32], r"severities: \[0\] is not allowed: .* from 1 to 5"),
        ({}, [], r"grid: \[\] is not allowed"),
        ({}, [{**LSQ, "weight_bits": []}], r"weight_bits: \[\] is not allowed"),
        ({}, [LSQ, LSQ], "digits-resnet8-lsq-w4a4 is there twice"),
        ({}, [FP32, {**LSQ, "seeds": [0, 7]}], r"seeds: \[0, 1\] for .*-fp32 but \[0, 7\] for .*need some of these"),
        ({}, [{**FP32, 1: 3}], r"grid\[0\]: 1: unknown key"),
        ({}, [FP32, {**LSQ, "epochs": 9}], "epochs: 3 for digits-resnet8-fp32 but 9 for .*need the same"),
    ],
)
def test_mistakes_name_file_key_value_and_what_is_allowed(tmp_path, common, grid, message):
    path = study_file(tmp_path, grid, **common)
    with pytest.raises(StudyError, match=message) as caught:
        load_study(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value).splitlines()) <= 3


def test_a_missing_key_is_named(tmp_path):
    path = study_file(tmp_path)
    content = yaml.safe_load(path.read_text())
    del content["common"]["epochs"]
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(StudyError, match="epochs: missing"):
        load_study(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("grid: [", "not valid YAML"),
        ("just text", "mapping"),
        ("", "mapping"),
        ("grid: 3", "grid: 3 is not allowed"),
        ("common: 3\ngrid: [{method: fp32}]", "common: 3 is not allowed"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("grids: []", "did you mean 'grid'"),
        ("1: []", "1: unknown key"),
    ],
)
def test_files_that_are_no_study(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(StudyError, match=message):
        load_study(path)


def test_a_missing_file_lists_the_studies_that_are_there(tmp_path):
    study_file(tmp_path)
    with pytest.raises(StudyError, match="no such file; studies there: toy"):
        load_study(tmp_path / "quik.yaml")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])  # each example is a file
@given(
    st.dictionaries(
        st.sampled_from([*Classification.model_fields, "nonsense", 1, True, None]),
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers())),
        max_size=4,
    )
)
def test_anything_else_is_refused_with_a_message_or_accepted(tmp_path_factory, change):
    path = tmp_path_factory.mktemp("study") / "toy.yaml"
    path.write_text(yaml.safe_dump({"common": {**COMMON, **change}, "grid": [FP32]}), encoding="utf-8")
    try:
        assert load_study(path).experiments
    except StudyError as error:
        assert str(error).startswith(str(path))


def test_written_params_are_read_back_as_the_same_experiment(tmp_path):
    path = study_file(tmp_path, [FP32, {**LSQ, "activation_bits": [None, 3]}])
    study = load_study(path)
    write_params(study, path, tmp_path / "results")
    assert load_study(tmp_path / "results" / "toy.yaml") == study
    for experiment in study.experiments:
        file = tmp_path / "results" / experiment.id / "params.yaml"
        assert Classification(**yaml.safe_load(file.read_text())) == experiment
        before = file.stat().st_mtime_ns
        write_params(study, path, tmp_path / "results")
        assert file.stat().st_mtime_ns == before  # its time of change means something


@pytest.mark.parametrize(
    "entry",
    ["/etc", "../up", "a/../../up", "..", ".", ".hidden", "~", "~/x", "a\\b", "C:/x", "", "a//b", "a/", "a\0b", "a\nb"],
)
@pytest.mark.parametrize("key", ["train_split", "test_split"])
def test_splits_cannot_leave_the_data_folder(tmp_path, key, entry):
    voc = {**SCENES, **FP32, "dataset": "voc", key: ["train2012", entry]}
    with pytest.raises(
        StudyError, match=rf"grid\[0\]: {key}: \['train2012', .* is not allowed: .*without \.\."
    ) as error:
        load_study(study_file(tmp_path, [voc]))
    assert str(error.value).isprintable()


@pytest.mark.parametrize("entry", ["train2012", "mine.txt", "lists/of mine.txt", "a-b_c.d+e/f", "größe"])
def test_splits_inside_the_data_folder(tmp_path, entry):
    voc = {**SCENES, **FP32, "dataset": "voc", "train_split": [entry]}
    assert load_study(study_file(tmp_path, [voc])).experiments[0].train_split == [entry]


def test_a_params_file_does_not_say_where_results_go(tmp_path):
    """results_dir is for whoever runs a notebook by hand, and may be anywhere."""
    with pytest.raises(StudyError, match="common: results_dir: unknown key"):
        load_study(study_file(tmp_path, results_dir="/etc"))
    with pytest.raises(StudyError, match=r"grid\[0\]: results_dir: unknown key"):
        load_study(study_file(tmp_path, [{**FP32, "results_dir": "../elsewhere"}]))
    with pytest.raises(StudyError, match=r"toy\.yaml: results_dir: unknown key"):
        path = study_file(tmp_path)
        path.write_text(f"results_dir: /etc\n{path.read_text()}")
        load_study(path)


# --- resources --------------------------------------------------------------------------------------------------------


def test_resources_of_an_entry_are_merged_over_the_common_ones(tmp_path):
    grid = [
        FP32,
        {**LSQ, "weight_bits": [4, 2], "resources": {"runtime": 90, "slurm_partition": "long,gpu-a.1"}},
        {**LSQ, "method": "pact", "resources": {}},
    ]
    common = {"runtime": 30, "mem_mb": 8000, "gres": "gpu:1", "slurm_account": "me"}
    study = load_study(study_file(tmp_path, grid, resources=common))
    longer = {**common, "runtime": 90, "slurm_partition": "long,gpu-a.1"}
    assert study.resources == {
        "digits-resnet8-fp32": common,
        "digits-resnet8-lsq-w4a4": longer,
        "digits-resnet8-lsq-w2a2": longer,
        "digits-resnet8-pact-w4a4": common,
    }


def test_resources_are_no_parameters_of_an_experiment(tmp_path):
    plain = load_study(study_file(tmp_path, [FP32, LSQ]))
    assert plain.resources == {"digits-resnet8-fp32": {}, "digits-resnet8-lsq-w4a4": {}}
    path = study_file(tmp_path, [FP32, {**LSQ, "resources": {"gres": "gpu:2"}}], resources=None)
    study = load_study(path)
    assert study.experiments == plain.experiments
    write_params(study, path, tmp_path / "results")
    assert load_study(tmp_path / "results" / "toy.yaml") == study
    assert all("gres" not in file.read_text() for file in (tmp_path / "results").glob("*/params.yaml"))
    with pytest.raises(StudyError, match="notebook parameters: resources: unknown key"):
        Classification.from_notebook({**COMMON, **FP32, "resources": {}})


@pytest.mark.parametrize(
    "resources, message",
    [
        ({"runtme": 5}, "resources.runtme: unknown key; did you mean 'runtime'?"),
        ({"nodes": 5}, "resources.nodes: unknown key; allowed: runtime, mem_mb, gres, slurm_partition, slurm_account"),
        ({1: 5}, "resources.1: unknown key"),
        ({"runtime": 0}, "resources.runtime: 0 is not allowed: minutes, an integer from 1 to 100000"),
        ({"runtime": 100_001}, "resources.runtime: 100001 is not allowed"),
        ({"runtime": "1h"}, "resources.runtime: '1h' is not allowed: minutes"),
        ({"runtime": True}, "resources.runtime: True is not allowed"),
        ({"runtime": None}, "resources.runtime: None is not allowed"),
        ({"mem_mb": 99}, "resources.mem_mb: 99 is not allowed: megabytes, an integer from 100 to 10000000"),
        ({"mem_mb": 10_000_001}, "resources.mem_mb: 10000001 is not allowed"),
        ({"gres": 1}, "resources.gres: 1 is not allowed: such as gpu, gpu:1 or gpu:a100:1"),
        ({"gres": "gpu:a:b:1"}, "resources.gres: 'gpu:a:b:1' is not allowed"),
        ({"gres": "gpu:1 --wrap=reboot"}, "resources.gres: 'gpu:1 --wrap=reboot' is not allowed"),
        ({"gpus": 1}, "resources.gpus: unknown key; "),
        ({"slurm_partition": ""}, "resources.slurm_partition: '' is not allowed: 1 to 100 characters of A-Z a-z 0-9 _"),
        ({"slurm_partition": "-x"}, "resources.slurm_partition: '-x' is not allowed"),
        ({"slurm_partition": "a b"}, "resources.slurm_partition: 'a b' is not allowed"),
        ({"slurm_partition": "a\n"}, r"resources.slurm_partition: 'a\n' is not allowed"),
        ({"slurm_partition": "größe"}, "resources.slurm_partition: 'größe' is not allowed"),
        ({"slurm_account": "$(reboot)"}, "resources.slurm_account: '$(reboot)' is not allowed: 1 to 100 characters"),
        ({"slurm_account": "x" * 101}, "resources.slurm_account: 'xxx"),
        ({"slurm_account": 7}, "resources.slurm_account: 7 is not allowed"),
        (
            [{"gres": "gpu"}],
            "resources: [{'gres': 'gpu'}] is not allowed: a mapping with any of runtime, mem_mb, gres, slurm_p",
        ),
        ([], "resources: [] is not allowed"),
        (3, "resources: 3 is not allowed: a mapping"),
    ],
)
def test_wrong_resources_are_named(tmp_path, resources, message):
    paths = [
        (study_file, [FP32], {"resources": resources}, "common"),
        (study_file, [FP32, {**LSQ, "resources": resources}], {}, "grid[1]"),
    ]
    for write, grid, common, place in paths:
        with pytest.raises(StudyError) as error:
            load_study(write(tmp_path, grid, **common))
        assert f"toy.yaml: {place}: {message}" in str(error.value)


@pytest.mark.parametrize("words", ["a", "x" * 100, "gpu_1,gpu-2.3"])
def test_words_for_the_cluster(tmp_path, words):
    study = load_study(study_file(tmp_path, resources={"slurm_partition": words, "slurm_account": words}))
    assert study.resources["digits-resnet8-fp32"] == {"slurm_partition": words, "slurm_account": words}


def test_mistyped_resources_are_recognised(tmp_path):
    with pytest.raises(StudyError, match="common: resorces: unknown key; did you mean 'resources'"):
        load_study(study_file(tmp_path, resorces={"gres": "gpu"}))


# ----------------------------------------------------------------------------------------------------------------------


def test_a_notebooks_parameters_are_checked():
    namespace = {**COMMON, "method": "lsq", "weight_bits": 4, "activation_bits": None, "results_dir": "x"}
    jupyter = {
        "In": [],
        "Out": {},
        "exit": 1,
        "quit": 1,
        "get_ipython": 1,
        "open": 1,
        "_i": "",
        "Classification": Classification,
    }
    experiment = Classification.from_notebook({**namespace, **jupyter, "yaml": yaml}, also=("results_dir",))
    assert experiment.id == "digits-resnet8-lsq-w4"
    with pytest.raises(StudyError, match="notebook parameters: epocs: unknown key"):
        Classification.from_notebook({**namespace, "epocs": 3}, also=("results_dir",))
    later = {"experiment": experiment, "start": 1.0, "device": "cpu", "load_dataset": load_study}
    changed = {**namespace, **jupyter, **later, "epochs": 5}  # run again by hand, after a change
    assert Classification.from_notebook(changed, also=("results_dir",)).epochs == 5


CELL = "\n".join(f"{name} = {value!r}" for name, value in {**COMMON, "method": "lsq", "weight_bits": 4}.items())
CALL = "from qreg_utils.study import Classification\nexperiment = Classification.from_notebook(globals())"


def run_cells(*cells, **startup):
    """A notebook's namespace after some cells, as IPython keeps it; the last cell calls from_notebook."""
    namespace = {"In": [""], "Out": {}, **startup}
    for cell in cells:
        namespace["In"].append(cell)
        exec(cell, namespace)
    return namespace["experiment"]


def test_what_a_persons_ipython_startup_files_define_is_no_parameter():
    assert run_cells(CELL, CALL, print=print, favourite=7).epochs == 3


def test_a_mistyped_parameter_on_papermills_command_line_is_an_error():
    with pytest.raises(StudyError, match="weigth_bits: unknown key; did you mean 'weight_bits'"):
        run_cells(CELL, "# Parameters\nweigth_bits = 2", CALL)


def test_a_typo_in_a_parameters_cell_that_is_run_again_is_an_error():
    later = "whole, data = 1, 2\nfolder = 'x'"
    changed = CELL.replace("epochs = 3", "epochs = 5")
    assert run_cells(CELL, CALL, later, changed, CALL).epochs == 5
    with pytest.raises(StudyError, match="epocs: unknown key; did you mean 'epochs'"):
        run_cells(CELL, CALL, later, CELL.replace("epochs = 3", "epocs = 5"), CALL)
    mended = [CELL, CALL, CELL + "\nweigth_bits = 2", changed, CALL]
    assert run_cells(*mended).epochs == 5


@pytest.mark.parametrize(
    "name, typed, meant",
    [("augment", "false", False), ("augment", "true", True), ("train_images", "null", None), ("compile", "true", True)],
)
def test_yaml_words_on_papermills_command_line_mean_what_they_say(name, typed, meant):
    experiment = Classification.from_notebook({**COMMON, **FP32, name: typed})
    assert getattr(experiment, name) is meant


def test_a_list_on_papermills_command_line_names_the_option_to_use():
    with pytest.raises(
        StudyError, match=r"seeds: '\[0\]' is not allowed: .* \(papermill's -p takes no lists: write -y"
    ):
        Classification.from_notebook({**COMMON, **FP32, "seeds": "[0]"})


@pytest.mark.parametrize(
    "written, said",
    [
        ("010", "'010' is not allowed: YAML 1.1 reads it as 8, YAML 1.2 as 10: write 10 or 8"),
        ("007", "'007' is not allowed: YAML 1.1 reads it as 7, YAML 1.2 as 7: write 7"),
        ("1:30", "'1:30' is not allowed: YAML 1.1 reads it as 90, YAML 1.2 as text: write 90"),
        ("[1, 010]", "line 3, column 14: '010' is not allowed"),
    ],
)
def test_numbers_that_two_versions_of_yaml_read_differently_are_refused(tmp_path, written, said):
    path = study_file(tmp_path)
    path.write_text(f"description: numbers\ncommon:\n  seeds: {written}\ngrid: []\n")
    with pytest.raises(StudyError) as error:
        load_study(path)
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["published", "scratch", "walkthroughs"])
def test_a_study_cannot_take_the_name_of_another_results_folder(tmp_path, name):
    path = study_file(tmp_path).rename(tmp_path / f"{name}.yaml")
    with pytest.raises(StudyError, match=f"cannot be called {name}"):
        load_study(path)


CONTROL = {"method": "gaussian-noise", "weight_bits": 4}
WEIGHTS_ONLY = {"method": "lsq", "weight_bits": 4, "activation_bits": None}


def test_the_noise_source_of_a_control_is_lsq_on_weights_only(tmp_path):
    study = load_study(study_file(tmp_path, [FP32, WEIGHTS_ONLY, CONTROL]))
    control = study.experiments[-1]
    assert control.id == "digits-resnet8-gaussian-noise-w4" and control.activation_bits is None
    assert control.noise_source == study.experiments[1] and not control.quantized
    assert study.experiments[0].noise_source is None and study.experiments[1].noise_source is None
    assert study.experiments[1].quantized and not study.experiments[0].quantized


@pytest.mark.parametrize(
    "grid, message",
    [
        ([FP32, LSQ, CONTROL], "has the noise of digits-resnet8-lsq-w4, which is missing; add method: lsq"),
        ([FP32, WEIGHTS_ONLY, CONTROL | {"activation_bits": 4}], "weight_bits: 4, activation_bits: 4, with the same"),
        (
            [FP32, WEIGHTS_ONLY, CONTROL | {"method": "gradient-penalty", "activation_bits": 4}],
            "activation_bits: 4 is not allowed: gradient-penalty",
        ),
        ([FP32, {"method": "gradient-penalty"}], "method gradient-penalty needs weight_bits"),
        (
            [{"method": "gradient-penalty", "weight_bits": 4, "precision": "bfloat16"}],
            "precision: bfloat16 is not allowed: gradient-penalty is computed in float32",
        ),
        ([{**FP32, "precision": "float16"}], "precision: 'float16' is not allowed: float32 or bfloat16"),
        ([{**FP32, "theory": 1}], "theory: 1 is not allowed: true or false"),
        ([FP32, {"method": "gaussian"}], "method: 'gaussian' is not allowed: 'fp32', 'lsq', 'pact', 'dorefa', 'lsq-"),
        ([SCENES | CONTROL], "method: 'gaussian-noise' is not allowed: 'fp32', 'lsq', 'pact' or 'dorefa'"),
    ],
)
def test_a_control_without_its_noise_source_is_an_error(tmp_path, grid, message):
    with pytest.raises(StudyError) as error:
        load_study(study_file(tmp_path, grid))
    assert message in str(error.value)


# --- quantization taken apart ---


def ids(study):
    return [experiment.id.removeprefix("digits-resnet8-") for experiment in study.experiments]


def test_parts_activations_alone_and_ordinary_regularizers_have_ids_and_rows_of_their_own(tmp_path):
    grid = [
        FP32,
        {"method": ["lsq", "lsq-unrounded"], "weight_bits": [4, None], "activation_bits": 4},
        {"method": "weight-decay", "weight_decay": [5.0e-3, 2.0e-2]},
        {"method": "dropout", "dropout": 0.5},
    ]
    study = load_study(study_file(tmp_path, grid))
    regularizers = ["weight-decay-0.005", "weight-decay-0.02", "dropout-0.5"]
    assert ids(study) == ["fp32", "lsq-w4a4", "lsq-a4", "lsq-unrounded-w4a4", "lsq-unrounded-a4", *regularizers]
    rows = {e.id.removeprefix("digits-resnet8-"): e.columns for e in study.experiments}
    assert [rows[name]["method"] for name in regularizers] == regularizers
    assert (rows["lsq-a4"]["weight_bits"], rows["lsq-a4"]["activation_bits"]) == (32, 4)
    quantized = {name for name, e in zip(rows, study.experiments, strict=True) if e.quantized}
    assert quantized == {"lsq-w4a4", "lsq-a4"}
    through = {name for name, e in zip(rows, study.experiments, strict=True) if e.through_quantizer}
    assert through == {name for name in rows if name.startswith("lsq")}


def test_gaussian_noise_on_activations_has_that_of_lsq_at_the_same_widths(tmp_path):
    widths = {"weight_bits": [4, None], "activation_bits": 4}
    study = load_study(study_file(tmp_path, [FP32, {"method": ["lsq", "gaussian-noise"], **widths}]))
    sources = [e.noise_source.id if e.noise_source else None for e in study.experiments]
    assert sources[3:] == ["digits-resnet8-lsq-w4a4", "digits-resnet8-lsq-a4"]


def test_rotating_severities_are_all_five(tmp_path):
    study = load_study(study_file(tmp_path, [FP32, LSQ], severities="rotating"))
    assert study.experiments[0].severities == "rotating"
    assert study.experiments[0].each_severity == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"method": "dorefa-unclipped", "weight_bits": 4}, "method: 'dorefa-unclipped' is not allowed: 'fp32', 'lsq'"),
        ({"method": "lsq", "weight_bits": None}, "method lsq needs weight_bits"),
        ({"method": "lsq-dithered"}, "method lsq-dithered needs weight_bits"),
        ({"method": "dropout"}, "dropout: 0 is not allowed for method dropout: above 0"),
        ({"method": "dropout", "dropout": 1.0}, "dropout: 1.0 is not allowed: a number from 0, below 1"),
        ({"method": "dropout", "dropout": 0.5, "weight_bits": 4}, "method dropout takes neither weight_bits"),
        ({**LSQ, "dropout": 0.5}, "dropout: 0.5 is not allowed for method lsq"),
        ({**LSQ, "full_precision_epochs": 10}, "full_precision_epochs: 10 is not allowed: fewer than epochs"),
        (
            {"method": "lsq", "weight_bits": None, "activation_bits": 4, "theory": True},
            "theory: true is not allowed for lsq-a4: it is of quantized weights",
        ),
        ({**FP32, "severities": "turning"}, "severities: 'turning' is not allowed: a list of one or more"),
        ({**FP32, "severities": "rotating", "test_images": 4}, "test_images: 4 is not allowed: rotating severities"),
        ({**SCENES, **FP32, "severities": "rotating"}, "severities: rotating is not allowed: mAP50"),
    ],
)
def test_an_ingredient_that_there_is_not_is_refused_in_one_line(tmp_path, entry, message):
    with pytest.raises(StudyError) as error:
        load_study(study_file(tmp_path, [entry], epochs=10))
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


def test_other_settings_than_the_ordinary_regularizer_have_the_same_strength(tmp_path):
    with pytest.raises(StudyError, match=r"weight_decay: 0\.0005 for digits-resnet8-fp32 but 0\.005"):
        load_study(study_file(tmp_path, [FP32, {**LSQ, "weight_decay": 5.0e-3}]))
