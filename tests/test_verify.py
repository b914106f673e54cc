"""A rerun, by a stand-in for papermill that copies files; and the committed tables, which are real."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qreg_utils.batch import notebooks, verify
from qreg_utils.batch.prepared import ADDRESS
from qreg_utils.metrics import CONFIGURATION, table_text
from qreg_utils.results import read_study, write_csv
from qreg_utils.study import load_study, write_params
from tests.test_batch import default_signals
from tests.test_results import change_run, leave_results
from tests.test_study import FP32, LSQ, study_file

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS_ALONE = {"method": "lsq", "weight_bits": 4, "activation_bits": None}
CONTROL = {"method": "gaussian-noise", "weight_bits": 4}
FP32_ID, LSQ_ID = "digits-resnet8-fp32", "digits-resnet8-lsq-w4a4"
WEIGHTS_ID, CONTROL_ID = "digits-resnet8-lsq-w4", "digits-resnet8-gaussian-noise-w4"
# papermill ... <notebook> <output> -f <params> -p results_dir <results>
PAPERMILL = """
import json, os, shutil, sys
from pathlib import Path
*_, notebook, output, f, params, p, name, results = sys.argv
folder = Path(output).parent
before = sorted(str(path.relative_to(results)) for path in Path(results).rglob("*"))
call = {"arguments": sys.argv[1:], "before": before, "threads": os.environ["OMP_NUM_THREADS"]}
Path("call.json").write_text(json.dumps({**call, "batch": os.environ["QREG_BATCH"]}))
for file in Path("made", folder.name).glob("*.*"):
    shutil.copy(file, folder)
