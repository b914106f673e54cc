"""Slopes along the axes that a study's variants lie on."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from qreg_utils import PROJECT
from qreg_utils.axes import AXES, along, budgets, slopes
from qreg_utils.claims import ALONG_AXES, claims_table
from qreg_utils.figures.axes import gains_along_axes, values_along_axes
from qreg_utils.names import CLEAN, PAPER_CORRUPTIONS
from qreg_utils.study import load_study

EPOCHS, IMAGES, AUGMENT, START = AXES
NETWORK = {"dataset": "cifar10", "model": "small_resnet8"}
LSQ = {"method": "lsq", "weight_bits": 2, "activation_bits": 2}
FP32 = {"method": "fp32", "weight_bits": 32, "activation_bits": 32}


@pytest.fixture(scope="module")
def budget():
    """The budgets of the committed study."""
    return budgets(load_study(PROJECT / "params" / "budget.yaml").experiments)


def gains(by_variant, seeds=(0, 1), **more):
    return pd.DataFrame(
        [
            {**NETWORK, "variant": variant, **LSQ, "seed": seed, "improvement": gain + seed, **more}
            for variant, gain in by_variant.items()
            for seed in seeds
        ]
    )


def test_the_axes_of_the_study_are_its_variants_that_differ_in_one_parameter(budget):
    found = {axis.parameter: [*next(along(axis, budget))["variant"]] for axis in AXES}
    assert found == {
        "epochs": ["epochs_5", "epochs_10", "base", "epochs_60"],
        "train_images": ["images_500", "base", "images_8000"],
        "augment": ["base", "augmented"],
        "full_precision_epochs": ["base", "from_fp32"],
    }
    assert set(found) == set(ALONG_AXES)


def test_a_study_without_variants_has_no_axis():
    study = load_study(PROJECT / "params" / "mechanism.yaml")
    assert not any(list(along(axis, budgets(study.experiments))) for axis in AXES)
    assert budgets(load_study(PROJECT / "params" / "voc-small.yaml").experiments).empty  # a detector's recipe


def test_where_variants_share_a_place_the_axis_is_not_guessed(budget):
    twice = pd.concat([budget, budget.query("variant == 'epochs_5'").assign(variant="another")])
    assert not list(along(EPOCHS, twice)) and list(along(IMAGES, twice))


def test_a_slope_is_the_change_with_every_doubling_as_least_squares_has_it(budget):
    values = {"epochs_5": -3.0, "epochs_10": 0.5, "base": 1.0, "epochs_60": 4.0}
    found = slopes(EPOCHS, budget, gains(values, image_variance=0.2))
    x = np.log2([5, 10, 30, 60])
    expected = np.polyfit(x, list(values.values()), 1)[0]
    assert found["value"].tolist() == pytest.approx([expected] * 2)
    assert found["image_variance"].tolist() == pytest.approx([0.2 / np.square(x - x.mean()).sum()] * 2)
    assert set(found["detail"]) == {"5 to 60 epochs"}
    values = slopes(AUGMENT, budget, gains({"base": 2.0, "augmented": 0.5}))
    assert values["value"].tolist() == [-1.5, -1.5]
    assert slopes(START, budget, gains({"base": 2.0, "from_fp32": 2.25}))["value"].tolist() == [0.25, 0.25]


def test_a_seed_counts_when_it_is_there_at_every_point(budget):
    some = gains({"base": 2.0, "augmented": 0.5}).query("variant == 'base' or seed == 1")
    assert slopes(AUGMENT, budget, some)["seed"].tolist() == [1]
    assert slopes(EPOCHS, budget, some).empty


def metrics(improvement):
    """Of six seeds; the quantized network's ``improvement`` by variant, with a little chance."""
    rows = []
    for variant, gain in improvement.items():
        for seed, corruption in [(seed, name) for seed in range(6) for name in (CLEAN, *PAPER_CORRUPTIONS)]:
            for setting, own in ((FP32, 0.0), (LSQ, gain + 0.1 * ((seed + len(variant)) % 3))):
                row = {"experiment": "x", **NETWORK, "variant": variant, **setting, "seed": seed}
                row |= {"corruption": corruption, "severity": 1}
                error = 50 * 10 ** (-own / 100)
                rows += [{**row, "metric": name, "value": value} for name, value in scores(error).items()]
    return pd.DataFrame(rows)


def scores(error):
    return {"accuracy": 100 - error, "loss": error / 25}


def history():
    row = {**NETWORK, "variant": "base", **FP32, "epoch": 0, "metric": 50.0}
    return pd.DataFrame([{**row, "seed": 0, "split": split, "loss": 1.0} for split in ("train", "val")])


def test_claims_about_the_axes_come_out_as_put_in(budget):
    gain = {"epochs_5": -4, "epochs_10": -2, "base": 2, "epochs_60": 4, "images_500": 4, "images_8000": 0}
    gain |= {"augmented": 2, "from_fp32": 2}
    paper = [pd.read_csv(PROJECT / "results" / "published" / f"{name}.csv") for name in ("table", "heatmap")]
    frames = (metrics(gain), history(), pd.DataFrame(), pd.DataFrame(), *paper)
    table = claims_table(*frames, budgets=budget).set_index("claim")
    verdicts = {
        "Quantization gains more the longer the training": "supported",
        "In log-likelihood quantization gains more the longer the training": "supported",
        "Quantization gains less the more training images there are": "supported",
        "Quantization gains less beside augmentation": "not decided",
        "A start from full precision changes nothing": "supported",
    }
    for claim, verdict in verdicts.items():
        assert table.loc[claim, "verdict"] == verdict, claim
    assert not set(verdicts) & set(claims_table(*frames)["claim"])  # unless asked


def test_the_figure_has_a_column_for_each_axis_and_a_row_for_each_measure(budget):
    gain = dict.fromkeys(budget["variant"], 1.0)
    frame = gains(gain).rename(columns={"improvement": "value"})
    figure = values_along_axes({"gain": frame, "rise": frame}, budget)
    assert len(figure.axes) == 2 * len(AXES)
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == ["scratch", "full precision"]
    plt.close(figure)
    assert values_along_axes({"gain": frame}, budget[budget["variant"] == "base"]) is None


def test_the_figure_of_a_study_is_of_its_gains_and_of_the_rise_of_its_losses(budget):
    figure = gains_along_axes(metrics(dict.fromkeys(budget["variant"], 1.0)), history(), budget)
    assert len(figure.axes) == 3 * len(AXES)
    accuracy, likelihood = (figure.axes[row * len(AXES)].lines[1].get_ydata() for row in (0, 1))
    assert accuracy == pytest.approx(likelihood)  # of the same ratio of errors and of losses
    plt.close(figure)
