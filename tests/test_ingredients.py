"""Quantization taken apart: which setting has which ingredient, and which is compared with which."""

import pandas as pd
import pytest

from qreg_utils.claims import claims_table, claims_text
from qreg_utils.ingredients import ingredients, minus_the_whole, rounding_itself, with_ingredients
from qreg_utils.names import CLEAN, PAPER_CORRUPTIONS

NETWORK = {"dataset": "cifar10", "model": "resnet8", "variant": ""}
# method, widths -> what it has of quantization, at which width, and a made-up improvement
SETTINGS = {
    ("fp32", 32, 32): ("", 32, 0.0),
    ("lsq", 4, 4): ("weights and activations", 4, 3.0),
    ("lsq", 4, 32): ("weights alone", 4, 1.0),
    ("lsq", 32, 4): ("activations alone", 4, 2.5),
    ("lsq-unrounded", 4, 4): ("LSQ, clipped only", 4, 2.0),
    ("lsq-unrounded", 4, 32): ("LSQ, clipped only, weights", 4, 0.5),
    ("gaussian-noise", 32, 4): ("training noise, activations", 4, 1.5),
    ("gaussian-noise", 4, 4): ("training noise", 4, 1.25),
    ("dropout-0.5", 32, 32): ("dropout-0.5", 32, 4.0),
}


def improvements():
    rows = []
    for setting, (_, _, value) in SETTINGS.items():
        names = dict(zip(("method", "weight_bits", "activation_bits"), setting, strict=True))
        rows += [{**NETWORK, **names, "seed": seed, "improvement": value + seed} for seed in (0, 1)]
    return with_ingredients(pd.DataFrame(rows))


def by_setting(rows, value):
    return {
        (row.method, row.weight_bits, row.activation_bits, row.seed): getattr(row, value) for row in rows.itertuples()
    }


def test_every_setting_says_what_it_has_of_quantization():
    rows = improvements()
    for setting, (ingredient, bits, _) in SETTINGS.items():
        assert by_setting(rows, "ingredient")[*setting, 0] == ingredient
        assert by_setting(rows, "width")[*setting, 0] == bits
    whole = {setting[:3] for setting in by_setting(rows, "seed")} - {
        setting[:3] for setting in by_setting(ingredients(rows), "seed")
    }
    assert whole == {("fp32", 32, 32), ("lsq", 4, 4)}


def test_parts_are_compared_with_the_whole_of_the_same_seed_and_width():
    found = by_setting(minus_the_whole(improvements()), "value")
    assert found["lsq", 4, 32, 1] == 1.0 - 3.0 and found["lsq", 32, 4, 0] == 2.5 - 3.0
    assert found["lsq-unrounded", 4, 4, 0] == 2.0 - 3.0
    assert not any(method in ("gaussian-noise", "dropout-0.5") for method, *_ in found)


def test_rounding_is_what_the_quantizer_has_beyond_its_own_range():
    found = rounding_itself(improvements())
    assert set(found["method"]) == {"lsq"} and found["value"].tolist() == [1.0, 1.0]


def metrics(settings):
    """Accuracies and losses in which a setting's improvement is as large as given, and differs a little by seed."""
    rows = []
    for (method, weight_bits, activation_bits), (_, _, improvement) in settings.items():
        for seed, corruption in [(s, c) for s in range(6) for c in (CLEAN, *PAPER_CORRUPTIONS)]:
            chance = 0.05 * ((seed + len(method) + weight_bits + 2 * activation_bits) % 3) * (method != "fp32")
            error = 50 * 10 ** (-(improvement + chance) / 100)
            row = {"experiment": "x", **NETWORK, "method": method, "weight_bits": weight_bits}
            row |= {"activation_bits": activation_bits, "seed": seed, "corruption": corruption, "severity": 1}
            rows += [
                {**row, "metric": "accuracy", "value": 100 - error},
                {**row, "metric": "loss", "value": error / 25},
            ]
    return pd.DataFrame(rows)


def history():
    row = {**NETWORK, "method": "fp32", "weight_bits": 32, "activation_bits": 32, "epoch": 0, "metric": 50.0}
    return pd.DataFrame(
        [{**row, "seed": s, "split": split, "loss": 1.0} for s in range(6) for split in ("train", "val")]
    )


@pytest.fixture(scope="module")
def table():
    paper = [pd.read_csv(f"results/published/{name}.csv") for name in ("table", "heatmap")]
    return claims_table(metrics(SETTINGS), history(), pd.DataFrame(), pd.DataFrame(), *paper, looks=[6])


def rows_of(table, claim):
    return table[table["claim"] == claim].set_index(["method", "detail"])


def test_an_ingredient_is_judged_against_fp32_and_against_the_whole(table):
    gains = rows_of(table, "One ingredient beats FP32 on corrupted data")
    assert len(gains) == 7
    assert gains.loc[("lsq", "activations alone"), "verdict"] == "supported"
    assert gains.loc[("lsq", "activations alone"), "effect"] == pytest.approx(2.55)
    assert gains.loc[("lsq-unrounded", "weights"), "verdict"] == "negligible"  # 0.5 is below the paper's smallest
    assert rows_of(table, "In log-likelihood, one ingredient beats FP32").loc[("dropout-0.5", ""), "effect"] > 3.9
    same = rows_of(table, "One ingredient does what the whole does")
    assert same.loc[("lsq", "activations alone"), "verdict"] == "supported"
    assert same.loc[("lsq", "weights alone"), "verdict"] == "contradicted"
    (rounding,) = rows_of(table, "Rounding itself helps").itertuples()
    assert rounding.effect == pytest.approx(1.0, abs=0.01)


def test_the_published_numbers_are_no_ingredients(table):
    gains = rows_of(table, "One ingredient beats FP32 on corrupted data")
    assert gains["published_effect"].isna().all()


def test_each_row_says_which_ingredient_it_is_of(table):
    text = claims_text(table)
    for words in ("LSQ, ResNet-8, CIFAR-10, weights alone", "training noise, ResNet-8, CIFAR-10, activations"):
        assert f"| {words} " in text
    assert "LSQ, clipped only, ResNet-8, CIFAR-10 " in text


def test_a_study_that_takes_nothing_apart_has_no_such_claims():
    whole = {key: value for key, value in SETTINGS.items() if value[0] in ("", "weights and activations")}
    paper = [pd.read_csv(f"results/published/{name}.csv") for name in ("table", "heatmap")]
    table = claims_table(metrics(whole), history(), pd.DataFrame(), pd.DataFrame(), *paper)
    assert not table["claim"].str.contains("ingredient").any()


def test_a_study_without_whole_quantizers_has_nothing_to_compare_its_ingredients_with():
    rows = improvements()
    alone = rows[(rows["activation_bits"] == 32) & ~rows["method"].str.endswith("unrounded")]
    assert minus_the_whole(alone).empty and rounding_itself(alone).empty
    weights = {key: value for key, value in SETTINGS.items() if key[2] == 32 and "unrounded" not in key[0]}
    paper = [pd.read_csv(f"results/published/{name}.csv") for name in ("table", "heatmap")]
    table = claims_table(metrics(weights), history(), pd.DataFrame(), pd.DataFrame(), *paper).set_index("claim")
    assert table.loc["Rounding itself helps", "verdict"] == "not measured"
    assert (table.loc["One ingredient beats FP32 on corrupted data", "seeds"] == 6).all()
