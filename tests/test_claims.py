"""The verdicts: right where the answer was put into the data, undecided where the seeds do not tell."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from qreg_utils import claims
from qreg_utils.claims import (
    CONTRADICTED,
    NEGLIGIBLE,
    NOT_DECIDED,
    NOT_MEASURED,
    SUPPORTED,
    Claim,
    claims_table,
    claims_text,
    verdict_lines,
)
from qreg_utils.metrics import relative_error_improvement
from qreg_utils.names import CLEAN, METHODS, PAPER_CORRUPTIONS, Method

ROOT = Path(__file__).resolve().parent.parent
ABOVE = Claim("up", "an effect", 0, math.inf, "")
GAIN = Claim("gain", "an effect", 0, math.inf, "", equivalent=0.84)
WITHIN = Claim("equal", "a ratio", 0.5, 2, "")
PUBLISHED = pd.DataFrame(
    {
        "dataset": ["cifar10", "voc"] * 3,
        "model": ["resnet20", "yolov5n"] * 3,
        "method": "lsq",
        "bits": [8, 8, 4, 4, 2, 2],
        "relative_error_improvement": [3.33, 0.96, 2.98, -2.31, -8.32, -7.86],
    }
)
FP32, LSQ8, LSQ4, LSQ2 = ("fp32", 32, 32), ("lsq", 8, 8), ("lsq", 4, 4), ("lsq", 2, 2)
LSQ4_WEIGHTS, NOISE4 = ("lsq", 4, 32), ("gaussian-noise", 4, 32)


def judged(claim, *comparisons, looks=()):
    """The rows of comparisons, each given by its seeds' values."""
    keys = dict.fromkeys(claims.KEYS, "x")
    rows = [
        {**keys, "bits": bits, "seed": seed, "value": value}
        for bits, values in enumerate(comparisons)
        for seed, value in enumerate(values)
    ]
    return claims._judged(claim, pd.DataFrame(rows), looks)


@pytest.mark.parametrize(
    "claim, values, verdict",
    [
        (ABOVE, [1, 2, 3, 2], SUPPORTED),
        (ABOVE, [-1, -2, -3, -2], CONTRADICTED),
        (ABOVE, [-1, 1, 2, 0], NOT_DECIDED),
        (ABOVE, [0, 0, 0], NOT_DECIDED),
        (ABOVE, [1], NOT_DECIDED),
        (WITHIN, [1, 1.2, 1.1], SUPPORTED),
        (WITHIN, [0.4, 1.2, 1.1], NOT_DECIDED),
        (WITHIN, [2.4, 2.5, 2.6], CONTRADICTED),
        (WITHIN, [-3, -2, -1], CONTRADICTED),
        (GAIN, [1, 2, 3, 2], SUPPORTED),
        (GAIN, [0.1, -0.1, 0.2, 0], NEGLIGIBLE),
        (GAIN, [0.3, 0.4, 0.35, 0.3], NEGLIGIBLE),  # above zero, but too small to matter
        (GAIN, [0.7, 0.9, 0.8, 0.75], SUPPORTED),  # its interval leaves the region of equivalence
    ],
)
def test_a_verdict_is_where_the_interval_lies(claim, values, verdict):
    (row,) = judged(claim, values).itertuples()
    assert row.verdict == verdict
    if verdict == SUPPORTED:
        assert claim.low < row.low and row.high < claim.high
    if verdict == CONTRADICTED:
        assert row.high < claim.low or row.low > claim.high
    if verdict == NEGLIGIBLE:
        assert -claim.equivalent < row.low and row.high < claim.equivalent


