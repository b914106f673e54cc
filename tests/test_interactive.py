"""Live charts hold the numbers that they tell, and a notebook keeps them as what a browser draws and as a picture."""

import numpy as np
import pandas as pd
import pytest
import torch

from qreg_utils.figures.interactive import (
    MIME,
    SCHEMA,
    both_kinds,
    differences_by_corruption,
    effects_with_intervals,
    levels_error_noise,
)
from qreg_utils.names import CLEAN, PAPER_CORRUPTIONS
from qreg_utils.quantizers import lsq


def rows_of(chart):
    """All data of a chart, a frame for each of its data sets."""
    return [pd.DataFrame(rows) for rows in chart.to_dict()["datasets"].values()]


def metrics(gain):
    """Three seeds of FP32 and of LSQ at 2 bits, which is better by ``gain``, more or less."""
    rows = []
    for seed in range(3):
        for method, bits, accuracy in (("fp32", 32, 50.0), ("lsq", 2, 50.0 + gain + 0.1 * (seed - 1))):
            base = {"dataset": "digits", "model": "resnet8", "variant": "", "method": method, "seed": seed}
            base |= {"weight_bits": bits, "activation_bits": bits, "metric": "accuracy", "value": accuracy}
            rows += [{**base, "corruption": name, "severity": 3} for name in PAPER_CORRUPTIONS]
            rows.append({**base, "corruption": CLEAN, "severity": 0})
    return pd.DataFrame(rows)


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_levels_errors_and_noise_are_the_quantizers(kind):
    line, values = kind([-1.2, 0.1, 0.4, 3.0]), kind([-0.5, 0.25, 0.75, -0.25])
    step = torch.tensor(0.5)

    def quantize(values, bits):
        return lsq(torch.as_tensor(values), step, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    curves, sizes = rows_of(levels_error_noise(line, values, quantize, range(2, 5)))
    assert curves.loc[curves["bits"] == 2, "level"].tolist() == [-1.0, 0.0, 0.5, 0.5]
    assert curves.loc[curves["bits"] == 4, "error"].round(6).tolist() == [0.2, -0.1, 0.1, 0.0]
    error = np.asarray(quantize(values, 2)) - np.asarray(values)
    assert sizes.loc[sizes["bits"] == 2, "relative noise"].item() == pytest.approx(
        error.std() / np.std(np.asarray(values)), abs=1e-4
    )


def test_a_cell_tells_its_interval_its_seeds_and_its_severities():
    (cells,) = rows_of(differences_by_corruption({"one": metrics(2.0)}))
    assert len(cells) == len(PAPER_CORRUPTIONS) + 1 and set(cells["setting"]) == {"LSQ, 2 bits"}
    fog = cells[cells["corruption"] == "fog"].iloc[0]
    assert (fog["points"], fog["seeds"], fog["severities"]) == (2.0, 3, "3")
    assert fog["95% interval"] == "+1.75 to +2.25" and fog["decided"]  # 2 +- 4.303 * 0.1 / sqrt(3)
    (cells,) = rows_of(differences_by_corruption({"one": metrics(0.2)}))
    assert not cells["decided"].any()


def test_the_reader_chooses_a_study_where_there_are_several():
    both = differences_by_corruption({"one": metrics(2.0), "two": metrics(-2.0)}).to_dict()
    (study,) = [param for param in both["params"] if param["name"] == "study"]
    assert study["bind"]["options"] == ["one", "two"] and study["value"] == "one"
    assert "params" not in differences_by_corruption({"one": metrics(2.0)}).to_dict()


def test_effects_are_those_of_improvement_that_were_measured():
    claims = pd.DataFrame(
        {
            "claim": ["a gain", "another", "a loss", "not yet"],
            "method": ["lsq", "dropout-0.5", "lsq", "lsq"],
            "bits": [2, 32, 2, 4],
            "detail": ["weights alone", np.nan, np.nan, np.nan],
            "measure": ["improvement", "improvement", "log-likelihood", "improvement"],
            "effect": [1.0, 0.5, 3.0, np.nan],
            "low": [0.5, -0.5, 2.0, np.nan],
            "high": [1.5, 1.5, 4.0, np.nan],
            "p": [0.01, 0.3, 0.0, np.nan],
            "seeds": [6, 6, 6, 0],
            "seeds_needed": [6, np.inf, 6, np.nan],
            "verdict": ["supported", "not decided", "supported", "not measured"],
        }
    )
    (rows,) = rows_of(effects_with_intervals({"one": claims}))
    assert rows["comparison"].tolist() == ["a gain: LSQ, 2 bits, weights alone", "another: dropout-0.5"]
    assert rows["verdict"].tolist() == ["supported", "not decided"] and rows["seeds needed"].isna().tolist() == [
        False,
        True,
    ]


def test_a_notebook_keeps_a_chart_and_its_picture():
    chart = differences_by_corruption({"one": metrics(2.0)})
    output = chart._repr_mimebundle_()
    assert output == both_kinds(chart.to_dict())
    assert output[MIME]["$schema"] == SCHEMA and output["image/png"].startswith(b"\x89PNG")
    assert output["text/plain"] == chart.description
