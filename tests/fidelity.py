"""How closely the corruptions agree with the original generators.

Two measures: pixel by pixel with the original's own random draws, and statistics of many pixels with our draws.
`python -m tests.fidelity` writes docs/fidelity.md, and tests/data/own_stats.csv, the statistics of our own outputs.
"""

import csv
import itertools
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from qreg_utils import corruptions
from qreg_utils.atomic import atomic_write
from qreg_utils.corruptions import CORRUPTIONS, FAMILIES, corrupt, finish
from qreg_utils.corruptions.registry import REGISTRY, SEVERITIES
from qreg_utils.datasets import all_digits

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT.parent / "shared" / "corruptions"
DATA = Path(__file__).parent / "data"
STATISTICS = Path(corruptions.__file__).parent  # of the original program: in the package, notebook 3 reads them
REPORT = ROOT / "docs" / "fidelity.md"

RANDOM = {
    "elastic_transform",
    "fog",
    "frost",
    "gaussian_noise",
    "glass_blur",
    "impulse_noise",
    "motion_blur",
    "shot_noise",
    "snow",
    "spatter",
    "speckle_noise",
}
# The original lays photographs over the image, which are not ours to ship.
WITHOUT_PIXEL_REFERENCE = "frost"
# Statistics of (output, output - clean), in levels.
MEASURES = ("mean", "std", "mad", "diff_std")
ROUNDING = 1e-4  # of the statistics in the tables
SEEDS = 5  # that the statistics of random corruptions are averaged over, as in the reference


@dataclass(frozen=True)
class PictureSet:
    """Pictures with a reference: the statistics are of all of them, the pixel reference has pictures[kept]."""

    name: str
    family: str
    title: str
    kept: slice
    seed: int  # of the pixel reference


PICTURE_SETS = {
    pictures.name: pictures
    for pictures in (
        PictureSet("cifar_c", "cifar", "CIFAR-10 pictures", slice(None, None, 3), 0),
        PictureSet("digits_c", "cifar", "digits", slice(None, None, 4), 0),
        PictureSet("imagenet_c", "imagenet", "photographs", slice(0, 1), 1),
    )
}


# --- pictures ---------------------------------------------------------------------------------------------------------


def to_torch(pictures):
    return torch.from_numpy(pictures).movedim(-1, -3).contiguous()


@lru_cache
def clean_pictures(name):
    """The pictures (N,3,H,W) of a set. All but the CIFAR-10 pictures can be made without the reference folder."""
    makers = {"digits_c": lambda: all_digits()[0][:64], "imagenet_c": _photographs}
    return makers[name]() if name in makers else reference_pictures(name)


def reference_pictures(name):
    return to_torch(np.load(REFERENCE / f"{name}_stats_clean.npy"))


def _photographs():
    """scikit-image's astronaut and coffee at 128 x 160 (H, W)."""
    from skimage import data

    fitted = [
        ImageOps.fit(Image.fromarray(picture), (160, 128), Image.Resampling.LANCZOS)
        for picture in (data.astronaut(), data.coffee())
    ]
    return to_torch(np.stack([np.asarray(picture) for picture in fitted]))


# --- pixel by pixel ---------------------------------------------------------------------------------------------------


class NumpyReplay:
    """The methods of CounterGenerator for one image, drawing from numpy's legacy generator like the originals."""

    def __init__(self, seed):
        self.state = np.random.RandomState(seed)

    def uniform(self, low, high, shape):
        return self._as_channels_first(lambda size: self.state.uniform(low, high, size), shape)

    def coins(self, shape):
        return self.uniform(0, 1, shape) < 0.5

    def normal(self, mean, std, shape):
        return self._as_channels_first(lambda size: self.state.normal(mean, std, size), shape)

    def integers(self, low, high, shape):
        return torch.tensor(self.state.randint(low, int(high), shape))[None]

    def poisson(self, levels, rate):
        counts = self.state.poisson(rate * (levels[0].movedim(0, -1).numpy() / 255.0))
        return torch.from_numpy(counts).movedim(-1, 0)[None].double()

    @staticmethod
    def _as_channels_first(sample, shape):
        if len(shape) < 3:
            return torch.tensor(sample(tuple(shape)), dtype=torch.float32)[None]
        channels, height, width = shape
        return torch.tensor(sample((height, width, channels)), dtype=torch.float32).movedim(-1, 0)[None]


