"""The paper's numbers follow from each other, and ours from theirs."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qreg_utils.corruptions import CORRUPTIONS
from qreg_utils.metrics import (
    CLEAN,
    cell_scores,
    confidence_interval,
    corruption_average,
    difference_to_fp32,
    generalization_gap,
    level_label,
    noise_shape,
    paper_levels,
    relative_error_improvement,
    results_table,
    table_text,
    weight_levels,
)

PAPER = Path(__file__).resolve().parent.parent / "results" / "published"


def test_relative_error_improvement_reproduces_every_row_of_the_published_table():
    table = pd.read_csv(PAPER / "table.csv")
    fp32 = table[table["method"] == "fp32"].set_index("dataset")["avg_corrupted"]
    for row in table.itertuples():
        ours = relative_error_improvement(fp32=fp32[row.dataset], quantized=row.avg_corrupted)
        assert ours == pytest.approx(row.relative_error_improvement, abs=0.011), row


def test_the_published_average_leaves_out_the_clean_test_set():
    table = pd.read_csv(PAPER / "table.csv")
    heatmap = pd.read_csv(PAPER / "heatmap.csv")
    fp32 = table[table["method"] == "fp32"].set_index("dataset")["avg_corrupted"]
    compared = 0
    for (dataset, bits), cells in heatmap.groupby(["dataset", "bits"]):
        if cells["delta_vs_fp32"].isna().any():
            continue  # two panels lost decimals in the slides
        row = table[(table["dataset"] == dataset) & (table["bits"] == bits)].iloc[0]
        published = row["avg_corrupted"] - fp32[dataset]
        corrupted = cells[cells["cell"] != CLEAN]["delta_vs_fp32"]
        assert len(corrupted) == 19
        assert corrupted.mean() == pytest.approx(published, abs=0.01)
        compared += 1
        if abs(cells["delta_vs_fp32"].mean() - corrupted.mean()) > 0.03:  # where it makes a difference
            assert cells["delta_vs_fp32"].mean() != pytest.approx(published, abs=0.01)
    assert compared == 7


def test_cells_of_the_published_heatmap_are_ours():
    assert set(pd.read_csv(PAPER / "heatmap.csv")["cell"]) == {CLEAN, *CORRUPTIONS}


@given(st.floats(0, 99.9), st.floats(0, 99.9))
def test_relative_error_improvement_is_antisymmetric_and_signed(a, b):
    score = relative_error_improvement(fp32=a, quantized=b)
    assert score == pytest.approx(-relative_error_improvement(fp32=b, quantized=a), abs=1e-9)
    assert (score > 0) == (b > a) or abs(a - b) < 1e-9


def test_relative_error_improvement_at_the_ends():
    assert relative_error_improvement(100, 100) == 0
    assert relative_error_improvement(90, 100) == math.inf
    assert relative_error_improvement(0, 90) == pytest.approx(100)  # the error falls to a tenth
    with pytest.raises(ValueError, match="quantized=101"):
        relative_error_improvement(50, 101)


def test_confidence_interval_is_students():
    assert confidence_interval([1.0, 2.0, 3.0]) == pytest.approx(4.302653 * 1 / math.sqrt(3), rel=1e-6)
    assert math.isnan(confidence_interval([1.0]))


def fake_metrics(seeds=(0, 1, 2), severities=(1, 5)):
    """FP32 at 80 and a 4-bit run one point better, plus a known amount for each seed; clean is 10 higher."""
    rows = []
    for method, bits, gain in [("fp32", 32, 0.0), ("lsq", 4, 1.0)]:
        for seed in seeds:
            base = {"dataset": "d", "model": "m", "method": method, "weight_bits": bits, "activation_bits": bits}
            value = 80 + gain + seed
            rows.append({**base, "seed": seed, "corruption": CLEAN, "severity": 0, "value": value + 10})
            for name in CORRUPTIONS:
                for severity in severities:
                    row = {"seed": seed, "corruption": name, "severity": severity, "value": value - severity}
                    rows.append({**base, **row})
    return pd.DataFrame(rows).assign(metric="accuracy")


def test_cells_average_over_severities_and_ignore_other_metrics():
    metrics = fake_metrics()
    loss = metrics.assign(metric="loss", value=-1.0)
    cells = cell_scores(pd.concat([metrics, loss]))
    fog = cells[(cells["method"] == "fp32") & (cells["seed"] == 0) & (cells["cell"] == "fog")]
    assert fog["score"].item() == 80 - 3


def test_differences_are_paired_by_seed():
    deltas = difference_to_fp32(cell_scores(fake_metrics()))
    assert len(deltas) == 3 * 20
    assert np.allclose(deltas["delta"], 1.0)


def test_table_averages_corruptions_only_and_pairs_seeds():
    table = results_table(corruption_average(cell_scores(fake_metrics()), CORRUPTIONS))
    fp32, lsq = table.to_dict("records")
    assert (fp32["method"], lsq["method"]) == ("fp32", "lsq")
    assert lsq["avg_corrupted"] == pytest.approx(81 + 1 - 3)
    assert lsq["clean"] == pytest.approx(81 + 1 + 10)
    expected = [relative_error_improvement(77 + seed, 78 + seed) for seed in range(3)]
    assert lsq["relative_error_improvement"] == pytest.approx(np.mean(expected))
    assert lsq["relative_error_improvement_ci"] == pytest.approx(confidence_interval(expected))
    assert fp32["relative_error_improvement"] == 0


def test_a_missing_corruption_is_an_error_not_a_smaller_average():
    metrics = fake_metrics()
    without = metrics[~((metrics["corruption"] == "fog") & (metrics["method"] == "lsq"))]
    with pytest.raises(ValueError, match="fog"):
        corruption_average(cell_scores(without), CORRUPTIONS)


def test_a_missing_fp32_partner_leaves_the_improvement_open():
    metrics = fake_metrics()
    only_lsq = metrics[metrics["method"] == "lsq"]
    table = results_table(corruption_average(cell_scores(only_lsq), CORRUPTIONS))
    assert table["relative_error_improvement"].isna().all()
    published = table.assign(published_avg_corrupted=83.94, published_relative_error_improvement=2.98)
    line = table_text(published).splitlines()[2]
    assert "LSQ" in line and "4/4" in line and "+2.98" in line


def test_a_missing_fp32_seed_leaves_the_improvement_open_too():
    metrics = fake_metrics()
    metrics = metrics[~((metrics["method"] == "fp32") & (metrics["seed"] == 2))]
    table = results_table(corruption_average(cell_scores(metrics), CORRUPTIONS)).set_index("method")
    assert math.isnan(table.loc["lsq", "relative_error_improvement"])
    assert table["seeds"].to_dict() == {"fp32": 2, "lsq": 3}


def test_weights_only_is_a_level_of_its_own():
    metrics = fake_metrics()
    weights_only = metrics[metrics["method"] == "lsq"].assign(activation_bits=32)
    weights_only["value"] += 5
    table = results_table(corruption_average(cell_scores(pd.concat([metrics, weights_only])), CORRUPTIONS))
    assert table[["weight_bits", "activation_bits", "seeds"]].to_numpy().tolist() == [
        [32, 32, 3],
        [4, 32, 3],
        [4, 4, 3],
    ]
    labels = [level_label(*pair) for pair in [(32, 32), (4, 4), (4, 32), (4, 8)]]
    assert labels == ["FP32", "4 bits", "4-bit weights", "w4a8"]


def test_generalization_gap_is_taken_after_the_last_epoch():
    base = {"dataset": "d", "model": "m", "method": "fp32", "weight_bits": 32, "activation_bits": 32}
    rows = [
        {
            **base,
            "dataset": data,
            "seed": seed,
            "epoch": epoch,
            "split": split,
            "loss": loss + 0.1 * epoch * (split == "val"),
        }
        for data, epochs in [("short", 2), ("long", 4)]
        for seed in (0, 1)
        for epoch in range(epochs)
        for split, loss in [("train", 1.0), ("val", 1.5)]
    ]
    table = generalization_gap(pd.DataFrame(rows)).set_index("dataset")
    assert table["gap"].to_dict() == {"short": pytest.approx(0.6), "long": pytest.approx(0.8)}
    assert table["rise"].to_dict() == {"short": pytest.approx(0.1), "long": pytest.approx(0.3)}


def test_detection_is_scored_by_map50():
    metrics = fake_metrics().assign(metric="map50")
    other = metrics.assign(metric="map50_95", value=0.0)
    both = cell_scores(pd.concat([metrics, other]))
    pd.testing.assert_frame_equal(both, cell_scores(fake_metrics()))


def test_weights_only_levels_stand_apart_from_the_papers():
    levels = pd.DataFrame(
        [("fp32", 32, 32), ("lsq", 4, 4), ("lsq", 4, 8), ("lsq", 4, 32), ("gaussian-noise", 4, 32)],
        columns=["method", "weight_bits", "activation_bits"],
    )
    assert paper_levels(levels).index.tolist() == [0, 1, 2]
    assert weight_levels(levels).index.tolist() == [0, 3, 4]


def test_the_noises_shape_is_the_layers_mean_by_size_after_the_last_epoch():
    rows = [
        {"dataset": "d", "model": "m", "method": "lsq", "weight_bits": 4, "activation_bits": 4, "seed": seed}
        | {"epoch": epoch, "weights": weights, "sigma": value * epoch, "weight_sigma": 2.0, "kurtosis": value}
        | dict.fromkeys(["clipped", "correlation", "distance_to_normal", "distance_to_uniform"], value)
        for seed in (0, 1)
        for epoch in (0, 1)
        for weights, value in ((100, 0.1), (300, 0.5))
    ]
    shape = noise_shape(pd.DataFrame(rows)).iloc[0]
    assert shape["kurtosis"] == shape["distance_to_normal"] == pytest.approx(0.4)
    assert shape["relative_sigma"] == pytest.approx(0.2)
