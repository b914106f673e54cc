"""What a study measures along its axes: length of training, number of images, augmentation, start."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from qreg_utils.axes import AXES, Axis, along
from qreg_utils.figures.style import MARKERS, labelled_settings
from qreg_utils.metrics import (
    COMPARED_WITHIN,
    SETTING,
    cell_scores,
    corruption_average,
    improvement_by_seed,
    interval,
    overfitting_by_seed,
    paper_settings,
    relative_loss_improvement,
    sort_settings,
)
from qreg_utils.names import METHODS, PAPER_CORRUPTIONS

WITHOUT_AND_WITH = {"augment": ("without", "with"), "full_precision_epochs": ("scratch", "full precision")}


def gains_along_axes(metrics: pd.DataFrame, history: pd.DataFrame, budgets: pd.DataFrame) -> Figure | None:
    """``values_along_axes`` of the gain over FP32 on corrupted images, in accuracy and in log-likelihood, and of how
    far the loss on unseen images rises above its lowest, FP32's among them. ``budgets`` are of one data set and model.
    """
    accuracy = improvement_by_seed(corruption_average(cell_scores(metrics), PAPER_CORRUPTIONS))
    gains = {"gain in accuracy": accuracy, "gain in log-likelihood": relative_loss_improvement(metrics)}
    measured = {
        label: paper_settings(rows).query("method != 'fp32'").assign(value=lambda own: own["improvement"])
        for label, rows in gains.items()
    }
    measured["rise of the loss"] = paper_settings(overfitting_by_seed(history)).assign(value=lambda own: own["rise"])
    return values_along_axes(measured, budgets)


def values_along_axes(measured: Mapping[str, pd.DataFrame], budgets: pd.DataFrame) -> Figure | None:
    """A row of panels for each of ``measured``, named by its label, a column for each axis of the study, a line for
    each setting: means over seeds with 95% intervals. None for a study without an axis.

    Frames have the columns of ``metrics.CONFIGURATION``, seed and value; ``budgets`` are rows of ``axes.budgets``, of
    one data set and model.
    """
    points = {axis: rows for axis in AXES for rows in along(axis, budgets)}
    if not points:
        return None
    size = (3.1 * len(points) + 1.8, 2.5 * len(measured))
    figure, panels = plt.subplots(
        len(measured), len(points), figsize=size, squeeze=False, layout="constrained", sharex="col", sharey="row"
    )
    labels = {}
    for row, (label, frame) in zip(panels, measured.items(), strict=True):
        row[0].set_ylabel(label)
        for panel, (axis, rows) in zip(row, points.items(), strict=True):
            panel.axhline(0, color="black", lw=1)
            labels |= _lines(panel, frame.merge(rows[[*COMPARED_WITHIN, "at"]], on=COMPARED_WITHIN))
            ticks = WITHOUT_AND_WITH.get(axis.parameter) or [f"{value:,}" for value in rows[axis.parameter]]
            panel.set_xticks(rows["at"], ticks)
            panel.margins(x=0.15)
    for panel, axis in zip(panels[-1], points, strict=True):
        panel.set_xlabel(_axis_label(axis))
    figure.legend(labels.values(), labels.keys(), loc="outside right center", frameon=False, fontsize="small")
    return figure


def _axis_label(axis: Axis) -> str:
    return "starts from" if axis.parameter == "full_precision_epochs" else axis.label


def _lines(panel: plt.Axes, frame: pd.DataFrame) -> dict[str, object]:
    """A line for each setting; what the legend shows, by label."""
    frame = sort_settings(frame)
    widths, colours = labelled_settings(frame)
    drawn = {}
    for setting, rows in frame.groupby(SETTING, sort=False):
        width = widths[rows.index[0]]
        name = width if width == "FP32" else f"{METHODS.label(setting[0])}, {width}"
        values = rows.groupby("at")["value"]
        means, bounds = values.mean(), np.array([interval(own) for _, own in values])
        marker = MARKERS[METHODS.position(setting[0]) % len(MARKERS)]
        bars = np.abs(bounds.T - means.to_numpy())
        drawn[name] = panel.errorbar(
            means.index, means, bars, fmt=f"{marker}-", color=colours[width], ms=6, capsize=2, lw=1.2
        )
    return drawn
