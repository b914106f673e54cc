"""The gain against the size of the noise on the weights."""

import math

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from qreg_utils.figures.noise_curve import gain_by_noise
from qreg_utils.noise_curve import off_the_curve, points

NETWORK = {"dataset": "cifar10", "model": "small_resnet8", "variant": ""}
WEIGHTS = {"activation_bits": 32, **NETWORK}
SIZES = {"lsq": {8: 0.01, 4: 0.1, 2: 0.4}, "dorefa": {8: 0.005, 4: 0.2, 2: 0.8}}  # of the noise, by width


def improvement(gains, seeds=(0, 1)):
    return pd.DataFrame(
        [
            {**WEIGHTS, "method": method, "weight_bits": width, "seed": seed, "improvement": gain + seed}
            for (method, width), gain in gains.items()
            for seed in seeds
        ]
    )


@pytest.fixture
def noise():
    """Two layers of which the second, with three times as many weights, has twice the noise; on average the SIZES."""
    return pd.DataFrame(
        [
            {
                **WEIGHTS,
                **{"method": method, "weight_bits": width, "seed": seed, "epoch": epoch, "layer": layer},
                **{"weights": weights, "sigma": times * size / 1.75 * 3 * epoch, "weight_sigma": 3.0},
            }
            for method, sizes in SIZES.items()
            for width, size in sizes.items()
            for seed in (0, 1)
            for epoch in (0, 1)
            for layer, weights, times in (("first", 10, 1), ("second", 30, 2))
        ]
    )


NOISE = {("gaussian-noise", width): 10 * math.log10(size) for width, size in SIZES["lsq"].items()}


def test_noise_has_its_own_size_and_training_noise_that_of_its_source(noise):
    found = points(improvement({("lsq", 4): 0.0, ("gaussian-noise", 4): 0.0, ("dorefa", 4): 0.0}), noise)
    sizes = found.groupby("method")["relative"].unique()
    assert {method: pytest.approx(values[0]) for method, values in sizes.items()} == {
        "lsq": 0.1,
        "gaussian-noise": 0.1,
        "dorefa": 0.2,
    }
    assert len(found) == 6


def test_a_gain_is_over_the_method_without_rounding_where_that_was_trained(noise):
    rows = improvement({("lsq", 4): 3.0, ("dorefa", 4): 3.0, ("dorefa", 2): 5.0, ("dorefa-unrounded", 8): 1.0})
    rows.loc[rows["method"] == "dorefa-unrounded", "improvement"] = [1.0, 1.5]
    found = points(rows, noise).set_index(["method", "weight_bits", "seed"])["gain"].to_dict()
    assert found == {
        ("lsq", 4, 0): 3,
        ("lsq", 4, 1): 4,
        ("dorefa", 4, 0): 2,
        ("dorefa", 4, 1): 2.5,
        ("dorefa", 2, 0): 4,
        ("dorefa", 2, 1): 4.5,
    }


def test_quantizers_are_compared_with_training_noise_of_their_size(noise):
    """The made-up curve is a straight line in the logarithm of the size."""
    rows = improvement(NOISE | {("dorefa", width): 7.0 for width in (8, 4, 2)} | {("lsq", 4): 9.0})
    found = off_the_curve(points(rows, noise))
    assert found["weight_bits"].unique().tolist() == [4]  # 8 and 2 bits are outside, LSQ is the noise's own source
    assert found["value"].tolist() == pytest.approx([7 - 10 * math.log10(0.2)] * 2)


def test_what_lies_on_the_curve_departs_by_nothing(noise):
    found = off_the_curve(points(improvement(NOISE | {("dorefa", 4): 10 * math.log10(0.2)}), noise))
    assert found["value"].tolist() == pytest.approx([0, 0])


def test_the_images_share_is_that_of_both(noise):
    rows = improvement(NOISE | {("dorefa", 4): 1.0}).assign(image_variance=0.25)
    assert off_the_curve(points(rows, noise))["image_variance"].tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("gains", [{("lsq", 4): 1.0}, {("dorefa", 4): 1.0, ("gaussian-noise", 4): 1.0}])
def test_without_a_curve_nothing_is_compared(noise, gains):
    assert off_the_curve(points(improvement(gains), noise)).empty


def test_without_noise_there_are_no_points(noise):
    assert points(improvement({("lsq", 4): 1.0}), noise.iloc[:0]).empty
    both = improvement({("lsq", 4): 1.0}).assign(activation_bits=4)
    assert off_the_curve(points(both, noise)).empty


def test_the_figure_has_a_line_for_each_method_and_a_label_at_each_point(noise):
    figure = gain_by_noise({"accuracy": points(improvement(NOISE | {("dorefa", 4): 1.0, ("dorefa", 8): 2.0}), noise)})
    (panel,) = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["DoReFa", "training noise"]
    assert sorted(text.get_text() for text in panel.texts) == ["2", "4", "4", "8", "8"]
    assert panel.get_xscale() == "log"
    plt.close(figure)