def test_the_comparison_of_the_methods_page_worked_by_hand():
    """docs/methods.md: five seeds, 2.1, 0.4, 1.7, 3.0 and 1.3 above FP32."""
    (row,) = judged(GAIN, [2.1, 0.4, 1.7, 3.0, 1.3]).itertuples()
    assert row.effect == pytest.approx(1.7) and row.spread == pytest.approx(0.962, abs=1e-3)
    assert (row.low, row.high) == pytest.approx((0.51, 2.89), abs=0.005)
    assert row.p == pytest.approx(0.0168, abs=1e-4) and row.verdict == SUPPORTED
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for number in ("1.70", "0.962", "0.51 to 2.89", "0.0168"):
        assert number in page


def test_holms_steps():
    assert claims.holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert claims.holm([0.5, 0.9]).tolist() == [1, 1]
    assert claims.holm([]).tolist() == []


def test_zeros_are_no_comparison():
    found = judged(ABOVE, [1, 2, 3, 2], [0, 0, 0, 0])
    assert set(found["comparisons"]) == {1} and found["verdict"].tolist() == [SUPPORTED, NOT_DECIDED]


def test_looks_spend_the_level():
    looks = (6, 10, 15, 20)
    levels = [claims.level_at(n, looks) for n in looks]
    assert sum(levels) == pytest.approx(0.05) and levels == sorted(levels)
    assert levels[0] == pytest.approx(0.00035, abs=1e-5)
    assert claims.level_at(5, looks) == 0 and claims.level_at(12, looks) == levels[1] and claims.level_at(7, ()) == 0.05
    values = [1, 2, 3, 2, 2.5, 1.5]
    assert judged(ABOVE, values)["verdict"].tolist() == [SUPPORTED]
    assert judged(ABOVE, [*values[:4], -1, 2], looks=looks)["verdict"].tolist() == [NOT_DECIDED]


def test_false_alarms_over_all_looks_are_within_the_level():
    """2,000 studies without an effect, each stopped at the first look that decides."""
    values = np.random.default_rng(0).normal(size=(2000, 20))
    alarms = np.zeros(len(values), dtype=bool)
    for look in (6, 10, 15, 20):
        p = scipy.stats.ttest_1samp(values[:, :look], 0, axis=1).pvalue
        alarms |= p < claims.level_at(look, (6, 10, 15, 20))
    assert alarms.mean() < 0.05


def test_the_power_of_known_designs():
    assert claims.seeds_needed(0.8) == 15 and claims.seeds_needed(1.15) == 9  # as tables of the t-test have it
    assert claims.seeds_needed(0.1) == math.inf and claims.seeds_needed(0) == math.inf
    assert claims.power(15, claims.detectable(15)) == pytest.approx(0.8, abs=1e-6)
    looks = (6, 10, 15, 20)
    assert [claims.seeds_needed(distance, looks=looks) for distance in (10, 1.15, 0.8)] == [6, 15, 20]
    assert claims.seeds_needed(0.3, looks=looks) == claims.seeds_needed(0.3) > 20
    (row,) = judged(ABOVE, [-1, 1, 2, 0]).itertuples()
    assert row.seeds_needed > 4 and row.detectable == pytest.approx(row.spread * claims.detectable(4))


def rows_of(setting, seed, **more):
    method, weight_bits, activation_bits = setting
    widths = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    return {"dataset": "digits", "model": "resnet8", "variant": "", "method": method, **widths, "seed": seed, **more}


def metrics_of(accuracies):
    """``accuracies`` maps a setting to one accuracy a seed, the same for every corruption."""
    return pd.DataFrame(
        [
            rows_of(setting, seed, corruption=cell, severity=int(cell != CLEAN), metric="accuracy", value=value)
            for setting, values in accuracies.items()
            for seed, value in enumerate(values)
            for cell in (CLEAN, *PAPER_CORRUPTIONS)
        ]
    )


def history_of(losses):
    """``losses`` maps a setting to (training loss, validation losses of two epochs), with a jitter of the seeds."""
    return pd.DataFrame(
        [
            rows_of(setting, seed, epoch=epoch, split=split, loss=loss * (1 + 0.01 * seed), metric=0.0, noise=0.0)
            for setting, (train, val) in losses.items()
            for seed in range(3)
            for epoch in range(2)
            for split, loss in (("train", train), ("val", val[epoch]))
        ]
    )


