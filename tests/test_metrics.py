"""The paper's numbers follow from each other, and ours from theirs."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t

from qreg_utils.metrics import (
    by_network,
    cell_scores,
    corruption_average,
    difference_to_fp32,
    frame_text,
    generalization_gap,
    interval,
    interval_text,
    last_epoch,
    network_label,
    noise_shape,
    paper_settings,
    random_effects,
    relative_error_improvement,
    results_table,
    setting_label,
    sort_settings,
    table_text,
    weight_only_settings,
    with_published,
    with_variant,
)
from qreg_utils.names import CLEAN, PAPER_CORRUPTIONS

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
    assert set(pd.read_csv(PAPER / "heatmap.csv")["cell"]) == {CLEAN, *PAPER_CORRUPTIONS}


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


def test_the_interval_is_students():
    half_width = 4.302653 * 1 / math.sqrt(3)
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - half_width, 2 + half_width), rel=1e-6)
    assert interval([5.0, 5.0, 5.0]) == (5, 5)
    low, high = interval([1.0, 2.0, 3.0], confidence=0.99)
    assert low < 2 - half_width < 2 + half_width < high


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0, math.inf, 2.0]])
def test_there_is_no_interval_of_one_value_or_of_what_is_no_number(values):
    assert all(map(math.isnan, interval(values)))


def fake_metrics(seeds=(0, 1, 2), severities=(1, 5)):
    """FP32 at 80 and a 4-bit run one point better, plus a known amount for each seed; clean is 10 higher."""
    rows = []
    for method, bits, gain in [("fp32", 32, 0.0), ("lsq", 4, 1.0)]:
        for seed in seeds:
            base = {
                "dataset": "d",
                "model": "m",
                "variant": "",
                "method": method,
                "weight_bits": bits,
                "activation_bits": bits,
            }
            value = 80 + gain + seed
            rows.append({**base, "seed": seed, "corruption": CLEAN, "severity": 0, "value": value + 10})
            for name in PAPER_CORRUPTIONS:
                for severity in severities:
                    row = {"seed": seed, "corruption": name, "severity": severity, "value": value - severity}
                    rows.append({**base, **row})
    return pd.DataFrame(rows).assign(metric="accuracy")


def test_studies_that_agree_are_weighted_by_their_variances():
    mean, low, high = random_effects([1.0, 1.0, 1.0], [0.1, 0.2, 0.4])
    half_width = t.ppf(0.975, 2) * math.sqrt(1 / (1 / 0.1 + 1 / 0.2 + 1 / 0.4))
    assert (mean, low, high) == pytest.approx((1.0, 1.0 - half_width, 1.0 + half_width))


def test_studies_that_differ_get_nearly_equal_weights():
    """Of two, DerSimonian and Laird's variance between studies is (difference^2 - both variances) / 2."""
    between = (10.0**2 - 0.5) / 2
    weights = [1 / (0.1 + between), 1 / (0.4 + between)]
    mean, low, high = random_effects([0.0, 10.0], [0.1, 0.4])
    assert mean == pytest.approx(10.0 * weights[1] / sum(weights))
    assert low < 0 < 10 < high
    assert all(map(math.isnan, random_effects([1.0], [0.1])))


def test_the_interval_of_a_mean_over_studies_holds_what_it_promises():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        variances = generator.uniform(0.05, 0.5, 6)
        means = 1.0 + generator.normal(0, 0.7, 6) + generator.normal(0, np.sqrt(variances))
        _, low, high = random_effects(means, variances)
        hits += low < 1.0 < high
    assert 0.92 < hits / 400 < 0.98


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
    table = results_table(corruption_average(cell_scores(fake_metrics()), PAPER_CORRUPTIONS))
    fp32, lsq = table.to_dict("records")
    assert (fp32["method"], lsq["method"]) == ("fp32", "lsq")
    assert lsq["avg_corrupted"] == pytest.approx(81 + 1 - 3)
    assert lsq["clean"] == pytest.approx(81 + 1 + 10)
    expected = [relative_error_improvement(77 + seed, 78 + seed) for seed in range(3)]
    assert lsq["relative_error_improvement"] == pytest.approx(np.mean(expected))
    bounds = (lsq["relative_error_improvement_low"], lsq["relative_error_improvement_high"])
    assert bounds == pytest.approx(interval(expected))
    assert (lsq["clean_low"], lsq["clean_high"]) == pytest.approx(interval([91, 92, 93]))
    assert (lsq["avg_corrupted_low"], lsq["avg_corrupted_high"]) == pytest.approx(interval([78, 79, 80]))
    assert fp32["relative_error_improvement"] == 0
    assert math.isnan(fp32["relative_error_improvement_low"]) and math.isnan(fp32["relative_error_improvement_high"])


