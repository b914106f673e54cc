"""The file layout of CIFAR-10-C: a test set in its 19 x 5 corrupted versions, written once and memory-mapped after.

``<corruption>.npy`` holds uint8 images (5 n, H, W, 3): the n test images at severity 1, then at 2, and so on;
``labels.npy`` holds their labels, five times over. A folder that was downloaded (CIFAR-10-C, CIFAR-100-C: zenodo.org,
records 2535967 and 3555552) is read in the same way.
"""

import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from qreg_utils import digest
from qreg_utils.atomic import atomic_write
from qreg_utils.corruptions import CORRUPTIONS, corrupt
from qreg_utils.corruptions.registry import SEVERITIES
from qreg_utils.extensions import load_extensions
from qreg_utils.progress import progress_bar

CHECKSUMS = "checksums.json"  # crc32 of each corruption's images; only in folders that we wrote
CHUNK = 1000  # images in memory at a time while a file is written
SAMPLE = 32  # images of each severity in a downloaded file that are compared with our own corruptions


class CorruptedImagesError(RuntimeError):
    """A file is missing, damaged, or belongs to something else; the message names it and what to do."""


@dataclass(frozen=True)
class CorruptedImages:
    """The corrupted versions of the clean test ``images`` (uint8, N, 3, H, W), in a folder in CIFAR-10-C's layout."""

    folder: Path
    clean: Tensor
    source: str  # who made them: recorded with every run
    extra: Mapping[str, Path] = field(default_factory=dict)  # registered corruption -> its folder

    def images(self, name: str, severity: int) -> Tensor:
        """The test images corrupted by ``name`` at ``severity`` 1..5: uint8 (N, 3, H, W), memory-mapped."""
        count = len(self.clean)
        start = SEVERITIES.index(severity) * count
        corrupted = _map(self.extra.get(name, self.folder) / f"{name}.npy", self._shape)[start : start + count]
        return torch.from_numpy(corrupted).permute(0, 3, 1, 2)

    def with_extra(
        self, parents: Sequence[Path], labels: Tensor, family: str, names: Sequence[str]
    ) -> "CorruptedImages":
        """With the images of more corruptions, registered by extensions, in a folder of their own in ``parents``.

        They void nothing of the paper's 19, and are made again when the extensions change.
        """
        fingerprint = _fingerprint(self.clean, labels, family, load_extensions())
        made = _made(parents, fingerprint, self.clean, labels, family, names)
        source = f"{self.source}; {', '.join(names)}: made by qreg ({fingerprint})"
        return replace(self, source=source, extra=dict.fromkeys(names, made.folder))

    @property
    def _shape(self) -> tuple[int, ...]:
        return (len(SEVERITIES) * len(self.clean), *self.clean.shape[2:], 3)

    def check_labels(self, labels: Tensor) -> None:
        path = self.folder / "labels.npy"
        if not np.array_equal(_map(path, self._shape[:1]), labels.cpu().tile(len(SEVERITIES))):
            raise CorruptedImagesError(f"{path} has other labels than the test set: the folder belongs to another one")

    def check_checksums(self, names: Sequence[str] = CORRUPTIONS) -> None:
        """Refuse our own files when they are not as they were written."""
        checksums = _read_checksums(self.folder)
        for name in names:
            path = self.folder / f"{name}.npy"
            if name not in checksums:
                raise CorruptedImagesError(f"{self.folder / CHECKSUMS} has no checksum for {path.name}")
            if zlib.crc32(_map(path, self._shape)) != checksums[name]:
                raise CorruptedImagesError(f"{path} is damaged: its checksum is not the one that was noted")

    def check_resemblance(self) -> None:
        """Refuse files with blank images, and files that do not change images as our own corruption of that name does:
        about as much (within a factor of 1.5), and about as much brighter or darker (within half of that)."""
        blank = self.clean.amax((1, 2, 3)).cpu() == 0
        sample = torch.linspace(0, len(self.clean) - 1, min(SAMPLE, len(self.clean))).long()
        clean = self.clean.cpu()[sample]
        for name, severity in itertools.product(CORRUPTIONS, SEVERITIES):
            path, images = self.folder / f"{name}.npy", self.images(name, severity)
            lost = int(((images.amax((1, 2, 3)) == 0) & ~blank).sum())
            if lost:
                raise CorruptedImagesError(f"{path} is damaged: {lost} images of severity {severity} are all zero")
            size, shift = _change(images[sample], clean)
            our_size, our_shift = _change(corrupt(clean, name, severity), clean)
            if not our_size / 1.5 <= size <= our_size * 1.5 or abs(shift - our_shift) > our_size / 2:
                raise CorruptedImagesError(
                    f"{path} is not {name} of this test set: at severity {severity} its images differ from the clean "
                    f"ones by {size:.1f} levels and are {shift:+.1f} brighter on average; {name} gives {our_size:.1f} "
                    f"and {our_shift:+.1f}"
                )


def _change(images: Tensor, clean: Tensor) -> tuple[float, float]:
    """Mean absolute and mean difference, in levels."""
    difference = images.float() - clean
    return difference.abs().mean().item(), difference.mean().item()


