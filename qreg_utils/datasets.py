"""Image data sets as whole uint8 tensors: small enough to live on the device, so there is no loader to wait for."""

import hashlib
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from qreg_utils.folders import data_dir
from qreg_utils.names import CLASSIFICATION, DATASETS, Dataset

SMALLEST_SIDE = 32  # pixels: of an image that can be corrupted


class DatasetError(RuntimeError):
    """A data set is missing or damaged; the message names the file and what to do."""


@dataclass(frozen=True)
class ImageDataset:
    """Images are uint8 (N, 3, H, W), H and W at least 32, labels int64 (N,).

    The test split also serves as validation in the training curves; no epoch or checkpoint is chosen by it.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, float, float]  # of the training images, scaled to [0, 1]
    std: tuple[float, float, float]
    shift: int  # augmentation: random translation by up to this many pixels
    flip: bool  # augmentation: random horizontal flip
    unverified_files: tuple[str, ...] = ()  # read although their md5 is not the official one

    def to(self, device: str | torch.device) -> "ImageDataset":
        names = ("train_images", "train_labels", "test_images", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def subset(self, train_images: int | None, test_images: int | None, *, choice: int = 0) -> "ImageDataset":
        """Fewer images, the same ones every time: a random choice of the training images, the first test images.

        Another number as ``choice`` is another choice. None keeps all. Raises ValueError for fewer than 1, or more than
        there are.
        """
        available = {"train_images": len(self.train_labels), "test_images": len(self.test_labels)}
        for name, wanted in {"train_images": train_images, "test_images": test_images}.items():
            if wanted is not None and not 1 <= wanted <= available[name]:
                raise ValueError(f"{name}: {wanted} is not allowed: {self.name} has {available[name]}")
        chosen = slice(None)
        if train_images is not None:
            order = torch.randperm(available["train_images"], generator=torch.Generator().manual_seed(choice))
            chosen = order[:train_images].sort().values
        return replace(
            self,
            train_images=self.train_images[chosen],
            train_labels=self.train_labels[chosen],
            test_images=self.test_images[:test_images],
            test_labels=self.test_labels[:test_images],
        )

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 images to float32 with the training set's mean 0 and standard deviation 1 in each channel."""
        constants = torch.tensor([self.mean, self.std]).view(2, 3, 1, 1)
        mean, std = constants.to(images.device, non_blocking=True)
        return (images / 255 - mean) / std

    def augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Translate each image by up to ``shift`` pixels (black comes in) and flip half of them, as one batch.

        ``generator`` lives on the CPU, so that every device sees the same augmentations.
        """
        n, _, height, width = images.shape
        offsets = torch.randint(0, 2 * self.shift + 1, (2, n), generator=generator)
        flips = torch.rand(n, generator=generator) < (0.5 if self.flip else 0.0)
        columns = torch.arange(width).expand(n, width)
        columns = torch.where(flips[:, None], width - 1 - columns, columns) + offsets[0][:, None]
        rows = torch.arange(height) + offsets[1][:, None]
        padded = torch.nn.functional.pad(images, [self.shift] * 4)
        pick = (torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :])
        n_index, rows, columns = (index.to(images.device, non_blocking=True) for index in pick)
        return padded.permute(0, 2, 3, 1)[n_index, rows, columns].permute(0, 3, 1, 2)


def load_dataset(name: str, *, accept_unverified_files: bool = False) -> ImageDataset:
    """Load "digits" (embedded in scikit-learn), "cifar10" or "cifar100" (from ``data_dir()``, downloaded when absent),
    or a registered data set.

    Files whose md5 is not the official one are refused, unless ``accept_unverified_files``: then they are listed in
    ``unverified_files``. Raises DatasetError for missing or damaged files, ValueError for an unknown name.
    """
    if name not in LOADERS:
        raise ValueError(f"data set {name!r} is unknown; choose from {', '.join(LOADERS)}")
    return LOADERS[name](accept_unverified_files)


def register_dataset(row: Dataset, load: Callable[[], ImageDataset] | None = None) -> None:
    """Make a data set for classification known by the name in ``row``; ``load()`` returns it (``from_arrays``,
    ``from_folder``).

    Raises NamesError, in one line, for a piece that is missing, or a name that is taken. When it is loaded, its name
    and the numbers of images in ``row``, where they are given, must be right (DatasetError).
    """
    if row.task != CLASSIFICATION.name:
        raise row.error(f"task {row.task!r} is not allowed: register_dataset is for {CLASSIFICATION.name}")
    if not callable(load):
        raise row.error("load is missing: a function without arguments that returns an ImageDataset")

    def checked(accept_unverified_files: bool) -> ImageDataset:
        data = load()
        if not isinstance(data, ImageDataset):
            raise DatasetError(f"data set {row.name}: load returns {type(data).__name__}, not an ImageDataset")
        found = {"name": data.name, "train_images": len(data.train_labels), "test_images": len(data.test_labels)}
        for field, value in found.items():
            if getattr(row, field) not in (None, value):
                raise DatasetError(f"data set {row.name}: {field} is {value}, registered as {getattr(row, field)}")
        return data

    DATASETS.add(row)
    LOADERS[row.name] = checked


def from_arrays(
    name: str,
    train_images: np.ndarray | Tensor,
    train_labels: np.ndarray | Tensor,
    test_images: np.ndarray | Tensor,
    test_labels: np.ndarray | Tensor,
    *,
    classes: Sequence[str] | None = None,
    shift: int = 0,
    flip: bool = False,
) -> ImageDataset:
    """A data set from arrays: uint8 images (N, H, W), (N, H, W, 3) or (N, 3, H, W), and integer labels (N,).

    Grey images become RGB. ``classes`` names the classes (default: their numbers); ``shift`` and ``flip`` are the
    augmentation. The mean and standard deviation are those of the training images. Raises DatasetError for arrays of
    another kind or shape, and for labels that are no class.
    """
    train, test = (_as_images(name, images) for images in (train_images, test_images))
    labels = [_as_labels(name, array) for array in (train_labels, test_labels)]
    if train.shape[1:] != test.shape[1:]:
        raise DatasetError(
            f"data set {name}: {tuple(train.shape[2:])} pixels to train, {tuple(test.shape[2:])} to test"
        )
    for images, numbers in zip((train, test), labels, strict=True):
        if numbers.shape != images.shape[:1] or not len(numbers):
            raise DatasetError(f"data set {name}: {len(images)} images and labels of shape {tuple(numbers.shape)}")
    classes = tuple(classes or map(str, range(int(max(part.max() for part in labels)) + 1)))
    if len(classes) < 2 or any(part.min() < 0 or part.max() >= len(classes) for part in labels):
        raise DatasetError(f"data set {name}: its labels are not 0 to {len(classes) - 1}, one of at least 2 classes")
    mean, std = _mean_and_std(train)
    if not all(std):
        raise DatasetError(f"data set {name}: a colour channel of its training images is constant")
    return ImageDataset(name, train, labels[0], test, labels[1], classes, mean, std, shift, flip)


def _mean_and_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of each channel of uint8 images, scaled to [0, 1]. The sums are of whole numbers, and exact."""
    total = squares = torch.zeros(3, dtype=torch.float64)
    for part in images.split(100):
        levels = part.double()
        total, squares = total + levels.sum((0, 2, 3)), squares + levels.square().sum((0, 2, 3))
    mean, mean_square = total / images[:, 0].numel(), squares / images[:, 0].numel()
    return tuple((mean / 255).tolist()), tuple(((mean_square - mean.square()).sqrt() / 255).tolist())


