"""Images: what corruptions do to them, and what detectors find in them."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from qreg_utils.names import CORRUPTIONS


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
        shown = [CORRUPTIONS.label(name) for name in names]
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
