"""The theory's figures: the noise that quantization is, the penalty that it stands for, how sharp the minima are."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from qreg_utils.figures.style import is_quantizer, method_colours, ordered_methods
from qreg_utils.metrics import last_epoch, with_statistics
from qreg_utils.names import METHODS

NOISE_LABELS = {
    "quantization": "rounding the weights",
    "normal": "normal noise, same sigma",
    "uniform": "uniform noise, same step",
}


def noise_by_bits(noise: pd.DataFrame) -> Figure:
    """Quantization noise relative to the weights, one point for each layer and seed, after the last epoch.

    ``noise`` has dataset, model, variant, method, bits, seed, epoch, layer, sigma, weight_sigma. The dashed line falls
    by a factor of 2 a bit, as rounding noise does on a fixed range.
    """
    last = last_epoch(noise)
    relative = last["sigma"] / last["weight_sigma"]
    colours = method_colours(last["method"])
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    jitter = np.random.default_rng(0).uniform(-0.06, 0.06, len(last))
    for position, (method, colour) in enumerate(colours.items()):
        rows = last["method"] == method
        x = last["bits"][rows] + jitter[rows] + 0.25 * (position - (len(colours) - 1) / 2)
        axis.scatter(x, relative[rows], s=10, alpha=0.6, color=colour, label=METHODS.label(method))
    widths = np.array(sorted(last["bits"].unique()))
    start = relative[last["bits"] == widths[0]].median()
    axis.plot(widths, start * 2.0 ** -(widths - widths[0]), "k--", lw=1, label="half for each bit")
    axis.set(yscale="log", ylabel="sigma(w_q - w) / sigma(w)", xlabel="bits of the layer", xticks=widths)
    axis.legend(frameon=False)
    return figure


def measured_penalty(penalty: pd.DataFrame) -> Figure:
    """How much the squared error of one network changes under noise on its weights: predicted, and measured.

    ``penalty`` has the columns of ``theory.penalty.penalty_rows`` and seed. Left: against bits, with the line of a
    factor of 4 a bit, and with what the penalty drops (residual times curvature) added. Right: measured against
    predicted; on the diagonal the penalty is right. Filled: the loss rises; hollow: it falls by that much. Means over
    seeds, in the landscape of the training (``with_statistics``).
    """
    penalty = with_statistics(penalty)
    means = penalty.groupby(["noise", "bits"], as_index=False)[["predicted", "curvature", "measured"]].mean()
    figure, (by_bits, against) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    predicted = means[means["noise"] == "normal"].sort_values("bits")
    by_bits.plot(predicted["bits"], predicted["predicted"], color="black", lw=1.5, label="predicted penalty")
    both = predicted["predicted"] + predicted["curvature"]
    if both.notna().any():  # it is measured with frozen statistics only
        by_bits.plot(predicted["bits"], both, color="black", lw=1, ls=":", label="with residual times curvature")
    widest = predicted.iloc[-1]
    slope = widest["predicted"] * 4.0 ** (widest["bits"] - predicted["bits"])
    by_bits.plot(predicted["bits"], slope, color="grey", ls="--", lw=1, label="a factor of 4 a bit")
    marks = zip(NOISE_LABELS.items(), sns.color_palette("deep", 3), (40, 60, 15), strict=True)
    for (noise, label), colour, size in marks:  # the two kinds of noise lie on each other
        rows = means[means["noise"] == noise]
        fills = [colour if value > 0 else "none" for value in rows["measured"]]
        for axis, x in ((by_bits, rows["bits"]), (against, rows["predicted"])):
            axis.scatter(x, rows["measured"].abs(), size, facecolors=fills, edgecolors=[colour], label=label, zorder=3)
    limits = [means["predicted"].min() / 2, means["predicted"].max() * 2]
    against.plot(limits, limits, color="black", lw=1)
    against.set(xscale="log", yscale="log", xlabel="predicted", ylabel="measured")
    by_bits.set(yscale="log", xlabel="bits", ylabel="change of the squared error", xticks=sorted(set(means["bits"])))
    handles, labels = by_bits.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def sharpness_by_bits(sharpness: pd.DataFrame, size: float = 0.1) -> Figure:
    """Sharpness of one kind of network against bits: hollow at the unrounded weights, filled at the quantized ones.

    ``sharpness`` has method, weight_bits, activation_bits, seed and the columns of ``theory.sharpness.sharpness``; a
    panel each for the relative eigenvalue and trace of the Hessian, and the rise of the loss under noise of ``size``.
    Means over seeds, with bars from the smallest to the largest, on a logarithmic axis, which has no room for a trace
    or a rise below zero. FP32 and the controls have one set of weights. Squares: only weights are quantized.
    """
    panels = {
        ("relative_largest_eigenvalue", 0.0): "largest Hessian eigenvalue",
        ("relative_trace", 0.0): "trace of the Hessian",
        ("loss_rise", size): f"rise of the loss, noise {size:g}",
    }
    sharpness = with_statistics(sharpness)
    widths = sorted(sharpness["weight_bits"].unique(), reverse=True)
    colours = method_colours(sharpness["method"])
    series = _series(sharpness)
    figure, axes = plt.subplots(1, len(panels), figsize=(4.3 * len(panels) + 1.8, 3.9), layout="constrained")
    for ((measure, at), title), axis in zip(panels.items(), axes, strict=True):
        rows = sharpness[(sharpness["measure"] == measure) & (sharpness["size"] == at)]
        for key, values in rows.groupby(["method", "activation_bits", "weight_bits", "weights"])["value"]:
            method, activation_bits, weight_bits, weights = key
            position = series.index((method, activation_bits == 32))
            x = widths.index(weight_bits) + 0.1 * (position - (len(series) - 1) / 2) + 0.03 * (weights == "quantized")
            bars = [[values.mean() - values.min()], [values.max() - values.mean()]]
            fill = colours[method] if weights == "quantized" or not is_quantizer(method) else "white"
            style = {"fmt": _marker(*series[position]), "color": colours[method], "mfc": fill}
            axis.errorbar(x, values.mean(), bars, ms=6, **style)
        axis.set_xticks(range(len(widths)), ["FP32" if bits == 32 else f"{bits} bits" for bits in widths])
        axis.set(title=title, yscale="log")
    entries = {_series_label(*key): (colours[key[0]], _marker(*key), colours[key[0]]) for key in series}
    entries |= {"unrounded weights": ("black", "o", "white"), "quantized (or only) weights": ("black", "o", "black")}
    marks = [
        plt.Line2D([], [], ls="", marker=marker, color=colour, mfc=fill) for colour, marker, fill in entries.values()
    ]
    figure.legend(marks, entries, loc="outside right center", frameon=False)
    return figure


def _series(sharpness: pd.DataFrame) -> list[tuple[str, bool]]:
    """What has a mark at each width: methods in reading order, and whether only their weights are quantized."""
    weights_only = sharpness["activation_bits"] == 32
    found = set(zip(sharpness["method"], weights_only, strict=True))
    methods = ordered_methods(sharpness["method"])
    return sorted(found, key=lambda series: (methods.index(series[0]), series[1]))


def _series_label(method: str, weights_only: bool) -> str:
    return METHODS.label(method) + (", weights only" if weights_only and is_quantizer(method) else "")


def _marker(method: str, weights_only: bool) -> str:
    return "s" if weights_only and is_quantizer(method) else "o"