def _as_labels(name: str, array: np.ndarray | Tensor) -> Tensor:
    labels = np.asarray(array)
    if labels.dtype.kind not in "iu":
        raise DatasetError(f"data set {name}: labels are {labels.dtype}; they must be integers")
    return torch.from_numpy(labels.astype(np.int64))


def _as_images(name: str, array: np.ndarray | Tensor) -> Tensor:
    images = np.asarray(array).copy()  # an array may be read-only, or a file
    if images.dtype != np.uint8:
        raise DatasetError(f"data set {name}: images are {images.dtype}; they must be uint8, 0 to 255")
    images = torch.from_numpy(images)
    if images.ndim == 4 and images.shape[-1] == 3 and images.shape[1] != 3:
        images = images.permute(0, 3, 1, 2)
    elif images.ndim == 3:
        images = images[:, None].expand(-1, 3, -1, -1)
    shape = tuple(images.shape)
    if images.ndim != 4 or images.shape[1] != 3 or min(shape[2:]) < SMALLEST_SIDE:
        raise DatasetError(
            f"data set {name}: images are {shape}; they must be (N, H, W), (N, H, W, 3) or (N, 3, H, W), with H and W "
            f"at least {SMALLEST_SIDE}"
        )
    return images.contiguous()


def from_folder(name: str, folder: str | Path, *, size: int, shift: int = 0, flip: bool = False) -> ImageDataset:
    """A data set from a folder with ``train/<class>/<image>`` and ``test/<class>/<image>``, any format of Pillow's.

    Images are turned as their EXIF data says, scaled until their short side has ``size`` pixels, and cut to the middle
    square. Raises DatasetError for a folder without such images, or a file that cannot be read.
    """
    folder = Path(folder)
    classes, tested = (_class_folders(folder / split) for split in ("train", "test"))
    if not classes:
        raise DatasetError(f"{folder / 'train'} has no folders: one for each class is needed, with its images")
    for path in [folder / "test" / label for label in tested if label not in classes]:
        raise DatasetError(f"{path} is of a class that is not in {folder / 'train'}: {', '.join(classes)}")
    for path in [folder / "train" / label for label in classes if not _files(folder / "train" / label)]:
        raise DatasetError(f"{path} has no images")
    arrays = []
    for split in ("train", "test"):
        files = [(file, number) for number, label in enumerate(classes) for file in _files(folder / split / label)]
        if not files:
            raise DatasetError(f"{folder / split} has no images of the classes {', '.join(classes)}")
        arrays += [np.stack([_read_square(file, size) for file, _ in files]), np.array([number for _, number in files])]
    return from_arrays(name, *arrays, classes=classes, shift=shift, flip=flip)


