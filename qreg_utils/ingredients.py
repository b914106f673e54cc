"""Quantization taken apart: what each setting of a study has of it, and the effects that tell which part it is.

A setting is an ingredient if it is neither full precision nor a quantizer of weights and activations alike: one of them
alone, a part of a quantizer, noise in its place, or an ordinary regularizer to compare with. No torch.
"""

import pandas as pd

from qreg_utils.image_chance import of_a_difference
from qreg_utils.metrics import PAIRED, SETTING
from qreg_utils.names import CONTROL, METHODS, PART, QUANTIZER, REGULARIZER, kind_of

WHOLE = "weights and activations"
ON = {(True, False): "weights", (False, True): "activations", (True, True): "both"}


def with_ingredients(rows: pd.DataFrame) -> pd.DataFrame:
    """``rows`` with the columns ``ingredient``, what they have of quantization in words ("" for full precision), and
    ``width``, the bits at whose scale they have it (32 where they have none)."""
    settings = rows[SETTING].drop_duplicates()
    named = settings.assign(
        ingredient=[_ingredient(*setting) for setting in settings.itertuples(index=False)],
        width=settings[["weight_bits", "activation_bits"]].min(axis=1),
    )
    return rows.merge(named, on=list(settings), how="left")


def _ingredient(method: str, weight_bits: int, activation_bits: int) -> str:
    kind, on = kind_of(method), ON.get((weight_bits < 32, activation_bits < 32), "")
    if kind == QUANTIZER:
        return WHOLE if on == "both" else f"{on} alone"
    if kind == REGULARIZER:
        return method
    if kind in (PART, CONTROL):
        return METHODS.label(method) if on == "both" else f"{METHODS.label(method)}, {on}"
    return ""


def sort_ingredients(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of ``with_ingredients`` in reading order: full precision, the whole quantizer, weights alone, activations
    alone, parts, noise, ordinary regularizers; the widest first."""
    first = ["", WHOLE, *(f"{on} alone" for on in ON.values())]
    rank = [
        first.index(name) if name in first else len(first) + METHODS.position(method)
        for name, method in zip(rows["ingredient"], rows["method"], strict=True)
    ]
    order = rows.assign(_rank=rank).sort_values(
        ["_rank", "ingredient", "width"], ascending=[True, True, False], kind="stable"
    )
    return order.drop(columns="_rank")


def ingredients(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``with_ingredients`` that are of an ingredient, not of full precision or of a whole quantizer."""
    return rows[~rows["ingredient"].isin(["", WHOLE])]


def minus_the_whole(improvement: pd.DataFrame) -> pd.DataFrame:
    """One row for each seed and part of a quantizer, or weights or activations alone: ``value`` is its ``improvement``
    minus that of the whole quantizer at the same width. ``improvement`` has the columns of ``with_ingredients``."""
    parts = ingredients(improvement)
    parts = parts[parts["method"].map(kind_of).isin([QUANTIZER, PART])]
    return _paired(parts, improvement)


def rounding_itself(improvement: pd.DataFrame) -> pd.DataFrame:
    """One row for each seed and quantizer of which the unrounded part is there: ``value`` is the quantizer's
    ``improvement`` minus that of its own range without rounding, at the same widths."""
    both = improvement["weight_bits"] == improvement["activation_bits"]
    pairs = _paired(improvement[both & improvement["method"].str.endswith("-unrounded")], improvement)
    return pairs.assign(value=-pairs["value"], method=pairs["of"], ingredient=pairs["of"].map(METHODS.label))


def _paired(parts: pd.DataFrame, improvement: pd.DataFrame) -> pd.DataFrame:
    of = [METHODS[name].of or name if name in METHODS else name for name in parts["method"]]
    keys = [*PAIRED, "of", "width"]
    wholes = improvement[improvement["ingredient"] == WHOLE].rename(columns={"method": "of"})
    of_images = ["image_variance"] if "image_variance" in improvement else []
    if parts.empty or wholes.empty:
        return parts.iloc[:0].assign(of=parts["method"].iloc[:0], value=0.0)
    wholes = wholes[[*keys, "improvement", *of_images]]
    paired = of_a_difference(parts.assign(of=of).merge(wholes, on=keys, suffixes=("", "_whole")), "_whole")
    return paired.assign(value=paired["improvement"] - paired["improvement_whole"])
