import io
import logging
import shutil
from types import SimpleNamespace

import pytest
from rich.console import Console

from qreg_utils.batch import display
from qreg_utils.batch.display import Display, duration, reason, report_unfinished, stage
from qreg_utils.progress import WAITING, FileBar, write_progress
from qreg_utils.study import Classification
from tests.test_study import COMMON

FP32, LSQ = (
    Classification(**{**COMMON, "seeds": [0, 5, 7]}, **setting)
    for setting in ({"method": "fp32"}, {"method": "lsq", "weight_bits": 4})
)
MINUTE = 60


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """A display of two experiments, whose console writes to a string; not a terminal."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for experiment in (FP32, LSQ):
        (tmp_path / experiment.id).mkdir()
    shown = Display("toy", {FP32.id: FP32, LSQ.id: LSQ}, tmp_path)
    shown.console = Console(file=io.StringIO(), highlight=False, markup=False, soft_wrap=True)
    yield shown
    shown.close()


def report(shown, event, **what):
    """What Snakemake's logger hands to the display."""
    record = logging.makeLogRecord({"event": event, **what})
    shown.handle(record)


def begin(shown, number, experiment):
    report(shown, "job_info", jobid=number, rule_name="experiment", wildcards={"experiment": experiment.id})


def printed(shown):
    return shown.console.file.getvalue().splitlines()


def test_a_line_for_the_study_and_one_for_each_experiment_that_runs(shown, tmp_path):
    report(shown, "run_info", stats={"experiment": 2, "summary": 1, "total": 3})
    begin(shown, 1, FP32)
    begin(shown, 2, LSQ)
    assert shown.lines() == ["toy: 0 of 2 experiments finished, 0 running, 2 starting or queued; 0 s"]
    write_progress(tmp_path / FP32.id / "progress.json", stage=WAITING)
    assert shown.lines() == ["toy: 0 of 2 experiments finished, 0 running, 2 starting or queued; 0 s"]
    write_progress(tmp_path / FP32.id / "progress.json", stage="starting")
    state = {"stage": "seed 5", "done": 1, "total": 3, "seconds_left": 20, "note": "train=0.312"}
    write_progress(tmp_path / LSQ.id / "progress.json", **state)
    head, *running = shown.lines()
    assert head == "toy: 0 of 2 experiments finished, 2 running; 0 s"
    width = len(LSQ.id)
    assert running == [
        f"  {FP32.id:{width}}  starting",
        f"  {LSQ.id}  seed 5 (2 of 3), epoch 1 of 3, loss train=0.312, 50 s of training left",
    ]


def test_the_slurm_job_of_an_experiment_is_shown(shown, tmp_path, monkeypatch):
    begin(shown, 1, FP32)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    write_progress(tmp_path / FP32.id / "progress.json", stage="starting")
    assert shown.lines()[1].endswith("starting  (SLURM job 12)")


def test_what_ends_is_reported_once_with_the_total(shown, tmp_path):
    report(shown, "run_info", stats={"experiment": 2, "summary": 1, "total": 3})
    begin(shown, 1, FP32)
    begin(shown, 2, LSQ)
    report(shown, "job_finished", job_id=1)
    (tmp_path / LSQ.id / "failed.txt").write_text("FloatingPointError: the loss is not finite after epoch 2 of 3\n")
    report(shown, "job_error", jobid=2)
    report(shown, "job_info", jobid=3, rule_name="summary", wildcards={})
    assert shown.lines() == ["toy: 1 of 2 experiments finished, 1 failed, the summary is being made; 0 s"]
    report(shown, "job_finished", job_id=3)
    assert printed(shown) == [
        f"finished {FP32.id}  [1 of 2, 0 s, about 0 s left]",
        f"FAILED {LSQ.id}: FloatingPointError: the loss is not finite after epoch 2 of 3  [2 of 2, 0 s]",
        f"summarised {tmp_path}  [0 s]",
    ]