Path(output).touch()
print("the last line")
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with a study of four experiments and two seeds. What a run of one of them gives is in ``made``."""
    monkeypatch.setenv(ADDRESS, "")  # a server of prepared processes has imported the real papermill
    folder = tmp_path / "results" / "toy"
    path = study_file(tmp_path, [FP32, LSQ, WEIGHTS_ALONE, CONTROL], theory=True)
    study = load_study(path)
    write_params(study, path, folder)
    for position, experiment in enumerate(study.experiments):
        leave_results(folder, experiment, compiled=False, precision="float32")
        change_metrics(
            folder / experiment.id, lambda metrics, p=position: 80 + p + metrics["seed"] + metrics["severity"]
        )
    (tmp_path / "results" / "published").mkdir()
    shutil.copy(ROOT / "results" / "published" / "table.csv", tmp_path / "results" / "published")
    write_tables(tmp_path)
    shutil.copytree(folder, tmp_path / "made")
    (tmp_path / "papermill.py").write_text(PAPERMILL)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path


def write_tables(project):
    folder = project / "results" / "toy"
    table = verify.study_table(read_study(folder), pd.read_csv(project / "results" / "published" / "table.csv"))
    write_csv(folder / "table.csv", table)
    (folder / "table.md").write_text(table_text(table) + "\n")


def change_metrics(folder, value):
    path = folder / "metrics.csv"
    metrics = pd.read_csv(path)
    write_csv(path, metrics.assign(value=value(metrics)))


def change_first_number(path, column):
    frame = pd.read_csv(path)
    frame[column] = frame[column].astype(float)
    frame.loc[0, column] += 1e-5 if path.stem == "noise" else 1e-6
    write_csv(path, frame)


def files(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def left_behind(project):
    return list((project / "tmp").iterdir())


# --- a rerun, from end to end -----------------------------------------------------------------------------------------


def test_the_same_numbers_pass(project, capsys):
    before = files(project / "results")
    assert verify.main(["toy", "--experiment", LSQ_ID], project) == 0
    printed = capsys.readouterr().out
    assert f"experiment: {LSQ_ID}, as asked; again: make verify STUDY=toy EXPERIMENT={LSQ_ID}" in printed
    assert "the committed run took 60 s" in printed and "done in " in printed
    assert "class: the same versions and hardware" in printed and "largest difference of a score: none" in printed
    assert "metrics.csv: 78 numbers, all the same" in printed and "noise.csv: 6 numbers, all the same" in printed
    assert printed.endswith(f"PASS: {LSQ_ID}\n") and "PASS: the study's tables" in printed
    assert files(project / "results") == before and not left_behind(project)


def add_seeds(project):
    """Six seeds of LSQ, the last of another machine; a run makes the second and the fourth alone."""
    study, (experiment,) = project / "results" / "toy", load_study(study_file(project, [LSQ], theory=True)).experiments
    folder, made = study / LSQ_ID, project / "made" / LSQ_ID
    leave_results(study, with_seeds(experiment, range(6)), compiled=False, precision="float32")
    change_metrics(folder, lambda metrics: 80 + metrics["seed"] + metrics["severity"])
    run = json.loads((folder / "run.json").read_text())
    change_run(folder, seeds={str(seed): {"processor": run["processor"], "seconds": 7.0} for seed in range(6)})
    change_run(folder, processor="the last seed's")
    leave_results(project / "made", with_seeds(experiment, [1, 3]), compiled=False, precision="float32")
    change_metrics(made, lambda metrics: 80 + metrics["seed"] + metrics["severity"])
    write_tables(project)


def with_seeds(experiment, seeds):
    return experiment.model_copy(update={"seeds": list(seeds)})


def test_of_many_seeds_two_are_run_and_compared_with_their_own_machine(project, capsys, monkeypatch):
    add_seeds(project)
    monkeypatch.setattr(verify.random, "sample", lambda seeds, count: [seeds[3], seeds[1]])
    assert verify.main(["toy", "--experiment", LSQ_ID], project) == 0
    printed = capsys.readouterr().out
    assert f"again: make verify STUDY=toy EXPERIMENT={LSQ_ID} SEEDS=1,3\n" in printed and "seeds: 1, 3\n" in printed
    assert "the committed run took 14 s" in printed and "the same versions and hardware" in printed
    assert "metrics.csv: 78 numbers, all the same" in printed
    params = json.loads((project / "call.json").read_text())["arguments"]
    assert f"{LSQ_ID}/params.yaml" in params[params.index("-f") + 1] and "results" not in params[params.index("-f") + 1]


def test_seeds_may_be_named_and_must_be_there(project, capsys):
    add_seeds(project)
    assert verify.main(["toy", "--experiment", LSQ_ID, "--seeds", "1,3"], project) == 0
    assert verify.main(["toy", "--experiment", LSQ_ID, "--seeds", "3,9"], project) == 2
    assert verify.main(["toy", "--experiment", LSQ_ID, "--seeds", "3-1"], project) == 2
    assert verify.main(["toy", "--experiment", LSQ_ID, "--seeds", "3"], project) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == f"{LSQ_ID}: no committed seed 9; it has [0, 1, 2, 3, 4, 5]"
    assert second == "SEEDS='3-1' is not allowed: 3-1 runs backwards"
    assert third == "SEEDS='3' is not allowed: two at least (one alone is another experiment)"


def test_it_is_run_as_the_batch_runs_it(project):
    change_run(project / "results" / "toy" / FP32_ID, threads=3)
    verify.main(["toy", "--experiment", FP32_ID], project)
    call = json.loads((project / "call.json").read_text())
    *options, notebook, output, f, params, p, name, results = call["arguments"]
    rule = (ROOT / "Snakefile").read_text()
    assert tuple(options) == notebooks.OPTIONS and "{PYTHON} -m qreg_utils.batch.notebooks notebooks/" in rule
    assert "-f {input.params} -p results_dir {RESULTS}" in rule and [f, p, name] == ["-f", "-p", "results_dir"]
    assert notebook == str(project / "notebooks" / "classification.ipynb")
    assert params == str(project / "results" / "toy" / FP32_ID / "params.yaml")
    assert Path(output).parent == Path(results, FP32_ID) and Path(results).is_relative_to(project / "tmp")
    assert call["threads"] == "3" and call["batch"] == str(os.getpid())
    assert call["before"] == [FP32_ID, f"{FP32_ID}/log.txt", "toy.yaml"]


def test_a_control_finds_its_noise_source(project):
    assert verify.main(["toy", "--experiment", CONTROL_ID], project) == 0
    found = json.loads((project / "call.json").read_text())["before"]
    assert {f"{WEIGHTS_ID}/noise.csv", f"{WEIGHTS_ID}/run.json"} <= set(found)
    assert not [name for name in found if name.startswith((FP32_ID, LSQ_ID))]


@pytest.mark.parametrize("name, column", [("metrics", "value"), ("history", "loss"), ("noise", "sigma")])
def test_one_other_number_fails_and_is_shown(project, capsys, name, column):
    change_first_number(project / "made" / LSQ_ID / f"{name}.csv", column)
    assert verify.main(["toy", "--experiment", LSQ_ID], project) == 1
    printed = capsys.readouterr().out
    assert re.search(rf"{name}\.csv: 1 of \d+ numbers are not the same; the first:\n.*committed +rerun\n", printed)
    assert ("largest difference of a score: 0.00 points (seed 0, test_set, severity 0: 81.00" in printed) == (
        name == "metrics"
    )
    assert printed.endswith(f"FAIL: {LSQ_ID}\n")
    (kept,) = left_behind(project)
    assert f"log: {kept}/toy/{LSQ_ID}/log.txt; delete {kept}" in printed
    assert (kept / "toy" / LSQ_ID / "log.txt").read_text() == "the last line\n"


@pytest.mark.parametrize("name, column", [("penalty", "measured"), ("sharpness", "value")])
def test_the_theorys_numbers_are_compared_too(project, capsys, name, column):
    change_first_number(project / "made" / LSQ_ID / f"{name}.csv", column)
    assert verify.main(["toy", "--experiment", LSQ_ID], project) == 1
    assert f"{name}.csv: 1 of 2 numbers are not the same" in capsys.readouterr().out


@pytest.mark.parametrize("points, status", [(0.5, 0), (-0.5, 0), (40, 1), (-40, 1)])
def test_on_another_machine_the_averages_must_agree(project, capsys, points, status):
    change_run(project / "made" / LSQ_ID, processor="Another CPU", versions={"torch": "9.9", "numpy": "9.9"})
    change_metrics(project / "made" / LSQ_ID, lambda metrics: metrics["value"] + points)
    assert verify.main(["toy", "--experiment", LSQ_ID], project) == status
    printed = capsys.readouterr().out
    committed = json.loads((project / "results" / "toy" / LSQ_ID / "run.json").read_text())
    assert (
        "class: another one (" in printed
        and f"torch 9.9 in the rerun, {committed['versions']['torch']} committed" in printed
    )
    assert f"processor Another CPU in the rerun, {committed['processor']} committed" in printed
    assert (
        f"the means differ by {abs(points):.2f} points; " in printed
        and "99% prediction interval for 2 other" in printed
    )
    assert f"seed 1: 84.00 committed, {84 + points:.2f} in the rerun" in printed


def test_a_run_that_fails_is_reported_with_the_last_line_of_its_log(project, capsys):
    (project / "papermill.py").write_text("print('before')\nraise SystemExit('DatasetError: voc is missing; make voc')")
    assert verify.main(["toy", "--experiment", LSQ_ID], project) == 1
    printed = capsys.readouterr().out
    assert (
        "DatasetError: voc is missing; make voc" in printed and "before" not in printed and "Traceback" not in printed
    )
    (kept,) = left_behind(project)
    assert f"log: {kept}/toy/{LSQ_ID}/log.txt" in printed


def test_what_the_run_has_recorded_is_reported(project, capsys):
    note = "Path(sys.argv[-6]).with_name('failed.txt').write_text('DatasetError: no')"
    text = f"import sys\nfrom pathlib import Path\n{note}\nprint('at the end')\nsys.exit(1)\n"
    (project / "papermill.py").write_text(text)
    assert verify.main(["toy", "--experiment", LSQ_ID], project) == 1
    assert f"{LSQ_ID}: failed: DatasetError: no\n" in capsys.readouterr().out


def test_a_run_that_leaves_nothing_fails(project, capsys):
    (project / "papermill.py").write_text("import sys\nopen(sys.argv[-6], 'w').close()\n")
    assert verify.main(["toy", "--experiment", LSQ_ID], project) == 1
    assert "its results cannot be used: not run, or not finished" in capsys.readouterr().out


def test_a_wrong_table_fails_and_the_experiment_is_run_all_the_same(project, capsys):
    (project / "results" / "toy" / "table.md").write_text("nothing")
    assert verify.main(["toy", "--experiment", LSQ_ID], project) == 1
    printed = capsys.readouterr().out
    assert "FAIL: the study's tables" in printed and f"PASS: {LSQ_ID}" in printed


def test_the_choice_is_at_random_among_those_with_results(project):
    (project / "results" / "toy" / LSQ_ID / "run.json").unlink()
    change_run(project / "results" / "toy" / CONTROL_ID, parameters={"method": "fp32"})
    study = verify.committed_study(project / "results", "toy")
    assert {verify.chosen(study, None).id for _ in range(100)} == {FP32_ID, WEIGHTS_ID}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nope"], "results/nope: no committed results; studies that have some: toy"),
        (["../results/toy"], "no committed results; studies that have some: toy"),
        (["toy", "--experiment", "nope"], f"nope: no experiment of toy; it has {FP32_ID}, "),
        (["toy", "--experiment", LSQ_ID], f"{LSQ_ID}: no committed results: not run, or not finished"),
    ],
)
def test_wrong_usage(project, capsys, arguments, message):
    (project / "results" / "toy" / LSQ_ID / "run.json").unlink()
    assert verify.main(arguments, project) == 2
    assert message in capsys.readouterr().err
    assert not left_behind(project)


def test_a_study_without_any_results(project, capsys):
    for path in project.glob("results/toy/*/run.json"):
        path.unlink()
    assert verify.main(["toy"], project) == 2
    assert f"results/toy: no committed results: {FP32_ID}: not run, or not finished" in capsys.readouterr().err


def test_files_that_are_not_as_committed_are_named(project, capsys):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *arguments], cwd=project, check=True)

    git("init", "--quiet")
    git("add", "results")
    git("commit", "--quiet", "--message", "results")
    verify.main(["toy", "--experiment", LSQ_ID], project)
    assert "WARNING" not in capsys.readouterr().out
    change_run(project / "results" / "toy" / LSQ_ID, wall_seconds=1.0)
    verify.main(["toy", "--experiment", LSQ_ID], project)
    assert (
        f"WARNING: compared with files that are not as committed: results/toy/{LSQ_ID}/run.json"
        in capsys.readouterr().out
    )


def test_ctrl_c_leaves_nothing_behind(project):
    (project / "papermill.py").write_text(
        "import time\nfrom pathlib import Path\nPath('runs').touch()\ntime.sleep(60)\n"
    )
    code = "import sys, pathlib, qreg_utils.batch.verify as v; sys.exit(v.main(['toy'], pathlib.Path(sys.argv[1])))"
    outside = {**os.environ, "TMPDIR": str(project / "tmp")}
    process = subprocess.Popen(
        [sys.executable, "-c", code, project],
        cwd=ROOT,
        env=outside,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    )
    try:
        while not (project / "runs").exists():
            assert process.poll() is None
            time.sleep(0.1)
        (papermill,) = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        assert "interrupted: not verified" in process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == verify.INTERRUPTED
    assert not papermill.is_running() and not left_behind(project)


# --- comparing --------------------------------------------------------------------------------------------------------

RUN = {
    "parameters": {"model": "resnet8"},
    "python": "3.11.7",
    "versions": {"torch": "2.14.0", "numpy": "2.4", "ultralytics": "8.4"},
    "platform": "linux x86_64",
    "processor": "A",
    "gpu": None,
    "threads": 1,
    "compiled": False,
}


def differing_class(**changes):
    return verify.differing(verify.machine_class(RUN), verify.machine_class({**RUN, **changes}))


def test_what_makes_another_class():
    assert differing_class() == []
    assert differing_class(python="3.11.9", cores=64, wall_seconds=1) == []
    assert differing_class(precision="float32") == [], "an older run does not say"
    assert differing_class(python="3.12.1") == ["Python 3.12 in the rerun, 3.11 committed"]
    assert differing_class(versions={**RUN["versions"], "torch": "2.15.0"}) == [
        "torch 2.15.0 in the rerun, 2.14.0 committed"
    ]
    assert differing_class(versions={**RUN["versions"], "ultralytics": "9"}) == [], "not used by a classifier"
    detector = {**RUN, "parameters": {"model": "yolov5n"}}
    other = {**detector, "versions": {"ultralytics": "9"}}
    other_class = verify.differing(verify.machine_class(detector), verify.machine_class(other))
    assert other_class == ["ultralytics 9 in the rerun, 8.4 committed"]
    for name, value in {"platform": "darwin", "processor": "B", "gpu": "H100", "threads": 2, "compiled": True}.items():
        assert differing_class(**{name: value}) == [f"{name} {value} in the rerun, {RUN[name]} committed"]


def test_another_commit_of_the_same_code_is_no_difference():
    run = {"commit": "a" * 40, "dirty": False, "code": "1" * 16, "corrupted_images": "made", "unverified_files": []}
    other = {**run, "commit": "b" * 40, "dirty": True}
    assert verify._other_code_or_data(run, other) == []
    different = "code: commit bbbbbbbbbb with uncommitted changes in the rerun, commit aaaaaaaaaa committed"
    assert verify._other_code_or_data(run, {**other, "code": "2" * 16}) == [different]
    older = {name: value for name, value in run.items() if name != "code"}
    assert verify._other_code_or_data(older, other) == [different]


def made_up(name, numbers):
    """A file's content with these numbers, a row each."""
    own = {"experiment": "e", "dataset": "d", "model": "m", "variant": "", "method": "lsq"}
    own |= {"weight_bits": 4, "activation_bits": 4}
    where = {
        "metrics": {"metric": "accuracy", "corruption": "fog", "severity": 1},
        "noise": {"layer": "fc", "epoch": 0},
    }
    value = {"metrics": "value", "noise": "sigma"}[name]
    return pd.DataFrame([{**own, **where[name], "seed": seed, value: number} for seed, number in enumerate(numbers)])


