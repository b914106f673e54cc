"""The live charts of the book: those of explore.md, from the committed results, and the outputs of notebooks."""

import json
from base64 import b64encode
from collections.abc import Callable
from html import escape
from pathlib import Path

import altair as alt
import pandas as pd
import torch
import vl_convert

from qreg_utils.figures.interactive import (
    MIME,
    both_kinds,
    differences_by_corruption,
    effects_with_intervals,
    levels_error_noise,
)
from qreg_utils.quantizers import lsq, lsq_initial_step
from qreg_utils.results import committed_study

RESULTS = Path(__file__).resolve().parent.parent / "results"
EMBEDDED = {"mode": "vega-lite", "actions": False, "renderer": "svg"}  # how vegaEmbed draws
# of one network each, by what people ask for
STUDIES = ("mechanism", "cifar10-full", "cifar10-cpu", "curve", "quick", "mechanism-quick")


def quantizer() -> alt.TopLevelMixin:
    """LSQ on normal weights, with its first step."""
    weights = torch.randn(100_000, generator=torch.Generator().manual_seed(0))

    def rounded(values: torch.Tensor, bits: int) -> torch.Tensor:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        return lsq(values, lsq_initial_step(weights, high), low, high)

    return levels_error_noise(torch.linspace(-4, 4, 401), weights, rounded)


def heatmap() -> alt.TopLevelMixin:
    return differences_by_corruption({study: committed_study(RESULTS, study).metrics for study in STUDIES})


def verdicts() -> alt.TopLevelMixin:
    return effects_with_intervals({study: pd.read_csv(RESULTS / study / "claims.csv") for study in STUDIES})


CHARTS: dict[str, Callable[[], alt.TopLevelMixin]] = {"quantizer": quantizer, "heatmap": heatmap, "verdicts": verdicts}


def as_html(name: str) -> str:
    """A chart for a page that has the script of ``write_script``."""
    output = both_kinds(CHARTS[name]().to_dict())
    return _live(name, output[MIME], b64encode(output["image/png"]).decode())


def with_live_charts(notebook: str) -> str:
    """An executed notebook's text, in which each chart is what ``as_html`` makes, not a picture."""
    content = json.loads(notebook)
    outputs = [output for cell in content["cells"] for output in cell.get("outputs", [])]
    charts = [output for output in outputs if MIME in output.get("data", {})]
    for number, output in enumerate(charts, 1):
        picture = "".join(output["data"]["image/png"]).replace("\n", "")
        output["data"] = {"text/html": _live(f"chart-{number}", output["data"][MIME], picture)}
    return json.dumps(content)


def _live(name: str, specification: dict, picture: str) -> str:
    """The chart in place of its picture (a PNG in base64), which stays where scripts are off."""
    described = escape(specification["description"], quote=True)
    image = f'<img alt="{described}" src="data:image/png;base64,{picture}">'
    versionless = {key: value for key, value in specification.items() if key != "$schema"}
    drawn, options = json.dumps(versionless).replace("</", r"<\/"), json.dumps(EMBEDDED)
    return (
        f'<div class="chart" role="figure" aria-label="{described}"><div id="{name}">{image}</div></div>'
        f'<script>vegaEmbed("#{name}", {drawn}, {options});</script>'
    )


def write_script(path: Path) -> None:
    """Vega, Vega-Lite and Vega-Embed, as Altair's package brings them; their names stay within a function."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"(() => {{{vl_convert.javascript_bundle()}}})();", encoding="utf-8")
