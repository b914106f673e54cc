"""Trained models on clean and corrupted test images -> tidy rows."""

from collections.abc import Mapping

from torch import nn
from tqdm.auto import tqdm

from qreg_utils.corruptions import CORRUPTIONS, corrupt
from qreg_utils.datasets import ImageDataset
from qreg_utils.metrics import CLEAN
from qreg_utils.quantize import assert_quantized
from qreg_utils.training import measure


def evaluate(
    models: Mapping[int, nn.Module], data: ImageDataset, severities: list[int], *, quantized: bool
) -> list[dict]:
    """Accuracy (percent) and loss of each model on the clean test images and on 19 corruptions x ``severities``.

    ``models`` maps seeds to models; each corrupted set is made once for all of them, and is the same for every
    experiment. Rows: seed, corruption ("test_set" for clean), severity (0 for clean), metric, value. With
    ``quantized`` every model must still be so right before it is measured, or QuantizationError is raised.
    """
    settings = [(CLEAN, 0)] + [(name, severity) for name in CORRUPTIONS for severity in severities]
    rows = []
    for name, severity in tqdm(settings, desc="evaluation", unit="set"):
        images = data.test_images if name == CLEAN else corrupt(data.test_images, name, severity)
        for seed, model in models.items():
            if quantized:
                assert_quantized(model)
            for metric, value in measure(model, data, images, data.test_labels).items():
                rows.append({"seed": seed, "corruption": name, "severity": severity, "metric": metric, "value": value})
    return rows