NUMBERS = st.lists(st.floats(0, 100) | st.just(float("nan")), min_size=1, max_size=20)


@given(NUMBERS, st.randoms())
def test_order_and_new_columns_make_no_difference(numbers, chance):
    frame = made_up("metrics", numbers)
    order = chance.sample(range(len(frame)), len(frame))
    rerun = frame.iloc[order].assign(new=1.0)
    assert verify.pair_numbers("metrics", frame, rerun)["same"].all()


@given(NUMBERS, st.data(), st.sampled_from(["metrics", "noise"]))
def test_every_other_number_is_found(numbers, data, name):
    position = data.draw(st.integers(0, len(numbers) - 1))
    other = data.draw(st.floats(0, 100).filter(lambda number: number != numbers[position]))
    changed = [*numbers[:position], other, *numbers[position + 1 :]]
    found = verify.pair_numbers(name, made_up(name, numbers), made_up(name, changed))
    assert found.loc[~found["same"], "seed"].tolist() == [position]


def test_a_row_that_the_rerun_lacks_is_found():
    found = verify.pair_numbers("metrics", made_up("metrics", [1.0, 2.0]), made_up("metrics", [1.0]))
    assert found["same"].tolist() == [True, False]


def averages(scores, seeds=3):
    """A frame of ``corruption_average`` with a setting for each row of ``scores``."""
    configurations = [("d", "m", "", "lsq", bits, bits) for bits in range(2, 2 + len(scores))]
    rows = [(*c, seed, row[seed]) for c, row in zip(configurations, scores, strict=True) for seed in range(seeds)]
    return pd.DataFrame(rows, columns=[*CONFIGURATION, "seed", "avg_corrupted"])