def _class_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*") if path.is_dir() and not path.name.startswith("."))


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*") if file.is_file() and not file.name.startswith("."))


def _read_square(file: Path, size: int) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            return np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC))
    except Exception as error:  # a damaged image can raise almost anything
        if isinstance(error, ImportError) and error.__context__:  # ultralytics has Pillow look for a reader of HEIF
            error = error.__context__
        raise DatasetError(f"{file} cannot be read as an image: {type(error).__name__}: {error}") from error


# --- digits -----------------------------------------------------------------------------------------------------------


def all_digits() -> tuple[Tensor, Tensor]:
    """The 1,797 digits in their original order: uint8 (N, 3, 32, 32) and int64 labels (N,)."""
    from PIL import Image

    # the file that sklearn.datasets.load_digits reads: importing scikit-learn takes seconds
    file = Path(find_spec("sklearn").origin).parent / "datasets" / "data" / "digits.csv.gz"
    *pixels, digits = np.loadtxt(file, delimiter=",", unpack=True)
    small = np.round(np.stack(pixels, axis=1).reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    large = np.stack([np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)) for image in small])
    return torch.from_numpy(large)[:, None].repeat(1, 3, 1, 1), torch.from_numpy(digits.astype(np.int64))


def rank_in_class(labels: Tensor) -> Tensor:
    """How many of its class come before each image: int64 (N,), for int64 labels (N,) in their original order."""
    return torch.nn.functional.one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0] - 1


def is_test_digit(labels: Tensor) -> Tensor:
    """Every fifth image of each class is a test image: bool (N,), for int64 labels (N,) in their original order."""
    return rank_in_class(labels) % 5 == 4


def _load_digits(accept_unverified_files: bool) -> ImageDataset:
    """Real 8x8 digits (UCI, Alpaydin & Kaynak 1998), enlarged to 32x32 with Pillow's bicubic filter, grey as RGB."""
    images, labels = all_digits()
    return _digits("digits", images, labels, is_test_digit(labels))


def _load_few_digits(accept_unverified_files: bool) -> ImageDataset:
    """The same digits, of which four in seven of each class are test images: few to train on, and many to tell."""
    images, labels = all_digits()
    return _digits("few_digits", images, labels, rank_in_class(labels) % 7 > 2)


def _digits(name: str, images: Tensor, labels: Tensor, test: Tensor) -> ImageDataset:
    return ImageDataset(
        name,
        *(images[~test], labels[~test], images[test], labels[test]),
        classes=tuple("0123456789"),
        mean=(0.3091,) * 3,
        std=(0.3489,) * 3,
        shift=2,
        flip=False,
    )


# --- CIFAR-10 and CIFAR-100 -------------------------------------------------------------------------------------------

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# the fine labels, in the order of the file ``meta``
CIFAR100_CLASSES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
    man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
    pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
    tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


def _load_cifar10(accept_unverified_files: bool) -> ImageDataset:
    from torchvision.datasets import CIFAR10

    return ImageDataset(
        "cifar10",
        **_load_cifar(CIFAR10, b"labels", CIFAR10_CLASSES, accept_unverified_files),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    )


