"""Figures say what they are given: every setting its own panel or line, gaps visible, bold only where decided."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex

from qreg_utils.figures.heatmaps import heatmaps
from qreg_utils.figures.images import agreement, boxes_on_images, change_by_severity, image_grid
from qreg_utils.figures.scores import accuracy_grid, improvement_by_bits, score_by_corruption, score_by_severity
from qreg_utils.figures.theory import NOISE_LABELS, measured_penalty, noise_by_bits, sharpness_by_bits
from qreg_utils.figures.training import training_curves
from qreg_utils.metrics import cell_scores, corruption_average, results_table
from qreg_utils.names import CLEAN, METHODS, PAPER_CORRUPTIONS

CELLS = (CLEAN, *PAPER_CORRUPTIONS)


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def deltas(settings, per_seed=(1.0, 1.2, 0.8), **columns):
    rows = []
    for weight_bits, activation_bits in settings:
        for seed, delta in enumerate(per_seed):
            base = {"dataset": "d", "model": "m", "variant": "", "method": "lsq", "seed": seed, "delta": delta}
            base |= {"weight_bits": weight_bits, "activation_bits": activation_bits, **columns}
            rows += [{**base, "cell": cell} for cell in CELLS]
    return pd.DataFrame(rows)


def panels(figure):
    return {axis.get_title(): axis for axis in figure.axes if axis.get_title()}


def test_every_setting_has_its_own_heatmap():
    both = pd.concat([deltas([(4, 4)]), deltas([(4, 32)], per_seed=(6.0, 6.1, 5.9))])
    shown = panels(heatmaps(both, "title"))
    assert set(shown) == {"4 bits", "4-bit weights"}
    numbers = {
        title: {text.get_text() for text in axis.texts if "." in text.get_text()} for title, axis in shown.items()
    }
    assert numbers == {"4 bits": {"+1.0"}, "4-bit weights": {"+6.0"}}


def test_a_missing_panel_says_so():
    other = deltas([(2, 2)], method="pact")
    figure = heatmaps(pd.concat([deltas([(4, 4)]), other]), "title")
    assert sum(text.get_text() == "missing" for axis in figure.axes for text in axis.texts) == 2


@pytest.mark.parametrize("extra", [(), ("rain",), ("rain", "b", "c", "d", "e", "f")])
def test_corruptions_besides_the_papers_have_cells_after_them(extra):
    """The last row is filled up with blanks."""
    frame = deltas([(4, 4)])
    others = [frame[frame["cell"] == "fog"].assign(cell=name, delta=7.0) for name in extra]
    (axis,) = panels(heatmaps(pd.concat([frame, *others]), "title")).values()
    names = {text.get_text(): text.get_position() for text in axis.texts if "+" not in text.get_text()}
    assert len(names) == 20 + len(extra) and set(extra) <= set(names)
    places = [(round(y - 0.27), round(x)) for x, y in names.values()]
    assert places == [divmod(position, 5) for position in range(20 + len(extra))]
    (image,) = axis.images
    assert image.get_array().shape == (-(-(20 + len(extra)) // 5), 5)
    assert image.get_array().mask.sum() == -(20 + len(extra)) % 5
    assert sum(text.get_text() == "+7.0" for text in axis.texts) == len(extra)


def test_a_corruption_that_one_method_was_not_measured_on_is_blank_there():
    frame = deltas([(4, 4)])
    rain = frame[frame["cell"] == "fog"].assign(cell="rain")
    figure = heatmaps(pd.concat([frame, rain, deltas([(4, 4)], method="pact")]), "title")
    with_rain, without = figure.axes[:2]
    assert len(with_rain.texts) == len(without.texts) + 2 == 42
    assert "?" not in {text.get_text() for text in without.texts}


def test_each_variant_has_its_own_row_of_heatmaps_and_says_which():
    frame = deltas([(4, 4)], dataset="cifar10", model="resnet20")
    figure = heatmaps(pd.concat([frame, frame.assign(variant="no_augment", delta=-3.0)]), "title")
    labels = [axis.get_ylabel() for axis in figure.axes[:2]]
    assert labels == ["LSQ\nResNet-20, CIFAR-10", "LSQ\nResNet-20, CIFAR-10\nno_augment"]
    numbers = [{text.get_text() for text in axis.texts if "." in text.get_text()} for axis in figure.axes[:2]]
    assert numbers == [{"+1.0"}, {"-3.0"}]


@pytest.mark.parametrize(
    "networks, labels",
    [
        ([("digits", "resnet8")], ["accuracy"]),
        ([("voc", "my_detector")], ["mAP50"]),
        ([("digits", "resnet8"), ("voc", "yolov5n")], ["accuracy", "mAP50"]),
    ],
)
def test_each_data_set_has_a_colour_bar_of_its_own_that_names_its_score(networks, labels):
    sizes = [1.0, 30.0]
    frames = [
        deltas([(4, 4)], dataset=dataset, model=model).assign(delta=size)
        for (dataset, model), size in zip(networks, sizes, strict=False)
    ]
    bars = heatmaps(pd.concat(frames), "title").axes[len(networks) :]
    assert [bar.get_ylabel() for bar in bars] == [f"{label} minus FP32, points" for label in labels]
    assert [bar.get_ylim()[1] for bar in bars] == sizes[: len(bars)]


@pytest.mark.parametrize(
    "per_seed, bold",
    [((1.0, 1.2, 0.8), True), ((1.0, 5.0, -4.0), False), ((1.0,), False), ((1.0, 1.0, 1.0), False)],
)
def test_numbers_are_bold_when_their_interval_excludes_zero(per_seed, bold):
    (axis,) = panels(heatmaps(deltas([(4, 4)], per_seed), "title")).values()
    weights = {text.get_fontweight() for text in axis.texts if "." in text.get_text()}
    assert weights == {"bold" if bold else "normal"}


def test_an_unknown_cell_is_a_question_mark_and_zero_has_no_minus():
    frame = deltas([(4, 4)], per_seed=(-0.01,))
    frame.loc[frame["cell"] == "fog", "delta"] = float("nan")
    (axis,) = panels(heatmaps(frame, "title")).values()
    texts = {text.get_text() for text in axis.texts}
    assert "?" in texts and "+0.0" in texts and "-0.0" not in texts


def history(methods):
    rows = []
    for method, weight_bits, activation_bits in methods:
        base = {"dataset": "d", "model": "m", "variant": "", "method": method, "weight_bits": weight_bits}
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


def test_curves_have_a_panel_for_each_method_and_a_line_for_each_setting():
    frame = history([("fp32", 32, 32), ("lsq", 4, 4), ("lsq", 4, 32), ("pact", 2, 2)])
    for draw in (training_curves, score_by_severity):
        figure = draw(frame)
        assert [axis.get_title() for axis in figure.axes] == ["LSQ", "PACT"]
        assert legend(figure)[:4] == ["FP32", "4-bit weights", "4 bits", "2 bits"]
    assert len(figure.axes[0].lines) == 3  # FP32 and two settings of LSQ


def test_a_method_without_a_row_in_the_table_of_names_is_shown_last():
    frame = history([("fp32", 32, 32), ("my-own", 4, 4), ("gaussian-noise", 4, 32)])
    for draw in (training_curves, score_by_severity):
        assert [axis.get_title() for axis in draw(frame).axes] == ["training noise", "my-own"]


def test_the_loss_is_that_of_the_task():
    frame = history([("fp32", 32, 32), ("lsq", 4, 4)])
    assert training_curves(frame).axes[0].get_ylabel() == "cross-entropy"
    assert training_curves(frame.assign(dataset="voc")).axes[0].get_ylabel() == "detection loss"


def test_full_precision_alone_is_fine():
    figure = training_curves(history([("fp32", 32, 32)]))
    assert [axis.get_title() for axis in figure.axes] == ["FP32"]


def test_noise_shows_the_last_epoch_of_every_layer_and_seed():
    frame = history([("lsq", 4, 4), ("lsq", 2, 2), ("dorefa", 4, 4)])
    figure = noise_by_bits(frame[frame["split"] == "val"])
    clouds = {cloud.get_label(): cloud for cloud in figure.axes[0].collections}
    assert {label: len(cloud.get_offsets()) for label, cloud in clouds.items()} == {"LSQ": 4, "DoReFa": 2}
    colours = {label: to_hex(cloud.get_facecolors()[0]) for label, cloud in clouds.items()}
    assert colours == {"LSQ": METHODS["lsq"].colour, "DoReFa": METHODS["dorefa"].colour}


def images(count):
    return torch.zeros(count, 3, 32, 40, dtype=torch.uint8)


def test_an_image_grid_names_rows_and_columns():
    figure = image_grid({"jpeg_compression": images(3), "fog": images(3)}, ["clean", "1", "2"])
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
    shown = panels(change_by_severity(pd.DataFrame(rows)))
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
    shown = panels(agreement(pd.DataFrame(rows)))
    assert list(shown) == ["mean", "std"]
    assert shown["std"].collections[0].get_offsets().tolist() == [[1, 2], [2, 3], [3, 4]]


def test_the_accuracy_grid_begins_with_the_hardest():
    rows = [
        {"corruption": name, "severity": severity, "metric": "accuracy", "value": value + severity}
        for name, value in {CLEAN: 99, "fog": 50, "zoom_blur": 20}.items()
        for severity in (1, 2)
    ]
    axis = accuracy_grid(pd.DataFrame(rows)).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["zoom blur", "fog"]
    assert [text.get_text() for text in axis.texts] == ["21", "22", "51", "52"]


def test_losses_far_above_the_first_epochs_leave_the_picture():
    frame = history([("fp32", 32, 32), ("lsq", 4, 4)]).assign(model="yolov5n")
    calm = training_curves(frame).axes[0]
    frame.loc[(frame["epoch"] == 1) & (frame["method"] == "lsq"), "loss"] = 1e4
    axis = training_curves(frame).axes[0]
    assert axis.get_ylim()[1] == 2 != calm.get_ylim()[1]
    assert axis.get_ylabel() == "detection loss"


def test_boxes_are_drawn_where_they_are_with_a_colour_for_each_class():
    boxes = torch.tensor([[1.0, 2.0, 11.0, 22.0], [5.0, 5.0, 9.0, 9.0], [0.0, 0.0, 4.0, 8.0]])
    row = [("labels", images(1)[0], boxes, ["3", "5", "3"]), ("fog", images(1)[0], boxes[:0], [])]
    first, second = boxes_on_images([row]).axes
    found = [(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in first.patches]
    assert found == [(1, 2, 10, 20), (5, 5, 4, 4), (0, 0, 4, 8)]
    colours = [patch.get_edgecolor() for patch in first.patches]
    assert colours[0] == colours[2] != colours[1]
    assert [text.get_text() for text in first.texts] == ["3", "5", "3"]
    assert second.get_title() == "fog" and not second.patches


def test_scores_of_detection_are_map50():
    frame = history([("fp32", 32, 32)]).assign(metric="map50")
    assert score_by_severity(frame).axes[0].get_ylabel() == "mAP50, %"
    assert score_by_corruption(frame).axes[0].get_xlabel() == "mAP50, %"


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
    by_bits, against = measured_penalty(pd.DataFrame(rows)).axes
    for axis in (by_bits, against):
        points = {cloud.get_label(): cloud for cloud in axis.collections}
        assert set(points) == set(NOISE_LABELS.values())
        for label, cloud in points.items():
            assert cloud.get_offsets()[:, 1].tolist() == pytest.approx([2 * 4.0**-bits for bits in (2, 4, 8)])
            hollow = len(cloud.get_facecolors()) == 0 or (cloud.get_facecolors()[:, 3] == 0).all()
            assert hollow == (label == NOISE_LABELS["quantization"])
    lines = {line.get_label(): line.get_ydata().tolist() for line in by_bits.lines}
    assert lines["a factor of 4 a bit"] == pytest.approx(lines["predicted penalty"])
    dropped = [4 * value for value in lines["predicted penalty"]]
    assert lines["with residual times curvature"] == pytest.approx(dropped)


def test_sharpness_has_a_mark_for_every_setting_and_kind_of_weights():
    settings = [
        ("fp32", 32, 32, ["unrounded"]),
        ("lsq", 4, 4, ["unrounded", "quantized"]),
        ("lsq", 4, 32, ["unrounded"]),
    ]
    rows = [
        {"method": method, "weight_bits": bits, "activation_bits": activations, "seed": seed, "weights": weights}
        | {"measure": measure, "size": size, "value": 1.0 + seed}
        for method, bits, activations, kinds in settings
        for weights in kinds
        for seed in (0, 1)
        for measure, size in (("relative_largest_eigenvalue", 0.0), ("relative_trace", 0.0), ("loss_rise", 0.1))
    ]
    figure = sharpness_by_bits(pd.DataFrame(rows))
    for axis in figure.axes:
        marks = [container[0] for container in axis.containers]
        assert [mark.get_ydata().item() for mark in marks] == [1.5] * 4
        assert [label.get_text() for label in axis.get_xticklabels()] == ["FP32", "4 bits"]
        assert sum(mark.get_markerfacecolor() == "white" for mark in marks) == 2
    names = [text.get_text() for text in figure.legends[0].texts]
    assert names[:3] == ["FP32", "LSQ", "LSQ, weights only"]
    colours = {to_hex(mark.get_color()) for mark in marks}
    assert colours == {METHODS["fp32"].colour, METHODS["lsq"].colour}
    assert [mark.get_marker() for mark in marks] == ["o", "o", "o", "s"]


def improvements(methods=("lsq",), variants=("",), gain=1.0):
    """``results_table`` of made-up accuracies, of three seeds whose gains differ."""
    rows = [
        {"dataset": "cifar10", "model": "resnet20", "variant": variant, "method": method, "weight_bits": bits}
        | {"activation_bits": bits, "seed": seed, "corruption": cell, "severity": 1, "metric": "accuracy"}
        | {"value": 80 + (gain + seed**2) * (method != "fp32")}
        for variant in variants
        for method, widths in {"fp32": (32,), **dict.fromkeys(methods, (8, 4))}.items()
        for bits in widths
        for seed in range(3)
        for cell in CELLS
    ]
    return results_table(corruption_average(cell_scores(pd.DataFrame(rows)), PAPER_CORRUPTIONS))


PUBLISHED = pd.DataFrame(
    [
        ("cifar10", "resnet20", "fp32", 32, 0.0),
        *((name, "resnet20", "lsq", bits, 3.0) for name in ("a", "b", "c", "d", "cifar10") for bits in (8, 4, 2)),
    ],
    columns=["dataset", "model", "method", "bits", "relative_error_improvement"],
)


def test_improvements_have_error_bars_from_the_low_to_the_high_end_of_the_interval():
    """Also where the mean is not in the middle of it."""
    table = improvements()
    table["relative_error_improvement_high"] += 10
    (axis,) = improvement_by_bits(table, PUBLISHED).axes
    (series,) = axis.containers
    line, _, (bars,) = series
    ours = table[table["method"] == "lsq"]
    assert line.get_ydata().tolist() == ours["relative_error_improvement"].tolist()
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    assert ends == pytest.approx(ours[["relative_error_improvement_low", "relative_error_improvement_high"]].to_numpy())


def test_improvements_show_every_method_variant_and_published_network():
    """The colour is the method's, whatever else is there; the marker tells variants apart."""
    figure = improvement_by_bits(improvements(("lsq", "dorefa"), ("", "wide")), PUBLISHED)
    (axis,) = figure.axes
    series = {container.get_label(): container[0] for container in axis.containers}
    network = "ResNet-20, CIFAR-10"
    assert {label: (to_hex(line.get_color()), line.get_marker()) for label, line in series.items()} == {
        f"LSQ, {network}": (METHODS["lsq"].colour, "o"),
        f"DoReFa, {network}": (METHODS["dorefa"].colour, "o"),
        f"LSQ, {network}, wide": (METHODS["lsq"].colour, "s"),
        f"DoReFa, {network}, wide": (METHODS["dorefa"].colour, "s"),
    }
    places = [tuple(line.get_xdata()) for line in series.values()]
    assert len(set(places)) == 4, "no mark lies on another"
    published = [text for text in legend(figure) if text.startswith("published")]
    assert published == [f"published: LSQ, ResNet-20, {name}" for name in ("a", "b", "c", "d", "CIFAR-10")]


def test_corruptions_besides_the_papers_are_not_in_the_mean_of_a_severity():
    frame = history([("fp32", 32, 32)])
    rain = frame.assign(corruption="rain", value=0.0)
    for metrics in (frame, pd.concat([frame, rain])):
        (line,) = score_by_severity(metrics).axes[0].lines
        assert set(line.get_ydata()) == {50.0}
    metrics = pd.concat([frame, rain]).assign(severity=1)
    labels = [label.get_text() for label in score_by_corruption(metrics).axes[0].get_yticklabels()]
    assert labels == ["rain", "fog"]
