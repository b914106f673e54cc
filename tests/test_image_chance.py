"""What the choice of test images adds to the chance: of made-up studies in which it is known."""

import base64

import numpy as np
import pandas as pd
import pytest

from qreg_utils.claims import claims_table
from qreg_utils.evaluation import rotating_severities
from qreg_utils.image_chance import _component_of_images, _from_rotation, image_variance, of_a_difference
from qreg_utils.metrics import interval
from qreg_utils.names import CLEAN, PAPER_CORRUPTIONS

NETWORK = {"dataset": "cifar10", "model": "resnet8", "variant": ""}


def table(rng, seeds, images, of_seed, of_image, of_both):
    """Differences (seeds, images) with three independent components of these standard deviations, around 1."""
    seed, image = rng.normal(0, of_seed, (seeds, 1)), rng.normal(0, of_image, (1, images))
    return 1 + seed + image + rng.normal(0, of_both, (seeds, images))


def test_the_component_is_that_of_the_images():
    rng = np.random.default_rng(0)
    found = [_component_of_images(table(rng, 6, 200, 0.5, 3.0, 10.0)) for _ in range(200)]
    assert np.mean(found) == pytest.approx(3.0**2 / 200, rel=0.1)


def test_with_it_an_interval_over_seeds_and_images_covers_the_mean():
    """95% of the time or more; without, the images' share makes it miss far more often."""
    rng, covered = np.random.default_rng(1), {"with": 0, "without": 0}
    for _ in range(600):
        difference = table(rng, 6, 100, 0.2, 4.0, 6.0)
        for name, more in {"with": _component_of_images(difference), "without": 0.0}.items():
            low, high = interval(difference.mean(1), more_variance=more)
            covered[name] += low < 1 < high
    assert covered["with"] > 0.945 * 600
    assert covered["without"] < 0.92 * 600


def packed(right):
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def images_csv(right, *, rotating):
    """``right[method][seed]`` is a table (1 + 19, images) of which are classified right, the clean ones first."""
    rows = []
    for (method, seed), answers in right.items():
        row = {**NETWORK, "method": method, "weight_bits": 32 if method == "fp32" else 4, "seed": seed}
        row["activation_bits"] = row["weight_bits"]
        for position, name in enumerate([CLEAN, *PAPER_CORRUPTIONS]):
            severity_of = np.zeros(answers.shape[1]) if name == CLEAN else np.full(answers.shape[1], 3)
            if rotating and name != CLEAN:
                severity_of = rotating_severities(answers.shape[1], position).numpy()
            for severity in sorted(set(severity_of)):
                own = answers[position][severity_of == severity]
                rows.append(
                    {**row, "corruption": name, "severity": severity, "images": len(own), "correct": packed(own)}
                )
    return pd.DataFrame(rows)


@pytest.mark.parametrize("rotating", [False, True])
def test_it_is_read_from_the_packed_answers_of_each_network(rotating):
    rng = np.random.default_rng(2)
    right = {(method, seed): rng.random((20, 53)) < 0.6 for method in ("fp32", "lsq") for seed in range(3)}
    (row,) = image_variance(images_csv(right, rotating=rotating)).itertuples()
    accuracy = {key: 100 * answers[1:].mean(0) for key, answers in right.items()}
    difference = np.stack([accuracy["lsq", seed] - accuracy["fp32", seed] for seed in range(3)])
    assert row.method == "lsq" and row.image_variance == pytest.approx(_component_of_images(difference))


def test_rotation_puts_every_image_back_in_its_place():
    severity_of = rotating_severities(23, 7).numpy()
    values = {severity: np.flatnonzero(severity_of == severity).astype(float) for severity in range(1, 6)}
    assert _from_rotation(values, 7, 23).tolist() == list(range(23))


def test_without_a_partner_in_full_precision_there_is_none():
    right = {("lsq", seed): np.ones((20, 10), dtype=bool) for seed in range(3)}
    assert image_variance(images_csv(right, rotating=True)).empty


def test_of_a_difference_it_errs_on_the_safe_side():
    paired = pd.DataFrame({"image_variance": [4.0], "image_variance_whole": [9.0]})
    assert of_a_difference(paired, "_whole")["image_variance"].tolist() == [25.0]


def test_claims_about_accuracies_have_wider_intervals_for_it():
    rng, right, metrics, history = np.random.default_rng(3), {}, [], []
    helped = rng.random(60) < 0.3  # images on which quantization helps, for every seed
    for seed in range(6):
        for method in ("fp32", "lsq"):
            chance = 0.5 + 0.4 * helped * (method == "lsq")
            right[method, seed] = rng.random((20, 60)) < chance
            row = {**NETWORK, "method": method, "weight_bits": 32 if method == "fp32" else 4, "seed": seed}
            row |= {"activation_bits": row["weight_bits"], "experiment": "x"}
            for position, name in enumerate([CLEAN, *PAPER_CORRUPTIONS]):
                at = {"corruption": name, "severity": int(name != CLEAN), "metric": "accuracy"}
                metrics.append({**row, **at, "value": 100 * right[method, seed][position].mean()})
            history += [{**row, "epoch": 0, "split": split, "loss": 1.0, "metric": 50.0} for split in ("train", "val")]
    metrics, history = pd.DataFrame(metrics), pd.DataFrame(history)
    frames = (metrics, history, pd.DataFrame(), pd.DataFrame(), pd.read_csv("results/published/table.csv"))
    widths = []
    for images in (None, images_csv(right, rotating=False)):
        claims = claims_table(*frames, images=images).set_index("claim")
        row = claims.loc["4 bits beat FP32 on corrupted data (classifiers)"]
        widths.append(row["high"] - row["low"])
        assert row["effect"] == pytest.approx(claims_table(*frames).set_index("claim").loc[row.name, "effect"])
    assert widths[1] > 1.5 * widths[0]
