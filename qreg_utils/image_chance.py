"""The share of chance that is the test images': the same for all seeds, so that no spread over seeds shows it.
No torch.

Seeds and images are crossed: with ``d_si`` the difference to FP32 of seed s on image i, the mean over S seeds and I
images has the variance ``v_s / S + v_i / I + v_si / (S I)`` of their three components. What the spread of the seeds'
means shows is the first and the last; ``image_variance`` is the second, by the analysis of variance of a two-way table
without replication (Searle, Casella & McCulloch 1992, *Variance Components*).
"""

import base64
from collections.abc import Mapping

import numpy as np
import pandas as pd

from qreg_utils.metrics import COMPARED_WITHIN, CONFIGURATION
from qreg_utils.names import CLEAN, PAPER_CORRUPTIONS

SEVERITIES = 5


def image_variance(images: pd.DataFrame) -> pd.DataFrame:
    """One row for each configuration with ``image_variance``: of its mean difference to FP32 in accuracy on corrupted
    images, in points squared, what the choice of test images adds.

    ``images`` is the content of images.csv files. Configurations with fewer than two seeds in common with FP32 are left
    out.
    """
    rows = []
    for network, measured in images.groupby(COMPARED_WITHIN):
        accuracy = {
            key: {seed: _accuracy_by_image(own) for seed, own in configuration.groupby("seed")}
            for key, configuration in measured.groupby(CONFIGURATION[len(COMPARED_WITHIN) :])
        }
        fp32 = next((by_seed for (method, *_), by_seed in accuracy.items() if method == "fp32"), {})
        for key, by_seed in accuracy.items():
            both = [seed for seed in by_seed if seed in fp32]
            if len(both) > 1 and key[0] != "fp32":
                difference = np.stack([by_seed[seed] - fp32[seed] for seed in both])
                rows.append((*network, *key, _component_of_images(difference)))
    return pd.DataFrame(rows, columns=[*CONFIGURATION, "image_variance"])


def of_a_difference(paired: pd.DataFrame, suffix: str) -> pd.DataFrame:
    """``paired`` with the ``image_variance`` of a difference of two settings, of which the second's columns have the
    ``suffix``: as if what the images do to the one were the opposite of what they do to the other, which errs on the
    safe side."""
    if f"image_variance{suffix}" not in paired:
        return paired
    both = np.sqrt(paired["image_variance"]) + np.sqrt(paired[f"image_variance{suffix}"])
    return paired.assign(image_variance=both**2)


def _component_of_images(difference: np.ndarray) -> float:
    """``v_i / I`` of a table (seeds, images), not below zero."""
    seeds, images = difference.shape
    by_seed, by_image = difference.mean(1, keepdims=True), difference.mean(0, keepdims=True)
    rest = difference - by_seed - by_image + difference.mean()
    residual = np.square(rest).sum() / ((seeds - 1) * (images - 1))
    return max(0.0, float(by_image.var(ddof=1) - residual / seeds) / images)


def _accuracy_by_image(rows: pd.DataFrame) -> np.ndarray:
    """Of one network: for each test image, over the paper's corruptions and their severities, in percent (I,)."""
    severities = dict(
        list(rows[rows["corruption"].isin([CLEAN, *PAPER_CORRUPTIONS])].groupby("corruption", sort=False))
    )
    count = int(severities.pop(CLEAN)["images"].iloc[0])
    right = [_of_corruption(own, position, count) for position, own in enumerate(severities.values(), start=1)]
    return 100 * np.mean(right, axis=0)


def _of_corruption(rows: pd.DataFrame, position: int, count: int) -> np.ndarray:
    """The mean over severities, each of which was measured on all images, or on those that it rotates to (I,)."""
    by_severity = {row.severity: _unpacked(row.correct, row.images) for row in rows.itertuples()}
    if all(len(right) == count for right in by_severity.values()):
        return np.mean(list(by_severity.values()), axis=0)
    return _from_rotation(by_severity, position, count)


def _from_rotation(by_severity: Mapping[int, np.ndarray], position: int, count: int) -> np.ndarray:
    """As in ``evaluation.rotating_severities``."""
    severity_of, right = 1 + (np.arange(count) + position) % SEVERITIES, np.zeros(count)
    for severity, values in by_severity.items():
        right[severity_of == severity] = values
    return right


def _unpacked(correct: str, count: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(base64.b64decode(correct), dtype=np.uint8), count=count).astype(float)
