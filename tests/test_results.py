"""What a run leaves behind is complete, and only complete runs are read."""

import itertools
import json
import os
import subprocess
import sys
from functools import cache
from unittest.mock import patch

import pandas as pd
import pytest
import torch
import yaml
from nbconvert.filters import markdown2html

from qreg_utils import digest
from qreg_utils.atomic import atomic_write
from qreg_utils.names import CLEAN, CORRUPTIONS, DETECTION, Corruption
from qreg_utils.results import (
    committed_study,
    describe,
    read_study,
    tidy,
    training_facts,
    write_csv,
    write_results,
    write_text,
)
from qreg_utils.study import StudyError, load_study, write_params
from tests.test_study import FP32, LSQ, SCENES, study_file

FP32_ID, LSQ_ID = "digits-resnet8-fp32", "digits-resnet8-lsq-w4a4"
# a digest takes a second, and the code does not change while tests run
CODE = {name: cache(getattr(digest, name)) for name in ("experiment_digest", "git_state")}


def made_up_frames(experiment):
    """As small as complete ones can be."""
    seeds = experiment.seeds
    images = [(CLEAN, 0), *itertools.product(experiment.corruptions, experiment.severities)]
    score = {"metric": experiment.task.score, "value": 1 / 3}
    metrics = [{"seed": s, "corruption": name, "severity": n, **score} for name, n in images for s in seeds]
    epochs = [{"seed": seed, "epoch": epoch} for seed in seeds for epoch in range(experiment.epochs)]
    history = [{**epoch, "split": split, "loss": 1.0} for epoch in epochs for split in ("train", "val")]
    noise = [{**epoch, "layer": "fc", "sigma": 0.1} for epoch in epochs] if experiment.quantized else []
    rows = {"metrics": metrics, "history": history, "noise": noise}
    if getattr(experiment, "theory", False):
        rows["penalty"] = [
            {"seed": seed, "statistics": "batch", "bits": 4, "noise": "normal", "measured": 0.1} for seed in seeds
        ]
        flat = {"statistics": "batch", "weights": "unrounded", "measure": "loss_rise", "size": 0.1, "value": 2.0}
        rows["sharpness"] = [{"seed": seed, **flat} for seed in seeds]
    return {name: tidy(experiment, content) for name, content in rows.items()}


def leave_results(folder, experiment, **facts):
    """The files that a finished run leaves, with made-up numbers."""
    facts = {"wall_seconds": 60, "unverified_files": [], "corrupted_images": "made by qreg", **facts}
    with patch.multiple("qreg_utils.results", **CODE):
        return write_results(folder / experiment.id, experiment, made_up_frames(experiment), facts)


@pytest.fixture
def study(tmp_path):
    """A study of two experiments, of which both have left their files in ``tmp_path / "results" / "toy"``."""
    path = study_file(tmp_path, [FP32, LSQ], theory=True)
    folder = tmp_path / "results" / "toy"
    study = load_study(path)
    write_params(study, path, folder)
    for experiment in study.experiments:
        leave_results(folder, experiment, unverified_files=["batch_1"] if experiment.method == "fp32" else [])
    return folder


def change_run(folder, **changes):
    path = folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_finished_experiments_are_read_back(study):
    results = read_study(study)
    assert list(results.runs) == ["digits-resnet8-fp32", "digits-resnet8-lsq-w4a4"]
    assert results.missing == {}
    assert results.metrics["value"].unique() == pytest.approx([1 / 3])
    assert results.metrics.groupby("weight_bits").size().to_dict() == {32: 2 * 39, 4: 2 * 39}  # seeds, sets
    assert results.noise["method"].tolist() == ["lsq"] * 2 * 3  # seeds, epochs


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("failing", ["metrics.csv", "sharpness.csv", "run.json"])
def test_results_of_an_earlier_run_stay_when_a_file_of_the_new_one_cannot_be_written(study, monkeypatch, failing):
    before = files(study / LSQ_ID)
    atomic = "qreg_utils.results.atomic_write"

    def full_disk(path):
        if path.name == failing:
            raise OSError("the disk is full")
        return atomic_write(path)

    monkeypatch.setattr(atomic, full_disk)
    experiment = load_study(study / "toy.yaml").experiments[1]
    with pytest.raises(OSError, match="full"):
        leave_results(study, experiment, wall_seconds=99)
    assert files(study / LSQ_ID) == before and names(study / LSQ_ID) == sorted(before)