def _load_cifar100(accept_unverified_files: bool) -> ImageDataset:
    from torchvision.datasets import CIFAR100

    return ImageDataset(
        "cifar100",
        **_load_cifar(CIFAR100, b"fine_labels", tuple(CIFAR100_CLASSES.split()), accept_unverified_files),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    )


def _load_cifar(source: type, label_key: bytes, classes: tuple[str, ...], accept_unverified_files: bool) -> dict:
    """What the two have in common, as arguments of ImageDataset; ``source`` is torchvision's class."""
    unverified = _check_cifar(source, accept_unverified_files)
    folder = data_dir() / source.base_folder
    train, test = (
        _read_cifar([folder / file for file, _ in files], label_key, len(classes))
        for files in (source.train_list, source.test_list)
    )
    arguments = dict(zip(("train_images", "train_labels", "test_images", "test_labels"), train + test, strict=True))
    return arguments | {"classes": classes, "shift": 4, "flip": True, "unverified_files": unverified}


def _check_cifar(source: type, accept_unverified_files: bool) -> tuple[str, ...]:
    """Download when nothing is there; refuse what is missing or fails torchvision's md5. Returns accepted files."""
    root, folder = data_dir(), data_dir() / source.base_folder
    files = source.train_list + source.test_list

    def missing() -> list[str]:
        return [file for file, _ in files if not (folder / file).exists()]

    if missing():  # where nothing is, a folder that others own or nobody can write to will do
        if len(missing()) == len(files):
            _download_once(source, root)
        if missing():
            raise DatasetError(f"{folder / missing()[0]} is missing; {_where_to_get(source)}")
    unverified = []
    for file, expected in files:
        found = hashlib.md5((folder / file).read_bytes()).hexdigest()
        if found != expected and not accept_unverified_files:
            raise DatasetError(
                f"{folder / file} has md5 {found}, not the official {expected}; {_where_to_get(source)}, "
                "or say accept_unverified_files: true in the params"
            )
        if found != expected:
            unverified.append(f"{source.base_folder}/{file}")
    return tuple(unverified)


def _download_once(source: type, root: Path) -> None:
    """Download and unpack; the folder takes its name when it is complete. Processes that start together share one.

    An archive that somebody has put into ``root`` is unpacked and not downloaded.
    """
    folder, part = root / source.base_folder, root / f"{source.base_folder}.part"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{source.base_folder}.lock"):
            if not folder.exists():
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
                if (root / source.filename).is_file():
                    shutil.copy(root / source.filename, part)
                source(part, download=True)
                (part / source.base_folder).rename(folder)
                shutil.rmtree(part, ignore_errors=True)
    except Exception as error:  # torchvision lets urllib, tarfile and its own RuntimeError through
        raise DatasetError(f"cannot download to {root} ({error}); {_where_to_get(source)}") from error


def _where_to_get(source: type) -> str:
    return f"get {source.url} and unpack it in {data_dir()} (or point QREG_DATA at a folder that has it)"


def _read_cifar(paths: list[Path], label_key: bytes, num_classes: int) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for path in paths:
        try:
            with path.open("rb") as file:
                batch = _ArraysOnly(file, encoding="bytes").load()
            data, label = np.asarray(batch[b"data"]), np.asarray(batch[label_key], dtype=np.int64)
        except Exception as error:  # a damaged pickle can raise almost anything
            raise DatasetError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        if data.dtype != np.uint8 or data.shape != (len(label), 3072) or not np.isin(label, range(num_classes)).all():
            raise DatasetError(f"{path} is damaged: data {data.dtype} {data.shape}, {len(label)} labels")
        images.append(torch.from_numpy(data.reshape(-1, 3, 32, 32)))
        labels.append(torch.from_numpy(label))
    return torch.cat(images), torch.cat(labels)


class _ArraysOnly(pickle.Unpickler):
    """CIFAR's files are pickles, and an unverified pickle could run any code: only NumPy arrays get through."""

    ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype"})

    def find_class(self, module: str, name: str) -> Callable:
        if module.partition(".")[0] == "numpy" and name in self.ALLOWED:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a data file")


# data set -> a function of accept_unverified_files
LOADERS: dict[str, Callable[[bool], ImageDataset]] = {
    "digits": _load_digits,
    "few_digits": _load_few_digits,
    "cifar10": _load_cifar10,
    "cifar100": _load_cifar100,
}
