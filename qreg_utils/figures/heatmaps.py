"""The paper's central figure: what quantization does under each corruption."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from qreg_utils.figures.style import labelled_settings
from qreg_utils.metrics import COMPARED_WITHIN, interval, network_label
from qreg_utils.names import CLEAN, CORRUPTIONS, METHODS, PAPER_CORRUPTIONS, task_of

COLUMNS = 5  # the paper's heatmaps: 4 rows of 5 cells
EMPTY_INTERVAL = 2e-4  # points: the seeds agree to the last image
ROW = [*COMPARED_WITHIN, "method"]  # of heatmaps


def heatmaps(deltas: pd.DataFrame, title: str) -> Figure:
    """Score minus FP32's, in points: a cell for the clean test set and for each corruption, the paper's 19 first.

    ``deltas`` has dataset, model, variant, method, weight_bits, activation_bits, cell, delta, and several rows a cell
    when there are several seeds. One row of heatmaps for each data set, model, variant and method, one column for each
    setting. Each data set has a scale of colours of its own. With several seeds, a number is bold when its 95% interval
    over seeds excludes zero.
    """
    setting, colours = labelled_settings(deltas)
    deltas = deltas.assign(setting=setting)
    cells = _cells(deltas)
    rows = list(deltas.groupby(ROW, sort=False).groups)
    panels = dict(list(deltas.groupby([*ROW, "setting"])))
    settings = list(reversed(colours))
    height = 0.725 * math.ceil(len(cells) / COLUMNS)
    size = (5.0 * len(settings), height * len(rows) + 0.7)
    figure, axes = plt.subplots(len(rows), len(settings), figsize=size, squeeze=False, layout="constrained")
    norms = {dataset: _norm(own) for dataset, own in deltas.groupby("dataset", sort=False)}
    for row, row_axes in zip(rows, axes, strict=True):
        dataset, model, variant, method = row
        for name, axis in zip(settings, row_axes, strict=True):
            _heatmap(axis, panels.get((*row, name), deltas.iloc[:0]), cells, norms[dataset])
        lines = (METHODS.label(method), network_label(dataset, model), variant)
        row_axes[0].set_ylabel("\n".join(filter(None, lines)), fontweight="bold")
    for name, axis in zip(settings, axes[0], strict=True):
        axis.set_title(name, fontweight="bold")
    for dataset, norm in norms.items():
        own = axes[[row[0] == dataset for row in rows]]
        mappable = plt.cm.ScalarMappable(norm=norm, cmap="RdBu")
        bar = figure.colorbar(mappable, ax=own, shrink=0.6 if len(own) > 1 else 0.9, extend="both", pad=0.01)
        bar.set_label(f"{_score_names(deltas[deltas['dataset'] == dataset])} minus FP32, points")
    figure.suptitle(title)
    return figure


def _norm(deltas: pd.DataFrame) -> TwoSlopeNorm:
    """Of the colours of a data set, whose effects may be many times as large as another's."""
    means = deltas.groupby([*ROW, "setting", "cell"])["delta"].mean()
    limit = max(1.0, float(np.nanpercentile(means.abs(), 95)))
    return TwoSlopeNorm(0, -limit, limit)


def _cells(deltas: pd.DataFrame) -> list[str]:
    """The clean test set, the paper's corruptions, and those that were measured besides."""
    extra = set(deltas["cell"]) - {CLEAN, *PAPER_CORRUPTIONS}
    return [CLEAN, *PAPER_CORRUPTIONS, *sorted(extra, key=lambda name: (CORRUPTIONS.position(name), name))]


def _score_names(rows: pd.DataFrame) -> str:
    """Such as "accuracy", or "accuracy or mAP50" of classifiers and detectors."""
    networks = rows[["model", "dataset"]].drop_duplicates().itertuples(index=False)
    names = {task_of(*network).score_label.removesuffix(", %") for network in networks}
    return " or ".join(sorted(names))


def _heatmap(axis: plt.Axes, panel: pd.DataFrame, cells: list[str], norm: TwoSlopeNorm) -> None:
    """A cell that was not measured is blank, one whose number is not known has a question mark."""
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    if panel.empty:
        axis.text(0.5, 0.5, "missing", ha="center", va="center", color="grey", transform=axis.transAxes)
        return
    values = {name: rows.to_numpy() for name, rows in panel.groupby("cell")["delta"]}
    rows = math.ceil(len(cells) / COLUMNS)
    means = np.full(rows * COLUMNS, np.nan)
    means[: len(cells)] = [values[name].mean() if name in values else np.nan for name in cells]
    axis.imshow(means.reshape(rows, COLUMNS), cmap="RdBu", norm=norm, aspect="auto")
    for position, name in enumerate(cells):
        if name in values:
            _label_cell(axis, *divmod(position, COLUMNS), name, values[name], norm)


def _label_cell(axis: plt.Axes, row: int, column: int, name: str, values: np.ndarray, norm: TwoSlopeNorm) -> None:
    mean, (low, high) = values.mean(), interval(values)
    colour = "white" if abs(mean) > 0.6 * norm.vmax else "black"
    decided = (low > 0 or high < 0) and high - low > EMPTY_INTERVAL  # NaN, of a single seed, is neither
    number = "?" if np.isnan(mean) else f"{round(mean, 1) + 0.0:+.1f}"  # + 0.0: no -0.0
    weight = "bold" if decided else "normal"
    axis.text(column, row - 0.13, number, ha="center", va="center", color=colour, fontsize=11, fontweight=weight)
    label = name.replace("_", " ") if name == CLEAN else CORRUPTIONS.label(name)
    axis.text(column, row + 0.27, label, ha="center", va="center", color=colour, fontsize=6)