def replay(name, family, pictures, kept, seed):
    """All severities of a corruption with the reference's draws, (5, len(pictures[kept]), 3, H, W).

    The original was seeded once for each corruption, then ran over the severities, and for each over all pictures.
    """
    corruption, draws, results = REGISTRY[name], NumpyReplay(seed), []
    for severity in SEVERITIES:
        parameters = corruption.parameters(family, severity)
        images = [finish(corruption.function(picture[None], draws, **parameters)) for picture in pictures]
        results.append(torch.cat(images)[kept])
    return torch.stack(results)


def pixel_differences(name, pictures):
    """Mean absolute difference to the reference, in levels, for each severity."""
    with np.load(REFERENCE / f"{pictures.name}_reference.npz") as arrays:
        reference = to_torch(arrays[name])
    clean = reference_pictures(pictures.name)
    if name in RANDOM:
        ours = replay(name, pictures.family, clean, pictures.kept, pictures.seed)
    else:
        kept = clean[pictures.kept]
        ours = torch.stack([corrupt(kept, name, severity, family=pictures.family) for severity in SEVERITIES])
    return mean_differences(ours, reference)


def mean_differences(ours, reference):
    return (ours.int() - reference.int()).abs().double().mean((1, 2, 3, 4)).tolist()


# --- statistics -------------------------------------------------------------------------------------------------------


def measure(clean, corrupted):
    corrupted = corrupted.double()
    difference = corrupted - clean.double()
    values = (corrupted.mean(), corrupted.std(correction=0), difference.abs().mean(), difference.std(correction=0))
    return dict(zip(MEASURES, map(float, values), strict=True))


@lru_cache
def expected_statistics(name):
    """(corruption, severity) -> measure -> (value, seed-to-seed standard deviation) for a set of pictures."""
    committed = STATISTICS / f"{name}_stats.csv"
    if committed.exists():
        with open(committed, newline="") as file:
            return {
                (row["corruption"], int(row["severity"])): {
                    key: (float(row[key]), float(row[f"{key}_sd"])) for key in MEASURES
                }
                for row in csv.DictReader(file)
            }
    table = json.loads((REFERENCE / f"{name}_stats.json").read_text())
    return {
        (corruption, severity): {
            key: (row[key], row.get(f"{key}_sd20", row[f"{key}_sd"]))
            for row in [table[corruption]["severity"][str(severity)]]
            for key in MEASURES
        }
        for corruption in CORRUPTIONS
        for severity in SEVERITIES
    }


def statistics_deviations(name, severity, pictures, seeds=range(SEEDS)):
    """Measure -> (deviation from the reference, what is tolerated: 3 standard deviations + 2 %), in levels."""
    clean = clean_pictures(pictures.name)
    seeds = seeds if name in RANDOM else seeds[:1]
    runs = [measure(clean, corrupt(clean, name, severity, seed=seed, family=pictures.family)) for seed in seeds]
    return {
        key: (abs(np.mean([run[key] for run in runs]) - value), max(3 * deviation + 0.02 * value, ROUNDING))
        for key, (value, deviation) in expected_statistics(pictures.name)[name, severity].items()
    }


# --- our own outputs: what would change them is noticed without the reference -----------------------------------------

OWN_STATISTICS = DATA / "own_stats.csv"


def own_statistics():
    """Rows of the statistics of our outputs at seed 0 on the photographs, both families."""
    clean = clean_pictures("imagenet_c")
    for family, name, severity in itertools.product(FAMILIES, CORRUPTIONS, SEVERITIES):
        statistics = measure(clean, corrupt(clean, name, severity, family=family))
        yield {"family": family, "corruption": name, "severity": severity} | statistics


def write_own_statistics():
    with atomic_write(OWN_STATISTICS) as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["family", "corruption", "severity", *MEASURES])
        writer.writeheader()
        for row in own_statistics():
            writer.writerow(row | {key: f"{row[key]:.4f}" for key in MEASURES})


# --- the report -------------------------------------------------------------------------------------------------------