@pytest.mark.parametrize("moves", range(6))
def test_files_of_two_runs_never_count_as_results(study, monkeypatch, moves):
    """A kill after any number of moves: what is there then is not read."""
    experiment, left = load_study(study / "toy.yaml").experiments[1], [moves]
    replace = type(study).replace

    def killed(path, target):
        if path.parent.name == ".part" and not path.name.endswith(".part"):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        return replace(path, target)

    monkeypatch.setattr(type(study), "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        leave_results(study, experiment, wall_seconds=99)
    assert read_study(study).missing == {LSQ_ID: "not run, or not finished"}
    monkeypatch.undo()
    assert leave_results(study, experiment, wall_seconds=99)["wall_seconds"] == 99
    assert read_study(study).missing == {}


def test_a_run_leaves_no_file_of_the_one_before_that_it_has_not_made_itself(study):
    (study / LSQ_ID / "failed.txt").write_text("KeyError: of an earlier run")
    experiment = load_study(study / "toy.yaml").experiments[1]
    frames = made_up_frames(experiment)
    del frames["penalty"], frames["sharpness"]
    write_results(study / LSQ_ID, experiment, frames, {})
    assert names(study / LSQ_ID) == ["history.csv", "metrics.csv", "noise.csv", "params.yaml", "run.json"]


def test_figures_are_among_the_files(study):
    from matplotlib.figure import Figure

    experiment = load_study(study / "toy.yaml").experiments[0]
    figure = Figure(figsize=(1, 1))
    write_results(study / FP32_ID, experiment, made_up_frames(experiment), {}, {"predictions.jpg": figure})
    assert (study / FP32_ID / "predictions.jpg").read_bytes().startswith(b"\xff\xd8")


def test_what_run_json_says_about_training():
    records = [
        {"images_per_second": [100.4, 300.0], "seconds": [1.0, 2.0], "compiled": True, "precision": "bfloat16"},
        {"images_per_second": [200.2], "seconds": [0.46]},
    ]
    expected = {"training_seconds": 3.5, "images_per_second": 200, "compiled": True, "precision": "bfloat16"}
    assert training_facts(records) == expected
    assert training_facts(records[1:])["compiled"] is False and training_facts(records[1:])["precision"] == "float32"


def test_an_unfinished_experiment_is_missing_not_averaged(study):
    (study / "digits-resnet8-lsq-w4a4" / "run.json").unlink()
    results = read_study(study)
    assert results.missing == {"digits-resnet8-lsq-w4a4": "not run, or not finished"}
    assert set(results.metrics["method"]) == {"fp32"}


def test_a_failed_experiment_is_missing_with_the_reason(study):
    (study / LSQ_ID / "failed.txt").write_text("FloatingPointError: the loss is not finite (seed 1)\n")
    assert not read_study(study).missing, "an earlier run has finished"
    (study / LSQ_ID / "run.json").unlink()
    results = read_study(study)
    assert results.missing == {LSQ_ID: "failed: FloatingPointError: the loss is not finite (seed 1)"}
    assert f"MISSING: {LSQ_ID}** (failed: FloatingPointError: the loss is not finite (seed 1));" in describe(results)


def test_older_results_are_read_and_it_is_said_that_they_are_older(study):
    assert read_study(study).older == {}
    (study / LSQ_ID / "failed.txt").write_text("FloatingPointError: the loss is not finite (seed 1)\n")
    results = read_study(study)
    assert set(results.runs) == {FP32_ID, LSQ_ID} and list(results.older) == [LSQ_ID]
    reason = "failed: FloatingPointError: the loss is not finite (seed 1)"
    assert f"- **WARNING: the last run of {LSQ_ID} {reason}**; its older results are shown" in describe(results)
    (study / LSQ_ID / "failed.txt").unlink()
    (study / LSQ_ID / "unfinished.ipynb").touch()  # what a killed run leaves
    assert f"the last run of {LSQ_ID} is not complete**; its older" in describe(read_study(study))
    leave_results(study, load_study(study / "toy.yaml").experiments[1])  # by hand, and not in unfinished.ipynb
    assert read_study(study).older == {}


NASTY = "\x1b[31mKeyError\x1b[0m:\n  '|a| **b** _c_ `d` $e$ <script>f</script> &amp; [g](h) \\(i\\)' \x00\u202e"


def test_what_a_failure_says_cannot_break_the_page(study):
    (study / LSQ_ID / "run.json").unlink()
    (study / LSQ_ID / "failed.txt").write_text(NASTY)
    results = read_study(study)
    shown = "failed: KeyError: '|a| **b** _c_ `d` $e$ <script>f</script> &amp; [g](h) \\(i\\)'"
    assert results.missing[LSQ_ID] == shown
    html = markdown2html(describe(results))
    assert "<code>failed: KeyError: '|a| **b** _c_ 'd' $e$ &lt;script&gt;" in html and "it is in no figure" in html
    (study / LSQ_ID / "failed.txt").write_bytes(b"\xff" + b"long " * 10**6)
    assert len(read_study(study).missing[LSQ_ID]) < 320
    (study / LSQ_ID / "failed.txt").write_text("")
    assert read_study(study).missing[LSQ_ID] == "failed"


@pytest.mark.parametrize("name", ["metrics", "history", "noise", "penalty", "sharpness"])
def test_a_file_that_is_lost_or_cut_off_is_named(study, name):
    path = study / LSQ_ID / f"{name}.csv"
    full = path.read_text()
    path.unlink()
    assert read_study(study).missing == {LSQ_ID: f"{name}.csv is missing"}
    for length in {*range(0, len(full), len(full) // 20), full.rindex("\n", 0, -1) + 1, len(full) - 1}:
        path.write_text(full[:length])
        missing = read_study(study).missing
        assert list(missing) == [LSQ_ID] and missing[LSQ_ID].startswith(f"{name}.csv "), length
    path.write_text(full)
    assert read_study(study).missing == {}


def replaced(old, new):
    return lambda text: text.replace(old, new, 1)


@pytest.mark.parametrize(
    "name, damage, said",
    [
        ("metrics", replaced("corruption", "corruptions"), "has no column corruption"),
        ("metrics", replaced("fog,1", "fog,2"), "has 78 rows of accuracy, not the 78 that the parameters ask for"),
        ("metrics", replaced("0.33333333", ""), "has something else than a number in value"),
        ("metrics", replaced("0.33333333", "0.3x"), "has something else than a number in value"),
        ("metrics", lambda text: text.replace("accuracy", "map50"), "has 0 rows of accuracy, not the 78"),
        ("metrics", lambda text: text.replace("lsq", "pact"), "is of another experiment"),
        ("metrics", lambda text: text + text.splitlines()[-1] + "\n", "has 79 rows of accuracy, not the 78"),
        ("history", replaced(",2,val", ",3,val"), "has 6 rows of val, not the 6"),
        ("history", lambda text: text.replace(",val,", ",test,"), "has 0 rows of val, not the 6"),
        ("noise", lambda text: text.splitlines()[0] + "\n", "has no rows"),
        ("sharpness", lambda text: text + '"', "cannot be read"),
        ("penalty", lambda text: "\0" + text, "has no column experiment"),
    ],
)
def test_a_damaged_file_is_named(study, name, damage, said):
    path = study / LSQ_ID / f"{name}.csv"
    path.write_text(damage(path.read_text()))
    results = read_study(study)
    assert results.missing[LSQ_ID].startswith(f"{name}.csv {said}")
    assert set(results.metrics["method"]) == set(results.history["method"]) == {"fp32"}


def test_a_file_of_bytes_is_named(study):
    (study / LSQ_ID / "history.csv").write_bytes(b"\xff\xfe\x00")
    (study / FP32_ID / "run.json").write_bytes(b"\xff\xfe\x00")
    missing = read_study(study).missing
    assert missing == {FP32_ID: "run.json cannot be read", LSQ_ID: "history.csv cannot be read"}


@pytest.mark.parametrize(
    "text, said",
    [("", "Invalid JSON"), ("{", "Invalid JSON"), ("[]", "Input should be an object"), ("{}", "parameters: Field")],
)
def test_a_run_json_that_is_no_such_file_is_named(study, text, said):
    (study / LSQ_ID / "run.json").write_text(text)
    assert read_study(study).missing[LSQ_ID].startswith(f"run.json: {said}")


@pytest.mark.parametrize(
    "key, value",
    [("commit", "<b>"), ("versions", "2.0"), ("wall_seconds", float("nan")), ("finished", "today"), ("threads", None)],
)
def test_a_run_json_that_lacks_something_is_named(study, key, value):
    change_run(study / LSQ_ID, **{key: value})
    assert read_study(study).missing[LSQ_ID].startswith(f"run.json: {key}: ")


def test_files_of_the_theory_are_needed_where_it_was_asked_for(study):
    (study / LSQ_ID / "penalty.csv").unlink()
    assert read_study(study).missing == {LSQ_ID: "penalty.csv is missing"}


def test_a_run_with_more_theory_than_is_asked_for_counts_and_one_with_less_does_not(study):
    for asked, missing in (({"theory": False}, {}), ({"theory": True, "theory_images": 7}, None)):
        study_file(study, [FP32, LSQ | asked], theory=True)
        results = read_study(study)
        reason = {LSQ_ID: "made without the theory that is asked for"}
        assert results.missing == (reason if missing is None else missing)
        assert set(results.penalty["method"]) == ({"fp32"} if missing is None else {"fp32", "lsq"})


def test_an_experiment_without_theory_needs_no_files_of_it(tmp_path):
    path, folder = study_file(tmp_path, [FP32 | {"theory": True}, LSQ]), tmp_path / "results" / "toy"
    write_params(load_study(path), path, folder)
    for experiment in load_study(path).experiments:
        leave_results(folder, experiment)
    assert "penalty.csv" not in names(folder / LSQ_ID)
    results = read_study(folder)
    assert results.missing == {} and set(results.penalty["method"]) == {"fp32"}


def test_the_description_warns_of_what_is_not_the_same_for_all(study):
    for experiment, commit in ((FP32_ID, "a" * 40), (LSQ_ID, "b" * 40)):
        change_run(study / experiment, commit=commit, code=None, dirty=False)
    text = describe(read_study(study))
    assert f"- **WARNING: 2 code versions**: commit `aaaaaaaaaa`: {FP32_ID}; commit `bbbbbbbbbb`: {LSQ_ID}\n" in text
    change_run(study / LSQ_ID, commit="a" * 40)
    text = describe(read_study(study))
    assert "- code: commit `aaaaaaaaaa`\n" in text and "WARNING" not in text


def test_the_runs_behind_rows(study):
    results = read_study(study)
    assert list(results.runs_behind(results.metrics)) == [FP32_ID, LSQ_ID]
    assert results.runs_behind(results.noise) == {LSQ_ID: results.runs[LSQ_ID]}
    assert results.runs_behind() == {}


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


def test_a_corruption_that_is_registered_later_makes_no_result_incomplete(study):
    CORRUPTIONS.add(Corruption("upside_down", "upside down", "digital"))
    try:
        assert read_study(study).missing == {}
        params = study / "toy.yaml"
        content = yaml.safe_load(params.read_text())
        content["common"]["extra_corruptions"] = ["upside_down"]
        params.write_text(yaml.safe_dump(content))
        assert set(read_study(study).missing.values()) == {"made with other parameters"}
        for experiment in load_study(params).experiments:
            leave_results(study, experiment)
        results = read_study(study)
        assert results.missing == {} and "upside_down" in set(results.metrics["corruption"])
        assert "besides the paper's 19 corruptions, and in no average: upside_down\n" in describe(results)
    finally:
        CORRUPTIONS.remove("upside_down")


VARIANTS = ("plain", "nan", "null", "true", "inf")  # words that pandas would take for something else


@pytest.fixture
def variants(tmp_path):
    """A study in which one network is trained in several ways, and in one without a name."""
    grid = [{**FP32, "variant": name, "train_images": 500 + n} for n, name in enumerate(VARIANTS)]
    path = study_file(tmp_path, [*grid, FP32, LSQ])
    folder, study = tmp_path / "results" / "toy", load_study(path)
    write_params(study, path, folder)
    for experiment in study.experiments:
        leave_results(folder, experiment)
    return folder


def test_variants_are_read_back(variants):
    results = read_study(variants)
    assert results.missing == {}
    found = results.metrics.groupby("variant")["experiment"].unique().map(list).to_dict()
    expected = {name: [f"digits-resnet8-{name}-fp32"] for name in VARIANTS}
    assert found == {"": [FP32_ID, LSQ_ID], **expected}


def test_only_files_of_a_variant_have_a_column_for_it(variants):
    def header(experiment):
        return (variants / experiment / "metrics.csv").read_text().splitlines()[0]

    assert header("digits-resnet8-null-fp32").startswith("experiment,dataset,model,variant,method,")
    assert header(FP32_ID).startswith("experiment,dataset,model,method,")


def test_what_is_not_so_for_all_variants_is_said_of_those_it_is_so_for(variants):
    text = describe(read_study(variants))
    for n, name in enumerate(VARIANTS):
        assert f"- **part of digits:** {500 + n} training images, all test images (resnet8 {name})\n" in text
    assert text.count("part of digits") == len(VARIANTS)


def test_a_study_by_its_name(study):
    results = study.parent
    assert list(committed_study(results, "toy").runs) == [FP32_ID, LSQ_ID]
    with pytest.raises(StudyError, match=r"^results/nope: no committed results; studies that have some: toy$"):
        committed_study(results, "nope")
    for experiment in (FP32_ID, LSQ_ID):
        (study / experiment / "run.json").unlink()
    with pytest.raises(StudyError, match=rf"^results/toy: no committed results: {FP32_ID}: not run, or not finished$"):
        committed_study(results, "toy")


def test_run_json_says_what_the_numbers_depend_on(study):
    run = json.loads((study / "digits-resnet8-fp32" / "run.json").read_text())
    assert run["parameters"]["dataset"] == "digits"
    assert run["code"] == digest.experiment_digest("classification", "classification.ipynb")
    assert set(run["versions"]) >= {"torch", "numpy"}
    assert {"commit", "dirty", "processor", "cores", "threads", "gpu", "peak_memory_mib", "finished"} <= set(run)
    assert 10 < run["peak_memory_mib"] < 100_000


def test_run_json_says_which_instructions_sums_are_made_with():
    code = "from qreg_utils.results import environment; print(environment()['instructions'])"
    found = []
    for settings in ({}, {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}):
        variables = {**os.environ, **settings}
        found += subprocess.check_output([sys.executable, "-c", code], env=variables, text=True).splitlines()
    assert found[0] == torch.backends.cpu.get_cpu_capability()
    assert found[1] == "DEFAULT, oneDNN up to SSE41"


def test_experiments_on_different_corrupted_images_are_flagged(study):
    change_run(study / FP32_ID, corrupted_images="CIFAR-10-C, as downloaded")
    text = describe(read_study(study))
    assert "corrupted test images of digits: CIFAR-10-C, as downloaded; made by qreg **(not the same for all)**" in text


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(OSError, match="full"), atomic_write(path) as part:
        part.write_text("ne")
        raise OSError("the disk is full")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_writing_replaces_files(tmp_path):
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
    assert "2 of 2 experiments finished, seeds 0, 1\n" in text and "2 minutes" in text
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
        leave_results(study, experiment)
    assert "**part of digits:** 500 training images, all test images" in describe(read_study(study))


def test_the_description_tells_what_is_different_about_detection(tmp_path):
    scenes = {**SCENES, **FP32, "severities": [3], "classes": ["3", "5"]}
    path = study_file(tmp_path, [FP32, scenes])
    folder, study = tmp_path / "results" / "toy", load_study(path)
    write_params(study, path, folder)
    for experiment in study.experiments:
        unreadable = {"unreadable_files": ["VOC/images/a.jpg"]} if experiment.task is DETECTION else {}
        leave_results(folder, experiment, corrupted_images=f"those of {experiment.dataset}", **unreadable)
    text = describe(read_study(folder))
    assert "severities averaged in the heatmaps and the table: 3 (digit_scenes), 1, 3 (digits)" in text
    assert "**part of digit_scenes:** 16 training images, 8 test images" in text and "part of digits" not in text
    assert "digit_scenes: scored by mAP50 over the classes 3, 5; YOLOv5n with today's anchor-free head" in text
    assert "of digits: those of digits" in text and "of digit_scenes: those of digit_scenes" in text
    assert "not the same for all" not in text
    assert "left out:** 1: VOC/images/a.jpg" in text
