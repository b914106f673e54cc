"""What a run leaves behind is whole, and only whole runs are read."""

import json

import pandas as pd
import pytest
import yaml

from qreg_utils.atomic import written_whole
from qreg_utils.results import describe, git_state, read_study, tidy, write_csv, write_run, write_text
from qreg_utils.study import load_study, write_params
from tests.test_study import FP32, LSQ, SCENES, study_file


@pytest.fixture
def study(tmp_path):
    """A study of two experiments, of which both have left their files in ``tmp_path / "results" / "toy"``."""
    path = study_file(tmp_path, [FP32, LSQ])
    folder = tmp_path / "results" / "toy"
    study = load_study(path)
    write_params(study, path, folder)
    for experiment in study.experiments:
        row = {"seed": 0, "corruption": "fog", "severity": 1, "metric": "accuracy", "value": 1 / 3}
        place = folder / experiment.id
        write_csv(place / "metrics.csv", tidy(experiment, [row]))
        write_csv(place / "history.csv", tidy(experiment, [{"seed": 0, "epoch": 0, "split": "val", "loss": 1.0}]))
        noise = [] if experiment.method == "fp32" else [{"seed": 0, "layer": "fc", "sigma": 0.1}]
        write_csv(place / "noise.csv", tidy(experiment, noise))
        unverified = ["batch_1"] if experiment.method == "fp32" else []
        facts = {"wall_seconds": 60, "unverified_files": unverified, "corrupted_images": "made by qreg"}
        write_run(place / "run.json", experiment, **facts)
    return folder


def test_finished_experiments_are_read_back(study):
    results = read_study(study)
    assert list(results.runs) == ["digits-resnet8-fp32", "digits-resnet8-lsq-w4a4"]
    assert results.missing == {}
    assert results.metrics["value"].tolist() == pytest.approx([1 / 3, 1 / 3])
    assert results.metrics["weight_bits"].tolist() == [32, 4]
    assert results.noise["layer"].tolist() == ["fc"]


def test_an_unfinished_experiment_is_missing_not_averaged(study):
    (study / "digits-resnet8-lsq-w4a4" / "run.json").unlink()
    results = read_study(study)
    assert results.missing == {"digits-resnet8-lsq-w4a4": "not run, or not finished"}
    assert set(results.metrics["method"]) == {"fp32"}


def test_results_of_other_parameters_are_missing(study):
    params = study / "toy.yaml"
    content = yaml.safe_load(params.read_text())
    content["common"]["epochs"] = 99
    params.write_text(yaml.safe_dump(content))
    assert set(read_study(study).missing.values()) == {"made with other parameters"}


def test_results_from_before_a_parameter_existed_count_with_its_default(study):
    path = study / "digits-resnet8-fp32" / "run.json"
    run = json.loads(path.read_text())
    del run["parameters"]["compile"]
    path.write_text(json.dumps(run))
    assert not read_study(study).missing
    run["parameters"]["no_longer_there"] = 1
    path.write_text(json.dumps(run))
    assert read_study(study).missing == {"digits-resnet8-fp32": "made with other parameters"}


def test_run_json_says_what_the_numbers_depend_on(study):
    run = json.loads((study / "digits-resnet8-fp32" / "run.json").read_text())
    assert run["parameters"]["dataset"] == "digits"
    assert set(run["versions"]) >= {"torch", "numpy"}
    assert {"commit", "dirty", "processor", "cores", "threads", "gpu", "peak_memory_mib", "finished"} <= set(run)
    assert 10 < run["peak_memory_mib"] < 100_000


def test_git_state_is_a_commit_or_unknown():
    state = git_state()
    assert state["commit"] is None or len(state["commit"]) == 40


def test_experiments_on_different_corrupted_images_are_flagged(study):
    path = study / "digits-resnet8-fp32" / "run.json"
    run = json.loads(path.read_text()) | {"corrupted_images": "CIFAR-10-C, as downloaded"}
    path.write_text(json.dumps(run))
    text = describe(read_study(study))
    assert "corrupted test images of digits: CIFAR-10-C, as downloaded; made by qreg **(not the same for all)**" in text


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(OSError, match="full"), written_whole(path) as part:
        part.write_text("ne")
        raise OSError("the disk is full")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_writing_replaces_whole_files(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


def test_csv_keeps_enough_digits(tmp_path):
    write_csv(tmp_path / "x.csv", pd.DataFrame({"value": [1 / 3]}))
    assert pd.read_csv(tmp_path / "x.csv")["value"].item() == pytest.approx(1 / 3, rel=1e-7)


def test_the_description_tells_what_is_missing_and_unverified(study):
    text = describe(read_study(study))
    assert "2 of 2 experiments finished, seeds 0" in text and "2 minutes" in text
    assert "md5 is not the official one:** batch_1" in text and "MISSING" not in text
    assert "corrupted test images of digits: made by qreg\n" in text
    (study / "digits-resnet8-lsq-w4a4" / "run.json").unlink()
    assert "MISSING: digits-resnet8-lsq-w4a4" in describe(read_study(study))
    (study / "digits-resnet8-fp32" / "run.json").unlink()
    with pytest.raises(ValueError, match="no experiment has finished"):
        describe(read_study(study))


def test_the_description_tells_that_only_a_part_of_the_data_was_used(study, tmp_path):
    assert "part of" not in describe(read_study(study))
    path = study_file(tmp_path, [{**FP32, "train_images": 500}, {**LSQ, "train_images": 500}])
    part = load_study(path)
    write_params(part, path, study)
    for experiment in part.experiments:
        facts = {"wall_seconds": 60, "unverified_files": [], "corrupted_images": "made by qreg"}
        write_run(study / experiment.id / "run.json", experiment, **facts)
    assert "**part of digits:** 500 training images, all test images" in describe(read_study(study))


def test_the_description_tells_what_is_different_about_detection(tmp_path):
    scenes = {**SCENES, **FP32, "severities": [3], "classes": ["3", "5"]}
    path = study_file(tmp_path, [FP32, scenes])
    folder, study = tmp_path / "results" / "toy", load_study(path)
    write_params(study, path, folder)
    for experiment, metric in zip(study.experiments, ("accuracy", "map50"), strict=True):
        place = folder / experiment.id
        rows = [
            {"seed": 0, "corruption": "fog", "severity": severity, "metric": metric, "value": 1.0}
            for severity in experiment.severities
        ]
        write_csv(place / "metrics.csv", tidy(experiment, rows))
        write_csv(place / "history.csv", tidy(experiment, [{"seed": 0, "epoch": 0, "split": "val", "loss": 1.0}]))
        write_csv(place / "noise.csv", tidy(experiment, []))
        facts = {"wall_seconds": 60, "unverified_files": [], "corrupted_images": f"those of {metric}"}
        unreadable = {"unreadable_files": ["VOC/images/a.jpg"]} if metric == "map50" else {}
        write_run(place / "run.json", experiment, **facts, **unreadable)
    text = describe(read_study(folder))
    assert "severities averaged in the heatmaps and the table: 3 (digit_scenes), 1, 3 (digits)" in text
    assert "**part of digit_scenes:** 16 training images, 8 test images" in text and "part of digits" not in text
    assert "digit_scenes: scored by mAP50 over the classes 3, 5; YOLOv5n with today's anchor-free head" in text
    assert "of digits: those of accuracy" in text and "of digit_scenes: those of map50" in text
    assert "not the same for all" not in text
    assert "left out:** 1: VOC/images/a.jpg" in text
