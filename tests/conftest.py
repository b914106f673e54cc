import os
import re
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("MPLBACKEND", "agg")
if "QREG_SLURM" not in os.environ:  # see bin/scontrol
    os.environ["PATH"] = f"{Path(__file__).parent / 'bin'}{os.pathsep}{os.environ['PATH']}"

import pytest
import torch

from qreg_utils.batch.gpus import visible_gpus
from qreg_utils.batch.prepared import start_server
from qreg_utils.batch.running import KERNEL_SETTINGS
from qreg_utils.datasets import load_dataset

torch.set_num_threads(1)


def pytest_configure(config):
    """All tests' notebooks and batches are forked from one server, which has imported what they need."""
    slow = "not slow" not in config.getoption("markexpr")
    if slow and config.getoption("numprocesses", None) and not visible_gpus():  # in the process that starts the workers
        config.prepared = start_server(KERNEL_SETTINGS)


@pytest.fixture(scope="session")
def tiny():
    """96 training and 48 test digits."""
    data = load_dataset("digits")
    return replace(
        data,
        train_images=data.train_images[:96],
        train_labels=data.train_labels[:96],
        test_images=data.test_images[:48],
        test_labels=data.test_labels[:48],
    )


# Test files that train, execute notebooks or try hundreds of examples: not part of `make test-fast`.
SLOW_FILES = (
    "alone|batch|benchmarks|blocks|book|controls|corrupted_images|corruptions|datasets|detection|detection_batch|detection_datasets|"
    "evaluation|extending|faults|gpus|models|noise|papermill_engine|penalty|precision|prepared|quantize|quantize_silent|replicate|"
    "results|running|seeds|sharpness|slurm|study_fuzz|summarise|summary|training|verify|walkthrough_quantizers|walkthroughs"
)
# Single tests that start programs or train
SLOW_TESTS = "is_digested|without_torch|no_torch|every_detection_data_set_can_be_loaded"


@pytest.hookimpl(optionalhook=True)  # where xdist is
def pytest_xdist_auto_num_workers(config):
    """One more than cores: half of the time a test waits for the programs that it has started."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items):
    """What executes whole notebooks, or compiles, goes first: no worker is left with it at the end."""
    items.sort(
        key=lambda item: not re.search("batch|blocks|book|faults|walkthrough|extending|test_training", item.path.name)
    )
    for item in items:
        if re.fullmatch(f"test_({SLOW_FILES})", item.path.stem) or re.search(SLOW_TESTS, item.name):
            item.add_marker(pytest.mark.slow)
