"""How the experiments of a machine share its GPUs."""

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from qreg_utils.progress import WAITING, report_stage


class GPUError(ValueError):
    """The number of experiments on one GPU is not a number."""


def experiments_per_gpu(text: str) -> int:
    """The number that ``QREG_PER_GPU`` or ``make study PER_GPU=`` gives; raises GPUError."""
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise GPUError(f"PER_GPU: {text!r} is not allowed: how many experiments share one GPU, from 1 to 64")
    return int(text)


@contextmanager
def share_of_a_gpu() -> Iterator[None]:
    """Wait for a free slot on one of this machine's GPUs, and let the notebook see only that GPU.

    Each GPU has ``QREG_PER_GPU`` slots (1), for all batches of a user together, or all of a SLURM job. Nothing happens
    where there are no GPUs.
    """
    gpus, job = visible_gpus(), os.environ.get("SLURM_JOB_ID")
    if not gpus:
        yield
        return
    slots = experiments_per_gpu(os.environ.get("QREG_PER_GPU", "1"))
    # two SLURM jobs may each call their own GPU "0"
    folder = Path(tempfile.gettempdir(), f"qreg-gpus-{os.getuid()}" + (f"-slurm-{job}" if job else ""))
    folder.mkdir(exist_ok=True)
    # the first slot of every GPU before the second of any
    locks = [(gpu, FileLock(folder / f"{gpu}-{slot}.lock")) for slot in range(slots) for gpu in gpus]
    gpu, lock = _first_free(locks)
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    try:
        yield
    finally:
        lock.release()


def visible_gpus() -> list[str]:
    """The GPUs to use, of which torch can: those of ``CUDA_VISIBLE_DEVICES``, which SLURM sets; elsewhere all that
    nvidia-smi lists."""
    named = _named_gpus()
    return named[: usable_gpus()] if named else []


def _named_gpus() -> list[str]:
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        named = [name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
        return [name for name in named if name and name != "-1"]
    if "SLURM_JOB_ID" in os.environ:
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line.strip() for line in lines if line.strip().isdecimal()]  # and not "No devices were found"


def usable_gpus() -> int:
    """How many GPUs torch can use: CUDA counts up to the first name that it does not know. Asked in a process of its
    own, because torch takes seconds to import and a process that has looked at the GPUs cannot choose one."""
    code = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 else 0


def _first_free(locks: list[tuple[str, FileLock]]) -> tuple[str, FileLock]:
    for attempt in itertools.count():
        for gpu, lock in locks:
            with suppress(Timeout):
                lock.acquire(timeout=0)
                report_stage("starting")
                return gpu, lock
        if attempt == 0:
            report_stage(WAITING)
        time.sleep(1)
