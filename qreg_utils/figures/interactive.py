"""Charts that answer when they are pointed at: tidy rows in, an Altair chart out, which the reader's browser draws.

Importing this sets how a notebook keeps a chart: as a specification, which JupyterLab and the book draw without a
kernel, and as a picture, which all others show. The specification is Vega-Lite 5, the newest that JupyterLab draws.
"""

from collections.abc import Callable, Iterable
from io import BytesIO

import altair as alt
import numpy as np
import pandas as pd
import vl_convert
from PIL import Image

from qreg_utils.ingredients import sort_ingredients, with_ingredients
from qreg_utils.metrics import cell_scores, difference_to_fp32, interval
from qreg_utils.names import CLEAN, CORRUPTIONS, METHODS, PAPER_CORRUPTIONS

MIME = "application/vnd.vegalite.v5+json"
SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"  # a name: nothing is loaded from there
ONE, OTHERS = "#c05621", "#4c72b0"  # colours of what is chosen, and of the rest
COLOURS = 256  # of a picture
GROUPS = ("noise", "blur", "weather", "digital")
VERDICTS = {"supported": "#1b7f5c", "contradicted": "#c05621", "negligible": "#9a9a9a", "not decided": "#e0b050"}
ORDERS = {"claim": "datum.position", "effect": "-datum.effect", "p": "datum.p"}  # of effects, and what sorts them


def both_kinds(specification: dict) -> dict[str, dict | bytes | str]:
    """A chart's output in a notebook: its specification and its picture (a PNG), and in words what it shows.

    ``specification`` is of an Altair chart with a ``description``.
    """
    specification = specification | {"$schema": SCHEMA}
    picture = _in_few_colours(vl_convert.vegalite_to_png(specification, scale=1.5))
    return {MIME: specification, "image/png": picture, "text/plain": specification["description"]}


def _in_few_colours(png: bytes) -> bytes:
    """A third of the size."""
    picture, smaller = Image.open(BytesIO(png)).convert("RGB"), BytesIO()
    picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE).save(smaller, "png", optimize=True)
    return smaller.getvalue()


alt.renderers.register("qreg", both_kinds)
alt.renderers.enable("qreg")
alt.data_transformers.disable_max_rows()


def levels_error_noise(
    line: np.ndarray, values: np.ndarray, quantize: Callable, widths: Iterable[int] = range(2, 9)
) -> alt.TopLevelMixin:
    """A quantizer's levels and errors along ``line``, and its noise on ``values``, at the bits that the reader chooses.

    ``line`` and ``values`` have one dimension, and the kind (array, tensor) that ``quantize(values, bits)`` takes and
    returns. The noise is the standard deviation of the error over that of the values.
    """
    widths = list(widths)
    curves, sizes = [], []
    for bits in widths:
        weight, level = np.asarray(line, float), np.asarray(quantize(line, bits), float)
        curves.append(pd.DataFrame({"bits": bits, "weight": weight, "level": level, "error": level - weight}))
        error = np.asarray(quantize(values, bits), float) - np.asarray(values, float)
        sizes.append({"bits": bits, "relative noise": round(error.std() / np.std(np.asarray(values, float)), 4)})
    slider = alt.binding_range(min=widths[0], max=widths[-1], step=1, name="bits ")
    curve = alt.Chart(pd.concat(curves).round(4)).transform_filter("datum.bits == bits")
    x = alt.X("weight:Q", title="weight, in standard deviations")
    levels = curve.mark_line(interpolate="step").encode(x=x, y=alt.Y("level:Q", title="quantized"))
    error = curve.mark_line(color=ONE).encode(x=x, y=alt.Y("error:Q", title="quantized minus weight"))
    noise = _noise_at_bits(pd.DataFrame(sizes))
    panels = [panel.properties(width=160, height=170) for panel in (levels, error, noise)]
    description = "The levels of a quantizer, its error, and the size of the noise, at bits that the reader chooses"
    return alt.hconcat(*panels, description=description).add_params(alt.param(name="bits", value=3, bind=slider))


