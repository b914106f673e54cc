"""One table of names: a row for each method, model, data set and corruption, with all that others need to know of it.

The schema of params files, figures, claims, results and ``make verify`` read these rows; the implementations
(``quantizers.QUANTIZERS``, ``models.BUILDERS``, ``datasets.LOADERS``, ``corruptions.registry.REGISTRY``) are found by
the same names. The order of the rows is the order in which figures and tables show them. An incomplete row raises
NamesError where it is made, not after hours of training. Nothing heavy is imported here.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

CLEAN = "test_set"  # the name of the uncorrupted images in the paper's heatmaps, and in metrics.csv


class NamesError(ValueError):
    """A row is incomplete, or its name is taken; the message is one line that says which, and what is missing."""


@dataclass(frozen=True)
class Task:
    """What a network is trained for."""

    name: str
    notebook: str  # in notebooks/: one experiment
    score: str  # the metric in metrics.csv that counts
    score_label: str
    loss_label: str


CLASSIFICATION = Task("classification", "classification.ipynb", "accuracy", "accuracy, %", "cross-entropy")
DETECTION = Task("detection", "detection.ipynb", "map50", "mAP50, %", "detection loss")
TASKS = {task.name: task for task in (CLASSIFICATION, DETECTION)}
SCORES = {task.score: task.score_label for task in TASKS.values()}

FULL_PRECISION, QUANTIZER, CONTROL = "full precision", "quantizer", "control"
PART, REGULARIZER = "part of a quantizer", "ordinary regularizer"
KINDS = (FULL_PRECISION, QUANTIZER, PART, CONTROL, REGULARIZER)
FAMILIES = ("cifar", "imagenet")  # of corruptions: whose constants


@dataclass(frozen=True)
class _Row:
    name: str = ""
    label: str = ""  # in figures and tables

    def __post_init__(self):
        if not (isinstance(self.name, str) and re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,49}", self.name)):
            raise self.error(f"name {self.name!r} is not allowed: 1 to 50 of a-z 0-9 _ -, beginning with no _ or -")
        if not self.label:
            raise self.error("label is missing: what figures and tables call it")

    def error(self, problem: str) -> NamesError:
        name = self.name if isinstance(self.name, str) and self.name.isprintable() else repr(self.name)
        return NamesError(f"{type(self).__name__.lower()} {name or '(without a name)'}: {problem}")

    def require(self, field: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, field)
        if value not in allowed:
            given = f"{field} {value!r} is not allowed" if value else f"{field} is missing"
            raise self.error(f"{given}: {', '.join(allowed)}")


@dataclass(frozen=True)
class Method(_Row):
    """How a network is trained: in full precision, through a quantizer, through one of which a part is left out, as a
    control (full precision, perturbed), or with more of an ordinary regularizer."""

    kind: str = QUANTIZER
    colour: str = ""  # "#rrggbb"
    tasks: tuple[str, ...] = ("classification", "detection")
    noise_source: str = ""  # of a control: the quantizer whose noise it has
    of: str = ""  # of a part: the quantizer
    strength: str = ""  # of an ordinary regularizer: the parameter that says how much of it

    def __post_init__(self):
        super().__post_init__()
        self.require("kind", KINDS)
        if not re.fullmatch("#[0-9a-fA-F]{6}", self.colour):
            given = f"colour {self.colour!r} is not allowed" if self.colour else "colour is missing"
            raise self.error(f"{given}: such as #1b7f5c")
        if not self.tasks or not set(self.tasks) <= set(TASKS):
            raise self.error(f"tasks {self.tasks!r} is not allowed: some of {', '.join(TASKS)}")
        if (self.kind == CONTROL) != bool(self.noise_source):
            raise self.error("a control, and nothing else, has a noise_source: the quantizer whose noise it has")
        if (self.kind == PART) != bool(self.of):
            raise self.error("a part, and nothing else, has an of: the quantizer that it is a part of")
        if (self.kind == REGULARIZER) != bool(self.strength):
            raise self.error("an ordinary regularizer, and nothing else, has a strength: the parameter that says it")


@dataclass(frozen=True)
class Model(_Row):
    task: str = ""
    note: str = ""  # what a summary says of it

    def __post_init__(self):
        super().__post_init__()
        self.require("task", tuple(TASKS))


@dataclass(frozen=True)
class Dataset(_Row):
    """``train_images`` and ``test_images`` say how many there are; None where that is not known before it is loaded."""

    task: str = ""
    corruption_family: str = ""  # the constants that suit its images
    train_images: int | None = None
    test_images: int | None = None
    classes: tuple[str, ...] = ()  # that a params file may choose from: of detection
    published_corruptions: str = ""  # a published folder of its corrupted test images, such as CIFAR-10-C
    named_splits: bool = False  # whether a params file may name its splits

    def __post_init__(self):
        super().__post_init__()
        self.require("task", tuple(TASKS))
        self.require("corruption_family", FAMILIES)
        for field in ("train_images", "test_images"):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or value < 2):
                raise self.error(f"{field} {value!r} is not allowed: an integer from 2, or None")
        if self.task == "detection" and not self.classes:
            raise self.error("classes is missing: the names of what is detected")


@dataclass(frozen=True)
class Corruption(_Row):
    group: str = ""

    def __post_init__(self):
        super().__post_init__()
        self.require("group", ("noise", "blur", "weather", "digital"))


Row = TypeVar("Row", bound=_Row)


class Table(Mapping[str, Row], Generic[Row]):
    """Rows by name, in the order in which they were added."""

    def __init__(self, *rows: Row):
        self._rows: dict[str, Row] = {}
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """Raises NamesError for a name that is there already."""
        if row.name in self._rows:
            raise row.error("the name is registered already")
        self._rows[row.name] = row

    def remove(self, name: str) -> None:
        del self._rows[name]

    def __getitem__(self, name: str) -> Row:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def label(self, name: str) -> str:
        """The row's label; a name that has no row, as in results of somebody else's extension, stands for itself."""
        return self._rows[name].label if name in self._rows else name

    def position(self, name: str) -> int:
        """Where it stands in reading order; a name that has no row comes last."""
        return list(self._rows).index(name) if name in self._rows else len(self._rows)


METHODS: Table[Method] = Table(
    Method("fp32", "FP32", FULL_PRECISION, "#444444"),
    Method("lsq", "LSQ", QUANTIZER, "#4c72b0"),
    Method("pact", "PACT", QUANTIZER, "#dd8452"),
    Method("dorefa", "DoReFa", QUANTIZER, "#55a868"),
    Method("lsq-unrounded", "LSQ, clipped only", PART, "#8fb3e0", ("classification",), of="lsq"),
    Method("lsq-unclipped", "LSQ, rounded only", PART, "#1f3d75", ("classification",), of="lsq"),
    Method("lsq-dithered", "LSQ, dithered", PART, "#64b5cd", ("classification",), of="lsq"),
    Method("pact-unrounded", "PACT, unrounded", PART, "#f3c6a5", ("classification",), of="pact"),
    Method("dorefa-unrounded", "DoReFa, unrounded", PART, "#a9d5b3", ("classification",), of="dorefa"),
    Method("gaussian-noise", "training noise", CONTROL, "#c44e52", ("classification",), noise_source="lsq"),
    Method("gradient-penalty", "gradient penalty", CONTROL, "#8172b3", ("classification",), noise_source="lsq"),
    Method("weight-decay", "weight decay", REGULARIZER, "#937860", ("classification",), strength="weight_decay"),
    Method("dropout", "dropout", REGULARIZER, "#da8bc3", ("classification",), strength="dropout"),
)


def kind_of(method: str) -> str:
    """What a method in a table of results is, where an ordinary regularizer has its strength behind its name; one that
    has no row, as of somebody else's extension, is taken for a quantizer."""
    if method in METHODS:
        return METHODS[method].kind
    regularizers = (name for name, row in METHODS.items() if row.kind == REGULARIZER)
    return REGULARIZER if method.startswith(tuple(f"{name}-" for name in regularizers)) else QUANTIZER


