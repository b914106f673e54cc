"""An experiment that runs in a batch: alone in its folder, seen from outside, and ended when its batch is killed."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from qreg_utils.atomic import atomic_write
from qreg_utils.progress import FAILED, report_stage

HEARTBEAT_SECONDS = 2.0  # between two checks that the batch lives, and two signs of life
BATCH_GONE = 75  # exit status (EX_TEMPFAIL)
# Progress bars and sliders are for people, figures belong on the page, whatever the caller's matplotlib settings. The
# malloc settings (glibc's) keep the pages of freed tensors instead of returning them to the system after every layer:
# training on a CPU is 10 to 20% faster.
KERNEL_SETTINGS = {
    "TQDM_DISABLE": "1",
    "QREG_STATIC": "1",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "1073741824",
}


@contextmanager
def exclusive_run(folder: Path, batch: int) -> Iterator[None]:
    """Run as the only writer to an experiment's ``folder`` for the process ``batch``; wait while there is another.

    ``progress.json`` in the folder says what is done, and is touched as a sign of life; it goes when the run ends.
    ``QREG_PROGRESS`` names it for the notebook's bars. ``failed.txt`` says in one line why a run has failed. When
    ``batch`` is killed, this process ends itself at once, and the notebook's kernel with it.
    """
    progress, lock = folder / "progress.json", FileLock(folder / ".lock")
    ended = threading.Event()
    threading.Thread(target=_follow, args=(batch, progress, lock, ended), daemon=True).start()
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another run that writes to {folder}: {_text(progress)}", flush=True)
        lock.acquire()
    try:
        (folder / FAILED).unlink(missing_ok=True)
        os.environ["QREG_PROGRESS"] = str(progress)
        report_stage("starting")
        yield
    except Exception as error:
        record_failure(folder, f"{type(error).__name__}: {error}")
        raise
    finally:
        ended.set()
        progress.unlink(missing_ok=True)
        lock.release()


def record_failure(folder: Path, error: str) -> None:
    """Say in one line why a run has failed; a full disk may be what has failed."""
    with suppress(OSError), atomic_write(folder / FAILED) as part:
        part.write_text(" ".join(error.split()) + "\n", encoding="utf-8")


def _follow(batch: int, progress: Path, lock: FileLock, ended: threading.Event) -> None:
    """Show signs of life while the batch lives, and end with it."""
    while not ended.wait(HEARTBEAT_SECONDS):
        if not _alive(batch):
            print("the batch was killed: this run ends", file=sys.stderr, flush=True)
            os._exit(BATCH_GONE)  # the kernel notices that its parent is gone
        if lock.is_locked:
            with suppress(OSError):
                os.utime(progress)


def _alive(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return "not known which"
