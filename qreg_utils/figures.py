"""The figures, one function each. Every function takes tidy rows and returns a matplotlib figure."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from qreg_utils.metrics import CLEAN, METHOD_LABELS, confidence_interval

sns.set_theme(
    style="ticks",
    context="notebook",
    rc={"figure.dpi": 110, "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "qreg"},
)

BITS_PALETTE = {32: "#444444", 8: "#1b7f5c", 4: "#2b6cb0", 2: "#c05621"}
COLUMNS = 5  # the paper's heatmaps: 4 rows of 5 cells


def heatmaps(deltas: pd.DataFrame, cells: tuple[str, ...], title: str) -> Figure:
    """The paper's central figure: accuracy minus FP32's, in points, for the clean test set and 19 corruptions.

    ``deltas`` has dataset, model, method, weight_bits, cell, delta, and several rows a cell when there are several
    seeds. One row of heatmaps for each data set, model and method, one column for each width. With several seeds, a
    number is bold when its 95% interval over seeds excludes zero.
    """
    rows = list(deltas.groupby(["dataset", "model", "method"], sort=False).groups)
    widths = sorted(deltas["weight_bits"].unique())
    figure, axes = plt.subplots(
        len(rows), len(widths), figsize=(5.0 * len(widths), 2.9 * len(rows) + 0.7), squeeze=False, layout="constrained"
    )
    means = deltas.groupby(["dataset", "model", "method", "weight_bits", "cell"])["delta"].mean()
    limit = max(1.0, float(np.nanpercentile(means.abs(), 95)))
    norm = TwoSlopeNorm(0, -limit, limit)
    for row, row_axes in zip(rows, axes, strict=True):
        for bits, axis in zip(widths, row_axes, strict=True):
            chosen = (deltas[["dataset", "model", "method"]] == row).all(axis=1) & (deltas["weight_bits"] == bits)
            _heatmap(axis, deltas[chosen], cells, norm)
            if axis in axes[0]:
                axis.set_title(f"{bits} bits", fontweight="bold")
        row_axes[0].set_ylabel(f"{METHOD_LABELS[row[2]]}\n{row[1]}, {row[0]}", fontweight="bold")
    colours = plt.cm.ScalarMappable(norm=norm, cmap="RdBu")
    bar = figure.colorbar(colours, ax=axes, shrink=0.6 if len(rows) > 1 else 0.9, extend="both", pad=0.01)
    bar.set_label("accuracy minus FP32, points")
    figure.suptitle(title)
    return figure


def _heatmap(axis: plt.Axes, panel: pd.DataFrame, cells: tuple[str, ...], norm: TwoSlopeNorm) -> None:
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    if panel.empty:
        axis.text(0.5, 0.5, "missing", ha="center", va="center", color="grey", transform=axis.transAxes)
        return
    values = panel.groupby("cell")["delta"]
    means = values.mean().reindex(cells).to_numpy().reshape(-1, COLUMNS)
    intervals = values.apply(confidence_interval).reindex(cells).to_numpy().reshape(-1, COLUMNS)
    axis.imshow(means, cmap="RdBu", norm=norm, aspect="auto")
    for (i, j), mean in np.ndenumerate(means):
        colour = "white" if abs(mean) > 0.6 * norm.vmax else "black"
        weight = "bold" if abs(mean) > intervals[i, j] else "normal"  # never bold without an interval
        number = "?" if np.isnan(mean) else f"{round(mean, 1) + 0.0:+.1f}"  # + 0.0: no -0.0
        axis.text(j, i - 0.13, number, ha="center", va="center", color=colour, fontsize=11, fontweight=weight)
        name = cells[i * COLUMNS + j].replace("_", " ")
        axis.text(j, i + 0.27, name, ha="center", va="center", color=colour, fontsize=6)


def training_curves(history: pd.DataFrame) -> Figure:
    """Loss on training and on unseen images after each epoch, averaged over seeds: one panel for each method.

    ``history`` has method, weight_bits, seed, epoch, split, loss. FP32 is repeated in every panel for comparison.
    """
    methods = [name for name in METHOD_LABELS if name in set(history["method"])]
    panels = [name for name in methods if name != "fp32"] or methods
    curves = history.groupby(["method", "weight_bits", "split", "epoch"])["loss"].agg(["mean", "min", "max"])
    curves = curves.reset_index()
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels) + 1.6, 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for method, axis in zip(panels, axes[0], strict=True):
        shown = curves[curves["method"].isin([method, "fp32"])]
        for (bits, split), curve in shown.groupby(["weight_bits", "split"]):
            epoch, colour = curve["epoch"] + 1, BITS_PALETTE.get(bits, "purple")
            axis.plot(epoch, curve["mean"], ".-" if split == "val" else ".:", color=colour)
            if split == "val":
                axis.fill_between(epoch, curve["min"], curve["max"], color=colour, alpha=0.12, lw=0)
        axis.set(title=METHOD_LABELS[method], xlabel="epoch", yscale="log")
    axes[0, 0].set_ylabel("cross-entropy")
    handles = [plt.Line2D([], [], color=BITS_PALETTE.get(bits, "purple")) for bits in _widths(history)]
    labels = ["FP32" if bits == 32 else f"{bits} bits" for bits in _widths(history)]
    handles += [plt.Line2D([], [], color="black", ls=style) for style in ("-", ":")]
    figure.legend(handles, [*labels, "validation", "training"], loc="outside right center", frameon=False)
    return figure


def _widths(frame: pd.DataFrame) -> list[int]:
    return sorted(frame["weight_bits"].unique(), reverse=True)


def noise_by_bits(noise: pd.DataFrame) -> Figure:
    """Quantization noise relative to the weights, one point for each layer and seed, after the last epoch.

    ``noise`` has method, bits, seed, epoch, layer, sigma, weight_sigma. The dashed line falls by a factor of 2 a bit,
    as rounding noise does on a fixed range.
    """
    last = noise[noise["epoch"] == noise["epoch"].max()].copy()
    last["relative noise"] = last["sigma"] / last["weight_sigma"]
    methods = [name for name in METHOD_LABELS if name in set(last["method"])]
    last["method"] = last["method"].map(METHOD_LABELS)
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    order = sorted(last["bits"].unique())
    names = [METHOD_LABELS[name] for name in methods]
    columns = {"x": "bits", "y": "relative noise", "hue": "method", "hue_order": names, "order": order}
    sns.stripplot(last, **columns, dodge=True, size=3.5, alpha=0.6, ax=axis)
    start = last.loc[last["bits"] == order[0], "relative noise"].median()
    guide = [start * 2.0 ** -(bits - order[0]) for bits in order]
    axis.plot(range(len(order)), guide, "k--", lw=1, label="half for each bit")
    axis.set(yscale="log", ylabel="sigma(w_q - w) / sigma(w)", xlabel="bits of the layer")
    axis.legend(frameon=False, title=None)
    return figure


def improvement_by_bits(table: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """Relative error improvement against bits: ours with 95% intervals over seeds, the published values beside them.

    ``table`` is ``metrics.results_table``; ``published`` has dataset, model, method, bits, relative_error_improvement.
    """
    ours = table[table["method"] != "fp32"]
    groups = list(ours.groupby(["dataset", "model", "method"], sort=False))
    theirs = list(published[published["method"] != "fp32"].groupby(["dataset", "model", "method"], sort=False))
    order = sorted({*ours["weight_bits"], *published.loc[published["method"] != "fp32", "bits"]})
    figure, axis = plt.subplots(figsize=(8.6, 4), layout="constrained")
    axis.axhline(0, color="black", lw=1)
    colours = sns.color_palette("deep", len(groups))
    for position, (((dataset, model, method), rows), colour) in enumerate(zip(groups, colours, strict=True)):
        x = np.array([order.index(bits) for bits in rows["weight_bits"]]) + 0.06 * (position - len(groups) / 2)
        label = f"{METHOD_LABELS[method]}, {model}, {dataset}"
        score, interval = rows["relative_error_improvement"], rows["relative_error_improvement_ci"]
        axis.errorbar(x, score, interval, fmt="o", capsize=3, color=colour, label=label)
    for marker, ((dataset, model, method), rows) in zip("sD^", theirs, strict=False):
        x = np.array([order.index(bits) for bits in rows["bits"]]) + 0.25
        label = f"published: {METHOD_LABELS[method]}, {model}, {dataset}"
        axis.plot(x, rows["relative_error_improvement"], marker, color="grey", mfc="none", label=label)
    axis.set_xticks(range(len(order)), [f"{bits} bits" for bits in order])
    axis.set(ylabel="relative error improvement", xlim=(-0.5, len(order) - 0.3))
    figure.legend(loc="outside right center", frameon=False, fontsize="small")
    return figure


def accuracy_by_corruption(metrics: pd.DataFrame) -> Figure:
    """One experiment: accuracy for each corruption and severity, averaged over seeds."""
    accuracy = metrics[metrics["metric"] == "accuracy"]
    clean = accuracy.loc[accuracy["corruption"] == CLEAN, "value"].mean()
    corrupted = accuracy[accuracy["corruption"] != CLEAN]
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
    axis.set(xlabel="accuracy, %", ylabel="")
    axis.set_yticks(range(len(order)), [name.replace("_", " ") for name in order])
    axis.legend(title="severity", frameon=False)
    return figure


def accuracy_by_severity(metrics: pd.DataFrame) -> Figure:
    """Mean accuracy over the 19 corruptions against severity, a line for each width, a panel for each method."""
    accuracy = metrics[metrics["metric"] == "accuracy"].copy()
    keys = ["method", "weight_bits", "severity"]
    lines = accuracy.groupby([*keys, "seed"])["value"].mean().groupby(keys).mean().reset_index()
    panels = [name for name in METHOD_LABELS if name in set(lines["method"]) and name != "fp32"] or ["fp32"]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.8 * len(panels) + 1.4, 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    for method, axis in zip(panels, axes[0], strict=True):
        for bits, line in lines[lines["method"].isin([method, "fp32"])].groupby("weight_bits"):
            axis.plot(line["severity"], line["value"], "o-", ms=4, color=BITS_PALETTE.get(bits, "purple"))
        axis.set(title=METHOD_LABELS[method], xlabel="severity (0: clean)", xticks=sorted(lines["severity"].unique()))
    axes[0, 0].set_ylabel("accuracy, %")
    handles = [plt.Line2D([], [], marker="o", ms=4, color=BITS_PALETTE.get(bits, "purple")) for bits in _widths(lines)]
    labels = ["FP32" if bits == 32 else f"{bits} bits" for bits in _widths(lines)]
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def image_row(images, titles: list[str]) -> Figure:
    """A row of uint8 images (N, 3, H, W) with a title over each."""
    figure, axes = plt.subplots(1, len(titles), figsize=(1.25 * len(titles), 1.7), squeeze=False, layout="constrained")
    for axis, image, title in zip(axes[0], images, titles, strict=True):
        axis.imshow(image.permute(1, 2, 0).cpu().numpy())
        axis.set_title(title, fontsize=8)
        axis.axis("off")
    return figure
