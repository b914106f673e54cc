"""The figures, one function each. Every function takes tidy rows and returns a matplotlib figure."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qreg_utils.metrics import CLEAN, METHOD_LABELS, SCORES, confidence_interval, last_epoch, level_label, scores
from qreg_utils.study import QUANTIZERS

sns.set_theme(
    style="ticks",
    context="notebook",
    rc={"figure.dpi": 110, "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "qreg"},
)

LEVEL_PALETTE = {"FP32": "#444444", "8 bits": "#1b7f5c", "4 bits": "#2b6cb0", "2 bits": "#c05621"}
LEVEL_PALETTE |= {name.replace(" bits", "-bit weights"): colour for name, colour in LEVEL_PALETTE.items()}
NOISE_LABELS = {
    "quantization": "rounding the weights",
    "normal": "normal noise, same sigma",
    "uniform": "uniform noise, same step",
}
SPLIT_STYLES = {"validation": "-", "training": ":"}
COLUMNS = 5  # the paper's heatmaps: 4 rows of 5 cells


def _levels(frame: pd.DataFrame) -> tuple[pd.Series, dict[str, str]]:
    """Each row's level, and a colour for every level that occurs, widest first."""
    widths = frame[["weight_bits", "activation_bits"]]
    order = widths.drop_duplicates().sort_values(["weight_bits", "activation_bits"], ascending=False)
    names = [level_label(*pair) for pair in order.itertuples(index=False)]
    others = iter(sns.color_palette("husl", len(names)).as_hex())
    colours = {name: LEVEL_PALETTE.get(name) or next(others) for name in names}
    return widths.apply(lambda row: level_label(*row), axis=1), colours


def heatmaps(deltas: pd.DataFrame, cells: tuple[str, ...], title: str) -> Figure:
    """The paper's central figure: score minus FP32's, in points, for the clean test set and 19 corruptions.

    ``deltas`` has dataset, model, method, weight_bits, activation_bits, cell, delta, and several rows a cell when
    there are several seeds. One row of heatmaps for each data set, model and method, one column for each level. With
    several seeds, a number is bold when its 95% interval over seeds excludes zero.
    """
    level, colours = _levels(deltas)
    deltas = deltas.assign(level=level)
    rows = list(deltas.groupby(["dataset", "model", "method"], sort=False).groups)
    panels = dict(list(deltas.groupby(["dataset", "model", "method", "level"])))
    levels = list(reversed(colours))
    figure, axes = plt.subplots(
        len(rows), len(levels), figsize=(5.0 * len(levels), 2.9 * len(rows) + 0.7), squeeze=False, layout="constrained"
    )
    means = deltas.groupby(["dataset", "model", "method", "level", "cell"])["delta"].mean()
    limit = max(1.0, float(np.nanpercentile(means.abs(), 95)))
    norm = TwoSlopeNorm(0, -limit, limit)
    for row, row_axes in zip(rows, axes, strict=True):
        for name, axis in zip(levels, row_axes, strict=True):
            _heatmap(axis, panels.get((*row, name), deltas.iloc[:0]), cells, norm)
            if axis in axes[0]:
                axis.set_title(name, fontweight="bold")
        row_axes[0].set_ylabel(f"{METHOD_LABELS[row[2]]}\n{row[1]}, {row[0]}", fontweight="bold")
    mappable = plt.cm.ScalarMappable(norm=norm, cmap="RdBu")
    bar = figure.colorbar(mappable, ax=axes, shrink=0.6 if len(rows) > 1 else 0.9, extend="both", pad=0.01)
    bar.set_label("accuracy (YOLO: mAP50) minus FP32, points")
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
        # never bold without an interval, nor where the seeds agree to the last image and the interval is empty
        weight = "bold" if 1e-4 < intervals[i, j] < abs(mean) else "normal"
        number = "?" if np.isnan(mean) else f"{round(mean, 1) + 0.0:+.1f}"  # + 0.0: no -0.0
        axis.text(j, i - 0.13, number, ha="center", va="center", color=colour, fontsize=11, fontweight=weight)
        name = cells[i * COLUMNS + j].replace("_", " ")
        axis.text(j, i + 0.27, name, ha="center", va="center", color=colour, fontsize=6)