def test_one_run_in_a_hundred_is_rejected_when_only_the_seeds_differ():
    chance = np.random.default_rng(0)
    settings, repeats, rejected = 5, 1000, 0
    for _ in range(repeats):
        scores = 50 + 10 * np.arange(settings)[:, None] + 4 * chance.standard_normal((settings, 3))
        rerun = 50 + 4 * chance.standard_normal(3)
        rejected += abs(scores[0].mean() - rerun.mean()) > verify.tolerance(averages(scores), 3)[0]
    assert 0.003 < rejected / repeats < 0.02


@settings(max_examples=30)
@given(st.floats(1, 50), st.floats(-50, 50), st.integers(1, 9))
def test_the_tolerance_follows_the_spread(factor, shift, seeds):
    scores = np.array([[60.0, 70.0, 65.0], [20.0, 29.0, 21.0]])
    allowed, _ = verify.tolerance(averages(scores), seeds)
    assert verify.tolerance(averages(factor * scores + shift), seeds)[0] == pytest.approx(factor * allowed)
    assert verify.tolerance(averages(scores), 4 * seeds)[0] == pytest.approx(allowed / 2)


def test_the_least_that_is_allowed():
    allowed, why = verify.tolerance(averages(np.full((2, 3), 50.0)), 3)
    assert allowed == verify.LEAST_ALLOWED_POINTS and "at least 1" in why
    allowed, why = verify.tolerance(averages(np.full((2, 1), 50.0), seeds=1), 1)
    assert allowed == verify.ALLOWED_POINTS_WITHOUT_SPREAD and "no setting has two seeds" in why


