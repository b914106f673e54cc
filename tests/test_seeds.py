"""Seeds add up: what is kept, what is added, and what is refused, in one line, with nothing changed."""

import json
from unittest.mock import patch

import pandas as pd
import pytest

from qreg_utils.batch import join as join_command
from qreg_utils.results import UnusableError, read_experiment, read_study
from qreg_utils.seeds import Seeds, current_code, extended, join, parse_seeds
from qreg_utils.study import StudyError, load_study, write_params
from tests.test_results import CODE, files, made_up_frames
from tests.test_study import FP32, LSQ, study_file

FACTS = {"wall_seconds": 60, "unverified_files": [], "corrupted_images": "made by qreg", "training_seconds": 2.5}
LSQ_ID = "digits-resnet8-lsq-w4a4"


@pytest.fixture(autouse=True)
def digested_once():
    with (
        patch.multiple("qreg_utils.results", **CODE),
        patch("qreg_utils.seeds.experiment_digest", CODE["experiment_digest"]),
    ):
        yield


@pytest.fixture
def study(tmp_path):
    """Of FP32 and LSQ, seeds 0 and 1, nothing run."""
    return load_study(study_file(tmp_path, [FP32, LSQ]))


def run_seeds(folder, experiment, *, keep=False, only=None, value=1 / 3):
    """What a notebook does, with made-up numbers; ``only`` so many seeds, as if it were killed then."""
    seeds = Seeds(folder / experiment.id, experiment, keep=keep)
    trained = seeds.missing[:only]
    for seed in trained:
        frames = made_up_frames(experiment.model_copy(update={"seeds": [seed]}))
        frames = {name: frame.assign(experiment=experiment.id) for name, frame in frames.items()}
        frames["metrics"]["value"] = value + seed
        seeds.add(seed, frames, FACTS)
    return trained


def run_study(folder, study, **options):
    return [run_seeds(folder, experiment, **options) for experiment in study.experiments]


def with_params(study, results):
    write_params(study, results.parent.parent / f"{study.name}.yaml", results)
    return results


# --- which seeds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, seeds",
    [("0-3", [0, 1, 2, 3]), ("7", [7]), ("0-1, 8,9", [0, 1, 8, 9]), ("0-999", list(range(1000)))],
)
def test_seeds_of_a_command_line(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    "text, message",
    [
        ("3-1", "3-1 runs backwards"),
        ("0-3,2", "names one twice"),
        ("0-1000", "more than 1000 seeds"),
        ("0-400,500-1200", "more than 1000 seeds"),
        ("2147483648", "the largest seed is 2147483647"),
        ("", "numbers and ranges"),
        ("a", "numbers and ranges"),
        ("-1", "numbers and ranges"),
        ("1.5", "numbers and ranges"),
        ("0-" + "9" * 400, "numbers and ranges"),
    ],
)
def test_seeds_that_are_refused(text, message):
    with pytest.raises(StudyError, match=message) as refused:
        parse_seeds(text)
    assert "\n" not in str(refused.value)


# --- a run ------------------------------------------------------------------------------------------------------------


def test_without_keep_the_files_come_when_all_seeds_are_done(study, tmp_path):
    lsq = study.experiments[1]
    run_seeds(tmp_path, lsq, only=1)
    with pytest.raises(UnusableError, match="not run"):
        read_experiment(tmp_path / LSQ_ID, lsq)
    assert run_seeds(tmp_path, lsq) == [0, 1]
    run, frames = read_experiment(tmp_path / LSQ_ID, lsq)
    assert list(run["seeds"]) == ["0", "1"] and run["training_seconds"] == 5.0
    entry = run["seeds"]["1"]
    assert entry["code"] == current_code(lsq) and {"commit", "processor", "versions", "seconds"} <= set(entry)
    assert frames["metrics"].groupby("seed")["value"].first().to_dict() == {
        0: pytest.approx(1 / 3),
        1: pytest.approx(4 / 3),
    }


def test_with_keep_there_are_whole_files_after_each_seed_and_no_seed_is_run_twice(study, tmp_path):
    (lsq,) = extended(study, range(4), tmp_path).experiments[1:]
    assert run_seeds(tmp_path, lsq, keep=True, only=1) == [0]
    run, _ = read_experiment(tmp_path / LSQ_ID, lsq, partly=True)
    assert run["parameters"]["seeds"] == [0]
    assert run_seeds(tmp_path, lsq, keep=True, only=2) == [1, 2]
    assert run_seeds(tmp_path, lsq, keep=True) == [3]
    assert run_seeds(tmp_path, lsq, keep=True) == []
    run, frames = read_experiment(tmp_path / LSQ_ID, lsq)
    assert frames["metrics"]["seed"].is_monotonic_increasing and list(run["seeds"]) == ["0", "1", "2", "3"]


