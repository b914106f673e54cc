"""How fast the 19 corruptions are: ours against imagecorruptions 1.1.2 (PyPI) in one run on the same images.

`make bench` installs imagecorruptions and writes docs/benchmark-corruptions.md. Everything runs on one thread, except
the last table, for which two processes write the CIFAR-10-C layout together.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_sample_images

from qreg_utils import PROJECT
from qreg_utils.atomic import atomic_write
from qreg_utils.corrupted_images import open_or_make
from qreg_utils.corruptions import CORRUPTIONS, FAMILIES, corrupt
from qreg_utils.results import environment

SEVERITY = 3
# The same code in imagecorruptions and in the CIFAR generator: what they take on two machines compares these.
SAME_CODE = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "brightness", "saturate")


def crops(count: int, side: int) -> torch.Tensor:
    """Square crops of scikit-learn's two sample photographs: uint8 (count, 3, side, side)."""
    photos = [torch.from_numpy(photo.copy()).permute(2, 0, 1) for photo in load_sample_images().images]
    corners = np.random.default_rng(0).integers(0, [photos[0].shape[1] - side, photos[0].shape[2] - side], (count, 2))
    return torch.stack(
        [photos[i % 2][:, row : row + side, column : column + side] for i, (row, column) in enumerate(corners.tolist())]
    )


def imagecorruptions_corrupt():
    """Its function, or None where it is not installed."""
    try:
        import cv2
        from imagecorruptions import corrupt as theirs
    except ImportError as error:
        print(f"imagecorruptions is left out: {error}", file=sys.stderr)
        return None
    cv2.setNumThreads(1)
    return theirs


def milliseconds(function, images: int) -> float:
    """Wall time of ``function()`` for each of so many images."""
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start) / images


def measure(images: torch.Tensor, few: int, rounds: int, theirs) -> dict[str, dict]:
    """For each corruption the median milliseconds an image: ours in one batch, in both families, and theirs over the
    first ``few`` images, or the error with which theirs fails."""
    arrays = list(images[:few].permute(0, 2, 3, 1).contiguous().numpy())
    failures, times = {}, defaultdict(list)
    for turn in range(rounds + 1):  # all take their turn in each round, so that a slow moment of the machine meets all
        for name in CORRUPTIONS:
            for family in FAMILIES:
                ours = milliseconds(lambda n=name, f=family: corrupt(images, n, SEVERITY, family=f), len(images))
                times[name, family].append(ours)
            if theirs and name not in failures:
                try:
                    them = milliseconds(lambda n=name: [theirs(a, SEVERITY, corruption_name=n) for a in arrays], few)
                    times[name, "imagecorruptions"].append(them)
                except Exception as error:  # it was written for libraries of 2019
                    failures[name] = type(error).__name__
        print(f"{images.shape[-1]} x {images.shape[-1]}: round {turn} of {rounds}", file=sys.stderr)
    measured = {name: {"failure": failures.get(name)} for name in CORRUPTIONS}
    for (name, key), values in times.items():
        measured[name][key] = statistics.median(values[1:])  # the first round warms up
    return measured


def original_times(measured: dict) -> tuple[dict[str, float], float]:
    """The original CIFAR generator's noted milliseconds, times how much longer this machine takes than that one did
    (the second result), which imagecorruptions tells: both are empty without it."""
    if not any("imagecorruptions" in times for times in measured.values()):
        return {}, math.nan
    noted = json.loads((Path(__file__).parent / "original_cifar_generator.json").read_text())
    noted_theirs = noted["libraries_of_2025"]
    factor = statistics.median(measured[name]["imagecorruptions"] / noted_theirs[name] for name in SAME_CODE)
    return {name: milliseconds * factor for name, milliseconds in noted["libraries_of_2019"].items()}, factor


def per_second(milliseconds: float | None) -> str:
    return "" if milliseconds is None else f"{1e3 / milliseconds:,.0f}"


def ratio(theirs: float | None, ours: float) -> str:
    return "" if theirs is None else f"{theirs / ours:.1f}"