def training_curves(history: pd.DataFrame) -> Figure:
    """Loss on training and on unseen images after each epoch, averaged over seeds: one panel for each method.

    ``history`` has model, method, weight_bits, activation_bits, seed, epoch, split, loss. FP32 is repeated in every
    panel for comparison. Losses above twice the first epoch's leave the picture at the top.
    """
    level, colours = _levels(history)
    split = history["split"].map({"val": "validation", "train": "training"})
    curves = history.assign(level=level, split=split).groupby(["method", "level", "split", "epoch"])["loss"]
    curves = curves.agg(["mean", "min", "max"]).reset_index()
    top = 2 * curves.loc[curves["epoch"] == curves["epoch"].min(), "max"].max()
    figure, panels = _panels_by_method(set(history["method"]), width=4.6, height=3.8)
    for method, axis in panels.items():
        for (name, split), curve in curves[curves["method"].isin([method, "fp32"])].groupby(["level", "split"]):
            epoch = curve["epoch"] + 1
            axis.plot(epoch, curve["mean"], ls=SPLIT_STYLES[split], marker=".", color=colours[name])
            if split == "validation":
                axis.fill_between(epoch, curve["min"], curve["max"], color=colours[name], alpha=0.12, lw=0)
        axis.set(xlabel="epoch", yscale="log")
        if curves["max"].max() > top:
            axis.set_ylim(top=top)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.axes[0].set_ylabel("detection loss" if history["model"].iloc[0] == "yolov5n" else "cross-entropy")
    styles = [plt.Line2D([], [], color="black", ls=style, label=name) for name, style in SPLIT_STYLES.items()]
    _level_legend(figure, colours, *styles)
    return figure


def _panels_by_method(methods: set[str], width: float, height: float) -> tuple[Figure, dict[str, plt.Axes]]:
    """A row of panels, one for each quantization method (or one for FP32 alone)."""
    names = [name for name in METHOD_LABELS if name in methods and name != "fp32"] or ["fp32"]
    size = (width * len(names) + 1.6, height)
    figure, axes = plt.subplots(1, len(names), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for name, axis in zip(names, axes[0], strict=True):
        axis.set_title(METHOD_LABELS[name])
    return figure, dict(zip(names, axes[0], strict=True))


def _level_legend(figure: Figure, colours: dict[str, str], *more: plt.Line2D) -> None:
    lines = [plt.Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=[*lines, *more], loc="outside right center", frameon=False)


def noise_by_bits(noise: pd.DataFrame) -> Figure:
    """Quantization noise relative to the weights, one point for each layer and seed, after the last epoch.

    ``noise`` has dataset, model, method, bits, seed, epoch, layer, sigma, weight_sigma. The dashed line falls by a
    factor of 2 a bit, as rounding noise does on a fixed range.
    """
    last = last_epoch(noise)
    relative = last["sigma"] / last["weight_sigma"]
    methods = [name for name in METHOD_LABELS if name in set(last["method"])]
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    jitter = np.random.default_rng(0).uniform(-0.06, 0.06, len(last))
    for position, (method, colour) in enumerate(zip(methods, sns.color_palette("deep", len(methods)), strict=True)):
        rows = last["method"] == method
        x = last["bits"][rows] + jitter[rows] + 0.25 * (position - (len(methods) - 1) / 2)
        axis.scatter(x, relative[rows], s=10, alpha=0.6, color=colour, label=METHOD_LABELS[method])
    widths = np.array(sorted(last["bits"].unique()))
    start = relative[last["bits"] == widths[0]].median()
    axis.plot(widths, start * 2.0 ** -(widths - widths[0]), "k--", lw=1, label="half for each bit")
    axis.set(yscale="log", ylabel="sigma(w_q - w) / sigma(w)", xlabel="bits of the layer", xticks=widths)
    axis.legend(frameon=False)
    return figure


def measured_penalty(penalty: pd.DataFrame) -> Figure:
    """How much the squared error of one network changes under noise on its weights: predicted, and measured.

    ``penalty`` has the columns of ``penalty.penalty_rows`` and seed. Left: against bits, with the line of a factor of 4
    a bit, and with what the penalty drops (residual times curvature) added. Right: measured against predicted; on the
    diagonal the penalty is right. Filled: the loss rises; hollow: it falls by that much. Means over seeds.
    """
    means = penalty.groupby(["noise", "bits"], as_index=False)[["predicted", "curvature", "measured"]].mean()
    figure, (by_bits, against) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    predicted = means[means["noise"] == "normal"].sort_values("bits")
    by_bits.plot(predicted["bits"], predicted["predicted"], color="black", lw=1.5, label="predicted penalty")
    both = predicted["predicted"] + predicted["curvature"]
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
    """Sharpness of one kind of network against bits: hollow at the latent weights, filled at the quantized ones.

    ``sharpness`` has method, weight_bits, activation_bits, seed and the columns of ``sharpness.sharpness``; a panel
    each for the relative eigenvalue and trace of the Hessian, and the rise of the loss under noise of ``size``.
    Means over seeds, with bars from the smallest to the largest, on a logarithmic axis, which has no place for a trace
    or a rise below zero. FP32 and the controls have one set of weights.
    """
    panels = {
        ("relative_largest_eigenvalue", 0.0): "largest Hessian eigenvalue",
        ("relative_trace", 0.0): "trace of the Hessian",
        ("loss_rise", size): f"rise of the loss, noise {size:g}",
    }
    keys = ["method", "activation_bits", "weight_bits", "weights"]
    widths = sorted(sharpness["weight_bits"].unique(), reverse=True)
    variants = sharpness[["method", "activation_bits"]].assign(weights_only=sharpness["activation_bits"] == 32)
    variants = variants[["method", "weights_only"]].drop_duplicates().apply(tuple, axis=1).tolist()
    variants.sort(key=lambda variant: (list(METHOD_LABELS).index(variant[0]), variant[1]))
    colours = dict(zip(variants, sns.color_palette("deep", len(variants)), strict=True))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.3 * len(panels) + 1.8, 3.9), layout="constrained")
    for ((measure, at), title), axis in zip(panels.items(), axes, strict=True):
        rows = sharpness[(sharpness["measure"] == measure) & (sharpness["size"] == at)]
        for (method, activations, bits, weights), values in rows.groupby(keys)["value"]:
            variant = (method, activations == 32)
            shift = 0.1 * (variants.index(variant) - len(variants) / 2) + 0.03 * (weights == "quantized")
            mean = values.mean()
            bars = [[mean - values.min()], [values.max() - mean]]
            fill = colours[variant] if weights == "quantized" or method not in QUANTIZERS else "white"
            axis.errorbar(widths.index(bits) + shift, mean, bars, fmt="o", ms=6, color=colours[variant], mfc=fill)
        axis.set_xticks(range(len(widths)), ["FP32" if bits == 32 else f"{bits} bits" for bits in widths])
        axis.set(title=title, yscale="log")
    marks = [plt.Line2D([], [], ls="", marker="o", color=colour) for colour in colours.values()]
    marks += [plt.Line2D([], [], ls="", marker="o", color="black", mfc=fill) for fill in ("white", "black")]
    names = [METHOD_LABELS[name] + (", weights only" if only and name in QUANTIZERS else "") for name, only in colours]
    names += ["latent weights", "quantized (or only) weights"]
    figure.legend(marks, names, loc="outside right center", frameon=False)
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
    axis.set_yticks(range(len(order)), [name.replace("_", " ") for name in order])
    axis.legend(title="severity", frameon=False)
    return figure