def noise_of(sigmas, distance):
    return pd.DataFrame(
        [
            rows_of(setting, seed, epoch=1, layer=layer, bits=setting[1], weights=weights)
            | {"sigma": sigma * (1 + 0.001 * seed * setting[1])}
            | {"weight_sigma": 1.0, "distance_to_normal": distance + 0.001 * seed}
            for setting, sigma in sigmas.items()
            for seed in range(3)
            for layer, weights in (("conv1", 10), ("fc", 1000))
        ]
    )


def penalty_of(ratios):
    return pd.DataFrame(
        [
            rows_of(FP32, seed, bits=bits, noise=noise, predicted=0.1 * bits, measured=0.1 * bits * ratio)
            for (noise, bits), values in ratios.items()
            for seed, ratio in enumerate(values)
        ]
    )


ACCURACY = {FP32: [80, 81, 82], LSQ8: [82, 83.01, 84], LSQ4: [80, 83, 80], LSQ2: [70, 71.02, 72]}
HISTORY = {FP32: (0.1, (1.0, 2.0)), LSQ8: (0.5, (1.0, 1.0)), LSQ4: (0.1, (1.0, 2.5)), LSQ2: (0.5, (1.0, 1.0))}
SIGMA = {LSQ8: 0.01, LSQ4: 0.1, LSQ2: 0.1}
NONE = pd.DataFrame()


def table(accuracy=ACCURACY, history=HISTORY, noise=NONE, penalty=NONE):
    return claims_table(metrics_of(accuracy), history_of(history), noise, penalty, PUBLISHED)


def of(found, claim, **which):
    rows = found[found["claim"].str.startswith(claim)]
    for name, value in which.items():
        rows = rows[rows[name] == value]
    return rows


def test_what_was_put_in_comes_out():
    found = table()
    eight = of(found, "8 bits beat FP32 on corrupted data").iloc[0]
    gains = [relative_error_improvement(*pair) for pair in zip(ACCURACY[FP32], ACCURACY[LSQ8], strict=True)]
    assert eight["effect"] == pytest.approx(sum(gains) / 3) and eight["verdict"] == SUPPORTED
    assert eight["published"] == "+3.33 (ResNet-20), +0.96 (YOLOv5n)" and eight["seeds"] == 3
    assert of(found, "4 bits beat")["verdict"].tolist() == [NOT_DECIDED]
    assert of(found, "4 bits are worse")["verdict"].tolist() == [NOT_MEASURED]  # no YOLOv5n here
    assert of(found, "2 bits are worse")["verdict"].tolist() == [SUPPORTED]
    assert of(found, "8 bits are the reliable")["verdict"].tolist() == [SUPPORTED]
    gap = of(found, "FP32 overfits where quantized models do not (gap)")
    assert dict(zip(gap["bits"], gap["verdict"], strict=True)) == {8: SUPPORTED, 4: CONTRADICTED, 2: SUPPORTED}
    rise = of(found, "FP32 overfits where quantized models do not (rise)")
    assert dict(zip(rise["bits"], rise["verdict"], strict=True)) == {8: SUPPORTED, 4: CONTRADICTED, 2: SUPPORTED}


def test_the_opposite_is_contradicted():
    accuracy = ACCURACY | {LSQ8: ACCURACY[LSQ2], LSQ2: ACCURACY[LSQ8]}
    found = table(accuracy)
    for claim in ("8 bits beat", "2 bits are worse", "8 bits are the reliable"):
        assert of(found, claim)["verdict"].tolist() == [CONTRADICTED]


def test_eight_bits_are_not_reliable_when_one_setting_is_undecided():
    pact = {("pact", 8, 8): [80, 85, 80]}
    found = table(ACCURACY | pact, HISTORY | {("pact", 8, 8): (0.1, (1.0, 1.0))})
    assert set(of(found, "8 bits beat")["verdict"]) == {SUPPORTED, NOT_DECIDED}
    assert of(found, "8 bits are the reliable")["verdict"].tolist() == [NOT_DECIDED]


