"""Nothing is lost and nothing incomplete is read, whatever is killed: the real batch, at toy size.

The suite kills three times and fills one disk; `make test-faults` kills 20 times, fills two, and says how it went.
"""

import json
import os
import random
import shutil
import subprocess
import time
import zipfile

import nbformat
import pandas as pd
import psutil
import pytest

from qreg_utils.batch.prepared import NAMES
from qreg_utils.results import read_study
from tests.test_batch import Project

KILLS = int(os.environ.get("QREG_KILLS", "3"))
LEFT = [900] if KILLS == 3 else [40, 900]  # kilobytes on a disk: enough to begin a notebook, or not even that
VICTIMS = ("kernel", "papermill", "snakemake")  # `make test-faults` also kills the server that they are forked from
VICTIMS += ("server",) if KILLS > 3 else ()
LIVING = ("kernel", "papermill", "snakemake", "server")
GRID = [{"method": "fp32"}, {"method": "lsq", "weight_bits": 4, "theory": True, "theory_images": 2}]
TOY = {"seeds": [0], "epochs": 3, "batch_size": 32, "train_images": 320, "test_images": 60}
FILES = ("metrics.csv", "history.csv", "noise.csv")
THEORY = ("penalty.csv", "sharpness.csv")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A finished study, how long its experiments took, and what a second batch said meanwhile."""
    project = Project(tmp_path_factory.mktemp("undisturbed"))
    project.write_study(GRID, **TOY)
    first, started = project.start_snakemake(), time.time()
    try:
        wait_for(lambda: processes(project, "papermill"), first)
        second = project.snakemake()
        assert first.poll() is None
        wait_for(lambda: len(list(project.results.glob("*/.done"))) == 2, first)
        seconds = time.time() - started
    finally:
        stdout, stderr = first.communicate(timeout=300)
    assert first.returncode == 0, stdout + stderr
    return project, seconds, second


def wait_for(condition, process):
    """Wait until something is so, or the process has ended; says whether it is."""
    while not condition():
        if process.poll() is not None:
            return False
        time.sleep(0.05)
    return True


def processes(project, kind):
    """The live processes of a project's batch: its kernels, papermills, or Snakemake itself.

    Those that were forked are known by their names, the others by their command lines.
    """
    marks = {"kernel": "ipykernel_launcher", "papermill": "qreg_utils.batch.notebooks", "snakemake": "--profile"}
    marks |= {"server": "qreg_utils.batch.prepared"}
    forked = {"kernel": NAMES["kernel"].decode(), "papermill": NAMES["notebook"].decode()}
    own_names = {name.decode() for name in NAMES.values()} - {NAMES["server"].decode()}
    found = []
    for process in psutil.process_iter():
        try:
            command, name = process.cmdline(), process.name()
            python = "python" in os.path.basename(command[0]) if command else False
            started = python and name not in own_names and any(marks[kind] in part for part in command[1:4])
            if (started or name == forked.get(kind)) and process.cwd() == str(project.root):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass
    return found


def numbers(project):
    """What a study's experiments measured, file by file."""
    return {
        str(path.relative_to(project.results)): pd.read_csv(path)
        for path in sorted(project.results.glob("*/*.csv"))
        if path.name in FILES + THEORY
    }


def assert_same_numbers(project, undisturbed):
    ours, theirs = numbers(project), numbers(undisturbed)
    assert ours.keys() == theirs.keys() and len(ours) == 2 * len(FILES) + len(THEORY)
    for name, frame in ours.items():
        pd.testing.assert_frame_equal(frame, theirs[name], check_exact=True)


def assert_complete(project, undisturbed):
    """Whatever has a result's name is complete, and what the summary would read is right."""
    for path in project.results.glob("*/*.csv"):
        pd.testing.assert_frame_equal(
            pd.read_csv(path), pd.read_csv(undisturbed.results / path.relative_to(project.results)), check_exact=True
        )
    for path in project.results.glob("*/run.json"):
        json.loads(path.read_text())
    for path in project.results.glob("*/checkpoint*.pt"):
        assert zipfile.ZipFile(path).testzip() is None
    for path in project.results.glob("*/notebook.ipynb"):
        cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code" and cell.source]
        assert all(cell.execution_count for cell in cells)
    if (project.results / "toy.yaml").exists():
        runs = read_study(project.results).runs
        assert all((project.results / name / "metrics.csv").exists() for name in runs)


def test_a_second_batch_says_that_the_first_is_running(undisturbed):
    _, _, second = undisturbed
    assert second.returncode == 2
    assert "study toy is running already in this folder" in second.stderr
    assert "Traceback" not in second.stderr


def test_killed_at_random_moments_it_comes_to_the_same_numbers(undisturbed, tmp_path, capsys):
    reference, seconds, _ = undisturbed
    chance = random.Random(9)
    project = Project(tmp_path, data=reference.data)
    project.write_study(GRID, **TOY)
    made, full_runs = dict.fromkeys(VICTIMS, 0), 0
    while sum(made.values()) < KILLS:
        victim = VICTIMS[sum(made.values()) % len(VICTIMS)]
        batch, moment = project.start_snakemake(), time.time() + chance.uniform(0.5, seconds)
        wait_for(lambda moment=moment: time.time() > moment, batch)
        wait_for(lambda victim=victim: processes(project, victim), batch)
        for process in chance.sample(processes(project, victim), k=1) if processes(project, victim) else []:
            process.kill()
            made[victim] += 1
        stdout, stderr = batch.communicate(timeout=300)
        assert "Traceback" not in stdout + stderr
        wait = time.time() + 15
        while any(processes(project, kind) for kind in LIVING) and time.time() < wait:
            time.sleep(0.1)
        assert not any(processes(project, kind) for kind in LIVING), "left behind by a dead batch"
        assert_complete(project, reference)
        if batch.returncode == 0:  # nothing is left to kill: from the start again
            assert_same_numbers(project, reference)
            shutil.rmtree(project.results)
            full_runs += 1
    done = project.snakemake()
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_numbers(project, reference)
    assert_complete(project, reference)
    with capsys.disabled():
        kinds = ", ".join(f"{count} of a {kind}" for kind, count in made.items())
        print(
            f"\n{sum(made.values())} kills survived of {sum(made.values())} made ({kinds}), {full_runs + 1} full runs"
        )


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB; needs the right to mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("kilobytes", LEFT)
def test_a_full_disk_is_named_and_nothing_is_lost(undisturbed, small_disk, kilobytes):
    reference, _, _ = undisturbed
    project = Project(small_disk / "project", data=reference.data)
    project.write_study(GRID, **TOY)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 1024 * kilobytes))
    failed = project.snakemake()
    assert failed.returncode not in (0, None)
    assert "THE DISK IS FULL" in failed.stderr and "results/toy" in failed.stderr
    assert "Traceback" not in failed.stderr + failed.stdout
    filler.unlink()
    assert_complete(project, reference)
    done = project.snakemake()
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_numbers(project, reference)