INTRODUCTION = """\
# How closely the corruptions follow the original programs

Written by `python -m tests.fidelity`; the same comparisons are tests (`tests/test_corruptions.py`).

The originals are `make_cifar_c.py` of hendrycks/robustness for `family="cifar"`, and imagecorruptions 1.1.2 (PyPI) for
`family="imagenet"`, both unedited, on libraries of 2019 (SciPy 1.2.1, OpenCV 4.1.0, Pillow 5.4.1 with IJG libjpeg 9,
scikit-image 0.15.0, ImageMagick 6.9.7-4), those of CIFAR-10-C's time. They were run once, and their outputs are the
reference. Today's libraries give other results in {drifting}; we match those of 2019 in every corruption and at every
severity.

**Pixels**: the mean absolute difference between our output and the reference, in levels of 255, on {kept}. Random
corruptions are fed the random numbers that the original drew, so that the formula is compared and not the luck. 0 means
that every byte is the same.

**Statistics**: our outputs with our own random numbers. Mean, standard deviation, mean |output - clean| and standard
deviation of (output - clean), over all pictures; for random corruptions averaged over {seeds} seeds, as the reference
is. The number is the worst of the four deviations, as a share of what the tests tolerate: 3 seed-to-seed standard
deviations of the original + 2 % of the value.

**frost** is the one deliberate departure: the original lays photographs over the image, which are not ours to ship, and
ours lays synthetic textures of the same size, colours, brightness distribution and correlation lengths. Its pixels
cannot agree (n/a). Its statistics deviate by {frost:.0%} of the tolerance at most. Its mean brightness deviates by
{frost_mean:.1f} levels at most; there the original's own has a standard deviation of {frost_sd:.1f} from seed to seed.
What the textures show differs: straight needles, where the photographs have ferns and drops.

**jpeg_compression** computes with the whole numbers of the library's transforms. Grey pictures are the same to a byte,
coloured ones but for one value in some thousands: the constants of its 16x16 transforms are rounded a bit differently.

Largest difference in pixels: {largest}.
"""


def write_report():
    if not REFERENCE.is_dir():
        raise SystemExit(
            f"the outputs of the original programs are needed in {REFERENCE}; {REPORT.name} stays as it is"
        )
    torch.set_num_threads(1)
    pixels, deviations = {}, {}
    for pictures in PICTURE_SETS.values():
        for name in CORRUPTIONS:
            if name != WITHOUT_PIXEL_REFERENCE:
                pixels[pictures.name, name] = pixel_differences(name, pictures)
            deviations[pictures.name, name] = [statistics_deviations(name, s, pictures) for s in SEVERITIES]
    sections = [_section(pictures, pixels, deviations) for pictures in PICTURE_SETS.values()]
    with atomic_write(REPORT) as path:
        path.write_text("\n".join([_introduction(pixels, deviations), *sections]))


def _introduction(pixels, deviations):
    worst = {name: max(max(values) for (_, n), values in pixels.items() if n == name) for _, name in pixels}
    largest = sorted(worst, key=worst.get, reverse=True)[:3]
    frost = [row for (_, name), rows in deviations.items() if name == "frost" for row in rows]
    frost_mean, frost_sd = max(
        (deviations[name, "frost"][severity - 1]["mean"][0], expected_statistics(name)["frost", severity]["mean"][1])
        for name in PICTURE_SETS
        for severity in SEVERITIES
    )
    return INTRODUCTION.format(
        drifting=", ".join(f"`{name}`" for name in _drifting()),
        kept=", ".join(f"{len(clean_pictures(p.name)[p.kept])} of the {p.title}" for p in PICTURE_SETS.values()),
        seeds=SEEDS,
        frost=max(map(_share, frost)),
        frost_mean=frost_mean,
        frost_sd=frost_sd,
        largest=", ".join(f"{worst[name]:.3f} levels in {name}" for name in largest),
    )


def _share(row):
    return max(deviation / tolerated for deviation, tolerated in row.values())


def _drifting():
    """The corruptions whose outputs differ between the library generations, but for the random generator."""
    arrays = [np.load(REFERENCE / f"{name}_reference_alt_modern.npz") for name in PICTURE_SETS]
    return sorted({name for group in arrays for name in group.files} - {"impulse_noise", "clean"})


def _section(pictures, pixels, deviations):
    count, _, height, width = clean_pictures(pictures.name).shape
    severities = " | ".join(map(str, SEVERITIES))
    lines = [
        f'## family="{pictures.family}", {count} {pictures.title} of {height} x {width} pixels',
        "",
        f"| severity | pixels {severities} | statistics {severities} |",
        f"| :-- |{' --: |' * (2 * len(SEVERITIES))}",
    ]
    for name in CORRUPTIONS:
        key = pictures.name, name
        differences = [_difference(value) for value in pixels[key]] if key in pixels else ["n/a"] * len(SEVERITIES)
        shares = [f"{_share(row):.2f}" for row in deviations[key]]
        lines.append(" | ".join([f"| {name}", *differences, *shares]) + " |")
    return "\n".join([*lines, ""])


def _difference(value):
    return "0" if value == 0 else "<0.001" if value < 0.0005 else f"{value:.3f}"


if __name__ == "__main__":
    write_report()
    write_own_statistics()