def test_eight_bits_are_not_contradicted_by_the_mean_of_undecided_settings():
    """Opposite luck of two methods makes a mean without spread."""
    accuracy = {FP32: [80, 80, 80], LSQ8: [70, 85, 79.1], ("pact", 8, 8): [85, 69.8, 79]}
    history = {setting: (0.1, (1.0, 1.0)) for setting in accuracy}
    found = table(accuracy, history)
    assert set(of(found, "8 bits beat")["verdict"]) == {NOT_DECIDED}
    assert of(found, "8 bits are the reliable")["verdict"].tolist() == [NOT_DECIDED]


def test_settings_that_differ_in_their_activations_are_not_more_seeds():
    wide = ("lsq", 4, 8)
    accuracy, history = ACCURACY | {wide: [80, 83, 80]}, HISTORY | {wide: (0.1, (1.0, 2.5))}
    found = table(accuracy, history, noise_of(SIGMA | {wide: 0.1}, 0.05))
    assert set(found.loc[found["seeds"] > 0, "seeds"]) == {3}
    assert sorted(of(found, "4 bits beat")["activation_bits"]) == [4, 8]
    assert len(of(found, "Noise doubles")) == 2 and len(of(found, "The noise is normal")) == 4


def test_seeds_that_agree_to_the_last_digit_decide_nothing():
    accuracy = ACCURACY | {FP32: [80, 80, 80], LSQ8: [81, 81, 81]}
    assert of(table(accuracy), "8 bits beat")["verdict"].tolist() == [NOT_DECIDED]


def test_more_comparisons_raise_the_p_that_decides():
    alone = of(table(), "8 bits beat").iloc[0]
    more = {("pact", 8, 8): [80, 85, 80], ("dorefa", 8, 8): [80, 85, 80]}
    history = HISTORY | {setting: (0.1, (1.0, 1.0)) for setting in more}
    among = of(table(ACCURACY | more, history), "8 bits beat", method="lsq").iloc[0]
    assert among["comparisons"] == 3 and alone["comparisons"] == 1
    assert among["low"] == pytest.approx(alone["low"]) and among["p"] == pytest.approx(3 * alone["p"])


def test_noise_that_grows_and_noise_that_does_not():
    found = of(table(noise=noise_of(SIGMA, 0.05)), "Noise doubles")
    assert found[["bits", "detail"]].to_numpy().tolist() == [[2, "than 4 bits"], [4, "than 8 bits"]]
    assert found["effect"].tolist() == pytest.approx([0, math.log2(10) / 4], abs=0.01)  # a bit
    assert found["verdict"].tolist() == [CONTRADICTED, SUPPORTED]


@pytest.mark.parametrize("distance, verdict", [(0.01, SUPPORTED), (0.057, CONTRADICTED), (0.028, NOT_DECIDED)])
def test_noise_is_normal_where_its_distance_is_small(distance, verdict):
    found = of(table(noise=noise_of(SIGMA, distance)), "The noise is normal")
    assert set(found["verdict"]) == {verdict} and len(found) == 3


def test_old_results_without_the_statistics_are_not_measured():
    old = noise_of(SIGMA, 0.01).drop(columns="distance_to_normal")
    found = table(noise=old)
    assert of(found, "The noise is normal")["verdict"].tolist() == [NOT_MEASURED]
    assert of(found, "The penalty")["verdict"].tolist() == [NOT_MEASURED]
    assert of(found, "Noise doubles")["verdict"].notna().all()


