"""Images with boxes around their objects: digit scenes (made here) and PASCAL VOC, both in YOLO's folder layout."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import ExifTags, Image

from qreg_utils.datasets import DatasetError, all_digits, is_test_digit
from qreg_utils.folders import data_dir
from qreg_utils.names import DATASETS, VOC_CLASSES
from qreg_utils.progress import progress_bar


@dataclass(frozen=True, eq=False)  # arrays do not compare to one bool
class LabelledImage:
    """An image file and the n objects in it; an image may have none."""

    file: Path  # absolute
    height: int  # pixels, as displayed: after the EXIF orientation
    width: int
    classes: np.ndarray  # int64 (n,)
    boxes: np.ndarray  # float32 (n, 4): centre x, centre y, width, height, as shares of the image's width and height


@dataclass(frozen=True)
class DetectionDataset:
    """The test split also serves as validation in the training curves; no epoch or checkpoint is chosen by it."""

    name: str
    train: tuple[LabelledImage, ...]
    test: tuple[LabelledImage, ...]
    classes: tuple[str, ...]
    flip: bool  # augmentation may mirror the images
    unreadable: tuple[str, ...] = ()  # images that cannot be decoded, and are left out (paths in the data folder)

    def subset(self, train_images: int | None, test_images: int | None) -> "DetectionDataset":
        """Fewer images, the same ones every time: a random choice of each split, in the order of the split.

        The test images are chosen at random too because VOC sorts them by year. None keeps all. Raises ValueError for
        fewer than 1, or more than there are.
        """
        splits = {"train": self.train, "test": self.test}
        for split, wanted in {"train": train_images, "test": test_images}.items():
            available = len(splits[split])
            if wanted is not None and not 1 <= wanted <= available:
                raise ValueError(f"{split}_images: {wanted} is not allowed: {self.name} has {available}")
            if wanted is not None:
                order = torch.randperm(available, generator=torch.Generator().manual_seed(0))
                splits[split] = tuple(splits[split][i] for i in sorted(order[:wanted].tolist()))
        return replace(self, **splits)

    def count_objects(self, classes: list[str] | None = None) -> dict[str, dict[str, int]]:
        """How many objects of each of ``classes`` (default: all) the splits have: {"train": {class: n}, "test": ...}.

        Raises ValueError for a split without any object, and for a class that is unknown, or named in ``classes`` and
        without an object to be measured on.
        """
        for name in classes or []:
            if name not in self.classes:
                raise ValueError(f"classes: {name!r} is not allowed; choose from {', '.join(self.classes)}")
        counts = {}
        for split, images in {"train": self.train, "test": self.test}.items():
            numbers = np.concatenate([image.classes for image in images])
            every = np.bincount(numbers, minlength=len(self.classes)).tolist()
            if not any(every):
                raise ValueError(f"the {split} images of {self.name} show no object: there is nothing to {split}")
            counts[split] = {
                name: n for name, n in zip(self.classes, every, strict=True) if name in (classes or self.classes)
            }
        for name in classes or []:
            if not counts["test"][name]:
                raise ValueError(f"classes: {name!r} is not allowed: the test images of {self.name} show none")
        return counts


def load_detection_dataset(
    name: str, *, train_split: list[str] | None = None, test_split: list[str] | None = None
) -> DetectionDataset:
    """Load "digit_scenes" (made from scikit-learn's digits) or "voc" (from ``data_dir()/VOC``).

    The splits are VOC's. An entry is a folder in ``images`` ("train2012"), or a file in the VOC folder that lists
    images ("mine.txt", with lines like images/train2012/2008_000008.jpg); no image may be named twice. Without them,
    VOC is 2007 and 2012 trainval against 2007 test, and the official number of images is required. Raises DatasetError
    for missing or damaged files (except images that cannot be decoded: ``unreadable`` names them), ValueError for an
    unknown name, or for splits of digit_scenes.
    """
    if name == "voc":
        return _load_voc(train_split, test_split)
    if name != "digit_scenes":
        raise ValueError(f"data set {name!r} is unknown; choose from digit_scenes, voc")
    if train_split is not None or test_split is not None:
        raise ValueError("train_split and test_split are for voc: digit_scenes has one training and one test split")
    return _load_digit_scenes()


# --- YOLO's folder layout ---------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
TOLERANCE = 0.01  # how far a coordinate may be out of the image before it is an error, as in ultralytics
DECODERS = 4  # threads


@dataclass(frozen=True)
class _YoloFolder:
    """``images/<split>/<stem>.jpg`` with ``labels/<split>/<stem>.txt``; an image's name is its path in the folder."""

    root: Path
    num_classes: int
    fix: str  # where to get what is missing

    def missing(self, path: str | PurePosixPath, note: str = "") -> DatasetError:
        return DatasetError(f"{self.root / path} is missing{note}; {self.fix}")

    def split(self, entries: list[str]) -> list[PurePosixPath]:
        """The images of some split folders and list files, one after the other."""
        images: dict[PurePosixPath, str] = {}
        for entry in entries:
            for image in self._listed(entry) if entry.endswith(".txt") else self.in_folder(entry):
                if image in images:
                    raise DatasetError(f"{self.root / image} is twice in the split: {images[image]}, {entry}")
                images[image] = entry
        if not images:
            raise DatasetError(f"the split {entries} names no image in {self.root}")
        return list(images)

    def in_folder(self, entry: str) -> list[PurePosixPath]:
        folder = "images" / self._inside(entry, entry)
        if not os.path.isdir(self.root / folder):
            raise self.missing(folder)
        self._check_links(folder, entry)
        images = [folder / file for file in _image_files(self.root / folder)]
        if not images:
            raise DatasetError(f"{self.root / folder} has no images ({', '.join(IMAGE_SUFFIXES)}); {self.fix}")
        return images

    def _listed(self, entry: str) -> list[PurePosixPath]:
        path = self.root / self._inside(entry, entry)
        if not os.path.isfile(path):
            raise DatasetError(f"{path} is missing: a list of images, one a line")
        self._check_links(entry, entry)
        images = []
        for where, line in _lines(path):
            image = self._inside(line.strip(), where)
            if image.parts[0] != "images" or image.suffix.lower() not in IMAGE_SUFFIXES:
                raise DatasetError(f"{where}: {line.strip()[:80]!r} is not an image in images/; correct the list")
            if not os.path.isfile(self.root / image):
                raise DatasetError(f"{where}: {self.root / image} is missing; correct the list, or {self.fix}")
            self._check_links(image, where)
            images.append(image)
        return images

    def _inside(self, path: str, where: str) -> PurePosixPath:
        inside = PurePosixPath(path)
        if not inside.parts or inside.is_absolute() or ".." in inside.parts:
            raise DatasetError(f"{where}: {path[:80]!r} is not a path inside {self.root}")
        return inside

    def _check_links(self, path: str | PurePosixPath, where: str) -> None:
        """The folder itself may be a link to another disk; what params and lists name in it may not lead away again."""
        real = Path(os.path.realpath(self.root / path))
        if not any(real.is_relative_to(os.path.realpath(folder)) for folder in (self.root, data_dir())):
            raise DatasetError(f"{where}: {self.root / path} is a link to {real}, which is not in {data_dir()}")

    def labels(self, image: PurePosixPath) -> tuple[np.ndarray, np.ndarray]:
        """Its classes and boxes, as in LabelledImage."""
        name = PurePosixPath("labels", *image.parts[1:]).with_suffix(".txt")
        path = self.root / name
        if not os.path.isfile(path):
            raise self.missing(name, f": the labels of {image} (an empty file for an image without objects)")
        rows = [_row(line, where, self.num_classes) for where, line in _lines(path)]
        rows = list(dict.fromkeys(rows))  # some of VOC's objects are listed twice
        classes = np.array([row[0] for row in rows], dtype=np.int64)
        return classes, np.array([row[1:] for row in rows], dtype=np.float32).reshape(-1, 4)

    def read(self, *splits: list[PurePosixPath]) -> tuple[list[tuple[LabelledImage, ...]], tuple[str, ...]]:
        """The labelled images of each split, and the paths of those that cannot be decoded."""
        images = [image for split in splits for image in split]
        labels = dict(zip(images, map(self.labels, images), strict=True))
        files = [self.root / image for image in images]
        with ThreadPoolExecutor(DECODERS) as threads:
            decoded = progress_bar(
                threads.map(_decoded_size, files), total=len(files), desc="images", unit="image", delay=2
            )
            sizes = dict(zip(images, decoded, strict=True))
        read = [
            tuple(LabelledImage(self.root / image, *sizes[image], *labels[image]) for image in split if sizes[image])
            for split in splits
        ]
        for split, readable in zip(splits, read, strict=True):
            if not readable:
                raise DatasetError(f"no image of the split with {self.root / split[0]} can be decoded; {self.fix}")
        base = data_dir()
        return read, tuple((self.root / image).relative_to(base).as_posix() for image in images if not sizes[image])


def _image_files(folder: Path) -> list[str]:
    return sorted(file for file in os.listdir(folder) if file.lower().endswith(IMAGE_SUFFIXES) and file[0] != ".")


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a text file that are not blank, each with its place for error messages."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read: {error}; correct the file") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield f"{path}:{number}", line