def table(measured: dict, original: dict) -> str:
    rows = []
    for name, times in measured.items():
        their_time = times.get("imagecorruptions")
        row = {"corruption": name, "qreg, cifar": per_second(times["cifar"])}
        if original:
            row |= {"CIFAR generator": per_second(original[name]), "ratio": ratio(original[name], times["cifar"])}
        row |= {"qreg, imagenet": per_second(times["imagenet"])}
        row |= {"imagecorruptions": times["failure"] or per_second(their_time)}
        row |= {"ratio ": ratio(their_time, times["imagenet"])}
        rows.append(row)
    alignment = ["left", *["right"] * (len(rows[0]) - 1)]
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True, colalign=alignment)


def sums(measured: dict, original: dict) -> str:
    ours = sum(times["cifar"] for times in measured.values())
    lines = [f"Sum over the 19, family cifar: {ours:.2f} ms an image."]
    if original:
        theirs = sum(original.values())
        worst = min(CORRUPTIONS, key=lambda name: original[name] / measured[name]["cifar"])
        lines.append(
            f"The original CIFAR generator: {theirs:.1f} ms, **{theirs / ours:.1f} times as long**; the smallest ratio "
            f"is {original[worst] / measured[worst]['cifar']:.1f} ({worst})."
        )
    both = [times for times in measured.values() if "imagecorruptions" in times]
    if both:
        theirs, ours = (sum(times[key] for times in both) for key in ("imagecorruptions", "imagenet"))
        lines.append(
            f"Of the {len(both)} that still run in imagecorruptions, family imagenet: {theirs:.1f} ms against our "
            f"{ours:.1f} ms, **{theirs / ours:.1f} times as long**."
        )
        slower = [name for name, times in measured.items() if times.get("imagecorruptions", 1e9) < times["imagenet"]]
        if slower:
            lines.append(f"Ours is the slower one in {', '.join(slower)}.")
    return " ".join(lines)


def write_layout(folder: str, count: int) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    open_or_make([Path(folder)], crops(count, 32), torch.arange(count) % 10)


def layout(count: int) -> str:
    """Time and memory of two processes that write the layout for ``count`` test images."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--write-layout", folder, "--layout-images", str(count)]
        start = time.perf_counter()
        processes = [subprocess.Popen(command) for _ in range(2)]
        if any([process.wait() for process in processes]):
            sys.exit("writing the layout failed")
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return (
        f"{95 * count:,} corrupted images of {count:,} test images by two processes with one thread each: "
        f"**{seconds:.0f} s**, start, imports and a check of all files included; {peak:.0f} MiB at most in a process."
    )


ORIGINAL = """
The original CIFAR generator does not run on today's libraries. Its times were taken with the libraries of its time on
another machine (`benchmarks/original_cifar_generator.json`) and are multiplied by {factor:.2f}, which is how long this
machine takes in comparison: the median over six corruptions whose code the generator shares with imagecorruptions.
"""


def report(arguments: argparse.Namespace) -> str:
    theirs = imagecorruptions_corrupt()
    small, large = crops(arguments.images, 32), crops(max(1, arguments.images // 32), 224)
    at_32 = measure(small, min(16, len(small)), arguments.rounds, theirs)
    at_224 = measure(large, min(2, len(large)), arguments.rounds, theirs)
    original, factor = original_times(at_32)
    system = environment()
    return f"""# Speed of the corruptions

Written by `benchmarks/corruptions.py` (`make bench`) on {date.today()}: {system["processor"]}, one thread, torch
{system["versions"]["torch"]}. Images a second at severity {SEVERITY}: medians of {arguments.rounds} rounds, in each
of which every implementation takes its turn on the same images. A ratio is how many times as long the other takes.
Freed memory stays with the process, as in the notebooks that the batch runs; else defocus_blur at 224 x 224 takes up
to twice as long.

imagecorruptions 1.1.2 runs on today's NumPy and scikit-image; where it fails, the table names the error.
{ORIGINAL.format(factor=factor) if original else ""}
## 32 x 32, batches of {len(small)}

{table(at_32, original)}

{sums(at_32, original)}

## 224 x 224, batches of {len(large)}

{table(at_224, {})}

{sums(at_224, {})}

## The CIFAR-10-C layout

{layout(arguments.layout_images)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=PROJECT / "docs" / "benchmark-corruptions.md")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=256, help="32x32 images in a batch")
    parser.add_argument("--layout-images", type=int, default=10_000, help="test images of the last measurement")
    parser.add_argument("--write-layout", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write_layout:
        return write_layout(arguments.write_layout, arguments.layout_images)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with atomic_write(arguments.output) as part:
        part.write_text(report(arguments))
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
