"""Trained models on clean and corrupted test images -> tidy rows."""

from collections.abc import Mapping, Sequence

from torch import nn

from qreg_utils.corrupted_images import CorruptedImages, open_downloaded, open_or_make
from qreg_utils.datasets import ImageDataset
from qreg_utils.folders import data_dir, default_data_dir
from qreg_utils.names import CLEAN, DATASETS, PAPER_CORRUPTIONS
from qreg_utils.progress import progress_bar
from qreg_utils.quantize import assert_quantized
from qreg_utils.training import measure


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
) -> list[dict]:
    """Accuracy (percent) and loss of each model on the clean test images and on ``corruptions`` x ``severities``.

    ``models`` maps seeds to models; ``corrupted`` holds the corrupted test images of ``data``, or of the set whose
    first test images it has (``ImageDataset.subset``). Rows: seed, corruption
    ("test_set" for clean), severity (0 for clean), metric, value. With ``quantized`` every model must still be so right
    before it is measured, or QuantizationError is raised.
    """
    settings = [(CLEAN, 0)] + [(name, severity) for name in corruptions for severity in severities]
    device = data.test_images.device
    rows = []
    for name, severity in progress_bar(settings, desc="evaluation", unit="set"):
        images = data.test_images
        if name != CLEAN:
            images = corrupted.images(name, severity)[: len(images)].to(device)
        for seed, model in models.items():
            if quantized:
                assert_quantized(model)
            for metric, value in measure(model, data, images, data.test_labels).items():
                rows.append({"seed": seed, "corruption": name, "severity": severity, "metric": metric, "value": value})
    return rows