def score_by_severity(metrics: pd.DataFrame) -> Figure:
    """Mean score over the 19 corruptions against severity, a line for each level, a panel for each method."""
    score = scores(metrics)
    level, colours = _levels(score)
    keys = ["method", "level", "severity"]
    lines = score.assign(level=level).groupby([*keys, "seed"])["value"].mean().groupby(keys).mean().reset_index()
    figure, panels = _panels_by_method(set(lines["method"]), width=3.8, height=3.4)
    for method, axis in panels.items():
        for name, line in lines[lines["method"].isin([method, "fp32"])].groupby("level"):
            axis.plot(line["severity"], line["value"], "o-", ms=4, color=colours[name])
        axis.set(xlabel="severity (0: clean)", xticks=sorted(lines["severity"].unique()))
    figure.axes[0].set_ylabel(SCORES[score["metric"].iloc[0]])
    _level_legend(figure, colours)
    return figure


def image_row(images, titles: list[str]) -> Figure:
    """A row of uint8 images (N, 3, H, W) with a title over each."""
    return image_grid({"": images}, titles)


def image_grid(rows: dict, columns: list[str]) -> Figure:
    """Rows of uint8 images: ``rows`` maps the name at the left to len(columns) images (3, H, W)."""
    height, width = next(iter(rows.values()))[0].shape[-2:]
    size = (1.3 * len(columns) + 1, 1.3 * height / width * len(rows) + 0.4)
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, squeeze=False, layout="constrained")
    for (name, images), row in zip(rows.items(), axes, strict=True):
        for image, axis in zip(images, row, strict=True):
            axis.imshow(image.permute(1, 2, 0).cpu().numpy())
            axis.set(xticks=[], yticks=[])
            sns.despine(ax=axis, left=True, bottom=True)
        row[0].set_ylabel(name.replace("_", "\n"), rotation=0, ha="right", va="center", fontsize=9)
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=9)
    return figure


