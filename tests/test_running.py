"""A run that is alone in its folder, is seen, and does not outlive its batch."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from qreg_utils.batch.display import read_progress
from qreg_utils.batch.running import BATCH_GONE, exclusive_run, record_failure

ROOT = Path(__file__).resolve().parent.parent
RUN = """
import sys, time
from pathlib import Path
from qreg_utils.batch.running import exclusive_run
with exclusive_run(Path(sys.argv[1]), batch=int(sys.argv[2])):
    print("alone", flush=True)
    time.sleep(float(sys.argv[3]))
print("ended", flush=True)
"""


def run(folder, batch, seconds):
    command = [str(part) for part in (sys.executable, "-c", RUN, folder, batch, seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def batch():
    process = subprocess.Popen(["sleep", "100"])
    yield process
    process.kill()
    process.wait()


def test_a_run_is_seen_while_it_lasts(tmp_path, monkeypatch):
    monkeypatch.delenv("QREG_PROGRESS", raising=False)
    (tmp_path / "failed.txt").write_text("from the run before")
    with exclusive_run(tmp_path, batch=os.getpid()):
        state = read_progress(tmp_path)
        assert state["stage"] == "starting" and state["process"] == os.getpid()
        assert os.environ["QREG_PROGRESS"] == str(tmp_path / "progress.json")
        assert not (tmp_path / "failed.txt").exists()
    assert read_progress(tmp_path) is None
    assert "QREG_PROGRESS" in os.environ and os.environ.pop("QREG_PROGRESS")


def test_a_failure_is_recorded_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="two"), exclusive_run(tmp_path, batch=os.getpid()):
        raise ValueError("in\ntwo  lines")
    assert (tmp_path / "failed.txt").read_text() == "ValueError: in two lines\n"
    os.environ.pop("QREG_PROGRESS")


def test_an_interruption_is_no_failure(tmp_path):
    with pytest.raises(KeyboardInterrupt), exclusive_run(tmp_path, batch=os.getpid()):
        raise KeyboardInterrupt
    assert not (tmp_path / "failed.txt").exists()
    os.environ.pop("QREG_PROGRESS")


def test_that_a_failure_cannot_be_recorded_does_not_hide_it(tmp_path):
    record_failure(tmp_path / "file" / "folder", "anything") if (tmp_path / "file").write_text("") else None
    assert (tmp_path / "file").read_text() == ""


def test_a_second_run_waits_for_the_first(tmp_path, batch):
    first = run(tmp_path, batch.pid, 2)
    assert first.stdout.readline() == "alone\n"
    second = run(tmp_path, batch.pid, 0)
    said = second.stdout.readline()
    assert said.startswith("waiting for another run that writes to") and json.dumps(first.pid) in said
    assert first.communicate()[0] == "ended\n"
    assert second.communicate()[0] == "alone\nended\n"


@pytest.mark.parametrize("waits", [False, True])
def test_a_run_ends_when_its_batch_is_killed(tmp_path, batch, waits):
    other = run(tmp_path, os.getpid(), 30) if waits else None
    if other:
        other.stdout.readline()
    process = run(tmp_path, batch.pid, 100)
    process.stdout.readline()
    batch.kill()  # it stays a zombie here until somebody waits for it
    started = time.monotonic()
    assert process.wait(timeout=30) == BATCH_GONE
    assert time.monotonic() - started < 15
    assert "the batch was killed" in process.stdout.read()
    if other:
        psutil.Process(other.pid).kill()
        other.wait()


def test_the_folder_of_a_killed_run_is_free(tmp_path, batch):
    first = run(tmp_path, batch.pid, 100)
    first.stdout.readline()
    first.kill()
    first.wait()
    assert read_progress(tmp_path)["process"] == first.pid  # as it was left
    assert run(tmp_path, batch.pid, 0).communicate()[0] == "alone\nended\n"
    assert read_progress(tmp_path) is None
