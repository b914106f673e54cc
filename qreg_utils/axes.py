"""Axes along which a regularizer's gain changes: how long and on how much is trained, with what beside it, from where.

A study has an axis where variants of a network differ in that parameter alone: budget.yaml has all four. The effect is
the slope of the improvement along the axis, for each seed. No torch.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from qreg_utils.metrics import COMPARED_WITHIN, PAIRED, SETTING
from qreg_utils.names import DATASETS

NETWORK = ["dataset", "model"]


@dataclass(frozen=True)
class Axis:
    """A parameter of an experiment, and ``at``, where on the axis a value of it lies.

    A step is a doubling of what is counted, and of what is not the way from without to with it.
    """

    parameter: str
    label: str
    step: str
    at: Callable[[Any], float]


AXES = (
    Axis("epochs", "epochs", "with every doubling of the epochs", math.log2),
    Axis("train_images", "training images", "with every doubling of the training images", math.log2),
    Axis("augment", "augmentation", "with augmentation minus without", float),
    Axis(
        "full_precision_epochs",
        "epochs in full precision first",
        "started from full precision minus from scratch",
        lambda epochs: float(epochs > 0),
    ),
)


def budgets(experiments: Iterable[Any]) -> pd.DataFrame:
    """One row for each data set, model and variant of ``experiments``, which have what they are compared on in common:
    the parameters that are AXES. Detectors, whose recipe has not all of them, are left out."""
    rows = {}
    for experiment in experiments:
        found = {axis.parameter: getattr(experiment, axis.parameter, None) for axis in AXES}
        found["train_images"] = found["train_images"] or DATASETS[experiment.dataset].train_images
        if None not in found.values():
            rows[experiment.dataset, experiment.model, experiment.variant or ""] = found
    parameters = [axis.parameter for axis in AXES]
    return pd.DataFrame(
        [(*network, *found.values()) for network, found in rows.items()], columns=[*COMPARED_WITHIN, *parameters]
    )


def along(axis: Axis, budgets: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Rows of ``budgets`` that differ in the axis' parameter alone, two or more, with ``at`` and in its order.

    Of several values of another parameter the commonest is taken: the study's base. Where variants share a place on the
    axis it is not known which of them belongs there, and the network is left out.
    """
    others = [other.parameter for other in AXES if other is not axis]
    for _, network in budgets.groupby(NETWORK, sort=False):
        base = network[others].mode().iloc[0]
        rows = network[(network[others] == base).all(axis=1)]
        rows = rows.assign(at=rows[axis.parameter].map(axis.at)).sort_values("at")
        if len(rows) > 1 and rows["at"].is_unique:
            yield rows


def slopes(axis: Axis, budgets: pd.DataFrame, improvement: pd.DataFrame) -> pd.DataFrame:
    """One row for each network, setting and seed: ``value`` is the change of its ``improvement`` with a step along the
    axis, by least squares; ``detail`` says from where to where. Of seeds that are there at every point.

    An ``image_variance`` is that of the slope, with the points' taken as independent.
    """
    found = [row for rows in along(axis, budgets) for row in _slopes_of(axis, rows, improvement)]
    columns = [*PAIRED, *SETTING, "detail", "value"]
    return pd.DataFrame(found, columns=[*columns, *(["image_variance"] if "image_variance" in improvement else [])])


def _slopes_of(axis: Axis, points: pd.DataFrame, improvement: pd.DataFrame) -> Iterator[tuple]:
    rows = improvement[improvement["method"] != "fp32"].merge(points[[*COMPARED_WITHIN, "at"]], on=COMPARED_WITHIN)
    at = points["at"].to_numpy(dtype=float)
    weights = (at - at.mean()) / np.square(at - at.mean()).sum()  # of each point in the slope
    weight_at = dict(zip(at, weights, strict=True))
    for (*network, method, weight_bits, activation_bits, seed), own in rows.groupby([*NETWORK, *SETTING, "seed"]):
        if len(own) < len(points):
            continue
        own = own.assign(weight=own["at"].map(weight_at))
        key = (*network, "", seed, method, weight_bits, activation_bits, _span(axis, points))
        value = (own["weight"] * own["improvement"]).sum()
        of_images = [(own["weight"] ** 2 * own["image_variance"]).sum()] if "image_variance" in own else []
        yield (*key, value, *of_images)


def _span(axis: Axis, points: pd.DataFrame) -> str:
    first, last = (points[axis.parameter].iloc[end] for end in (0, -1))
    return "" if axis.at is float else f"{first:,} to {last:,} {axis.label}"
