"""Scores: against bits, corruptions and severities."""

from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from qreg_utils.figures.style import (
    MARKERS,
    labelled_settings,
    method_colours,
    panels_by_method,
    setting_legend,
)
from qreg_utils.metrics import COMPARED_WITHIN, network_label, scores
from qreg_utils.names import CLEAN, CORRUPTIONS, METHODS, PAPER_CORRUPTIONS, SCORES

IMPROVEMENT = "relative_error_improvement"


def improvement_by_bits(table: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """Relative error improvement against bits: ours with 95% intervals over seeds, the published values at the right.

    ``table`` is ``metrics.results_table``; ``published`` has dataset, model, method, bits, relative_error_improvement.
    The colour is the method's, the marker the network's (data set, model and variant).
    """
    ours, theirs = (rows[rows["method"] != "fp32"] for rows in (table, published))
    order = sorted({*ours["weight_bits"], *theirs["bits"]})
    groups = list(ours.groupby([*COMPARED_WITHIN, "method"], sort=False))
    colours = method_colours(ours["method"])
    markers = dict(zip(dict.fromkeys(key[:-1] for key, _ in groups), cycle(MARKERS), strict=False))
    figure, axis = plt.subplots(figsize=(8.6, 4), layout="constrained")
    axis.axhline(0, color="black", lw=1)
    step = min(0.06, 0.5 / max(len(groups), 1))
    entries = []
    for position, ((*network, method), rows) in enumerate(groups):
        x = np.array([order.index(bits) for bits in rows["weight_bits"]]) + step * (position - len(groups) / 2)
        style = {"fmt": markers[tuple(network)], "color": colours[method], "capsize": 3}
        label = f"{METHODS.label(method)}, {network_label(*network)}"
        entries.append(axis.errorbar(x, rows[IMPROVEMENT], _error_bars(rows, IMPROVEMENT), label=label, **style))
    for marker, ((dataset, model, method), rows) in zip(
        cycle("sD^"), theirs.groupby(["dataset", "model", "method"], sort=False), strict=False
    ):
        x = np.array([order.index(bits) for bits in rows["bits"]]) + 0.3
        label = f"published: {METHODS.label(method)}, {network_label(dataset, model)}"
        entries += axis.plot(x, rows[IMPROVEMENT], marker, color="grey", mfc="none", label=label)
    axis.set_xticks(range(len(order)), [f"{bits} bits" for bits in order])
    axis.set(ylabel="relative error improvement", xlim=(-0.5, len(order) - 0.4))
    figure.legend(handles=entries, loc="outside right center", frameon=False, fontsize="small")
    return figure


def _error_bars(table: pd.DataFrame, name: str) -> np.ndarray:
    """How far the interval reaches below and above the mean, (2, rows)."""
    return np.array([table[name] - table[f"{name}_low"], table[f"{name}_high"] - table[name]])


def score_by_corruption(metrics: pd.DataFrame) -> Figure:
    """One experiment: accuracy or mAP50 for each corruption and severity, averaged over seeds."""
    score = scores(metrics)
    clean = score.loc[score["corruption"] == CLEAN, "value"].mean()
    corrupted = score[score["corruption"] != CLEAN]
    order = corrupted.groupby("corruption")["value"].mean().sort_values().index
    figure, axis = plt.subplots(figsize=(7, 5.4), layout="constrained")
    severities = sorted(corrupted["severity"].unique())
    sns.pointplot(
        corrupted,
        x="value",
        y="corruption",
        hue="severity",
        order=order,
        palette=sns.color_palette("flare", len(severities)),
        linestyle="none",
        errorbar=None,
        ax=axis,
    )
    axis.axvline(clean, color="black", ls="--", lw=1, label="clean")
    axis.set(xlabel=SCORES[score["metric"].iloc[0]], ylabel="")
    axis.set_yticks(range(len(order)), map(CORRUPTIONS.label, order))
    axis.legend(title="severity", frameon=False)
    return figure


def score_by_severity(metrics: pd.DataFrame) -> Figure:
    """Mean score over the paper's 19 corruptions against severity, a line for each setting, a panel for each method.

    ``metrics`` is of one network. Corruptions that were measured besides are not in the mean.
    """
    score = scores(metrics)
    score = score[score["corruption"].isin([CLEAN, *PAPER_CORRUPTIONS])]
    setting, colours = labelled_settings(score)
    keys = ["method", "setting", "severity"]
    lines = score.assign(setting=setting).groupby([*keys, "seed"])["value"].mean().groupby(keys).mean().reset_index()
    figure, panels = panels_by_method(lines["method"], width=3.8, height=3.4)
    for method, axis in panels.items():
        for name, line in lines[lines["method"].isin([method, "fp32"])].groupby("setting"):
            axis.plot(line["severity"], line["value"], "o-", ms=4, color=colours[name])
        axis.set(xlabel="severity (0: clean)", xticks=sorted(lines["severity"].unique()))
    figure.axes[0].set_ylabel(SCORES[score["metric"].iloc[0]])
    setting_legend(figure, colours)
    return figure


def accuracy_grid(metrics: pd.DataFrame) -> Figure:
    """Accuracy for each corruption (rows, the hardest first) and severity (columns), averaged over seeds."""
    accuracy = metrics[(metrics["metric"] == "accuracy") & (metrics["corruption"] != CLEAN)]
    grid = accuracy.pivot_table(index="corruption", columns="severity", values="value")
    grid = grid.loc[grid.mean(axis=1).sort_values().index]
    grid.index = grid.index.map(CORRUPTIONS.label)
    figure, axis = plt.subplots(figsize=(5.4, 6), layout="constrained")
    sns.heatmap(grid, annot=True, fmt=".0f", cmap="viridis", cbar_kws={"label": "accuracy, %"}, ax=axis)
    axis.set(ylabel="")
    return figure