def _row(line: str, where: str, num_classes: int) -> tuple[int, float, float, float, float]:
    """The class and box of a line, the box clipped to the image; its numbers are float32."""
    try:
        number, *box = map(float, line.split())
        x, y, width, height = box
    except ValueError:
        raise DatasetError(f"{where}: {line[:80]!r} is not a class and 4 numbers; correct the file") from None
    if number not in range(num_classes):
        raise DatasetError(f"{where}: class {line.split()[0][:80]} is not in 0..{num_classes - 1}; correct the file")
    for name, value in {"centre x": x, "centre y": y, "width": width, "height": height}.items():
        lowest = 0 if name in ("width", "height") else -TOLERANCE
        if not lowest <= value <= 1 + TOLERANCE:
            raise DatasetError(f"{where}: {name} {value} is not a share of the image, 0..1; correct the file")
    x, width = _clip(x, width)
    y, height = _clip(y, height)
    if min(width, height) <= 0:
        raise DatasetError(f"{where}: {line[:80]!r} is a box without area in the image; correct the file")
    return int(number), x, y, width, height


def _clip(centre: float, size: float) -> tuple[float, float]:
    """An interval clipped to 0..1, in float32; one that lies inside keeps its very numbers."""
    start, end = centre - size / 2, centre + size / 2
    if start < 0 or end > 1:
        start, end = max(start, 0), min(end, 1)
        centre, size = (start + end) / 2, end - start
    return float(np.float32(centre)), float(np.float32(size))


