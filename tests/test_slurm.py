"""A toy study through sbatch on a real SLURM: `make test-slurm`, where one is running (a single node will do)."""

import os
import signal
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest

from qreg_utils.batch.display import read_progress
from qreg_utils.results import read_study
from tests.test_batch import BROKEN, FP32, GRID, LSQ, Project, finish

pytestmark = pytest.mark.skipif("QREG_SLURM" not in os.environ, reason="make test-slurm runs these")

W2 = "digits-resnet8-lsq-w2a2"
SLURM = ("--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "5")
SMALL = ("--default-resources", "runtime=30", "mem_mb=3000")
GPUS = "gpu" in subprocess.run("sinfo --noheader --format=%G", shell=True, capture_output=True, text=True).stdout


def queue():
    """Of every job in the queue: its time limit, megabytes, processors and GPUs."""
    command = ["squeue", "--noheader", "--format", "%i|%l|%m|%C|%b"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line.split("|") for line in done.stdout.splitlines()]
    return {row[0]: row[1:] for row in rows}


def wait_for_training(project, experiment, batch):
    """Until an experiment trains; the number of its SLURM job."""
    while not (state := read_progress(project.results / experiment)) or not state["stage"].startswith("seed"):
        assert batch.poll() is None, finish(batch)
        time.sleep(0.2)
    return state["slurm_job"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def disturbed(project):
    """One experiment fails, one is cancelled while it trains; what the queue was at first, its job, the batch's end."""
    theirs = {"runtime": 17, "mem_mb": 2500, **({"gres": "gpu:1"} if GPUS else {})}
    project.write_study([{**GRID[1], "weight_bits": 2, "resources": theirs}, *GRID, BROKEN], epochs=4)
    batch = project.start_snakemake(*SLURM, *SMALL, profile="slurm")
    while len(first := queue()) < 4:
        assert batch.poll() is None, finish(batch)
        time.sleep(0.05)
    number = wait_for_training(project, W2, batch)
    subprocess.run(["scancel", number], check=True)
    return first, number, finish(batch)


def test_an_experiment_gets_the_resources_of_its_entry_and_the_others_the_profiles(disturbed):
    first, number, _ = disturbed
    assert first[number] == ["17:00", "2500M", "1", "gres:gpu:1" if GPUS else "N/A"]
    assert all(row == ["30:00", "3000M", "1", "N/A"] for other, row in first.items() if other != number)


def test_what_failed_and_what_was_cancelled_is_named_and_the_rest_finished(project, disturbed):
    _, number, done = disturbed
    assert done.returncode == 1
    assert "NOT FINISHED: cifar10-resnet8-fp32: DatasetError: " in done.stderr
    assert f"NOT FINISHED: {W2}: SLURM-job '{number}' failed, SLURM status is: 'CANCELLED'" in done.stderr
    assert f"finished {FP32}" in done.stdout and f"finished {LSQ}" in done.stdout
    assert set(read_study(project.results).runs) == {FP32, LSQ}


def test_a_rerun_completes_and_does_only_what_is_missing(project, disturbed):
    before = times(project)
    project.write_study([{**GRID[1], "weight_bits": 2}, *GRID], epochs=4)
    done = project.snakemake(*SLURM, *SMALL, profile="slurm")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"finished {W2}" in done.stdout and f"finished {FP32}" not in done.stdout
    assert before == {name: time for name, time in times(project).items() if name != W2}
    assert read_study(project.results).missing == {}
    assert set(pd.read_csv(project.results / "table.csv")["weight_bits"]) == {32, 4, 2}


def times(project):
    return {path.parent.name: path.stat().st_mtime_ns for path in project.results.glob("*/run.json")}


def test_a_batch_in_one_job_shares_its_gpu(tmp_path):
    project = Project(tmp_path)
    project.write_study(GRID, epochs=4)
    gpu = "" if GPUS else "CUDA_VISIBLE_DEVICES=0"  # as SLURM sets it where there is one; nothing computes on it here
    batch = f"{gpu} {sys.executable} -m snakemake --profile profiles/local --config study=toy per_gpu=2"
    asked = ["--cpus-per-task=2", "--mem=6000", *(["--gres=gpu:1"] if GPUS else [])]
    job = project.start_program("sbatch", "--wait", *asked, "--output=out.txt", "--wrap", batch)
    numbers = {wait_for_training(project, name, job) for name in (FP32, LSQ)}
    assert numbers == set(queue())
    both = [psutil.Process(read_progress(project.results / name)["process"]).environ() for name in (FP32, LSQ)]
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in both] == ["0", "0"]
    assert finish(job).returncode == 0, (tmp_path / "out.txt").read_text()
    assert read_study(project.results).missing == {}


def test_an_interrupted_batch_leaves_no_jobs(tmp_path):
    project = Project(tmp_path)
    project.write_study(GRID)
    batch = project.start_snakemake(*SLURM, *SMALL, profile="slurm")
    wait_for_training(project, LSQ, batch)
    run = psutil.Process(read_progress(project.results / LSQ)["process"])
    batch.send_signal(signal.SIGINT)
    done = finish(batch)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    deadline = time.time() + 60
    while queue() or run.is_running():
        assert time.time() < deadline, queue()
        time.sleep(0.5)


def test_job_arrays_are_refused(tmp_path):
    project = Project(tmp_path)
    project.write_study(GRID)
    done = project.snakemake(*SLURM, "--slurm-array-jobs", "all", profile="slurm")
    assert done.returncode == 2
    assert "slurm-array-jobs is not allowed" in done.stderr
    assert queue() == {}


def test_what_sbatch_refuses_is_reported(tmp_path):
    project = Project(tmp_path)
    project.write_study(GRID, resources={"slurm_partition": "nowhere"})
    done = project.snakemake(*SLURM, *SMALL, profile="slurm")
    assert done.returncode == 1
    assert f"NOT FINISHED: {FP32}: SLURM sbatch failed" in done.stderr and "nvalid partition" in done.stderr


def test_blocks_of_seeds_are_jobs(tmp_path):
    project = Project(tmp_path)
    project.write_study(GRID[:1], seeds=[*range(4)])
    batch = project.start_snakemake(*SLURM, *SMALL, profile="slurm", seeds_per_job=2)
    seen = set()
    while batch.poll() is None:
        seen.add(len(queue()))
        time.sleep(0.2)
    done = finish(batch)
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(seen) == 2  # the two blocks; then one job collects them
    assert f"finished {FP32}, seeds 0-1" in done.stdout and f"finished {FP32}, seeds 2-3" in done.stdout
    assert [*read_study(project.results).runs[FP32]["seeds"]] == ["0", "1", "2", "3"]
