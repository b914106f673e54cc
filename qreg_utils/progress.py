"""Progress bars: a widget in Jupyter, text in a terminal, and in a batch a file that its display reads."""

import io
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm as text_bar
from tqdm.auto import tqdm

from qreg_utils.atomic import atomic_write

WAITING = "waiting for a GPU"  # a stage
# files in an experiment's folder that say how its last run ended, if it did not succeed
FAILED = "failed.txt"
UNFINISHED = "unfinished.ipynb"


class FileBar(text_bar):
    """A bar whose state goes to the file that ``QREG_PROGRESS`` names, at most about once a second."""

    def __init__(self, *args, **kwargs):
        kwargs |= {"file": io.StringIO(), "disable": False, "mininterval": 1.0}
        super().__init__(*args, **kwargs)

    def display(self, *args, **kwargs) -> bool:
        state = self.format_dict
        left = (state["total"] - state["n"]) / state["rate"] if state["total"] and state["rate"] else None
        stage = {"stage": state["prefix"], "unit": state["unit"], "done": state["n"], "total": state["total"]}
        write_progress(Path(os.environ["QREG_PROGRESS"]), **stage, seconds_left=left, note=state["postfix"] or "")
        return True


def write_progress(path: Path, **state) -> None:
    """Write what a running experiment does, and where; that this fails, on a full disk, must not end it."""
    where = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "time": time.time(),
    }
    with suppress(OSError), atomic_write(path) as part:
        part.write_text(json.dumps(state | where), encoding="utf-8")


def report_stage(stage: str) -> None:
    """Say in a word or two what this process does, to the file that ``QREG_PROGRESS`` names; nothing without it."""
    if path := os.environ.get("QREG_PROGRESS"):
        write_progress(Path(path), stage=stage)


def progress_bar(*args, **kwargs) -> text_bar:
    """tqdm's bar where a person looks on, FileBar in a batch, nothing with ``TQDM_DISABLE`` alone."""
    if os.environ.get("QREG_PROGRESS"):
        return FileBar(*args, **kwargs)
    # tqdm's notebook widget does not look at TQDM_DISABLE by itself, and would be saved with the notebook at 0%
    return tqdm(*args, disable=bool(os.environ.get("TQDM_DISABLE")), **kwargs)