# --- the study's tables -----------------------------------------------------------------------------------------------


STUDIES = sorted(path.parent.name for path in (ROOT / "results").glob("*/table.md"))


@pytest.mark.parametrize("study", STUDIES)
def test_the_committed_tables_are_what_the_metrics_give(study):
    assert verify.check_study(ROOT / "results" / study, ROOT / "results" / "published" / "table.csv") == []


def copied(tmp_path):
    """What the tables are made from."""
    left_out = shutil.ignore_patterns("*.ipynb", "*.html", "*.pt", "figures", "scratch", "walkthroughs")
    shutil.copytree(ROOT / "results", tmp_path / "results", ignore=left_out)
    return tmp_path


def one_digit(path, name=""):
    """The first number with decimals (after ``name``), and the same with another last digit but two."""
    found = re.search(rf"{name},\d+\.\d{{4,}}", path.read_text()).group()
    return found, found[:-3] + str((int(found[-3]) + 5) % 10) + found[-2:]


def test_one_wrong_digit_is_found_wherever_it_is(tmp_path):
    project = copied(tmp_path)
    table, quick = project / "results/voc-small/table.md", project / "results/quick"
    row = re.search(r"-\d\.\d\d \[-\d\.\d", table.read_text()).group()
    metrics = quick / "few_digits-small_resnet8-fp32/metrics.csv"
    changes = {
        table: (row, row[:-1] + str((int(row[-1]) + 1) % 10), "results/voc-small/table.md: | VOC "),
        quick / "table.csv": (*one_digit(quick / "table.csv"), "results/quick/table.csv: clean of "),
        metrics: (*one_digit(metrics, "accuracy"), "metrics.csv give "),
    }
    for path, (right, wrong, message) in changes.items():
        text = path.read_text()
        assert right in text, path
        path.write_text(text.replace(right, wrong, 1))
        folder = project / "results" / path.relative_to(project / "results").parts[0]
        found = verify.check_study(folder, project / "results" / "published" / "table.csv")
        assert message in "\n".join(found), found
        path.write_text(text)
        assert verify.check_study(folder, project / "results" / "published" / "table.csv") == []


def test_a_table_without_what_it_is_made_from_is_found(project):
    (project / "results" / "other").mkdir()
    shutil.copy(project / "results" / "toy" / "table.md", project / "results" / "other")
    published = project / "results" / "published" / "table.csv"
    (line,) = verify.check_study(project / "results" / "other", published)
    assert line.startswith("results/other: ") and "no such file" in line
