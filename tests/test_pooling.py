"""The spread that all settings of a network share."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from qreg_utils.claims import claims_table
from qreg_utils.pooling import with_pooled_variance
from tests.test_claims import ACCURACY, FP32, HISTORY, NONE, PUBLISHED, history_of, metrics_of

NETWORK = {"dataset": "digits", "model": "resnet8", "variant": ""}


def table_of(values):
    """``values`` (seeds, settings), the first of which is FP32."""
    return pd.DataFrame(
        [
            {**NETWORK, "method": f"m{setting}", "weight_bits": 32, "activation_bits": 32, "seed": seed}
            | {"improvement": value - row[0]}
            for seed, row in enumerate(values)
            for setting, value in enumerate(row)
        ]
    )


def test_the_residual_is_that_of_a_two_way_table():
    values = np.random.default_rng(0).normal(size=(5, 4)) + np.arange(5)[:, None] * 3
    found = with_pooled_variance(table_of(values))
    centred = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    assert found["pooled_df"].unique() == [12]
    assert found["pooled_variance"].unique() == pytest.approx([2 * np.square(centred).sum() / 12])


def test_a_seed_that_a_setting_lacks_leaves_the_model_as_it_is():
    values = np.add.outer([0.0, 5.0, -2.0], [1.0, 2.0, 4.0])  # seeds and settings add up: no residual
    found = with_pooled_variance(table_of(values).drop(index=5))
    assert found["pooled_df"].unique() == [3] and found["pooled_variance"].max() < 1e-20


@pytest.mark.parametrize("values", [[[1.0, 2.0]], [[1.0], [2.0]]])
def test_one_seed_or_one_setting_leaves_no_residual(values):
    found = with_pooled_variance(table_of(np.array(values)))
    assert found["pooled_variance"].isna().all() and (found["pooled_df"] == 0).all()


def test_of_equal_spreads_the_interval_covers_as_often_as_it_says():
    """200 made-up studies of 4 seeds and 6 settings without any difference."""
    random, covered = np.random.default_rng(1), []
    for _ in range(200):
        found = with_pooled_variance(table_of(random.normal(size=(4, 6)) + 3 * random.normal(size=(4, 1))))
        own = found[found["method"] == "m3"]
        half_width = t.ppf(0.975, own["pooled_df"].iloc[0]) * np.sqrt(own["pooled_variance"].iloc[0] / 4)
        covered.append(abs(own["improvement"].mean()) < half_width)
    assert 0.91 < np.mean(covered) < 0.985


def test_verdicts_do_not_depend_on_it():
    found = claims_table(metrics_of(ACCURACY), history_of(HISTORY), NONE, NONE, PUBLISHED)
    gains = found[found["measure"] == "relative error improvement"].dropna(subset=["effect"])
    assert gains["pooled_low"].notna().all() and (gains["pooled_low"] < gains["effect"]).all()
    others = found[found["claim"].str.startswith("FP32 overfits")]
    assert others["pooled_low"].isna().all()  # an effect that is no difference of two settings' improvements
    alone = claims_table(metrics_of({FP32: [80, 81, 82]}), history_of(HISTORY), NONE, NONE, PUBLISHED)
    assert alone["pooled_low"].isna().all() if "pooled_low" in alone else True
