import os
from dataclasses import replace

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch

from qreg_utils.datasets import load_dataset

torch.set_num_threads(1)


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
