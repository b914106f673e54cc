"""Trained models on clean and corrupted test images -> tidy rows."""

import base64
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qreg_utils.compiling import compiler_works, with_shared_graph
from qreg_utils.corrupted_images import SEVERITIES, CorruptedImages, open_downloaded, open_or_make
from qreg_utils.datasets import ImageDataset
from qreg_utils.folders import data_dir, default_data_dir
from qreg_utils.names import CLEAN, DATASETS, PAPER_CORRUPTIONS
from qreg_utils.progress import progress_bar
from qreg_utils.quantize import assert_quantized, weights_quantized_once
from qreg_utils.training import MEASURED_BATCH, outputs_on

COMPILE_FROM_IMAGES = 200_000  # measured in all; with fewer, compiling (half a minute) costs more than it saves
CALIBRATION_BINS = 15


def corrupted_test_images(data: ImageDataset, extra: Sequence[str] = ()) -> CorruptedImages:
    """The 19 x 5 corrupted versions of the test images, the same files for every experiment on this data set; and
    those of ``extra`` registered corruptions. The constants are those of the data set's family.

    A published set that lies in ``data_dir()`` is used as it is. Otherwise our own is, written the first time into
    ``corrupted/`` there (or in the project's data folder, when that one is read-only). Raises CorruptedImagesError for
    files that are damaged or belong to other images.
    """
    row = DATASETS[data.name]
    published = row.published_corruptions
    parents = [root / "corrupted" / data.name for root in (data_dir(), default_data_dir())]
    if published and (data_dir() / published).is_dir():
        found = open_downloaded(data_dir() / published, data.test_images, data.test_labels)
    else:
        found = open_or_make(parents, data.test_images, data.test_labels, row.corruption_family)
    return found.with_extra(parents, data.test_labels, row.corruption_family, extra) if extra else found


def evaluate(
    models: Mapping[int, nn.Module],
    data: ImageDataset,
    corrupted: CorruptedImages,
    severities: list[int] | Literal["rotating"],
    *,
    quantized: bool,
    corruptions: Sequence[str] = PAPER_CORRUPTIONS,
    compile: bool | Literal["auto"] = False,
    runs: int = 1,
) -> dict[str, list[dict]]:
    """What each model makes of the clean test images and of ``corruptions`` x ``severities``: rows of two tables.

    ``models`` maps seeds to models of one structure; ``corrupted`` holds the corrupted test images of ``data``, or of
    the set whose first test images it has (``ImageDataset.subset``). With "rotating" each image is measured at one
    severity of each corruption, which goes round from image to image and corruption to corruption: five times as many
    images for the same work.

    "metrics" has rows seed, corruption ("test_set" for clean), severity (0 for clean), metric, value:
    accuracy (percent), loss (mean cross-entropy), ece (expected calibration error, percent) and scaled_loss (the loss
    with all logits divided by the temperature that is best for the model on the clean test images). "images" has rows
    seed, corruption, severity, images, and which of them, in the order of the test set, are classified right
    (``packed``).

    With ``quantized`` every model must still be so right before it is measured, or QuantizationError is raised. Weights
    are quantized once for all images.

    ``compile`` says whether the forward pass goes through torch.compile; "auto" means that it does for at least
    COMPILE_FROM_IMAGES images, all sets, models and ``runs`` like this one together. Compiled, outputs may differ in
    their last digits.
    """
    sets = [CLEAN, *corruptions]
    device, count = data.test_images.device, len(data.test_labels)
    passes = 1 if severities == "rotating" else len(severities)
    images_in_all = (1 + len(corruptions) * passes) * len(models) * count * runs
    compile = (images_in_all >= COMPILE_FROM_IMAGES if compile == "auto" else compile) and compiler_works(device)
    rows: dict[str, list[dict]] = {"metrics": [], "images": []}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(weights_quantized_once(model.eval()))
        logits = {seed: _logits_of(model, compile, device) for seed, model in models.items()}
        temperatures: dict[int, float] = {}
        for position, name in enumerate(progress_bar(sets, desc="evaluation", unit="set")):
            for severity_of, images in _image_sets(name, position, data, corrupted, severities):
                for seed, model in models.items():
                    if quantized:
                        assert_quantized(model)
                    outputs = outputs_on(model, data, images.to(device), logits=logits[seed])
                    if name == CLEAN:
                        temperatures[seed] = best_temperature(outputs, data.test_labels)
                    for severity in sorted(set(severity_of.tolist())):
                        of_it = (severity_of == severity).to(device)
                        found = scores_of(outputs[of_it], data.test_labels[of_it], temperatures[seed])
                        row = {"seed": seed, "corruption": name, "severity": severity}
                        correct = outputs[of_it].argmax(1) == data.test_labels[of_it]
                        rows["metrics"] += [{**row, "metric": metric, "value": x} for metric, x in found.items()]
                        rows["images"].append({**row, "images": len(correct), "correct": packed(correct)})
    return rows