def test_a_missing_corruption_is_an_error_not_a_smaller_average():
    metrics = fake_metrics()
    without = metrics[~((metrics["corruption"] == "fog") & (metrics["method"] == "lsq"))]
    with pytest.raises(ValueError, match="fog"):
        corruption_average(cell_scores(without), PAPER_CORRUPTIONS)


def test_a_missing_fp32_partner_leaves_the_improvement_open():
    metrics = fake_metrics()
    only_lsq = metrics[metrics["method"] == "lsq"]
    table = results_table(corruption_average(cell_scores(only_lsq), PAPER_CORRUPTIONS))
    assert table["relative_error_improvement"].isna().all()
    published = table.assign(published_avg_corrupted=83.94, published_relative_error_improvement=2.98)
    line = table_text(published).splitlines()[2]
    assert "LSQ" in line and "4/4" in line and "+2.98" in line


def test_a_missing_fp32_seed_leaves_the_improvement_open_too():
    metrics = fake_metrics()
    metrics = metrics[~((metrics["method"] == "fp32") & (metrics["seed"] == 2))]
    table = results_table(corruption_average(cell_scores(metrics), PAPER_CORRUPTIONS)).set_index("method")
    assert math.isnan(table.loc["lsq", "relative_error_improvement"])
    assert table["seeds"].to_dict() == {"fp32": 2, "lsq": 3}


def test_weights_only_is_a_setting_of_its_own():
    metrics = fake_metrics()
    weights_only = metrics[metrics["method"] == "lsq"].assign(activation_bits=32)
    weights_only["value"] += 5
    table = results_table(corruption_average(cell_scores(pd.concat([metrics, weights_only])), PAPER_CORRUPTIONS))
    assert table[["weight_bits", "activation_bits", "seeds"]].to_numpy().tolist() == [
        [32, 32, 3],
        [4, 32, 3],
        [4, 4, 3],
    ]
    labels = [setting_label(*pair) for pair in [(32, 32), (4, 4), (4, 32), (4, 8)]]
    assert labels == ["FP32", "4 bits", "4-bit weights", "w4a8"]


def test_generalization_gap_is_taken_after_the_last_epoch():
    base = {"dataset": "d", "model": "m", "variant": "", "method": "fp32", "weight_bits": 32, "activation_bits": 32}
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
    assert table.loc["long", ["gap_low", "gap_high", "rise_low", "rise_high"]].tolist() == pytest.approx(
        [0.8] * 2 + [0.3] * 2
    )
    assert table["rise"].to_dict() == {"short": pytest.approx(0.1), "long": pytest.approx(0.3)}


def test_detection_is_scored_by_map50():
    metrics = fake_metrics().assign(metric="map50")
    other = metrics.assign(metric="map50_95", value=0.0)
    both = cell_scores(pd.concat([metrics, other]))
    pd.testing.assert_frame_equal(both, cell_scores(fake_metrics()))


def test_weights_only_settings_stand_apart_from_the_papers():
    settings = pd.DataFrame(
        [("fp32", 32, 32), ("lsq", 4, 4), ("lsq", 4, 8), ("lsq", 4, 32), ("gaussian-noise", 4, 32)],
        columns=["method", "weight_bits", "activation_bits"],
    )
    assert paper_settings(settings).index.tolist() == [0, 1, 2]
    assert weight_only_settings(settings).index.tolist() == [0, 3, 4]


def test_the_noises_shape_is_the_layers_mean_by_size_after_the_last_epoch():
    rows = [
        {
            "dataset": "d",
            "model": "m",
            "variant": "",
            "method": "lsq",
            "weight_bits": 4,
            "activation_bits": 4,
            "seed": seed,
        }
        | {"epoch": epoch, "weights": weights, "sigma": value * epoch, "weight_sigma": 2.0, "kurtosis": value}
        | dict.fromkeys(["clipped", "correlation", "distance_to_normal", "distance_to_uniform"], value)
        for seed in (0, 1)
        for epoch in (0, 1)
        for weights, value in ((100, 0.1), (300, 0.5))
    ]
    shape = noise_shape(pd.DataFrame(rows)).iloc[0]
    assert shape["kurtosis"] == shape["distance_to_normal"] == pytest.approx(0.4)
    assert shape["relative_sigma"] == pytest.approx(0.2)


def variant(metrics, name, gain=0.0):
    """``metrics`` as of another variant, in which every score is better by ``gain``."""
    return metrics.assign(variant=name, value=metrics["value"] + gain)