def _decoded_size(path: Path) -> tuple[int, int] | None:
    """Height and width of an image as displayed; None when it cannot be decoded."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            image.draft(None, (1, 1))  # a JPEG is read to its end, but only every eighth pixel computed
            image.load()  # a truncated file fails here
    except Exception:  # a damaged image can raise almost anything
        return None
    return (width, height) if turned else (height, width)


# --- digit scenes -----------------------------------------------------------------------------------------------------

SCENES = {
    "version": 1,  # of the code below: another one when the scenes change
    "train": 400,
    "test": 200,
    "pixels": 64,
    "digits": (1, 4),  # in a scene
    "heights": (14, 30),  # of a digit, in pixels
    "overlap": 0.05,  # of two digits' boxes: at most this share of the smaller one
    "contrast": 0.4,  # in luminance, between a digit and the background where it is
}
SCENES_README = """Scenes of digits on textured backgrounds, with boxes around the digits, in YOLO's layout: by qreg.
The digits are real: UCI, Alpaydin & Kaynak 1998, by way of scikit-learn. Made from: {}
"""


def _load_digit_scenes() -> DetectionDataset:
    fingerprint = hashlib.sha256(json.dumps(SCENES).encode()).hexdigest()[:8]
    root = data_dir() / f"digit-scenes-{fingerprint}"
    _write_scenes_once(root)
    fix = f"delete {root} and it is made again"
    folder = _YoloFolder(root, 10, fix)
    splits = [folder.in_folder(split) for split in ("train", "test")]
    for split, images in zip(("train", "test"), splits, strict=True):
        if len(images) != SCENES[split]:
            raise DatasetError(f"{root}/images/{split} has {len(images)} images, not {SCENES[split]}; {fix}")
    (train, test), unreadable = folder.read(*splits)
    if unreadable:
        raise DatasetError(f"{data_dir() / unreadable[0]} is damaged; {fix}")
    return DetectionDataset("digit_scenes", train, test, DATASETS["digit_scenes"].classes, flip=False)


def _write_scenes_once(root: Path) -> None:
    """A folder takes its name when it is complete; processes that start together wait for the one that writes."""
    from filelock import FileLock

    if root.exists():
        return
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(root.parent / f".{root.name}.lock"):
            if not root.exists():
                part = root.with_name(root.name + ".part")
                shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
                _write_scenes(part)
                part.rename(root)
    except OSError as error:
        raise DatasetError(f"cannot write {root} ({error}); point QREG_DATA at a folder that can be written") from error


def _write_scenes(root: Path) -> None:
    digits, labels = all_digits()
    digits, labels, is_test = digits[:, 0].numpy(), labels.numpy(), is_test_digit(labels).numpy()
    for seed, split in enumerate(("train", "test")):
        own = np.flatnonzero(is_test == (split == "test"))
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for number in range(SCENES[split]):
            rng = np.random.Generator(np.random.PCG64([SCENES["version"], seed, number]))
            image, objects = _scene(rng, digits[own], labels[own])
            Image.fromarray(image).save(root / "images" / split / f"{number:04}.png")
            (root / "labels" / split / f"{number:04}.txt").write_text("".join(map(_yolo_line, objects)))
    (root / "classes.txt").write_text("\n".join("0123456789") + "\n")
    (root / "README.txt").write_text(SCENES_README.format(json.dumps(SCENES)))


@dataclass(frozen=True)
class _Digit:
    """A digit in a scene, and the box around its ink in pixels: from left to just before right, top to bottom."""

    label: int
    left: int
    top: int
    right: int
    bottom: int

    @property
    def area(self) -> int:
        return (self.right - self.left) * (self.bottom - self.top)

    def overlap(self, other: "_Digit") -> float:
        """The share of the smaller box that lies in the other."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0) * max(height, 0) / min(self.area, other.area)