def _noise_at_bits(sizes: pd.DataFrame) -> alt.Chart:
    mark = alt.Chart(sizes).mark_point(filled=True, size=90)
    return mark.encode(
        x=alt.X("bits:O", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("relative noise:Q", scale=alt.Scale(type="log"), title="noise over weights"),
        color=alt.condition("datum.bits == bits", alt.value(ONE), alt.value(OTHERS)),
        tooltip=["bits", "relative noise"],
    )


def differences_by_corruption(metrics: dict[str, pd.DataFrame]) -> alt.TopLevelMixin:
    """Score minus FP32's of every setting under every corruption, in points; a cell tells its interval (95%, over
    seeds), seeds and severities, and has a dot where the interval excludes zero.

    ``metrics`` are rows of metrics.csv by the name of their study, each of one network; the reader chooses the study
    where there are several.
    """
    cells = pd.concat([_cells(study, rows) for study, rows in metrics.items()])
    by_group = sorted(PAPER_CORRUPTIONS, key=lambda name: (GROUPS.index(CORRUPTIONS[name].group), name))
    order = ["clean", *map(CORRUPTIONS.label, by_group)]
    limit = max(1.0, round(float(np.nanpercentile(cells["points"].abs(), 95))))
    colours = alt.Scale(scheme="redblue", domain=[-limit, limit], clamp=True)
    base = alt.Chart(cells).encode(
        x=alt.X("corruption:N", sort=order, title=None, axis=alt.Axis(labelAngle=-45)),
        y=alt.Y("setting:N", sort=alt.EncodingSortField("position"), title=None, axis=alt.Axis(labelLimit=220)),
        tooltip=["setting", "corruption", "points", "95% interval", "seeds", "severities"],
    )
    dark = alt.condition(f"abs(datum.points) > {limit} / 2", alt.value("white"), alt.value("black"))
    layers = alt.layer(
        base.mark_rect().encode(color=alt.Color("points:Q", scale=colours, title="points")),
        base.transform_filter("datum.decided").mark_point(filled=True, size=8, opacity=1).encode(color=dark),
    )
    described = "Accuracy minus FP32's, by setting and corruption; a dot where the interval excludes zero"
    return _of_chosen_study(layers.properties(width=440, height=alt.Step(17), description=described), list(metrics))


def _cells(study: str, metrics: pd.DataFrame) -> pd.DataFrame:
    deltas = sort_ingredients(with_ingredients(difference_to_fp32(cell_scores(metrics))))
    severities = sorted({int(s) for s in metrics.loc[metrics["corruption"] != CLEAN, "severity"]})
    rows = []
    keys = ["method", "ingredient", "width", "cell"]
    for position, ((method, ingredient, width, cell), own) in enumerate(deltas.groupby(keys, sort=False)):
        low, high = interval(own["delta"])
        alone = ingredient if ingredient.endswith("alone") else ""
        rows.append(
            {
                "study": study,
                "setting": ", ".join(filter(None, [METHODS.label(method), _bits(width), alone])),
                "position": position,
                "corruption": "clean" if cell == CLEAN else CORRUPTIONS.label(cell),
                "points": round(own["delta"].mean(), 2),
                "95% interval": f"{low:+.2f} to {high:+.2f}",
                "decided": bool(low > 0 or high < 0),
                "seeds": own["seed"].nunique(),
                "severities": ", ".join(map(str, severities)),
            }
        )
    return pd.DataFrame(rows)


def effects_with_intervals(claims: dict[str, pd.DataFrame]) -> alt.TopLevelMixin:
    """Every effect on improvement with its 95% interval, in the order that the reader chooses; a point tells its
    p-value, verdict, seeds, and the seeds that would decide.

    ``claims`` are rows of claims.csv by the name of their study; the reader chooses the study where there are several.
    """
    rows = pd.concat([_effects(study, table) for study, table in claims.items()])
    choice = alt.binding_radio(options=list(ORDERS), name="sorted by ")
    chosen = " : ".join([*(f"order == '{name}' ? {value}" for name, value in ORDERS.items()), "0"])
    effects = alt.Chart(rows).transform_calculate(place=chosen)
    colours = alt.Scale(domain=list(VERDICTS), range=list(VERDICTS.values()))
    base = effects.encode(
        y=alt.Y("comparison:N", sort=alt.EncodingSortField("place", op="min"), title=None).axis(labelLimit=420),
        color=alt.Color("verdict:N", scale=colours, legend=alt.Legend(orient="top", title=None, columns=2)),
        tooltip=["claim", "comparison", "effect", "low", "high", "p", "seeds", "seeds needed", "verdict"],
    )
    zero = alt.Axis(gridColor=alt.condition("datum.value == 0", alt.value("black"), alt.value("#dddddd")))
    x = alt.X("effect:Q", title="effect, 95% interval", axis=zero)
    points = base.mark_point(filled=True, size=60).encode(x=x)
    layers = alt.layer(base.mark_rule().encode(x="low:Q", x2="high:Q"), points)
    layers = layers.properties(width=300, height=alt.Step(15), description="Effects with intervals, and verdicts")
    return _of_chosen_study(layers, list(claims)).add_params(alt.param(name="order", value="claim", bind=choice))


def _effects(study: str, claims: pd.DataFrame) -> pd.DataFrame:
    found = claims[claims["measure"].str.contains("improvement") & claims["effect"].notna()].reset_index(drop=True)
    names = [
        f"{row.claim[:58]}: " + ", ".join(filter(None, [METHODS.label(row.method), _bits(row.bits), row.detail]))
        for row in found.fillna({"detail": ""}).itertuples()
    ]
    columns = found[["claim", "effect", "low", "high", "p", "seeds", "verdict"]].round(3)
    needed = found["seeds_needed"].replace(np.inf, np.nan)
    return columns.assign(study=study, comparison=names, position=found.index, **{"seeds needed": needed})


def _bits(width: float) -> str:
    return "" if width == 32 else f"{width:.0f} bits"


def _of_chosen_study(chart: alt.TopLevelMixin, studies: list[str]) -> alt.TopLevelMixin:
    """With a choice of the study, where there is one."""
    if len(studies) == 1:
        return chart
    choice = alt.binding_select(options=studies, name="study ")
    chosen = alt.param(name="study", value=studies[0], bind=choice)
    return chart.transform_filter("datum.study == study").add_params(chosen)