def test_settings_are_compared_within_a_variant():
    """Half of the quantized network's gain is the variant's; FP32 has it too, and the differences stay."""
    both = pd.concat([fake_metrics(), variant(fake_metrics(), "no_augment", gain=5.0)])
    cells = cell_scores(both)
    deltas = difference_to_fp32(cells)
    assert len(deltas) == 2 * 3 * 20 and np.allclose(deltas["delta"], 1.0)
    table = results_table(corruption_average(cells, PAPER_CORRUPTIONS))
    assert table[["variant", "method", "seeds"]].to_numpy().tolist() == [
        ["", "fp32", 3],
        ["", "lsq", 3],
        ["no_augment", "fp32", 3],
        ["no_augment", "lsq", 3],
    ]
    expected = np.mean([relative_error_improvement(82 + seed, 83 + seed) for seed in range(3)])
    assert table["relative_error_improvement"].iloc[3] == pytest.approx(expected)


def test_a_variant_without_fp32_is_not_compared_with_that_of_another():
    both = pd.concat([fake_metrics(), variant(fake_metrics(), "no_augment").query("method == 'lsq'")])
    cells = cell_scores(both)
    assert set(difference_to_fp32(cells)["variant"]) == {""}
    improvement = results_table(corruption_average(cells, PAPER_CORRUPTIONS))["relative_error_improvement"]
    assert improvement.isna().tolist() == [False, False, True]


def test_the_last_epoch_is_that_of_the_variant():
    rows = [("", 0), ("", 1), ("long", 0), ("long", 1), ("long", 2)]
    frame = pd.DataFrame(rows, columns=["variant", "epoch"]).assign(dataset="d", model="m")
    assert last_epoch(frame)["epoch"].tolist() == [1, 2]


def test_a_variant_is_added_where_there_is_none():
    frame = pd.DataFrame({"dataset": ["d", "d"], "model": ["m", "m"], "method": ["fp32", "lsq"]})
    added = with_variant(frame)
    assert list(added) == ["dataset", "model", "variant", "method"] and set(added["variant"]) == {""}
    assert "variant" not in frame, "the frame that was given is left as it is"
    pd.testing.assert_frame_equal(with_variant(added), added)
    mixed = pd.concat([frame, added.assign(variant="wide")], ignore_index=True)
    assert with_variant(mixed)["variant"].tolist() == ["", "", "wide", "wide"]
    without = with_variant(frame.assign(variant=math.nan))  # how pandas reads a column of nothing
    pd.testing.assert_frame_equal(without[list(added)], added)
    assert list(with_variant(pd.DataFrame())) == ["variant"]


def test_a_corruption_besides_the_papers_is_in_no_average():
    metrics = fake_metrics()
    extra = metrics[metrics["corruption"] == "fog"].assign(corruption="rain", value=0.0)
    with_extra = cell_scores(pd.concat([metrics, extra]))
    assert "rain" in set(with_extra["cell"])
    ours, theirs = (corruption_average(cells, PAPER_CORRUPTIONS) for cells in (with_extra, cell_scores(metrics)))
    pd.testing.assert_frame_equal(ours, theirs)


def published_table():
    return pd.read_csv(PAPER / "table.csv")


def test_the_published_numbers_stand_beside_those_of_the_same_configuration():
    metrics = fake_metrics().assign(dataset="cifar10", model="resnet20")
    weights_only = metrics[metrics["method"] == "lsq"].assign(activation_bits=32)
    ablation = variant(metrics, "no_augment")
    cells = cell_scores(pd.concat([metrics, weights_only, ablation]))
    ours = results_table(corruption_average(cells, PAPER_CORRUPTIONS))
    table = with_published(ours, published_table())
    pd.testing.assert_frame_equal(table[list(ours)], ours)
    keys = ["variant", "method", "activation_bits"]
    found = table.set_index(keys)["published_avg_corrupted"].dropna().to_dict()
    assert found == {("", "fp32", 32): 82.80, ("", "lsq", 4): 83.94}
    improvement = table.set_index(keys)["published_relative_error_improvement"].dropna().to_dict()
    assert improvement == {("", "fp32", 32): 0, ("", "lsq", 4): 2.98}


def test_of_another_network_nothing_is_published_and_the_text_has_no_column_for_it():
    table = with_published(
        results_table(corruption_average(cell_scores(fake_metrics()), PAPER_CORRUPTIONS)), published_table()
    )
    assert table["published_avg_corrupted"].isna().all()
    assert "published" not in table_text(table)