def _yolo_line(digit: _Digit) -> str:
    """With 7 decimals, which are exact for 64 pixels."""
    corners = np.array([[digit.left, digit.top], [digit.right, digit.bottom]]) / SCENES["pixels"]
    numbers = [*corners.mean(axis=0), *(corners[1] - corners[0])]
    return f"{digit.label} " + " ".join(f"{number:.7f}" for number in numbers) + "\n"


# The scenes are the same on every platform: no sin, exp, normal() or matrix product, whose last bits differ, and no
# uniform(), which a compiler may fuse.


def _scene(rng: np.random.Generator, digits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, list[_Digit]]:
    """uint8 (P, P, 3) with 1 to 4 of the ``digits`` (uint8, N, 32, 32), and where they are."""
    pixels = SCENES["pixels"]
    canvas = _background(rng, pixels)
    placed = []
    for _ in range(rng.integers(*SCENES["digits"], endpoint=True)):
        chosen = rng.integers(len(digits))
        for _ in range(20):  # a crowded scene may end up with a digit less
            ink = _ink(digits[chosen], int(rng.integers(*SCENES["heights"], endpoint=True)), _between(rng, 0.85, 1.2))
            top, left = (int(rng.integers(1, pixels - size)) for size in ink.shape)
            digit = _Digit(int(labels[chosen]), left, top, left + ink.shape[1], top + ink.shape[0])
            if all(digit.overlap(other) <= SCENES["overlap"] for other in placed):
                patch = canvas[digit.top : digit.bottom, digit.left : digit.right]
                patch += ink[..., None] * (_contrasting_colour(rng, patch) - patch)
                placed.append(digit)
                break
    return np.rint(canvas * 255).astype(np.uint8), placed


def _ink(digit: np.ndarray, height: int, stretch: float) -> np.ndarray:
    """The digit's strokes cut out, ``height`` pixels high: opacity 0..1, with ink in every border row and column."""
    rows, columns = (np.flatnonzero((digit >= 96).any(axis)) for axis in (1, 0))
    tight = digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    width = max(4, round(height * stretch * tight.shape[1] / tight.shape[0]))
    large = Image.fromarray(tight).resize((width, height), Image.Resampling.BICUBIC)
    opacity = ((np.asarray(large) / 255 - 0.35) * 2.5).clip(0, 1)  # crisp edges
    rows, columns = (np.flatnonzero((opacity >= 0.4).any(axis)) for axis in (1, 0))
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _luminance(colours: np.ndarray) -> np.ndarray:
    return colours[..., 0] * 0.299 + colours[..., 1] * 0.587 + colours[..., 2] * 0.114


def _contrasting_colour(rng: np.random.Generator, patch: np.ndarray) -> np.ndarray:
    """The first of some random colours that is bright or dark enough to be seen on ``patch``, else the best."""
    colours = _random_colours(rng, 200)
    difference = np.abs(_luminance(colours) - np.median(_luminance(patch)))
    enough = np.flatnonzero(difference >= SCENES["contrast"])
    return colours[enough[0] if len(enough) else difference.argmax()]