def test_a_run_without_keep_replaces_all_seeds_at_its_end(study, tmp_path):
    lsq = study.experiments[1]
    run_seeds(tmp_path, lsq)
    before = files(tmp_path / LSQ_ID)
    assert run_seeds(tmp_path, lsq, only=1, value=5) == [0]
    assert files(tmp_path / LSQ_ID) == before
    run_seeds(tmp_path, lsq, value=5)
    assert read_experiment(tmp_path / LSQ_ID, lsq)[1]["metrics"]["value"].min() == 5


def test_keep_seeds_means_what_a_command_line_says(study, tmp_path):
    """papermill leaves true and false as text."""
    lsq = study.experiments[1]
    run_seeds(tmp_path, lsq)
    kept = {keep: list(Seeds(tmp_path / LSQ_ID, lsq, keep=keep).entries) for keep in (False, True, "false", "true")}
    assert kept == {False: [], True: [0, 1], "false": [], "true": [0, 1]}
    for keep in ("False", "no", None, 1):
        with pytest.raises(StudyError, match=r"keep_seeds: .* is not allowed: true or false"):
            Seeds(tmp_path / LSQ_ID, lsq, keep=keep)


def change_entry(folder, seed, **changes):
    path = folder / "run.json"
    run = json.loads(path.read_text())
    run["seeds"][str(seed)] |= changes
    path.write_text(json.dumps(run))


def test_a_seed_of_other_code_or_settings_is_run_again(study, tmp_path):
    lsq = study.experiments[1]
    run_seeds(tmp_path, lsq)
    change_entry(tmp_path / LSQ_ID, 1, code="0" * 16)
    assert Seeds(tmp_path / LSQ_ID, lsq, keep=True).missing == [1]
    other = lsq.model_copy(update={"learning_rate": 0.2})
    assert Seeds(tmp_path / LSQ_ID, other, keep=True).missing == [0, 1]


# --- a study ----------------------------------------------------------------------------------------------------------


def test_a_seed_of_code_that_makes_the_same_numbers_is_kept(study, tmp_path, monkeypatch):
    results = with_params(study, tmp_path / "results" / "toy")
    run_study(results, study)
    code = current_code(study.experiments[0])
    for experiment in study.experiments:
        change_entry(results / experiment.id, 0, code="0" * 16)
    with pytest.raises(StudyError, match="made by other code"):
        extended(study, range(4), results)
    monkeypatch.setattr("qreg_utils.digest.SAME_NUMBERS", {"0" * 16: "1" * 16, "1" * 16: code})
    assert [experiment.seeds for experiment in extended(study, range(4), results).experiments] == [[0, 1, 2, 3]] * 2
    monkeypatch.setattr("qreg_utils.digest.SAME_NUMBERS", {"0" * 16: "1" * 16, "1" * 16: "0" * 16})  # of older code
    with pytest.raises(StudyError, match="made by other code"):
        extended(study, range(4), results)


def test_a_study_is_extended_by_what_is_missing(study, tmp_path):
    results = with_params(study, tmp_path / "results" / "toy")
    run_study(results, study)
    larger = extended(study, [1, 2, 3], results)
    assert [experiment.seeds for experiment in larger.experiments] == [[0, 1, 2, 3]] * 2
    assert [experiment.id for experiment in larger.experiments] == [experiment.id for experiment in study.experiments]
    assert run_study(results, larger, keep=True) == [[2, 3]] * 2
    read = read_study(results)  # whose params file says two seeds
    assert read.missing == {} and sorted(read.metrics["seed"].unique()) == [0, 1, 2, 3]
    assert read.study.experiments[0].seeds == [0, 1, 2, 3]


def test_params_that_ask_for_more_seeds_stay_as_they_are(study, tmp_path):
    """So `make study` after `make extend` has nothing to do, and throws no seed away."""
    results = with_params(study, tmp_path / "results" / "toy")
    write_params(extended(study, range(4), results), tmp_path / "toy.yaml", results)
    before = (results / LSQ_ID / "params.yaml").read_text()
    write_params(study, tmp_path / "toy.yaml", results)
    assert (results / LSQ_ID / "params.yaml").read_text() == before and "- 3" in before


