"""How much longer a training step of YOLOv5n takes when it is quantized: full epochs of the real trainer, in one run.

`make bench-detection` writes docs/benchmark-detection.md.
"""

import argparse
import os
import shlex
import statistics
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from qreg_utils import PROJECT
from qreg_utils.atomic import atomic_write
from qreg_utils.batch.running import KERNEL_SETTINGS
from qreg_utils.detection.datasets import DetectionDataset, load_detection_dataset
from qreg_utils.detection.training import fit
from qreg_utils.detection.yolo import build_detector, quantize_detector
from qreg_utils.recipe import DetectionRecipe
from qreg_utils.results import environment

SETTINGS = {"FP32": None, "LSQ, 8 bits": 8, "LSQ, 4 bits": 4, "LSQ, 2 bits": 2}
AT_MOST = 1.6  # the goal: times FP32's step
BATCH_SIZE = 16
HYPERPARAMETERS = {
    "batch_size": BATCH_SIZE,
    "learning_rate": 0.01,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "alpha_decay": 5e-4,
    "schedule": "cosine",
    "warmup_epochs": 1.0,
    "augment": False,
}
ENVIRONMENT = KERNEL_SETTINGS | {"OMP_NUM_THREADS": "1"}  # glibc reads the malloc settings when a process starts


def step_seconds(data: DetectionDataset, bits: int | None, image_size: int, epochs: int) -> list[float]:
    """Seconds of a training step in each epoch but the first: reading the batch, the step itself, the EMA."""
    model = build_detector(len(data.classes), seed=0)
    if bits:
        model = quantize_detector(model, "lsq", bits, bits)
    recipe = DetectionRecipe(image_size=image_size, epochs=epochs, **HYPERPARAMETERS)
    run = fit(model, data, recipe, seed=0)
    return [BATCH_SIZE / speed for speed in run["images_per_second"][1:]]


def measure(image_size: int, rounds: int, epochs: int, images: int) -> dict[str, list[float]]:
    """Every setting takes its turn in every round, so that all meet the same disturbances: medians of the rounds."""
    data = load_detection_dataset("digit_scenes").subset(images, BATCH_SIZE)
    times = {setting: [] for setting in SETTINGS}
    for _ in range(rounds):
        for setting, bits in SETTINGS.items():
            times[setting].append(statistics.median(step_seconds(data, bits, image_size, epochs)))
    return times


def table(times: dict[str, list[float]]) -> str:
    lines = ["| setting | ms a step | times FP32 |", "| --- | ---: | ---: |"]
    for setting, seconds in times.items():
        ratios = [ours / fp32 for ours, fp32 in zip(seconds, times["FP32"], strict=True)]
        ratio = statistics.median(ratios)
        verdict = "" if setting == "FP32" else ", reached" if ratio <= AT_MOST else ", **not reached**"
        lines.append(f"| {setting} | {1e3 * statistics.median(seconds):.0f} | {ratio:.2f}{verdict} |")
    return "\n".join(lines)


def report(arguments: argparse.Namespace) -> str:
    system = environment()
    options = sys.argv[1:]
    command = shlex.join(["python", "benchmarks/detection.py", *options]) if options else "make bench-detection"
    sections = [
        f"## {size} pixels\n\n{table(measure(size, arguments.rounds, arguments.epochs, arguments.images))}"
        for size in arguments.image_sizes
    ]
    return f"""# Speed of training a detector

Written by `{command}` on {date.today()}: {system["gpu"] or system["processor"]}, {torch.get_num_threads()} thread(s),
torch {torch.__version__}, ultralytics {version("ultralytics")}.

A step of YOLOv5n by ultralytics' trainer, eager, batches of {BATCH_SIZE} digit scenes: the batch, forward, backward,
the limit on the scales' gradients, SGD, the moving average. In each of {arguments.rounds} rounds every setting trains
for {arguments.epochs} epochs of {arguments.images} images, of which the first is not counted; ratios are medians of the
rounds' ratios. The goal is at most {AT_MOST} times FP32's. The smaller the images, the more the rounding of the 2.5
million weights counts, which is the same for every size.

{chr(10).join(f"{section}{chr(10)}" for section in sections)}"""


def main() -> None:
    if not ENVIRONMENT.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=PROJECT / "docs" / "benchmark-detection.md")
    parser.add_argument("--image-sizes", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=64)
    arguments = parser.parse_args()
    text = report(arguments)
    with atomic_write(arguments.output) as part:
        part.write_text(text, encoding="utf-8")
    print(f"{text}\nwrote {arguments.output}")


if __name__ == "__main__":
    main()
