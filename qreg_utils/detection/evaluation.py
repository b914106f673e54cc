"""Detectors on clean and corrupted test images -> tidy rows, through ultralytics' validator."""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from ultralytics.cfg import get_cfg
from ultralytics.data.build import build_dataloader
from ultralytics.data.dataset import YOLODataset
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.utils.nms import non_max_suppression

from qreg_utils.corruptions import corrupt
from qreg_utils.detection.datasets import DetectionDataset, LabelledImage
from qreg_utils.detection.yolo import assert_as_trained
from qreg_utils.names import CLEAN, DATASETS, PAPER_CORRUPTIONS
from qreg_utils.precision import ieee_float32
from qreg_utils.progress import progress_bar

RAM = 2**30  # bytes of decoded images up to which they are kept in memory


class BoxDataset(YOLODataset):
    """Images whose boxes have been read and checked (``LabelledImage``): no label caches, which would be pickles."""

    def __init__(
        self, images: Sequence[LabelledImage], args: SimpleNamespace, data: dict, augment: bool, batch_size: int
    ):
        self.images = images
        with redirect_stdout(StringIO()):  # a progress bar of ultralytics' own
            super().__init__(
                img_path="",
                data=data,
                imgsz=args.imgsz,
                cache="ram",
                augment=augment,
                hyp=args,
                rect=not augment,  # measured in batches of similar shape, with as little padding as the strides allow
                batch_size=batch_size,
                pad=0.0,
            )

    def check_cache_ram(self, safety_margin: float = 1.0) -> bool:
        """Whether the images are kept in memory: by their number, not by what memory happens to be free.

        Where they are not, ultralytics would draw a mosaic's images from the last few that were read, which a resumed
        run has not got; that is off with cache="ram", kept or not.
        """
        return len(self.images) * 3 * self.imgsz**2 <= RAM

    def set_rectangle(self) -> None:
        """Batches of similar shape: by aspect ratio, and equal ones in the order of the data set on every machine."""
        positions = {str(image.file): (image.height / image.width, i) for i, image in enumerate(self.images)}
        super().set_rectangle()
        order = sorted(range(self.ni), key=lambda i: positions[self.im_files[i]])
        self.im_files, self.labels = ([items[i] for i in order] for items in (self.im_files, self.labels))

    def get_img_files(self, img_path) -> list[str]:
        return [str(image.file) for image in self.images]

    def get_labels(self) -> list[dict]:
        return [
            {
                "im_file": str(image.file),
                "shape": (image.height, image.width),
                "cls": image.classes[:, None].astype(np.float32),
                "bboxes": image.boxes,
                "segments": [],
                "keypoints": None,
                "normalized": True,
                "bbox_format": "xywh",
            }
            for image in self.images
        ]


