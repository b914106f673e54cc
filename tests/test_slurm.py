"""A toy study through sbatch on a real SLURM: `make test-slurm`, where one is running (a single node will do)."""

import os
import subprocess
import time

import pandas as pd
import pytest

from qreg_utils.display import read_progress
from qreg_utils.results import read_study
from tests.test_batch import BROKEN, FP32, GRID, LSQ, Project, finish

pytestmark = pytest.mark.skipif("QREG_SLURM" not in os.environ, reason="make test-slurm runs these")

CANCELLED = "digits-resnet8-lsq-w2a2"
SLURM = ("--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "5", "--jobs", "2")
SMALL = ("--default-resources", "runtime=30", "mem_mb=3000")


def squeue(form):
    done = subprocess.run(["squeue", "--noheader", "--format", form], capture_output=True, text=True, check=True)
    return [line.split("|") for line in done.stdout.splitlines()]


def jobs():
    """Of every job in the queue: its number, time limit, memory, processors, and what Snakemake says of it."""
    return {row[0]: row[1:] for row in squeue("%i|%l|%m|%C|%k")}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def disturbed(project):
    """One experiment fails, one is cancelled while it runs; what the queue showed of it before, and the batch's end."""
    theirs = {"weight_bits": 2, "resources": {"runtime": 17, "mem_mb": 2500}}
    project.write_study([{**GRID[1], **theirs}, *GRID, BROKEN], epochs=4)
    batch = project.start_snakemake(*SLURM, *SMALL, profile="slurm")
    while not (state := read_progress(project.results / CANCELLED)) or state["stage"] == "starting":
        assert batch.poll() is None, finish(batch)
        time.sleep(0.2)
    queue = jobs()
    number = next(number for number, row in queue.items() if CANCELLED in row[-1])
    subprocess.run(["scancel", number], check=True)
    return queue, number, finish(batch)


def test_an_experiment_gets_the_resources_of_its_entry_and_the_others_the_profiles(disturbed):
    queue, number, _ = disturbed
    assert queue[number][:2] == ["17:00", "2500M"]
    others = [row for other, row in queue.items() if other != number]
    assert others and all(row[:2] == ["30:00", "3000M"] for row in others)


def test_what_failed_and_what_was_cancelled_is_named_and_the_rest_finished(project, disturbed):
    _, _, done = disturbed
    assert done.returncode == 1
    assert "NOT FINISHED: cifar10-resnet8-fp32: DatasetError: " in done.stderr
    assert f"NOT FINISHED: {CANCELLED}: ended without a word (killed, cancelled, out of time?)" in done.stderr
    assert f"finished {FP32}" in done.stdout and f"finished {LSQ}" in done.stdout
    assert set(read_study(project.results).runs) == {FP32, LSQ}


def test_a_rerun_completes_and_does_only_what_is_missing(project, disturbed):
    before = {name: (project.results / name / "run.json").stat().st_mtime_ns for name in (FP32, LSQ)}
    project.write_study([{**GRID[1], "weight_bits": 2}, *GRID], epochs=4)
    done = project.snakemake(*SLURM, *SMALL, profile="slurm")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"finished {CANCELLED}" in done.stdout and f"finished {FP32}" not in done.stdout
    assert before == {name: (project.results / name / "run.json").stat().st_mtime_ns for name in (FP32, LSQ)}
    assert read_study(project.results).missing == {}
    assert set(pd.read_csv(project.results / "table.csv")["weight_bits"]) == {32, 4, 2}


def test_several_experiments_share_one_job(tmp_path):
    project = Project(tmp_path)
    project.write_study(GRID)
    packed = ("--groups", "experiment=packed", "--group-components", "packed=2")
    batch = project.start_snakemake(*SLURM, *SMALL, *packed, profile="slurm")
    together = 0
    while batch.poll() is None:
        running = [name for name in (FP32, LSQ) if read_progress(project.results / name)]
        together = max(together, len(running))
        if len(running) == 2:
            assert len(jobs()) == 1, "both in one job"
            assert next(iter(jobs().values()))[2] == "2", "with a core each"
        time.sleep(0.5)
    done = finish(batch)
    assert done.returncode == 0, done.stdout + done.stderr
    assert together == 2
    assert read_study(project.results).missing == {}