def test_what_goes_wrong_outside_of_experiments_is_reported(shown):
    shown.handle(logging.makeLogRecord({"levelno": logging.ERROR, "msg": "sbatch: error: invalid partition"}))
    shown.handle(logging.makeLogRecord({"levelno": logging.WARNING, "msg": "No SLURM account given, trying to guess."}))
    assert printed(shown) == ["sbatch: error: invalid partition"]


def test_line_by_line_where_there_is_no_terminal(shown, tmp_path, monkeypatch):
    monkeypatch.setattr(display, "REPORT_INTERVAL_SECONDS", 0.05)
    report(shown, "run_info", stats={"experiment": 2, "total": 2})
    begin(shown, 1, FP32)
    write_progress(tmp_path / FP32.id / "progress.json", stage="starting")
    shown.start()
    assert not shown.live.is_started
    assert shown.stopped.wait(0.5) is False
    shown.close()
    first, *later = printed(shown)
    assert first == f"toy: 2 experiments to run; logs: {tmp_path}/*/log.txt"
    assert later and any(line.startswith(f"  {FP32.id}  starting") for line in later)
    assert not any("\x1b" in line for line in later)


@pytest.mark.parametrize(
    "state, words",
    [
        ({"stage": "sharpness", "done": 2, "total": 3, "seconds_left": None}, "sharpness, 2 of 3"),
        (
            {"stage": "noise theory", "done": 1, "total": 3, "seconds_left": 7 * MINUTE},
            "noise theory, 1 of 3, 7 min left",
        ),
        ({"stage": "seed 0", "done": 0, "total": 3, "seconds_left": None, "note": ""}, "seed 0 (1 of 3), epoch 0 of 3"),
        ({"stage": "seed 7", "done": 3, "total": 3, "seconds_left": 0.0}, "seed 7 (3 of 3), epoch 3 of 3"),
        ({"stage": "seed 99", "done": 1, "total": 3, "seconds_left": None}, "seed 99, 1 of 3"),
    ],
)
def test_what_a_run_does_in_words(state, words):
    assert stage(FP32, state) == words


@pytest.mark.parametrize(
    "seconds, words", [(0, "0 s"), (99, "99 s"), (100, "2 min"), (99 * MINUTE, "99 min"), (200 * MINUTE, "3 h 20 min")]
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_a_bar_leaves_its_state_for_the_display(tmp_path, monkeypatch):
    monkeypatch.setenv("QREG_PROGRESS", str(tmp_path / "progress.json"))
    for _ in FileBar(range(3), desc="seed 5", unit="epoch", total=3):
        pass
    state = display.read_progress(tmp_path)
    assert (state["stage"], state["unit"], state["done"], state["total"]) == ("seed 5", "epoch", 3, 3)


def test_why_an_experiment_has_not_finished(tmp_path):
    assert reason(tmp_path) == "not started"
    slurm = "SLURM-job '7' failed, SLURM status is:\n'TIMEOUT'"
    assert reason(tmp_path, slurm) == "SLURM-job '7' failed, SLURM status is: 'TIMEOUT'"
    (tmp_path / "log.txt").write_text("Executing\nEpoch 3\n")
    assert reason(tmp_path) == "ended without a message (killed, cancelled, out of time?); its log ends with: Epoch 3"
    assert reason(tmp_path, slurm).endswith("status is: 'TIMEOUT'; its log ends with: Epoch 3")
    (tmp_path / "failed.txt").write_text("DatasetError: no such file\n")
    assert reason(tmp_path, slurm) == "DatasetError: no such file"


def test_a_full_disk_is_reported(tmp_path, monkeypatch, capsys):
    report_unfinished([FP32.id], tmp_path, why={})
    assert "FULL" not in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 2**20))
    report_unfinished([FP32.id, LSQ.id], tmp_path, why={LSQ.id: "sbatch: error"})
    told = capsys.readouterr().err
    assert f"NOT FINISHED: {FP32.id}: not started" in told and f"NOT FINISHED: {LSQ.id}: sbatch: error" in told
    assert f"THE DISK IS FULL: 3 MB are left where {tmp_path} lies; make room and run it again" in told