def change_by_severity(changes: pd.DataFrame) -> Figure:
    """How far corrupted images lie from the clean ones: one panel for each group of corruptions, a line for each.

    ``changes`` has group, corruption, family, severity and change (mean absolute difference in levels).
    """
    groups = list(changes.groupby("group", sort=False))
    figure, axes = plt.subplots(1, len(groups), figsize=(3.4 * len(groups) + 1, 4.6), sharey=True, layout="constrained")
    for (group, rows), axis in zip(groups, np.atleast_1d(axes), strict=True):
        sns.lineplot(rows, x="severity", y="change", hue="corruption", style="family", markers=True, ax=axis)
        lines = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        names = rows["corruption"].unique()
        shown = [name.replace("_", " ") for name in names]
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18), "frameon": False}
        axis.legend([lines[name] for name in names], shown, **below)
        axis.set(title=group, xticks=range(1, 6), ylabel="mean |corrupted - clean|, levels")
    families = rows["family"].unique()
    figure.legend([lines[name] for name in families], families, title="family", loc="outside right center")
    return figure


def agreement(statistics: pd.DataFrame) -> Figure:
    """Our statistics against the reference's, a point for each corruption and severity; on the line they agree.

    ``statistics`` has statistic, corruption, severity, reference, ours; a panel for each statistic.
    """
    groups = list(statistics.groupby("statistic", sort=False))
    figure, axes = plt.subplots(1, len(groups), figsize=(3.2 * len(groups), 3.4), layout="constrained")
    for (name, rows), axis in zip(groups, np.atleast_1d(axes), strict=True):
        limits = [0, 1.05 * rows[["reference", "ours"]].to_numpy().max()]
        axis.plot(limits, limits, color="grey", lw=1)
        sns.scatterplot(rows, x="reference", y="ours", hue="severity", palette="flare", s=18, legend="full", ax=axis)
        axis.set(title=name, xlim=limits, ylim=limits, aspect="equal")
        points, severities = axis.get_legend_handles_labels()
        axis.get_legend().remove()
    figure.legend(points, severities, title="severity", loc="outside right center")
    return figure


def boxes_on_images(rows: list[list[tuple]]) -> Figure:
    """Rows of images with boxes, each a tuple: title, uint8 image (3, H, W), boxes (n, 4), the n names.

    Boxes are left, top, right, bottom in pixels. Each class has its colour.
    """
    names = sorted({name for row in rows for *_, found in row for name in found})
    colours = dict(zip(names, sns.color_palette("bright", len(names)), strict=True))
    columns = max(map(len, rows))
    height, width = rows[0][0][1].shape[1:]
    size = (2.4 * columns, (2.4 * height / width + 0.3) * len(rows))
    # photographs with noise hardly compress: no more pixels than are needed
    figure, axes = plt.subplots(len(rows), columns, figsize=size, dpi=72, squeeze=False, layout="constrained")
    for row, row_axes in zip(rows, axes, strict=True):
        for (title, image, boxes, found), axis in zip(row, row_axes, strict=True):
            axis.imshow(image.permute(1, 2, 0).cpu().numpy())
            axis.set_title(title, fontsize=9)
            axis.set(xticks=[], yticks=[])
            for (left, top, right, bottom), name in zip(boxes.tolist(), found, strict=True):
                box = plt.Rectangle((left, top), right - left, bottom - top, fill=False, lw=1.5, color=colours[name])
                axis.add_patch(box)
                text = {"fontsize": 7, "color": "white", "va": "bottom", "clip_on": True}
                axis.text(left, top, name, bbox={"color": colours[name], "pad": 0.6, "lw": 0}, **text)
    return figure


def accuracy_grid(metrics: pd.DataFrame) -> Figure:
    """Accuracy for each corruption (rows, the hardest first) and severity (columns), averaged over seeds."""
    accuracy = metrics[(metrics["metric"] == "accuracy") & (metrics["corruption"] != CLEAN)]
    grid = accuracy.pivot_table(index="corruption", columns="severity", values="value")
    grid = grid.loc[grid.mean(axis=1).sort_values().index]
    grid.index = grid.index.str.replace("_", " ")
    figure, axis = plt.subplots(figsize=(5.4, 6), layout="constrained")
    sns.heatmap(grid, annot=True, fmt=".0f", cmap="viridis", cbar_kws={"label": "accuracy, %"}, ax=axis)
    axis.set(ylabel="")
    return figure