def test_the_penalty_predicts_or_does_not():
    ratios = {("normal", 8): [1, 1.1, 0.9], ("quantization", 4): [30, 31, 32], ("normal", 2): [0.5, 2, 1]}
    ratios |= {("normal", 5): [9, 9, 9], ("uniform", 8): [9, 9, 9]}  # neither is compared
    found = of(table(penalty=penalty_of(ratios)), "The penalty")
    verdicts = dict(zip(found["bits"], found["verdict"], strict=True))
    assert verdicts == {8: SUPPORTED, 4: CONTRADICTED, 2: NOT_DECIDED}


@pytest.mark.parametrize(
    "control, verdict",
    [([82, 83, 84], SUPPORTED), ([70, 71, 72], CONTRADICTED), ([82, 85, 80], NOT_DECIDED)],
)
def test_a_control_is_compared_with_lsq_on_weights_alone(control, verdict):
    accuracy = ACCURACY | {LSQ4_WEIGHTS: [82, 83, 84.05], NOISE4: control}
    history = HISTORY | {setting: (0.1, (1.0, 1.0)) for setting in (LSQ4_WEIGHTS, NOISE4)}
    found = table(accuracy, history)
    assert of(found, "Noise alone")["verdict"].tolist() == [verdict]
    assert set(of(found, "4 bits beat")["method"]) == {"lsq"} and len(of(found, "4 bits beat")) == 1  # with activations


def test_one_seed_decides_nothing():
    accuracy = {setting: values[:1] for setting, values in ACCURACY.items()}
    found = claims_table(metrics_of(accuracy), history_of(HISTORY).query("seed == 0"), NONE, NONE, PUBLISHED)
    assert set(found["verdict"]) == {NOT_DECIDED, NOT_MEASURED}


def test_the_text_names_each_claim_once_and_has_every_row():
    found = table(noise=noise_of(SIGMA, 0.05))
    lines = claims_text(found).splitlines()
    assert len(lines) == 2 + len(found)
    text = "\n".join(lines)
    for claim in found["claim"].unique():
        assert text.count(f"| **{claim}**: ") == 1
    assert "**supported**" in text and "nan" not in text


def variant(frame, name):
    return frame.assign(variant=name)


def test_each_variant_is_compared_with_its_own_fp32_and_named():
    """The variant is worse throughout, and FP32 of the other one is no partner for it."""
    worse = {setting: [value - 20 for value in values] for setting, values in ACCURACY.items()}
    metrics = pd.concat([metrics_of(ACCURACY), variant(metrics_of(worse), "no_augment")])
    history = pd.concat([history_of(HISTORY), variant(history_of(HISTORY), "no_augment")])
    noise = pd.concat([noise_of(SIGMA, 0.05), variant(noise_of(SIGMA, 0.05), "no_augment")])
    ratios = penalty_of({("normal", 8): [1, 1.1, 0.9]})
    penalty = pd.concat([ratios, variant(ratios, "no_augment")])
    found = claims_table(metrics, history, noise, penalty, PUBLISHED)
    eight = of(found, "8 bits beat")
    assert eight["variant"].tolist() == ["", "no_augment"] and set(eight["seeds"]) == {3}
    gains = [relative_error_improvement(*pair) for pair in zip(worse[FP32], worse[LSQ8], strict=True)]
    assert eight["effect"].iloc[1] == pytest.approx(sum(gains) / 3) and eight["comparisons"].tolist() == [2, 2]
    once = table(noise=noise_of(SIGMA, 0.05), penalty=ratios)
    for claim in ("Noise doubles", "The noise is normal", "The penalty", "FP32 overfits"):
        assert len(of(found, claim)) == 2 * len(of(once, claim))
        assert set(of(found, claim)["seeds"]) == {3}
    assert of(found, "8 bits are the reliable")["variant"].tolist() == ["all"]
    text = claims_text(found)
    assert "LSQ, ResNet-8, digits, no_augment" in text and "| LSQ, ResNet-8, digits " in text


def test_without_variants_the_column_is_empty():
    assert set(table()["variant"]) == {""}