def _random_colours(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 3) in 0..1: natural rather than neon."""
    colours = rng.random((count, 3))
    grey = _luminance(colours)[:, None]
    return grey + 0.7 * (colours - grey)


def _background(rng: np.random.Generator, pixels: int) -> np.ndarray:
    """Float (P, P, 3) in 0..1: a colour gradient with a pattern and smooth noise on it."""
    y, x = np.mgrid[:pixels, :pixels] / (pixels - 1)
    first, second, accent = _random_colours(rng, 3)
    second = second + 0.8 * (_luminance(first) - _luminance(second))  # another hue, about as bright
    right, down = _between(rng, -1, 1), _between(rng, -1, 1)
    share = _triangle(right * x + down * y + rng.random())[..., None]
    canvas = first + share * (second - first)
    right, down, period = _between(rng, -1, 1), _between(rng, -1, 1), _between(rng, 0.1, 0.35)
    across = (right * x + down * y) / max(abs(right), abs(down)) / period
    patterns = (
        lambda: _triangle(across),  # soft stripes
        lambda: _triangle(across) > 0.6,  # hard stripes
        lambda: (x // period + y // period) % 2,  # chequers
        lambda: _triangle(np.sqrt((x - right) ** 2 + (y - down) ** 2) / period),  # rings
        lambda: _triangle(x / period) * _triangle(y / period) > 0.35,  # diamonds
        lambda: _smooth_noise(rng, pixels, 4) > 0.5,  # blotches
    )
    pattern = patterns[rng.integers(len(patterns))]()[..., None] * _between(rng, 0.15, 0.35)
    canvas = canvas + pattern * (accent - canvas)
    noise = sum(_smooth_noise(rng, pixels, cells)[..., None] * (rng.random(3) + 0.5) - 0.5 for cells in (4, 16))
    return (canvas + _between(rng, 0.05, 0.2) * noise).clip(0, 1)


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _triangle(phase: np.ndarray) -> np.ndarray:
    """A wave 0..1 with period 1."""
    return np.abs(2 * (phase - np.floor(phase)) - 1)


def _smooth_noise(rng: np.random.Generator, pixels: int, cells: int) -> np.ndarray:
    """(P, P) in 0..1: random values on a coarse grid, interpolated."""
    grid = rng.random((cells + 1, cells + 1))
    position = np.arange(pixels) * (cells / pixels)
    cell = position.astype(int)
    share = position - cell
    share = share * share * (3 - 2 * share)
    rows = grid[cell] + share[:, None] * (grid[cell + 1] - grid[cell])
    return rows[:, cell] + share * (rows[:, cell + 1] - rows[:, cell])


# --- PASCAL VOC -------------------------------------------------------------------------------------------------------

VOC_TRAIN = {"train2012": 5717, "train2007": 2501, "val2012": 5823, "val2007": 2510}  # the official numbers of images
VOC_TEST = {"test2007": 4952}


def _load_voc(train_split: list[str] | None, test_split: list[str] | None) -> DetectionDataset:
    root = data_dir() / "VOC"
    fix = "`make voc` downloads it (2.8 GB), or point QREG_DATA at a folder that has it"
    folder = _YoloFolder(root, len(VOC_CLASSES), fix)
    if not root.is_dir():
        raise DatasetError(f"{root} is missing; {fix}")
    official = (VOC_TRAIN if train_split is None else {}) | (VOC_TEST if test_split is None else {})
    check_voc_counts(root, official, f"{fix}; or name other splits with train_split and test_split in the params")
    train = folder.split(list(VOC_TRAIN) if train_split is None else train_split)
    test = folder.split(list(VOC_TEST) if test_split is None else test_split)
    both = set(test).intersection(train)
    if both:
        raise DatasetError(f"{root / min(both)} is in both train_split and test_split (of {len(both)} such images)")
    (train, test), unreadable = folder.read(train, test)
    return DetectionDataset("voc", train, test, VOC_CLASSES, flip=True, unreadable=unreadable)


def check_voc_counts(root: Path, official: dict[str, int], fix: str) -> None:
    """Raise DatasetError unless each split of a VOC folder has the official number of images."""
    folders = {split: root / "images" / split for split in official}
    found = {split: len(_image_files(folder)) if folder.is_dir() else 0 for split, folder in folders.items()}
    if found != official:
        raise DatasetError(
            f"{root / 'images'} has {_listing(found)} images, the official VOC has {_listing(official)}; {fix}"
        )


def _listing(counts: dict[str, int]) -> str:
    return ", ".join(f"{split}: {count}" for split, count in counts.items())
