"""One training loop for every level: same budget, data order and first weights; FP32 is the loop without quantizers."""

import hashlib
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qreg_utils.atomic import written_whole
from qreg_utils.datasets import ImageDataset
from qreg_utils.noise import overall_noise, weight_noise
from qreg_utils.progress import progress_bar
from qreg_utils.quantize import alpha_penalty, calibrate, learned_scales, limit_scale_gradients, parameter_groups

PACKAGE = Path(__file__).parent
GAP_IMAGES = 10_000  # training images on which the training loss is measured; all, where there are fewer
# what decides the numbers of a training run: a checkpoint made by other code is not resumed
SOURCES = ["datasets.py", "models", "noise.py", "quantize.py", "quantizers.py", "training.py"]


def fit(
    model: nn.Module,
    data: ImageDataset,
    *,
    seed: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    alpha_decay: float,
    schedule: str,
    augment: bool,
    checkpoint: Path | None = None,
) -> dict[str, list]:
    """Train ``model`` in place on the device of ``data``; return history and noise rows, and images_per_second.

    SGD with momentum; ``weight_decay`` spares quantizer scales, whose gradients are limited to a tenth of their
    magnitude; PACT's alphas get ``alpha_decay / 2 * alpha^2`` in the loss. ``schedule`` is "one-cycle" or "cosine",
    stepped each batch. Data order and augmentation depend on ``seed`` and the epoch alone. After every epoch the loss
    and accuracy (``metric``, in percent) on the test images and on the training images, both in evaluation mode and
    not augmented, and each layer's quantization noise are recorded. Of more than GAP_IMAGES training images a random
    sample is taken, the same for every run.

    With ``checkpoint`` (a path) the state is saved after every epoch, and a run that was stopped goes on from there;
    the numbers are those of a run never stopped. A checkpoint of another configuration, or made by other code, is
    not used. ``images_per_second`` is the training speed of each epoch. Raises FloatingPointError, naming the epoch,
    when the loss is no longer finite.
    """
    steps = epochs * (len(data.train_labels) // batch_size)
    if steps == 0:
        raise ValueError(f"batch_size={batch_size} is larger than the training set ({len(data.train_labels)} images)")
    settings = {"seed": seed, "batch_size": batch_size, "epochs": epochs, "augment": augment, "schedule": schedule}
    settings |= {"learning_rate": learning_rate, "momentum": momentum}
    settings |= {"weight_decay": weight_decay, "alpha_decay": alpha_decay}
    made_by = fingerprint(model, data, settings)
    saved = _load_checkpoint(checkpoint, made_by)
    device = data.train_images.device
    model.to(device, memory_format=torch.channels_last)

    if saved:
        model.load_state_dict(saved["model"])
    else:
        first, _ = next(_batches(data, seed, 0, batch_size, augment))
        calibrate(model, first)
    optimizer = torch.optim.SGD(parameter_groups(model, weight_decay), learning_rate, momentum)
    scheduler = _scheduler(schedule, optimizer, learning_rate, steps)
    history, noise, speed, done = [], [], [], 0
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        history, noise, done = saved["history"], saved["noise"], saved["epochs_done"]
        speed = saved["images_per_second"]

    splits = _measured_splits(data)
    progress = progress_bar(range(done, epochs), desc=f"seed {seed}", unit="epoch", initial=done, total=epochs)
    for epoch in progress:
        started = time.perf_counter()
        batches = _batches(data, seed, epoch, batch_size, augment)
        images = _train_epoch(model, batches, optimizer, scheduler, alpha_decay)
        speed.append(images / (time.perf_counter() - started))
        layers = weight_noise(model)
        rows = _epoch_rows(model, data, splits, overall_noise(layers))
        if not all(math.isfinite(row["loss"]) for row in rows):
            raise FloatingPointError(f"the loss is not finite after epoch {epoch} of {epochs} (seed {seed})")
        history += [{"seed": seed, "epoch": epoch, **row} for row in rows]
        noise += [{"seed": seed, "epoch": epoch, **row} for row in layers]
        progress.set_postfix({row["split"]: f"{row['loss']:.3f}" for row in rows})
        if checkpoint:
            state = {"made_by": made_by, "epochs_done": epoch + 1, "history": history, "noise": noise}
            state["images_per_second"] = speed
            parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
            _save_checkpoint(checkpoint, state | {name: part.state_dict() for name, part in parts.items()})
    return {"history": history, "noise": noise, "images_per_second": speed}


def _train_epoch(model, batches, optimizer, scheduler, alpha_decay: float) -> int:
    """One pass over ``batches``; returns the number of images."""
    model.train()
    count, scales = 0, learned_scales(model)
    for images, labels in batches:
        loss = F.cross_entropy(model(images), labels) + alpha_decay / 2 * alpha_penalty(model)
        optimizer.zero_grad()
        loss.backward()
        limit_scale_gradients(scales)
        optimizer.step()
        scheduler.step()
        count += len(labels)
    if labels.is_cuda:
        torch.cuda.synchronize()
    return count


def _batches(data: ImageDataset, seed: int, epoch: int, batch_size: int, augment: bool):
    """Shuffled, whole batches of normalised images and labels. The generator is made anew for each epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(data.train_labels), generator=generator)
    for picked in order.split(batch_size):
        if len(picked) < batch_size:
            return
        picked = picked.to(data.train_images.device)
        images = data.train_images[picked]
        if augment:
            images = data.augment(images, generator)
        yield data.normalise(images).contiguous(memory_format=torch.channels_last), data.train_labels[picked]


def _measured_splits(data: ImageDataset) -> dict[str, tuple[Tensor, Tensor]]:
    """The images and labels that are measured after every epoch."""
    # a random sample, not the first so many: digits come in the order of their writers
    sample = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(0))[:GAP_IMAGES]
    sample = sample.to(data.train_images.device)
    return {
        "train": (data.train_images[sample], data.train_labels[sample]),
        "val": (data.test_images, data.test_labels),
    }


def _epoch_rows(model: nn.Module, data: ImageDataset, splits: dict, noise: float) -> list[dict]:
    rows = []
    for split, (images, labels) in splits.items():
        result = measure(model, data, images, labels)
        rows.append({"split": split, "loss": result["loss"], "metric": result["accuracy"], "noise": noise})
    return rows


@torch.inference_mode()
def measure(model: nn.Module, data: ImageDataset, images: Tensor, labels: Tensor, batch_size: int = 128) -> dict:
    """Mean cross-entropy ``loss`` and ``accuracy`` in percent on uint8 ``images`` (N, 3, H, W); ``data`` normalises."""
    model.eval()
    loss = correct = 0.0
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        logits = model(data.normalise(x).contiguous(memory_format=torch.channels_last))
        loss += F.cross_entropy(logits, y, reduction="sum").item()
        correct += (logits.argmax(1) == y).sum().item()
    return {"loss": loss / len(labels), "accuracy": 100 * correct / len(labels)}


def _scheduler(name: str, optimizer, learning_rate: float, steps: int):
    if name == "one-cycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, cycle_momentum=False)
    if name == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    raise ValueError(f"schedule {name!r} is unknown; choose from one-cycle, cosine")


def fingerprint(model: nn.Module, data: ImageDataset, settings: dict) -> str:
    """Identifies what a training run depends on: model, first weights, data, settings, our code, torch's version."""
    digest = hashlib.sha256(repr(model).encode())
    images = [data.train_images, data.train_labels, data.test_images, data.test_labels]
    for tensor in [*model.parameters(), *images]:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    for source in SOURCES:
        path = PACKAGE / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    digest.update(json.dumps([torch.__version__, data.name, settings], sort_keys=True).encode())
    return digest.hexdigest()


def _save_checkpoint(path: Path, state: dict) -> None:
    with written_whole(path) as part:
        torch.save(state, part)


def _load_checkpoint(path: Path | None, made_by: str) -> dict | None:
    if path is None or not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive can raise almost anything
        print(f"{path.name} cannot be read ({type(error).__name__}): training starts over")
        return None
    if saved["made_by"] != made_by:
        print(f"{path.name} belongs to another configuration or other code: training starts over")
        return None
    return saved
