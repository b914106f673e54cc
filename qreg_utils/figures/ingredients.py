"""Quantization taken apart: what each ingredient gains, and at what training loss."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from qreg_utils.figures.style import MARKERS
from qreg_utils.ingredients import sort_ingredients
from qreg_utils.metrics import SETTING, interval, overfitting_by_seed


def gain_by_ingredient(gains: dict[str, pd.DataFrame]) -> Figure:
    """Gain over FP32 against bits, a line for each ingredient, with 95% intervals over seeds; a panel for each of
    ``gains``, named by its label.

    A frame has the columns of ``ingredients.with_ingredients`` and seed, improvement, and is of one network. What has
    no width, as ordinary regularizers, stands at the left.
    """
    figure, axes = plt.subplots(
        1, len(gains), figsize=(5.4 * len(gains) + 2.2, 4.4), squeeze=False, layout="constrained"
    )
    gains = {label: sort_ingredients(frame) for label, frame in gains.items()}
    names = _names(next(iter(gains.values())))
    for (label, frame), axis in zip(gains.items(), axes[0], strict=True):
        widths = sorted(frame.loc[frame["ingredient"] != "", "width"].unique(), reverse=True)
        axis.axhline(0, color="black", lw=1)
        for position, (name, (colour, marker)) in enumerate(names.items()):
            rows = frame[frame["ingredient"] == name]
            means = rows.groupby("width")["improvement"].mean().sort_index(ascending=False)
            bounds = np.array([interval(rows.loc[rows["width"] == bits, "improvement"]) for bits in means.index])
            x = np.array([widths.index(bits) for bits in means.index]) + 0.055 * (position - len(names) / 2)
            bars = np.abs(bounds.T - means.to_numpy())
            axis.errorbar(x, means, bars, fmt=f"{marker}-", color=colour, ms=6, capsize=2, lw=1, label=name)
        axis.set_xticks(range(len(widths)), ["no rounding" if bits == 32 else f"{bits:.0f} bits" for bits in widths])
        axis.set(title=label, ylabel="gain over FP32")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize="small")
    return figure


def _names(rows: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """The colour and the marker of each ingredient, in the order of the rows."""
    names = [name for name in rows["ingredient"].unique() if name]
    colours = sns.color_palette("colorblind", 10).as_hex()
    return {name: (colours[i % 10], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}


def gap_against_training_loss(history: pd.DataFrame) -> Figure:
    """Validation minus training loss against training loss after the last epoch: a mean over seeds for each setting,
    with bars from the smallest to the largest.

    ``history`` has the columns of ``ingredients.with_ingredients``, and is of one network. A line joins FP32 and the
    ordinary regularizers: what moves along it regularizes as they do.
    """
    history = sort_ingredients(history)
    by_seed = overfitting_by_seed(history)
    by_seed = by_seed.merge(history[[*SETTING, "ingredient", "width"]].drop_duplicates(), on=SETTING)
    figure, axis = plt.subplots(figsize=(8.6, 4.8), layout="constrained")
    names, ordinary = _names(history), []
    for (name, bits), rows in by_seed.groupby(["ingredient", "width"], sort=False):
        colour, marker = names.get(name, ("black", "o"))
        x, y = rows["train"].mean(), rows["gap"].mean()
        spread = [_bars(rows[column]) for column in ("gap", "train")]
        axis.errorbar(x, y, *spread, fmt=marker, color=colour, ms=7, lw=1)
        axis.annotate(
            "FP32" if not name else f"{bits:.0f}" if bits < 32 else "",
            (x, y),
            (5, 5),
            textcoords="offset points",
            fontsize=8,
        )
        if bits == 32:
            ordinary.append((x, y))
    if len(ordinary) > 1:
        axis.plot(*zip(*sorted(ordinary), strict=True), color="grey", ls="--", lw=1, zorder=0)
    axis.set(xscale="log", xlabel="training loss", ylabel="validation minus training loss")
    marks = [
        plt.Line2D([], [], ls="", marker=marker, color=colour, label=name) for name, (colour, marker) in names.items()
    ]
    figure.legend(handles=marks, loc="outside right center", frameon=False, fontsize="small")
    return figure


def _bars(values: pd.Series) -> np.ndarray:
    """From the smallest to the largest, (2, 1): never below zero, whatever the mean's last digit."""
    mean = values.mean()
    return np.array([[mean - values.min()], [values.max() - mean]]).clip(min=0)
