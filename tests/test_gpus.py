"""Sharing GPUs, with stand-ins for them."""

import os
import threading

import pytest
import torch

from qreg_utils.batch import gpus
from qreg_utils.batch.display import read_progress
from qreg_utils.batch.gpus import GPUError, experiments_per_gpu, share_of_a_gpu, visible_gpus
from qreg_utils.progress import WAITING

USABLE = gpus.usable_gpus


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with two GPUs, as nvidia-smi lists them."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "QREG_PER_GPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpus, "usable_gpus", lambda: 8)  # torch here may know none
    return monkeypatch


def take(count):
    """The GPUs that as many experiments get that run at the same time."""
    taken = []

    def next_one():
        visible = os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # each experiment is a process of its own
        try:
            if len(taken) < count:
                with share_of_a_gpu():
                    taken.append(os.environ["CUDA_VISIBLE_DEVICES"])
                    next_one()
        finally:
            if visible is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = visible

    next_one()
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    return taken


def test_every_gpu_has_one_experiment_before_any_has_two(machine):
    machine.setenv("QREG_PER_GPU", "2")
    assert take(4) == ["0", "1", "0", "1"]


def test_another_experiment_waits_for_a_free_slot_and_says_so(machine, tmp_path):
    machine.setenv("CUDA_VISIBLE_DEVICES", "1")
    machine.setenv("QREG_PROGRESS", str(tmp_path / "progress.json"))
    got = threading.Event()

    def other():
        with share_of_a_gpu():
            got.set()

    with share_of_a_gpu():
        waiting = threading.Thread(target=other)
        waiting.start()
        assert not got.wait(1.5)
        assert read_progress(tmp_path)["stage"] == WAITING
    assert got.wait(5)
    waiting.join()
    assert read_progress(tmp_path)["stage"] == "starting"


def test_the_gpus_that_the_caller_allows(machine):
    assert visible_gpus() == ["0", "1"]
    machine.setenv("CUDA_VISIBLE_DEVICES", "1, GPU-5ebe9f43")
    assert visible_gpus() == ["1", "GPU-5ebe9f43"]
    for none in ("", "-1"):
        machine.setenv("CUDA_VISIBLE_DEVICES", none)
        assert visible_gpus() == []


@pytest.mark.parametrize("variable", ["NoDevFiles", "0,1", "GPU-5ebe9f43"])
def test_a_gpu_that_torch_cannot_use_does_not_count(machine, variable):
    machine.setattr(gpus, "usable_gpus", USABLE)
    if torch.cuda.is_available():
        pytest.skip("torch has a GPU here")
    assert visible_gpus() == []  # of two that nvidia-smi lists
    machine.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert visible_gpus() == []
    with share_of_a_gpu():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == variable


def test_only_as_many_gpus_count_as_torch_can_use(machine):
    machine.setattr(gpus, "usable_gpus", lambda: 1)
    assert visible_gpus() == ["0"]


def test_what_nvidia_smi_says_instead_of_numbers_is_no_gpu(machine, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho No devices were found\n")
    assert visible_gpus() == []


def test_without_gpus_nothing_happens(machine):
    machine.setenv("PATH", "/nonexistent")
    with share_of_a_gpu():
        assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_in_a_slurm_job_its_own_gpus_are_shared_by_its_own_experiments(machine):
    machine.setenv("SLURM_JOB_ID", "7")
    assert visible_gpus() == []  # whatever nvidia-smi says
    machine.setenv("CUDA_VISIBLE_DEVICES", "0")
    with share_of_a_gpu():
        machine.setenv("SLURM_JOB_ID", "8")  # whose GPU 0 is another one
        with share_of_a_gpu():
            assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
        got = threading.Event()
        machine.setenv("SLURM_JOB_ID", "7")

        def other():
            with share_of_a_gpu():
                got.set()

        waiting = threading.Thread(target=other)
        waiting.start()
        assert not got.wait(1.5)
    assert got.wait(5)
    waiting.join()


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "", "65", "²"])
def test_a_number_that_is_none(text):
    with pytest.raises(GPUError, match="PER_GPU"):
        experiments_per_gpu(text)


def test_numbers():
    assert experiments_per_gpu("1") == 1 and experiments_per_gpu("64") == 64