def test_a_control_is_compared_within_its_variant():
    accuracy = ACCURACY | {LSQ4_WEIGHTS: [82, 83, 84.05], NOISE4: [82, 83, 84]}
    lone = variant(metrics_of({FP32: ACCURACY[FP32], NOISE4: [70, 71, 72]}), "no_augment")
    history = {setting: (0.1, (1.0, 1.0)) for setting in accuracy}
    found = claims_table(pd.concat([metrics_of(accuracy), lone]), history_of(history), NONE, NONE, PUBLISHED)
    assert of(found, "Noise alone")[["variant", "verdict"]].to_numpy().tolist() == [["", SUPPORTED]]


@pytest.fixture
def pact_noise():
    METHODS.add(Method("pact-noise", "PACT's noise", "control", "#123456", ("classification",), noise_source="pact"))
    yield
    METHODS.remove("pact-noise")


@pytest.mark.usefixtures("pact_noise")
def test_a_control_is_compared_with_the_quantizer_whose_noise_it_has():
    pact, control = ("pact", 4, 32), ("pact-noise", 4, 32)
    accuracy = ACCURACY | {LSQ4_WEIGHTS: [60, 61, 62], pact: [82, 83, 84.05], control: [82, 83, 84]}
    found = table(accuracy, {setting: (0.1, (1.0, 1.0)) for setting in accuracy})
    rows = of(found, "Noise alone")
    assert rows[["method", "verdict"]].to_numpy().tolist() == [["pact-noise", SUPPORTED]]


def test_detectors_are_told_by_their_task_not_by_their_name():
    """A network without a row on a data set for detection is a detector."""
    metrics = metrics_of({FP32: [50, 51, 52], LSQ4: [40, 41.05, 42]}).assign(dataset="voc", model="my_detector")
    history = history_of({FP32: (0.1, (1.0, 1.0)), LSQ4: (0.1, (1.0, 1.0))}).assign(dataset="voc", model="my_detector")
    found = claims_table(metrics.assign(metric="map50"), history, NONE, NONE, PUBLISHED)
    assert of(found, "4 bits are worse")["verdict"].tolist() == [SUPPORTED]
    assert of(found, "4 bits beat")["verdict"].tolist() == [NOT_MEASURED]
    assert of(found, "4 bits are worse")["published"].tolist() == ["-2.31 (YOLOv5n)"]
    assert of(found, "4 bits beat")["published"].tolist() == ["+2.98 (ResNet-20)"]


def test_other_corruptions_than_the_papers_play_no_part():
    metrics = metrics_of(ACCURACY)
    rain = metrics[metrics["corruption"] == "fog"].assign(corruption="rain", value=0.0)
    found = claims_table(pd.concat([metrics, rain]), history_of(HISTORY), NONE, NONE, PUBLISHED)
    pd.testing.assert_frame_equal(found, table())


def test_the_text_shows_effects_with_their_intervals():
    found = table()
    row = next(line for line in claims_text(found).splitlines() if "**8 bits beat" in line)
    eight = of(found, "8 bits beat FP32 on corrupted data").iloc[0]
    assert f"| {eight['effect']:+.3g} [{eight['low']:+.3g}, {eight['high']:+.3g}] " in row


def test_without_fp32_nothing_is_measured_and_that_is_said():
    metrics = metrics_of({LSQ8: [50, 51, 52]})
    found = claims_table(metrics, history_of({LSQ8: (0.1, (1.0, 1.0))}), NONE, NONE, PUBLISHED)
    assert set(found["verdict"]) == {NOT_MEASURED}
    assert claims_text(found).count("| not measured |") == len(found)


def test_a_line_for_each_claim_counts_its_verdicts():
    lines = verdict_lines(table())
    assert "| 8 bits beat FP32 on corrupted data " in lines and "not measured" not in lines
    (line,) = (line for line in lines.splitlines() if line.startswith("| 2 bits are worse"))
    assert "**supported**" in line and "[" in line  # of one comparison with its effect
    assert verdict_lines(table().query("seeds == 0")).splitlines()[0].startswith("| claim")
