"""What all figures share: theme, colours of methods and settings, panels, legends."""

from collections.abc import Iterable

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from qreg_utils.metrics import setting_label
from qreg_utils.names import METHODS, QUANTIZER, kind_of

SETTING_COLOURS = {"FP32": "#444444", "8 bits": "#1b7f5c", "4 bits": "#2b6cb0", "2 bits": "#c05621"}
SETTING_COLOURS |= {name.replace(" bits", "-bit weights"): colour for name, colour in SETTING_COLOURS.items()}
MARKERS = "osDv^P"  # of what has the same colour


def set_theme() -> None:
    """Of all figures that are drawn after this; the package calls it when it is imported."""
    sns.set_theme(
        style="ticks",
        context="notebook",
        rc={"figure.dpi": 110, "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "qreg"},
    )


def labelled_settings(frame: pd.DataFrame) -> tuple[pd.Series, dict[str, str]]:
    """The label of each row's setting (its widths), and a colour for every setting that occurs, widest first."""
    widths = frame[["weight_bits", "activation_bits"]]
    order = widths.drop_duplicates().sort_values(["weight_bits", "activation_bits"], ascending=False)
    names = [setting_label(*pair) for pair in order.itertuples(index=False)]
    return widths.apply(lambda row: setting_label(*row), axis=1), _completed(names, SETTING_COLOURS)


def ordered_methods(names: Iterable[str]) -> list[str]:
    """In reading order; those without a row in the table of names last."""
    return sorted(set(names), key=lambda name: (METHODS.position(name), name))


def method_colours(names: Iterable[str]) -> dict[str, str]:
    """The colour of each method, in reading order: that of its row in the table of names, if it has one."""
    return _completed(ordered_methods(names), {name: row.colour for name, row in METHODS.items()})


def _completed(names: list[str], known: dict[str, str]) -> dict[str, str]:
    """A colour for each of ``names``: the known one, or one of its own."""
    others = iter(sns.color_palette("husl", len(names)).as_hex())
    return {name: known.get(name) or next(others) for name in names}


def is_quantizer(method: str) -> bool:
    """Whether its networks have quantized weights besides those that are trained; so for a method without a row."""
    return kind_of(method) == QUANTIZER


def panels_by_method(methods: Iterable[str], width: float, height: float) -> tuple[Figure, dict[str, plt.Axes]]:
    """A row of panels, one for each quantization method or control (or one for FP32 alone)."""
    names = [name for name in ordered_methods(methods) if name != "fp32"] or ["fp32"]
    size = (width * len(names) + 1.6, height)
    figure, axes = plt.subplots(1, len(names), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for name, axis in zip(names, axes[0], strict=True):
        axis.set_title(METHODS.label(name))
    return figure, dict(zip(names, axes[0], strict=True))


def setting_legend(figure: Figure, colours: dict[str, str], *more: plt.Line2D) -> None:
    """At the right: a line for each setting, then ``more``."""
    lines = [plt.Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=[*lines, *more], loc="outside right center", frameon=False)
