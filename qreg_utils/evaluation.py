"""Trained models on clean and corrupted test images -> tidy rows."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from qreg_utils.compiling import compiler_works, with_shared_graph
from qreg_utils.corrupted_images import CorruptedImages, open_downloaded, open_or_make
from qreg_utils.datasets import ImageDataset
from qreg_utils.folders import data_dir, default_data_dir
from qreg_utils.names import CLEAN, DATASETS, PAPER_CORRUPTIONS
from qreg_utils.progress import progress_bar
from qreg_utils.quantize import assert_quantized, weights_quantized_once
from qreg_utils.training import MEASURED_BATCH, measure

COMPILE_FROM_IMAGES = 200_000  # measured in all; with fewer, compiling (half a minute) costs more than it saves


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
    severities: list[int],
    *,
    quantized: bool,
    corruptions: Sequence[str] = PAPER_CORRUPTIONS,
    compile: bool | Literal["auto"] = False,
    runs: int = 1,
) -> list[dict]:
    """Accuracy (percent) and loss of each model on the clean test images and on ``corruptions`` x ``severities``.

    ``models`` maps seeds to models of one structure; ``corrupted`` holds the corrupted test images of ``data``, or of
    the set whose first test images it has (``ImageDataset.subset``). Rows: seed, corruption ("test_set" for clean),
    severity (0 for clean), metric, value. With ``quantized`` every model must still be so right before it is measured,
    or QuantizationError is raised. Weights are quantized once for all images.

    ``compile`` says whether the forward pass goes through torch.compile; "auto" means that it does for at least
    COMPILE_FROM_IMAGES images, all sets, models and ``runs`` like this one together. Compiled, outputs may differ in
    their last digits.
    """
    settings = [(CLEAN, 0)] + [(name, severity) for name in corruptions for severity in severities]
    device = data.test_images.device
    images_in_all = len(settings) * len(models) * len(data.test_labels) * runs
    compile = (images_in_all >= COMPILE_FROM_IMAGES if compile == "auto" else compile) and compiler_works(device)
    rows = []
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(weights_quantized_once(model.eval()))
        logits = {seed: _logits_of(model, compile, device) for seed, model in models.items()}
        for name, severity in progress_bar(settings, desc="evaluation", unit="set"):
            images = data.test_images
            if name != CLEAN:
                images = corrupted.images(name, severity)[: len(images)].to(device)
            for seed, model in models.items():
                if quantized:
                    assert_quantized(model)
                row = {"seed": seed, "corruption": name, "severity": severity}
                found = measure(model, data, images, data.test_labels, logits=logits[seed])
                rows += [{**row, "metric": metric, "value": value} for metric, value in found.items()]
    return rows


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
