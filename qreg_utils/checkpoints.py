"""Checkpoints that survive a kill, and are gone on from only by the run that wrote them."""

import hashlib
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from qreg_utils.atomic import written_whole

PACKAGE = Path(__file__).parent
# parts of a fingerprint that are digests, as a person is told that they differ
DIGESTS = {"model": "another model, method or bit width", "first weights": "other first weights", "data": "other data"}


class CheckpointError(RuntimeError):
    """A checkpoint belongs to another configuration; the message says which file, and what differs."""


def fingerprint(model: nn.Module, data: Iterable, settings: dict, sources: Iterable[str]) -> dict[str, str]:
    """What a training run depends on: ``settings``, model, first weights, ``data`` (parts that are bytes or arrays),
    torch's version, and our own code: ``sources`` are files or folders of the package."""
    weights = [parameter.detach().cpu() for parameter in model.parameters()]
    paths = [PACKAGE / source for source in sources]
    files = [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    return {name: str(value) for name, value in settings.items()} | {
        "model": _digest(repr(model).encode()),
        "first weights": _digest(*(tensor.contiguous().numpy() for tensor in weights)),
        "data": _digest(*data),
        "code": _digest(torch.__version__.encode(), *(file.read_bytes() for file in files)),
    }


def _digest(*parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _previous(path: Path) -> Path:
    """Where the checkpoint before the last one is kept."""
    return path.with_suffix(f".previous{path.suffix}")


def save_checkpoint(path: Path, state: dict) -> None:
    """Write ``state`` (tensors and plain values) whole; the checkpoint before it is kept beside it."""
    with written_whole(path) as part:
        torch.save(state, part)
        if path.exists():
            path.replace(_previous(path))


def load_checkpoint(path: Path | None, made_by: dict[str, str]) -> dict | None:
    """The last checkpoint at ``path`` that is whole, or None when there is none or other code made it.

    ``made_by`` is the run's fingerprint, which ``state["made_by"]`` must equal. Raises CheckpointError for a checkpoint
    of another configuration.
    """
    if path is None:
        return None
    for candidate in (path, _previous(path)):
        saved = _read_checkpoint(candidate)
        if saved is not None:
            return saved if _same_run(candidate, saved.get("made_by"), made_by) else None
    return None


def _read_checkpoint(path: Path) -> dict | None:
    """A checkpoint's content. A damaged one is deleted: the next save must not put it in the place of a good one."""
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"{damaged} does not have its checksum")
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except OSError:  # it cannot be read now; that does not say that it is damaged
        raise
    except Exception as error:  # a damaged archive can raise almost anything
        print(f"{path.name} is damaged ({type(error).__name__}) and deleted")
        path.unlink()
        return None


def _same_run(path: Path, theirs: dict[str, str], ours: dict[str, str]) -> bool:
    """Whether a checkpoint can be gone on from; CheckpointError when it is another run's."""
    if not isinstance(theirs, dict) or theirs.get("code") != ours["code"]:
        print(f"{path.name} was made by other code: training starts over")
        return False
    other = [name for name in ours if theirs.get(name) != ours[name]]
    if other:
        differences = [DIGESTS.get(name) or f"{name} {theirs.get(name)}, not {ours[name]}" for name in other]
        raise CheckpointError(
            f"{path} belongs to another configuration ({'; '.join(differences)}): put the parameters back to go on "
            f"with it, or delete {path.stem.split('.')[0]}*{path.suffix} to train anew"
        )
    return True
