"""Checkpoints that survive a kill, and are resumed only by the run that wrote them."""

import hashlib
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from pydantic import ValidationError
from torch import nn

from qreg_utils.atomic import atomic_write
from qreg_utils.digest import code_digest
from qreg_utils.extensions import load_extensions
from qreg_utils.models import build_model
from qreg_utils.quantize import quantize_model
from qreg_utils.recipe import Recipe

if TYPE_CHECKING:  # imported where an experiment is read: training does not depend on it
    from qreg_utils.study import Classification

# parts of a fingerprint that are digests, and how their difference is reported
DIGESTS = {"model": "another model, method or bit width", "first weights": "other first weights", "data": "other data"}


class CheckpointError(RuntimeError):
    """A checkpoint belongs to another configuration, or cannot be used; the message says which file, and why."""


def training_fingerprint(
    model: nn.Module, data: Iterable, recipe: Recipe, code: Iterable[str], **more: object
) -> dict[str, str]:
    """What a training run depends on: the whole ``recipe`` and what else is given by name, the model, its first
    weights, ``data`` (parts that are bytes or arrays), torch's version, and our own ``code`` (parts of the package, as
    in ``digest.TRAINING``) with the user's extensions."""
    weights = [parameter.detach().cpu() for parameter in model.parameters()]
    return (
        recipe.settings()
        | {name: str(value) for name, value in more.items()}
        | {
            "model": _digest(repr(model).encode()),
            "first weights": _digest(*(tensor.contiguous().numpy() for tensor in weights)),
            "data": _digest(*data),
            "code": _digest(torch.__version__.encode(), code_digest(code, load_extensions()).encode()),
        }
    )


def _digest(*parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _previous(path: Path) -> Path:
    """Where the checkpoint before the last one is kept."""
    return path.with_suffix(f".previous{path.suffix}")


def save_checkpoint(path: Path, state: dict) -> None:
    """Write ``state`` (tensors and plain values) atomically, and keep the previous checkpoint next to it."""
    with atomic_write(path) as part:
        torch.save(state, part)
        if path.exists():
            path.replace(_previous(path))


def load_checkpoint(path: Path | None, fingerprint: dict[str, str]) -> dict | None:
    """The last undamaged checkpoint at ``path``, or None when there is none or other code made it.

    ``fingerprint`` is the run's (``training_fingerprint``), which ``state["fingerprint"]`` must equal. Raises
    CheckpointError for a checkpoint of another configuration.
    """
    if path is None:
        return None
    for candidate in (path, _previous(path)):
        saved = _read_checkpoint(candidate)
        if saved is not None:
            return saved if _same_run(candidate, saved.get("fingerprint"), fingerprint) else None
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
    """Whether a checkpoint can be resumed; CheckpointError when it is another run's."""
    if not isinstance(theirs, dict) or theirs.get("code") != ours["code"]:
        print(f"{path.name} was made by other code: training starts over")
        return False
    other = [name for name in ours if theirs.get(name) != ours[name]]
    if other:
        differences = [DIGESTS.get(name) or f"{name} {theirs.get(name)}, not {ours[name]}" for name in other]
        raise of_another_configuration(path, differences)
    return True


def of_another_configuration(path: Path, differences: Iterable[str]) -> CheckpointError:
    return CheckpointError(
        f"{path} belongs to another configuration ({'; '.join(differences)}): put the parameters back to resume "
        f"it, or delete {path.stem.split('.')[0]}*{path.suffix} to train again"
    )


def load_experiment(folder: Path, seed: int) -> tuple["Classification", nn.Module, list[dict]]:
    """A finished classification experiment from its folder: its parameters, this seed's network, its layer statistics.

    The network is in evaluation mode, on the CPU, with the weights of ``checkpoint-seed<seed>.pt``, whatever version of
    the code trained it. The layer statistics are those recorded after every epoch (``noise.weight_noise``), none for a
    network in full precision. Raises CheckpointError, naming the file, for one that is missing, damaged or incomplete.
    """
    folder = Path(folder)
    experiment = _read_parameters(folder)
    path = folder / f"checkpoint-seed{seed}.pt"
    if not path.exists():
        found = ", ".join(sorted(file.name for file in folder.glob("checkpoint-seed*[0-9].pt"))) or "none"
        raise CheckpointError(f"{path}: no such file; checkpoints in that folder: {found}")
    try:
        saved = dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged archive can raise almost anything
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    num_classes = _num_classes(saved)
    if num_classes is None:
        raise CheckpointError(f"{path} holds no model")
    if saved.get("epochs_done") != experiment.epochs:
        raise CheckpointError(f"{path} is unfinished: {saved.get('epochs_done')} of {experiment.epochs} epochs")
    if experiment.through_quantizer and not saved.get("noise"):
        raise CheckpointError(f"{path} is without the layer statistics (noise) of a quantized network: train it again")
    model = build_model(experiment.model, num_classes, seed=seed)
    if experiment.through_quantizer:
        bits = (experiment.weight_bits, experiment.activation_bits, experiment.first_last_bits)
        model = quantize_model(model, experiment.method, *bits)
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError as error:
        raise CheckpointError(f"{path} holds another model than {experiment.id}: {error}") from error
    return experiment, model.eval(), saved.get("noise") or []


def _num_classes(saved: dict) -> int | None:
    """How many classes a checkpoint's network tells apart; None if it holds no network."""
    if not isinstance(saved.get("model"), dict):
        return None
    last_layer = saved["model"].get("fc.weight")  # of checkpoints that do not say it
    return saved.get("num_classes") or (None if last_layer is None else len(last_layer))


def _read_parameters(folder: Path) -> "Classification":
    """An experiment's parameters, from params.yaml, which a study lays out, or else run.json."""
    from qreg_utils.study import Classification

    load_extensions()
    params, run = folder / "params.yaml", folder / "run.json"
    path = params if params.exists() else run
    try:
        content = path.read_text(encoding="utf-8")
        values = yaml.safe_load(content) if path == params else json.loads(content)["parameters"]
        return Classification.model_validate(values)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no experiment in that folder: neither params.yaml nor run.json") from None
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        if isinstance(error, ValidationError):
            problem = error.errors()[0]
            error = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
        raise CheckpointError(f"{path} does not say what a classification experiment was: {error}") from None