MODELS: Table[Model] = Table(
    Model("resnet8", "ResNet-8", "classification"),
    Model(
        "small_resnet8",
        "small ResNet-8",
        "classification",
        "small ResNet-8 standardises each image, and its first layer has a stride of 2",
    ),
    Model("resnet18", "ResNet-18", "classification"),
    Model("resnet20", "ResNet-20", "classification"),
    Model("resnet50", "ResNet-50", "classification"),
    Model("mobilenet_v1", "MobileNetV1", "classification"),
    Model(
        "yolov5n",
        "YOLOv5n",
        "detection",
        "YOLOv5n with today's anchor-free head, where the paper's of July 2022 had anchors",
    ),
)

# fmt: off
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on

DATASETS: Table[Dataset] = Table(
    Dataset("digits", "digits", "classification", "cifar", 1442, 355),
    Dataset("few_digits", "few digits", "classification", "cifar", 777, 1020),
    Dataset("cifar10", "CIFAR-10", "classification", "cifar", 50_000, 10_000, published_corruptions="CIFAR-10-C"),
    Dataset("cifar100", "CIFAR-100", "classification", "cifar", 50_000, 10_000, published_corruptions="CIFAR-100-C"),
    Dataset("digit_scenes", "digit scenes", "detection", "imagenet", 400, 200, tuple("0123456789")),
    Dataset(
        "voc", "VOC", "detection", "imagenet", classes=VOC_CLASSES, named_splits=True
    ),  # how many depends on its splits
)

CORRUPTIONS: Table[Corruption] = Table(
    *(
        Corruption(name, name.replace("_", " "), group)
        for name, group in {
            "brightness": "weather",
            "contrast": "digital",
            "defocus_blur": "blur",
            "elastic_transform": "digital",
            "fog": "weather",
            "frost": "weather",
            "gaussian_blur": "blur",
            "gaussian_noise": "noise",
            "glass_blur": "blur",
            "impulse_noise": "noise",
            "jpeg_compression": "digital",
            "motion_blur": "blur",
            "pixelate": "digital",
            "saturate": "digital",
            "shot_noise": "noise",
            "snow": "weather",
            "spatter": "weather",
            "speckle_noise": "noise",
            "zoom_blur": "blur",
        }.items()
    )
)
# The paper's, and Hendrycks & Dietterich's (arXiv 1903.12261): what every experiment is measured on, and what averages
# are taken over, however many more are registered.
PAPER_CORRUPTIONS = tuple(CORRUPTIONS)


def task_of(model: object, dataset: object) -> Task:
    """What an experiment is: detection if its model or its data set is for that, else classification."""
    rows = [table[name] for table, name in ((MODELS, model), (DATASETS, dataset)) if name in list(table)]
    return DETECTION if any(row.task == DETECTION.name for row in rows) else CLASSIFICATION
