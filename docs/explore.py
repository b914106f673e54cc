"""The charts of explore.md, from the committed results: Vega-Lite, drawn by the reader's browser."""

import json
from collections.abc import Callable
from pathlib import Path

import altair as alt
import numpy as np
import pandas as pd
import torch
import vl_convert

from qreg_utils.ingredients import sort_ingredients, with_ingredients
from qreg_utils.metrics import cell_scores, difference_to_fp32, interval
from qreg_utils.names import CLEAN, CORRUPTIONS, METHODS, PAPER_CORRUPTIONS
from qreg_utils.quantizers.lsq import lsq_formula
from qreg_utils.results import committed_study

RESULTS = Path(__file__).resolve().parent.parent / "results"
STUDIES = ("mechanism", "cifar10-cpu", "curve", "quick", "mechanism-quick")  # of one network, by what people ask for
BITS = range(2, 9)


def quantizer() -> alt.TopLevelMixin:
    """LSQ's levels, error and noise on normal weights, at the number of bits that the reader chooses."""
    weights, shown = torch.randn(100_000, generator=torch.Generator().manual_seed(0)), torch.linspace(-4, 4, 401)
    curves, sizes = [], []
    for bits in BITS:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        step = 2 * weights.abs().mean() / high**0.5
        levels = lsq_formula(shown, step, low, high, 1.0)
        curves.append(pd.DataFrame({"bits": bits, "weight": shown, "level": levels, "error": levels - shown}))
        noise = lsq_formula(weights, step, low, high, 1.0) - weights
        sizes.append({"bits": bits, "relative noise": round(float(noise.std() / weights.std()), 4)})
    slider = alt.binding_range(min=min(BITS), max=max(BITS), step=1, name="bits ")
    chosen = alt.param(name="bits", value=3, bind=slider)
    curve = alt.Chart(pd.concat(curves).round(4)).transform_filter("datum.bits == bits")
    x = alt.X("weight:Q", title="weight, in standard deviations")
    levels = curve.mark_line(interpolate="step").encode(x=x, y=alt.Y("level:Q", title="quantized"))
    error = curve.mark_line(color="#c05621").encode(x=x, y=alt.Y("error:Q", title="quantized minus weight"))
    noise = alt.Chart(pd.DataFrame(sizes)).encode(
        x=alt.X("bits:O", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("relative noise:Q", scale=alt.Scale(type="log"), title="noise over weights"),
        color=alt.condition("datum.bits == bits", alt.value("#c05621"), alt.value("#4c72b0")),
        tooltip=["bits", "relative noise"],
    )
    panels = (
        panel.properties(width=160, height=170) for panel in (levels, error, noise.mark_point(filled=True, size=90))
    )
    return alt.hconcat(*panels).add_params(chosen)


def heatmap() -> alt.TopLevelMixin:
    """Accuracy minus FP32's of every setting under every corruption; a cell tells its interval, seeds, severities."""
    cells = pd.concat([_cells(study) for study in STUDIES])
    chosen = alt.param(name="study", value=STUDIES[0], bind=alt.binding_select(options=list(STUDIES), name="study "))
    order = ["clean", *(CORRUPTIONS.label(name) for name in PAPER_CORRUPTIONS)]
    return (
        alt.Chart(cells)
        .transform_filter("datum.study == study")
        .mark_rect()
        .encode(
            x=alt.X("corruption:N", sort=order, title=None, axis=alt.Axis(labelAngle=-45)),
            y=alt.Y("setting:N", sort=alt.EncodingSortField("position"), title=None, axis=alt.Axis(labelLimit=220)),
            color=alt.Color("points:Q", scale=alt.Scale(scheme="redblue", domain=[-5, 5], clamp=True), title="points"),
            tooltip=["setting", "corruption", "points", "95% interval", "seeds", "severities"],
        )
        .properties(width=440, height=alt.Step(17))
        .add_params(chosen)
    )


def _cells(study: str) -> pd.DataFrame:
    results = committed_study(RESULTS, study)
    deltas = sort_ingredients(with_ingredients(difference_to_fp32(cell_scores(results.metrics))))
    severities = sorted({int(s) for s in results.metrics.loc[results.metrics["corruption"] != CLEAN, "severity"]})
    rows = []
    keys = ["method", "ingredient", "width", "cell"]
    for position, ((method, ingredient, width, cell), own) in enumerate(deltas.groupby(keys, sort=False)):
        low, high = interval(own["delta"])
        name = METHODS.label(method)
        rows.append(
            {
                "study": study,
                "setting": f"{name}, {width:.0f} bits" + (f", {ingredient}" if ingredient.endswith("alone") else ""),
                "position": position,
                "corruption": "clean" if cell == CLEAN else CORRUPTIONS.label(cell),
                "points": round(own["delta"].mean(), 2),
                "95% interval": f"{low:+.2f} to {high:+.2f}",
                "seeds": own["seed"].nunique(),
                "severities": ", ".join(map(str, severities)),
            }
        )
    return pd.DataFrame(rows)


def verdicts() -> alt.TopLevelMixin:
    """Every comparison of a study about improvement with its interval, in the order that the reader chooses."""
    rows = pd.concat([_comparisons(study) for study in STUDIES])
    study = alt.param(name="of", value=STUDIES[0], bind=alt.binding_select(options=list(STUDIES), name="study "))
    orders = {"claim": "datum.position", "effect": "-datum.effect", "p": "datum.p"}
    order = alt.param(name="order", value="claim", bind=alt.binding_radio(options=list(orders), name="sorted by "))
    chosen = " : ".join(f"order == '{name}' ? {value}" for name, value in list(orders.items())[:-1])
    base = (
        alt.Chart(rows)
        .transform_filter("datum.study == of")
        .transform_calculate(place=f"{chosen} : {orders['p']}")
        .encode(
            y=alt.Y("comparison:N", sort=alt.EncodingSortField("place", op="min"), title=None).axis(labelLimit=420),
            color=alt.Color("verdict:N", scale=alt.Scale(scheme="tableau10")),
            tooltip=["claim", "comparison", "effect", "low", "high", "p", "seeds", "seeds needed", "verdict"],
        )
    )
    points = base.mark_point(filled=True, size=60).encode(x=alt.X("effect:Q", title="effect, 95% interval"))
    bars = base.mark_rule().encode(x="low:Q", x2="high:Q")
    return (bars + points).properties(width=260, height=alt.Step(15)).add_params(study, order)


def _comparisons(study: str) -> pd.DataFrame:
    claims = pd.read_csv(RESULTS / study / "claims.csv")
    found = claims[claims["measure"].str.contains("improvement") & claims["effect"].notna()].reset_index(drop=True)
    names = [
        f"{row.claim[:58]}: {METHODS.label(row.method)} {row.bits:.0f}"
        + (f", {row.detail}" if row.detail == row.detail else "")
        for row in found.itertuples()
    ]
    columns = found[["claim", "effect", "low", "high", "p", "seeds", "verdict"]].round(3)
    needed = found["seeds_needed"].replace(np.inf, np.nan)
    return columns.assign(study=study, comparison=names, position=found.index, **{"seeds needed": needed})


CHARTS: dict[str, Callable[[], alt.TopLevelMixin]] = {"quantizer": quantizer, "heatmap": heatmap, "verdicts": verdicts}


def as_html(name: str) -> str:
    """A chart for a page that has the script of ``write_script``."""
    with alt.data_transformers.enable("default", max_rows=None):
        specification = json.dumps(CHARTS[name]().to_dict())
    options = '{"actions": false, "renderer": "svg"}'
    return (
        f'<div class="chart" role="figure" aria-label="{CHARTS[name].__doc__.strip()}"><div id="{name}"></div></div>'
        f'<script>vegaEmbed("#{name}", {specification}, {options});</script>'
    )


def write_script(path: Path) -> None:
    """Vega, Vega-Lite and Vega-Embed, as Altair's package brings them; their names stay within a function."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"(() => {{{vl_convert.javascript_bundle()}}})();", encoding="utf-8")
