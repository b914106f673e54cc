"""Gain against the size of the noise on the weights."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from qreg_utils.figures.style import MARKERS, method_colours
from qreg_utils.metrics import (
    cell_scores,
    corruption_average,
    improvement_by_seed,
    interval,
    relative_loss_improvement,
)
from qreg_utils.names import METHODS, PAPER_CORRUPTIONS
from qreg_utils.noise_curve import NOISE, points


def gains_along_the_noise(metrics: pd.DataFrame, noise: pd.DataFrame) -> Figure | None:
    """``gain_by_noise`` in accuracy and in log-likelihood; ``metrics`` and ``noise`` are of one network. None where
    training noise on the weights alone has not two sizes, which make a curve."""
    averages = corruption_average(cell_scores(metrics), PAPER_CORRUPTIONS)
    gains = {"accuracy": improvement_by_seed(averages), "log-likelihood": relative_loss_improvement(metrics)}
    curves = {f"{measure}, corrupted": points(gain, noise) for measure, gain in gains.items()}
    accuracy = next(iter(curves.values()))
    sizes = accuracy.loc[accuracy["method"] == NOISE, "weight_bits"].nunique()
    return gain_by_noise(curves) if sizes > 1 else None


def gain_by_noise(gains: Mapping[str, pd.DataFrame]) -> Figure:
    """Gain against relative noise, a line for each method, with 95% intervals over seeds and the bits beside each
    point; a panel for each of ``gains``, named by its label.

    Frames are rows of ``noise_curve.points``, of one network.
    """
    figure, panels = plt.subplots(
        1, len(gains), figsize=(5.2 * len(gains) + 1.8, 4.2), squeeze=False, layout="constrained"
    )
    colours = method_colours(name for frame in gains.values() for name in frame["method"])
    markers = dict(zip(colours, MARKERS, strict=False))
    for panel, (label, frame) in zip(panels[0], gains.items(), strict=True):
        panel.axhline(0, color="black", lw=1)
        for method, colour in colours.items():
            _line(panel, frame[frame["method"] == method], colour, markers[method], METHODS.label(method))
        panel.set(title=label, xscale="log", xlabel="noise relative to the weights", ylabel="gain over no rounding")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter("")
    entries = panels[0, 0].get_legend_handles_labels()
    figure.legend(*entries, loc="outside right center", frameon=False, fontsize="small")
    return figure


def _line(panel: plt.Axes, rows: pd.DataFrame, colour: str, marker: str, label: str) -> None:
    groups = rows.groupby("weight_bits")
    means = groups[["relative", "gain"]].mean().sort_values("relative")
    bounds = np.array([interval(groups["gain"].get_group(bits)) for bits in means.index])
    bars = np.abs(bounds.T - means["gain"].to_numpy())
    panel.errorbar(
        means["relative"], means["gain"], bars, fmt=f"{marker}-", color=colour, ms=6, capsize=2, lw=1.2, label=label
    )
    for bits, (relative, gain) in means.iterrows():
        panel.annotate(str(bits), (relative, gain), (4, 5), textcoords="offset points", fontsize=8, color=colour)