def _map(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The array in a .npy file, memory-mapped; copy-on-write, because torch has no read-only tensors."""
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except FileNotFoundError:
        raise CorruptedImagesError(f"{path} is missing") from None
    except (OSError, ValueError, EOFError) as error:
        raise CorruptedImagesError(f"{path} is damaged or cut short: {error}") from error
    if not array.flags.c_contiguous:
        raise CorruptedImagesError(f"{path} is in Fortran order, not in C order")
    if array.shape != shape or array.dtype.kind not in "ui" or (array.ndim > 1 and array.dtype != np.uint8):
        expected = f"for this test set at five severities it must be {shape}" + " of uint8" * (len(shape) > 1)
        raise CorruptedImagesError(f"{path} holds {array.shape} of {array.dtype}; {expected}")
    return array


def open_downloaded(folder: Path, images: Tensor, labels: Tensor) -> CorruptedImages:
    """A folder that somebody else made, used as it is once it is found to belong to the test images and labels.

    Raises CorruptedImagesError for a file that is missing, damaged, short, or of something else.
    """
    found = CorruptedImages(folder, images, f"{folder.name}, as downloaded")
    with _advice("unpack the published archive there again, or move the folder away and qreg makes its own"):
        found.check_labels(labels)
        found.check_resemblance()
    return found


def open_or_make(parents: Sequence[Path], images: Tensor, labels: Tensor, family: str = "cifar") -> CorruptedImages:
    """Our own corruptions (of ``family``, seed 0) of uint8 images (N,3,H,W), in a folder of one of ``parents``.

    The folder's name is a fingerprint of the images, the family and the code that corrupts them. It is looked for in
    all parents; what is missing is written, into the first parent that can be written to. Of several processes that
    want it at once each writes another file. Raises CorruptedImagesError for a file that has been damaged since.
    """
    return _made(parents, _fingerprint(images, labels, family), images, labels, family, CORRUPTIONS)


def _made(
    parents: Sequence[Path], fingerprint: str, images: Tensor, labels: Tensor, family: str, names: Sequence[str]
) -> CorruptedImages:
    folders = [parent / fingerprint for parent in parents]
    complete = [folder for folder in folders if not _missing(folder, names)]
    folder = next(iter(complete or filter(_writable, folders)), folders[0])
    made = CorruptedImages(folder, images, f"made by qreg ({fingerprint})")
    if not complete:
        _write_missing(made, labels, family, names)
    with _advice(f"delete {folder} and it is made again"):
        made.check_labels(labels)
        made.check_checksums(names)
    return made


@contextmanager
def _advice(what_to_do: str):
    try:
        yield
    except CorruptedImagesError as error:
        raise CorruptedImagesError(f"{error}; {what_to_do}") from None


def _missing(folder: Path, names: Sequence[str]) -> list[str]:
    return [name for name in (*names, "labels") if not (folder / f"{name}.npy").exists()]


def _writable(folder: Path) -> bool:
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return os.access(nearest, os.W_OK)


def _fingerprint(images: Tensor, labels: Tensor, family: str, extensions: Sequence[Path] = ()) -> str:
    code = digest.code_digest(digest.CORRUPTIONS, extensions)
    total = hashlib.sha256(f"{torch.__version__} {code} {family}".encode())
    for tensor in (images, labels):
        total.update(tensor.cpu().contiguous().numpy())
    return total.hexdigest()[:12]


def _write_missing(made: CorruptedImages, labels: Tensor, family: str, names: Sequence[str]) -> None:
    made.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(made.folder / ".labels.lock"), atomic_write(made.folder / "labels.npy") as part:
        _save(part, (made._shape[0],), np.int64, [labels.cpu().tile(len(SEVERITIES))])
    progress = progress_bar(_missing(made.folder, names), desc="corrupted test images", unit="corruption")
    busy = [name for name in progress if not _write(made, name, family, wait=False)]
    for name in busy:  # another process is at it
        _write(made, name, family, wait=True)


def _write(made: CorruptedImages, name: str, family: str, wait: bool) -> bool:
    """Write one corruption's file unless it is there; False when another process is at it and we shall not wait."""
    path = made.folder / f"{name}.npy"
    try:
        with FileLock(made.folder / f".{name}.lock", timeout=-1 if wait else 0):
            if not path.exists():
                with atomic_write(path) as part:
                    checksum = _save(part, made._shape, np.uint8, _corrupted_chunks(made.clean, name, family))
                    _note_checksum(made.folder, name, checksum)
    except Timeout:
        return False
    return True


def _corrupted_chunks(images: Tensor, name: str, family: str):
    for severity in SEVERITIES:
        for start in range(0, len(images), CHUNK):
            corrupted = corrupt(images[start : start + CHUNK], name, severity, family=family, first_image=start)
            yield corrupted.permute(0, 2, 3, 1).contiguous().cpu()


def _save(path: Path, shape: tuple[int, ...], dtype: type, chunks) -> int:
    """Write a .npy file piece by piece; returns the crc32 of its data. (A full disk is an OSError, which it would not
    be in a memory-mapped file.)"""
    checksum = 0
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in chunks:
            data = chunk.numpy()
            file.write(data)
            checksum = zlib.crc32(data, checksum)
    return checksum


def _note_checksum(folder: Path, name: str, checksum: int) -> None:
    with FileLock(folder / ".checksums.lock"), atomic_write(folder / CHECKSUMS) as part:
        part.write_text(json.dumps(_read_checksums(folder) | {name: checksum}, indent=1))


def _read_checksums(folder: Path) -> dict[str, int]:
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:  # not UTF-8, or not JSON
        raise CorruptedImagesError(f"{folder / CHECKSUMS} is damaged: {error}") from None
    if not isinstance(checksums, dict):
        raise CorruptedImagesError(f"{folder / CHECKSUMS} is damaged: it holds no table")
    return checksums