def test_the_table_reads_as_the_papers_with_labels_and_intervals():
    metrics = fake_metrics().assign(dataset="cifar10", model="resnet20")
    table = results_table(corruption_average(cell_scores(metrics), PAPER_CORRUPTIONS))
    header, _, fp32, lsq = table_text(with_published(table, published_table())).splitlines()
    assert "variant" not in header
    cells = [cell.strip() for cell in lsq.strip("|").split("|")]
    assert cells[:7] == ["CIFAR-10", "ResNet-20", "LSQ", "4/4", "3", "92.00 [89.52, 94.48]", "79.00 [76.52, 81.48]"]
    assert cells[7].startswith("+2.") and " [+" in cells[7] and cells[8:] == ["83.94", "+2.98"]
    assert [cell.strip() for cell in fp32.strip("|").split("|")][7] == "+0.00"
    ablation = table_text(with_published(table.assign(variant="no_augment"), published_table())).splitlines()
    assert [cell.strip() for cell in ablation[0].strip("|").split("|")][:3] == ["data set", "model", "variant"]
    assert [cell.strip() for cell in ablation[2].strip("|").split("|")][2] == "no_augment"


def test_a_number_is_shown_with_its_interval_if_it_has_one():
    assert interval_text(98.4, 96.938, 99.862) == "98.40 [96.94, 99.86]"
    assert interval_text(1.0, 0.5, 2.0, spec="+.1f") == "+1.0 [+0.5, +2.0]"
    assert interval_text(1.0) == "1.00" and interval_text(math.nan) == "-"


def test_any_frame_is_shown_with_labels_and_intervals():
    frame = pd.DataFrame([{"dataset": "cifar10", "model": "resnet20", "variant": "", "method": "gaussian-noise"}])
    frame = frame.assign(weight_bits=4, gap=0.5, gap_low=0.25, gap_high=1.0, loss=2.0)
    header, _, row = frame_text(frame, digits=1).splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "dataset",
        "model",
        "method",
        "weight_bits",
        "gap",
        "loss",
    ]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["CIFAR-10", "ResNet-20", "training noise", "4", "0.5 [0.2, 1.0]", "2.0"]
    assert "| wide" in frame_text(frame.assign(variant="wide"))


def test_rows_are_in_the_order_of_the_table_of_names_and_unknown_names_come_last():
    rows = [
        ("voc", "yolov5n", "", "lsq", 8, 8),
        ("attic", "resnet8", "", "lsq", 8, 8),
        ("cifar10", "resnet20", "wide", "fp32", 32, 32),
        ("cifar10", "resnet20", "", "my-own", 8, 8),
        ("cifar10", "resnet20", "", "pact", 2, 2),
        ("cifar10", "resnet20", "", "pact", 8, 4),
        ("cifar10", "resnet20", "", "pact", 8, 8),
        ("cifar10", "resnet20", "", "lsq", 2, 2),
        ("cifar10", "my_net", "", "lsq", 2, 2),
        ("digits", "resnet8", "", "fp32", 32, 32),
    ]
    names = ["dataset", "model", "variant", "method", "weight_bits", "activation_bits"]
    shown = sort_settings(pd.DataFrame(rows, columns=names))
    order = [9, 7, 6, 5, 4, 3, 2, 8, 0, 1]
    assert list(shown.itertuples(index=False, name=None)) == [rows[position] for position in order]
    assert list(shown) == names


def test_rows_are_split_by_what_is_compared_in_reading_order():
    metrics = fake_metrics().assign(dataset="voc", model="yolov5n")
    classifier = metrics.assign(dataset="cifar10", model="resnet20")
    found = list(by_network(pd.concat([metrics, variant(classifier, "wide"), classifier])))
    assert [(label, name) for label, name, _ in found] == [
        ("ResNet-20, CIFAR-10", "cifar10-resnet20"),
        ("ResNet-20, CIFAR-10, wide", "cifar10-resnet20-wide"),
        ("YOLOv5n, VOC", "voc-yolov5n"),
    ]
    pd.testing.assert_frame_equal(found[0][2], classifier)
    assert list(by_network(pd.DataFrame())) == []


def test_a_network_is_called_by_its_labels():
    assert network_label("cifar10", "resnet20") == "ResNet-20, CIFAR-10"
    assert network_label("my_data", "my_net", "wide") == "my_net, my_data, wide"


def test_what_reads_results_does_without_torch():
    """A summary then opens in seconds."""
    modules = ("metrics", "claims", "provenance", "results", "figures.heatmaps", "figures.images", "figures.scores")
    imports = "; ".join(f"import qreg_utils.{name}" for name in (*modules, "figures.theory", "figures.training"))
    program = (
        f"{imports}; import sys; print([name for name in ('torch', 'qreg_utils.quantizers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
