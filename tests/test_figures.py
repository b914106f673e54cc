"""Figures say what they are given: every level its own panel or line, gaps visible, bold only where decided."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from qreg_utils import figures
from qreg_utils.corruptions import CORRUPTIONS
from qreg_utils.metrics import CLEAN

CELLS = (CLEAN, *CORRUPTIONS)


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def deltas(levels, per_seed=(1.0, 1.2, 0.8), **columns):
    rows = []
    for weight_bits, activation_bits in levels:
        for seed, delta in enumerate(per_seed):
            base = {"dataset": "d", "model": "m", "method": "lsq", "seed": seed, "delta": delta}
            base |= {"weight_bits": weight_bits, "activation_bits": activation_bits, **columns}
            rows += [{**base, "cell": cell} for cell in CELLS]
    return pd.DataFrame(rows)


def panels(figure):
    return {axis.get_title(): axis for axis in figure.axes if axis.get_title()}


def test_every_level_has_its_own_heatmap():
    both = pd.concat([deltas([(4, 4)]), deltas([(4, 32)], per_seed=(6.0, 6.1, 5.9))])
    shown = panels(figures.heatmaps(both, CELLS, "title"))
    assert set(shown) == {"4 bits", "4-bit weights"}
    numbers = {
        title: {text.get_text() for text in axis.texts if "." in text.get_text()} for title, axis in shown.items()
    }
    assert numbers == {"4 bits": {"+1.0"}, "4-bit weights": {"+6.0"}}


def test_a_missing_panel_says_so():
    other = deltas([(2, 2)], method="pact")
    figure = figures.heatmaps(pd.concat([deltas([(4, 4)]), other]), CELLS, "title")
    assert sum(text.get_text() == "missing" for axis in figure.axes for text in axis.texts) == 2


@pytest.mark.parametrize(
    "per_seed, bold",
    [((1.0, 1.2, 0.8), True), ((1.0, 5.0, -4.0), False), ((1.0,), False), ((1.0, 1.0, 1.0), False)],
)
def test_numbers_are_bold_when_their_interval_excludes_zero(per_seed, bold):
    (axis,) = panels(figures.heatmaps(deltas([(4, 4)], per_seed), CELLS, "title")).values()
    weights = {text.get_fontweight() for text in axis.texts if "." in text.get_text()}
    assert weights == {"bold" if bold else "normal"}


def test_an_unknown_cell_is_a_question_mark_and_zero_has_no_minus():
    frame = deltas([(4, 4)], per_seed=(-0.01,))
    frame.loc[frame["cell"] == "fog", "delta"] = float("nan")
    (axis,) = panels(figures.heatmaps(frame, CELLS, "title")).values()
    texts = {text.get_text() for text in axis.texts}
    assert "?" in texts and "+0.0" in texts and "-0.0" not in texts


def history(methods):
    rows = []
    for method, weight_bits, activation_bits in methods:
        base = {"dataset": "d", "model": "m", "method": method, "weight_bits": weight_bits}
        base |= {"activation_bits": activation_bits, "metric": "accuracy", "value": 50.0, "loss": 1.0}
        base |= {"bits": weight_bits, "sigma": 0.1, "weight_sigma": 1.0, "layer": "fc"}
        for seed in (0, 1):
            for epoch in (0, 1):
                rows += [
                    {**base, "seed": seed, "epoch": epoch, "split": split, "severity": severity, "corruption": "fog"}
                    for split, severity in [("train", 0), ("val", 3)]
                ]
    return pd.DataFrame(rows)


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_curves_have_a_panel_for_each_method_and_a_line_for_each_level():
    frame = history([("fp32", 32, 32), ("lsq", 4, 4), ("lsq", 4, 32), ("pact", 2, 2)])
    for draw in (figures.training_curves, figures.score_by_severity):
        figure = draw(frame)
        assert [axis.get_title() for axis in figure.axes] == ["LSQ", "PACT"]
        assert legend(figure)[:4] == ["FP32", "4-bit weights", "4 bits", "2 bits"]
    assert len(figure.axes[0].lines) == 3  # FP32 and two levels of LSQ


def test_full_precision_alone_is_fine():
    figure = figures.training_curves(history([("fp32", 32, 32)]))
    assert [axis.get_title() for axis in figure.axes] == ["FP32"]


def test_noise_shows_the_last_epoch_of_every_layer_and_seed():
    frame = history([("lsq", 4, 4), ("lsq", 2, 2), ("dorefa", 4, 4)])
    figure = figures.noise_by_bits(frame[frame["split"] == "val"])
    points = {collection.get_label(): len(collection.get_offsets()) for collection in figure.axes[0].collections}
    assert points == {"LSQ": 4, "DoReFa": 2}


def images(count):
    return torch.zeros(count, 3, 32, 40, dtype=torch.uint8)


def test_an_image_grid_names_rows_and_columns():
    figure = figures.image_grid({"jpeg_compression": images(3), "fog": images(3)}, ["clean", "1", "2"])
    assert len(figure.axes) == 6
    assert [axis.get_title() for axis in figure.axes[:3]] == ["clean", "1", "2"]
    assert [axis.get_ylabel() for axis in figure.axes[::3]] == ["jpeg\ncompression", "fog"]


def test_changes_have_a_panel_for_each_group_and_a_line_for_each_corruption():
    rows = [
        {"group": group, "corruption": name, "family": family, "severity": severity, "change": severity + len(name)}
        for group, names in {"noise": ["shot_noise", "speckle_noise"], "blur": ["zoom_blur"]}.items()
        for name in names
        for family in ("cifar", "imagenet")
        for severity in range(1, 6)
    ]
    shown = panels(figures.change_by_severity(pd.DataFrame(rows)))
    assert list(shown) == ["noise", "blur"]
    assert [text.get_text() for text in shown["noise"].get_legend().texts] == ["shot noise", "speckle noise"]
    lines = [line for line in shown["noise"].lines if len(line.get_xdata()) == 5]
    assert [line.get_ydata()[0] for line in lines] == [1 + 10, 1 + 10, 1 + 13, 1 + 13]


def test_agreement_shows_every_point_in_the_panel_of_its_statistic():
    rows = [
        {"statistic": name, "corruption": "fog", "severity": severity, "reference": severity, "ours": severity + 1}
        for name in ("mean", "std")
        for severity in (1, 2, 3)
    ]
    shown = panels(figures.agreement(pd.DataFrame(rows)))
    assert list(shown) == ["mean", "std"]
    assert shown["std"].collections[0].get_offsets().tolist() == [[1, 2], [2, 3], [3, 4]]


def test_the_accuracy_grid_begins_with_the_hardest():
    rows = [
        {"corruption": name, "severity": severity, "metric": "accuracy", "value": value + severity}
        for name, value in {CLEAN: 99, "fog": 50, "zoom_blur": 20}.items()
        for severity in (1, 2)
    ]
    axis = figures.accuracy_grid(pd.DataFrame(rows)).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["zoom blur", "fog"]
    assert [text.get_text() for text in axis.texts] == ["21", "22", "51", "52"]


def test_losses_far_above_the_first_epochs_leave_the_picture():
    frame = history([("fp32", 32, 32), ("lsq", 4, 4)]).assign(model="yolov5n")
    calm = figures.training_curves(frame).axes[0]
    frame.loc[(frame["epoch"] == 1) & (frame["method"] == "lsq"), "loss"] = 1e4
    axis = figures.training_curves(frame).axes[0]
    assert axis.get_ylim()[1] == 2 != calm.get_ylim()[1]
    assert axis.get_ylabel() == "detection loss"


def test_boxes_are_drawn_where_they_are_with_a_colour_for_each_class():
    boxes = torch.tensor([[1.0, 2.0, 11.0, 22.0], [5.0, 5.0, 9.0, 9.0], [0.0, 0.0, 4.0, 8.0]])
    row = [("labels", images(1)[0], boxes, ["3", "5", "3"]), ("fog", images(1)[0], boxes[:0], [])]
    first, second = figures.boxes_on_images([row]).axes
    drawn = [(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in first.patches]
    assert drawn == [(1, 2, 10, 20), (5, 5, 4, 4), (0, 0, 4, 8)]
    colours = [patch.get_edgecolor() for patch in first.patches]
    assert colours[0] == colours[2] != colours[1]
    assert [text.get_text() for text in first.texts] == ["3", "5", "3"]
    assert second.get_title() == "fog" and not second.patches


def test_scores_of_detection_are_map50():
    frame = history([("fp32", 32, 32)]).assign(metric="map50")
    assert figures.score_by_severity(frame).axes[0].get_ylabel() == "mAP50, %"
    assert figures.score_by_corruption(frame).axes[0].get_xlabel() == "mAP50, %"


def test_the_measured_penalty_is_drawn_at_its_size_and_hollow_below_zero():
    noises = ("normal", "uniform", "quantization")
    rows = [
        {
            "noise": noise,
            "bits": bits,
            "seed": seed,
            "predicted": 4.0**-bits,
            "curvature": 3 * 4.0**-bits,
            "measured": sign * (1 + seed) * 4.0**-bits,
        }
        for noise, sign in zip(noises, (1, 1, -1), strict=True)
        for bits in (2, 4, 8)
        for seed in (0, 2)
    ]
    by_bits, against = figures.measured_penalty(pd.DataFrame(rows)).axes
    for axis in (by_bits, against):
        points = {cloud.get_label(): cloud for cloud in axis.collections}
        assert set(points) == set(figures.NOISE_LABELS.values())
        for label, cloud in points.items():
            assert cloud.get_offsets()[:, 1].tolist() == pytest.approx([2 * 4.0**-bits for bits in (2, 4, 8)])
            hollow = len(cloud.get_facecolors()) == 0 or (cloud.get_facecolors()[:, 3] == 0).all()
            assert hollow == (label == figures.NOISE_LABELS["quantization"])
    lines = {line.get_label(): line.get_ydata().tolist() for line in by_bits.lines}
    assert lines["a factor of 4 a bit"] == pytest.approx(lines["predicted penalty"])
    dropped = [4 * value for value in lines["predicted penalty"]]
    assert lines["with residual times curvature"] == pytest.approx(dropped)


def test_sharpness_has_a_mark_for_every_level_and_kind_of_weights():
    levels = [("fp32", 32, 32, ["latent"]), ("lsq", 4, 4, ["latent", "quantized"]), ("lsq", 4, 32, ["latent"])]
    rows = [
        {"method": method, "weight_bits": bits, "activation_bits": activations, "seed": seed, "weights": weights}
        | {"measure": measure, "size": size, "value": 1.0 + seed}
        for method, bits, activations, kinds in levels
        for weights in kinds
        for seed in (0, 1)
        for measure, size in (("relative_largest_eigenvalue", 0.0), ("relative_trace", 0.0), ("loss_rise", 0.1))
    ]
    figure = figures.sharpness_by_bits(pd.DataFrame(rows))
    for axis in figure.axes:
        marks = [container[0] for container in axis.containers]
        assert [mark.get_ydata().item() for mark in marks] == [1.5] * 4
        assert [label.get_text() for label in axis.get_xticklabels()] == ["FP32", "4 bits"]
        assert sum(mark.get_markerfacecolor() == "white" for mark in marks) == 2
    names = [text.get_text() for text in figure.legends[0].texts]
    assert names[:3] == ["FP32", "LSQ", "LSQ, weights only"]