def test_what_cannot_be_extended_is_refused(study, tmp_path):
    results = with_params(study, tmp_path / "results" / "toy")
    run_study(results, study)
    change_entry(results / LSQ_ID, 0, code="0" * 16)
    with pytest.raises(StudyError, match=f"{LSQ_ID}: made by other code .*make study runs all seeds anew"):
        extended(study, range(4), results)
    run = json.loads((results / LSQ_ID / "run.json").read_text())
    del run["seeds"]
    (results / LSQ_ID / "run.json").write_text(json.dumps(run))
    with pytest.raises(StudyError, match="made by an older version"):
        extended(study, range(4), results)
    (results / LSQ_ID / "metrics.csv").unlink()
    with pytest.raises(StudyError, match="is missing: it cannot be extended"):
        extended(study, range(4), results)


def test_an_experiment_of_one_seed_is_not_extended(tmp_path):
    study = load_study(study_file(tmp_path, [{**FP32, "seeds": [0]}]))
    with pytest.raises(StudyError, match="digits-resnet8-fp32-seed0 is an experiment of one seed"):
        extended(study, range(4), tmp_path)


def test_a_study_without_results_begins_with_two_seeds(study, tmp_path):
    with pytest.raises(StudyError, match=r"digits-resnet8-fp32: no results yet: begin with two seeds or more"):
        extended(study, [0], tmp_path)


# --- another folder ---------------------------------------------------------------------------------------------------


@pytest.fixture
def two_folders(study, tmp_path):
    """Seeds 0 and 1 here, 1 to 3 there."""
    here, there = tmp_path / "here" / "results" / "toy", tmp_path / "there" / "results" / "toy"
    run_study(here, study)
    run_study(there, extended(study, [1, 2, 3], there))
    return here, there


def test_seeds_of_another_folder_are_added(study, two_folders):
    here, there = two_folders
    joined, lines = join(study, here, there)
    assert lines == [f"{e.id}: added: seeds 2, 3; here already: seeds 1" for e in study.experiments]
    assert [experiment.seeds for experiment in joined.experiments] == [[0, 1, 2, 3]] * 2
    run, frames = read_experiment(here / LSQ_ID, joined.experiments[1])
    assert list(run["seeds"]) == ["0", "1", "2", "3"]
    assert len(frames["metrics"]) == 4 * 39
    assert join(study, here, there)[1][0].endswith("nothing added: here already: seeds 1, 2, 3")


def test_what_does_not_fit_is_not_added_and_nothing_changes(study, two_folders):
    here, there = two_folders
    before = files(here / LSQ_ID)
    change_entry(there / LSQ_ID, 2, code="0" * 16)
    change_entry(there / LSQ_ID, 3, settings="0" * 16)
    (there / study.experiments[0].id / "run.json").unlink()
    _, (fp32, lsq) = join(study, here, there)
    assert "nothing added: not run, or not finished" in fp32
    assert "seed 2 is made by other code" in lsq and "seed 3 is made with other parameters" in lsq
    assert files(here / LSQ_ID) == before


def test_results_of_half_a_folder_are_not_added(study, two_folders):
    here, there = two_folders
    path = there / LSQ_ID / "metrics.csv"
    path.write_text(path.read_text()[:2000])
    before = files(here / LSQ_ID)
    assert "nothing added: metrics.csv" in join(study, here, there)[1][1]
    assert files(here / LSQ_ID) == before


def test_the_command_that_joins(study, tmp_path, capsys):
    here, there = tmp_path / "results" / "toy", tmp_path / "there"
    (tmp_path / "params").mkdir()
    (tmp_path / "toy.yaml").rename(tmp_path / "params" / "toy.yaml")
    run_study(here, study)
    run_study(there, extended(study, [2, 3], there))
    assert join_command.main(["toy", str(there)], tmp_path) == 0
    assert f"{LSQ_ID}: added: seeds 2, 3" in capsys.readouterr().out
    assert sorted(read_study(here).metrics["seed"].unique()) == [0, 1, 2, 3]
    for arguments in (["toy", ""], ["toy", str(tmp_path / "nowhere")], ["other", str(there)]):
        assert join_command.main(arguments, tmp_path) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_rows_are_of_the_seeds_that_are_kept(study, tmp_path):
    """Two seeds there, one of them usable: the other's rows must not stay."""
    lsq = study.experiments[1]
    run_seeds(tmp_path, lsq)
    change_entry(tmp_path / LSQ_ID, 0, code="0" * 16)
    seeds = Seeds(tmp_path / LSQ_ID, lsq, keep=True)
    assert pd.concat(seeds.frames.values())["seed"].unique().tolist() == [1]