def _image_sets(
    name: str,
    position: int,
    data: ImageDataset,
    corrupted: CorruptedImages,
    severities: list[int] | Literal["rotating"],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Which sets of all test images one corruption is measured on: the severity of each image, and the images."""
    count = len(data.test_labels)
    if name == CLEAN:
        yield torch.zeros(count, dtype=torch.long), data.test_images
    elif severities == "rotating":
        severity_of = rotating_severities(count, position)
        images = torch.empty_like(data.test_images, device="cpu")
        for severity in SEVERITIES:
            chosen = severity_of == severity
            images[chosen] = corrupted.images(name, severity)[:count][chosen]
        yield severity_of, images
    else:
        for severity in severities:
            yield torch.full((count,), severity), corrupted.images(name, severity)[:count]


def rotating_severities(count: int, position: int) -> Tensor:
    """The severity, 1 to 5, of each of ``count`` images for the corruption at that ``position``: int64 (count,)."""
    return 1 + (torch.arange(count) + position) % len(SEVERITIES)


def scores_of(outputs: Tensor, labels: Tensor, temperature: float) -> dict[str, float]:
    """Accuracy, loss, ece and scaled_loss of logits (N, classes), as in ``evaluate``."""
    return {
        "loss": F.cross_entropy(outputs, labels).item(),
        "accuracy": 100 * (outputs.argmax(1) == labels).double().mean().item(),
        "ece": calibration_error(outputs, labels),
        "scaled_loss": F.cross_entropy(outputs / temperature, labels).item(),
    }


def calibration_error(outputs: Tensor, labels: Tensor) -> float:
    """Expected calibration error in percent: the mean over images of |accuracy - confidence| of their bin.

    Confidence is the largest probability, in CALIBRATION_BINS bins of equal width. Source: Guo et al. 2017, arXiv
    1706.04599, Eq. 3.
    """
    confidence, predicted = outputs.softmax(1).double().max(1)
    bins = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
    surplus = (predicted == labels).double() - confidence
    sums = torch.zeros(CALIBRATION_BINS, dtype=torch.float64, device=outputs.device).index_add_(0, bins, surplus)
    return 100 * sums.abs().sum().item() / len(labels)


def best_temperature(outputs: Tensor, labels: Tensor) -> float:
    """The temperature, 1/20 to 20, by which logits (N, classes) are divided for the smallest cross-entropy.

    Source: Guo et al. 2017, arXiv 1706.04599, section 4.2.
    """
    from scipy.optimize import minimize_scalar  # here, because it takes a moment

    outputs = outputs.double()
    limit = math.log(20)
    found = minimize_scalar(
        lambda log: F.cross_entropy(outputs / math.exp(log), labels).item(), bounds=(-limit, limit), method="bounded"
    )
    return math.exp(found.x)


def packed(correct: Tensor) -> str:
    """Truth values (N,) as text: eight to a byte, in base64."""
    return base64.b64encode(np.packbits(correct.cpu().numpy()).tobytes()).decode()


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def _logits_of(model: nn.Module, compile: bool, device) -> Callable[[nn.Module, Tensor], Tensor]:
    """A function of a model like this and a batch; compiled, of full batches: the last one is filled up."""
    if not compile:
        return _logits
    compiled = with_shared_graph(_logits, model, device)

    def of_a_full_batch(model: nn.Module, x: Tensor) -> Tensor:
        missing = MEASURED_BATCH - len(x)
        return compiled(model, F.pad(x, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else x)[: len(x)]

    return of_a_full_batch