class Validator(DetectionValidator):
    """ultralytics' validator that checks what it measures, and may corrupt what it shows to the network."""

    corruption: tuple[str, int] | None = None  # name and severity
    quantized = False  # whether the model must be

    def get_model(self, model, trainer=None) -> nn.Module:
        """The model that will be measured. It is looked at here because ultralytics converts it to float32 next."""
        model = super().get_model(model, trainer)
        assert_as_trained(model, quantized=self.quantized)
        return model

    def init_metrics(self, model: nn.Module) -> None:
        """Called right before the first batch, with the very model that is measured."""
        assert_as_trained(model, quantized=self.quantized)
        super().init_metrics(model)

    def preprocess(self, batch: dict) -> dict:
        if self.corruption:
            name, severity = self.corruption
            images = batch["img"].to(self.device)
            batch["img"] = corrupt(images, name, severity, family=self.family, first_image=self.seen)
        return super().preprocess(batch)

    def postprocess(self, preds: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """As ultralytics', but without its time limit, after which images count as empty on a busy machine."""
        limits = {"max_det": self.args.max_det, "max_time_img": float("inf")}
        found = non_max_suppression(preds, self.args.conf, self.args.iou, multi_label=True, **limits)
        return [{"bboxes": x[:, :4], "conf": x[:, 4], "cls": x[:, 5], "extra": x[:, 6:]} for x in found]

    def mean_ap(self, classes: Sequence[str] | None = None) -> dict[str, float]:
        """mAP50 and mAP50-95 in percent of the last measurement, over ``classes`` (default: all that have objects)."""
        box = self.metrics.box
        chosen = [i for i, c in enumerate(box.ap_class_index) if classes is None or self.names[c] in classes]
        return {"map50": 100 * float(np.mean(box.ap50[chosen])), "map50_95": 100 * float(np.mean(box.ap[chosen]))}


@ieee_float32()
def evaluate(
    models: Mapping[int, nn.Module],
    data: DetectionDataset,
    image_size: int,
    severities: Sequence[int],
    *,
    quantized: bool = False,
    classes: Sequence[str] | None = None,
    batch_size: int = 32,
    corruptions: Sequence[str] | None = None,
) -> list[dict]:
    """Mean average precision of each model on the clean test images and on ``corruptions`` (default: the
    paper's 19) x ``severities``.

    ``models`` maps seeds to models. The corruptions (constants of the data set's family) are applied to the letterboxed
    batches, on the models' device; nothing is written to disk. Rows: seed, corruption ("test_set" for clean), severity
    (0 for clean), metric ("map50", "map50_95"), value in percent, the mean over ``classes`` (default: all that have
    test objects). ``batch_size`` decides how images are letterboxed together; training measures with twice its own.
    Raises QuantizationError for a model that is not what was trained (``assert_as_trained``; with ``quantized``, that
    has no quantized layer), ValueError for a class that is unknown or has no test object.
    """
    names = PAPER_CORRUPTIONS if corruptions is None else corruptions
    settings = [(CLEAN, 0)] + [(name, severity) for name in names for severity in severities]
    rows = []
    data.count_objects(classes)  # a wrong class is found before any work is done
    device = next(next(iter(models.values())).parameters()).device
    with tempfile.TemporaryDirectory() as scratch:
        validator = _validator(data, image_size, batch_size, device, Path(scratch))
        validator.quantized, validator.family = quantized, _family(data)
        for name, severity in progress_bar(settings, desc="evaluation", unit="set"):
            validator.corruption = None if name == CLEAN else (name, severity)
            for seed, model in models.items():
                validator(_as_if_trained_just_now(model, data))
                for metric, value in validator.mean_ap(classes).items():
                    rows.append(
                        {"seed": seed, "corruption": name, "severity": severity, "metric": metric, "value": value}
                    )
    for model in models.values():
        model.criterion = None  # its tensors are inference tensors, which cannot be trained with
    return rows


def _family(data: DetectionDataset) -> str:
    """Whose constants its corruptions have; a data set that has no row is taken to hold photographs."""
    return DATASETS[data.name].corruption_family if data.name in DATASETS else "imagenet"


def description(data: DetectionDataset) -> dict:
    """What ultralytics calls a data set: splits, class names."""
    names = dict(enumerate(data.classes))
    return {"train": data.train, "val": data.test, "names": names, "nc": len(names), "channels": 3}


def _validator(
    data: DetectionDataset, image_size: int, batch_size: int, device: torch.device, scratch: Path
) -> Validator:
    args = get_cfg(overrides={"imgsz": image_size, "batch": batch_size, "plots": False})
    dataset = BoxDataset(data.test, args, description(data), augment=False, batch_size=batch_size)
    workers = args.workers if device.type == "cuda" else 0  # as ultralytics' trainer
    return Validator(build_dataloader(dataset, batch_size, workers, shuffle=False, device=device), scratch, args)


def _as_if_trained_just_now(model: nn.Module, data: DetectionDataset) -> SimpleNamespace:
    """What the validator asks of a trainer; sets ``model.names`` and ``model.args``, as a trainer does.

    Without a trainer it would copy the model, fold its batch norms and look for a font online.
    """
    model.names, model.args = description(data)["names"], get_cfg()
    device = next(model.parameters()).device
    losses = dict.fromkeys(("box_loss", "cls_loss", "dfl_loss"), torch.zeros((), device=device))
    return SimpleNamespace(
        ema=SimpleNamespace(ema=model),
        device=device,
        data=description(data),
        amp=False,
        loss_items=losses,
        label_loss_items=lambda losses, prefix: losses,
        stopper=SimpleNamespace(possible_stop=False),
        epoch=0,
        epochs=1,
        world_size=0,
    )


def shown_with_labels(data: DetectionDataset, images: Sequence[LabelledImage], image_size: int) -> list[tuple]:
    """For ``figures.boxes_on_images``: the letterboxed images and their labels."""
    return [
        _shown("labels", data, item["img"], _corners(item), item["cls"]) for item in _letterboxed(images, image_size)
    ]


def shown_with_detections(
    model: nn.Module,
    data: DetectionDataset,
    images: Sequence[LabelledImage],
    image_size: int,
    corruptions: Sequence[tuple[str, int]],
) -> list[list[tuple]]:
    """For ``figures.boxes_on_images``: a row for each image, with its labels, then what ``model`` finds on the clean
    image and on each of its ``corruptions`` (name, severity)."""
    rows, family = [], _family(data)
    for labels, item in zip(shown_with_labels(data, images, image_size), _letterboxed(images, image_size), strict=True):
        clean = item["img"][None]
        versions = {"clean": clean}
        for name, severity in corruptions:
            versions[name.replace("_", " ")] = corrupt(clean, name, severity, family=family)
        found = [(title, image[0], detect(model, image)[0].cpu()) for title, image in versions.items()]
        rows.append([labels, *(_shown(title, data, image, boxes[:, :4], boxes[:, 5]) for title, image, boxes in found)])
    return rows


def _letterboxed(images: Sequence[LabelledImage], image_size: int) -> list[dict]:
    names = {"names": {}, "channels": 3}
    dataset = BoxDataset(images, get_cfg(overrides={"imgsz": image_size}), names, augment=False, batch_size=1)
    by_file = {item["im_file"]: item for item in dataset}  # ultralytics sorts them by their shape
    return [by_file[str(image.file)] for image in images]


def _corners(item: dict) -> torch.Tensor:
    """The labels' boxes: left, top, right, bottom in pixels of the letterboxed image."""
    height, width = item["img"].shape[1:]
    centre, size = item["bboxes"].split(2, dim=1)
    return torch.cat([centre - size / 2, centre + size / 2], dim=1) * torch.tensor([width, height, width, height])


def _shown(
    title: str, data: DetectionDataset, image: torch.Tensor, boxes: torch.Tensor, classes: torch.Tensor
) -> tuple:
    return title, image, boxes, [data.classes[int(number)] for number in classes.flatten()]


@torch.inference_mode()
def detect(model: nn.Module, images: torch.Tensor, confidence: float = 0.25) -> list[torch.Tensor]:
    """What ``model`` finds in uint8 images (N, 3, H, W), H and W multiples of 32, after non-maximum suppression.

    One float tensor (n, 6) for each image: left, top, right, bottom in pixels, confidence, class.
    """
    assert_as_trained(model)
    device = next(model.parameters()).device
    return non_max_suppression(model.eval()(images.to(device) / 255)[0], confidence, max_time_img=float("inf"))
