"""What happens while networks are trained."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qreg_utils.figures.style import labelled_settings, panels_by_method, setting_legend
from qreg_utils.names import task_of

SPLIT_STYLES = {"validation": "-", "training": ":"}


def training_curves(history: pd.DataFrame) -> Figure:
    """Loss on training and on unseen images after each epoch, averaged over seeds: one panel for each method.

    ``history`` has dataset, model, method, weight_bits, activation_bits, seed, epoch, split, loss, and is of one
    network. FP32 is repeated in every panel for comparison. Losses above twice the first epoch's leave the picture at
    the top.
    """
    setting, colours = labelled_settings(history)
    split = history["split"].map({"val": "validation", "train": "training"})
    curves = history.assign(setting=setting, split=split).groupby(["method", "setting", "split", "epoch"])["loss"]
    curves = curves.agg(["mean", "min", "max"]).reset_index()
    top = 2 * curves.loc[curves["epoch"] == curves["epoch"].min(), "max"].max()
    figure, panels = panels_by_method(history["method"], width=4.6, height=3.8)
    for method, axis in panels.items():
        for (name, split), curve in curves[curves["method"].isin([method, "fp32"])].groupby(["setting", "split"]):
            epoch = curve["epoch"] + 1
            axis.plot(epoch, curve["mean"], ls=SPLIT_STYLES[split], marker=".", color=colours[name])
            if split == "validation":
                axis.fill_between(epoch, curve["min"], curve["max"], color=colours[name], alpha=0.12, lw=0)
        axis.set(xlabel="epoch", yscale="log")
        if curves["max"].max() > top:
            axis.set_ylim(top=top)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    model, dataset = history[["model", "dataset"]].iloc[0]
    figure.axes[0].set_ylabel(task_of(model, dataset).loss_label)
    styles = [plt.Line2D([], [], color="black", ls=style, label=name) for name, style in SPLIT_STYLES.items()]
    setting_legend(figure, colours, *styles)
    return figure
