"""One training loop for every setting: same budget, data order and first weights; FP32 has no quantizers."""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from qreg_utils import digest
from qreg_utils.checkpoints import (
    load_checkpoint,
    of_another_configuration,
    save_checkpoint,
    training_fingerprint,
)
from qreg_utils.compiling import FEWEST_CALLS, compiler_works, pays, with_shared_graph
from qreg_utils.controls import OWN_STREAM, Control
from qreg_utils.datasets import ImageDataset
from qreg_utils.precision import computing_in, ieee_float32
from qreg_utils.progress import progress_bar
from qreg_utils.quantize import (
    alpha_penalty,
    calibrate,
    dead_scales,
    learned_scales,
    limit_scale_gradients,
    modes_kept,
    parameter_groups,
    quantized_layers,
    start_quantizing,
    stay_in_full_precision,
    weights_quantized_once,
)
from qreg_utils.quantizers import Quantizer
from qreg_utils.recipe import ClassificationRecipe, epoch_seed
from qreg_utils.theory.noise import input_noise, overall_noise, weight_noise

CURVE_IMAGES = 1_000  # on which the losses after each epoch are measured; all, where there are fewer
BATCH_NORM_IMAGES = 1_000  # at least, from which batch norm's statistics are taken before anything is measured
NOISE_IMAGES = 64  # on which the noise of the activations is measured
MEASURED_BATCH = 64  # images at once: on a CPU 10 to 15% faster than 128 (ResNet-20, 32x32)


@ieee_float32()
def fit(
    model: nn.Module,
    data: ImageDataset,
    recipe: ClassificationRecipe,
    *,
    seed: int,
    control: Control | None = None,
    checkpoint: Path | None = None,
    like: dict[str, Any] | None = None,
    runs: int = 1,
) -> dict[str, Any]:
    """Train ``model`` in place on the device of ``data``; return history and noise rows, and facts about the speed.

    SGD with momentum; ``weight_decay`` spares quantizer scales, whose gradients are limited to a tenth of their
    magnitude; PACT's alphas get ``alpha_decay / 2 * alpha^2`` in the loss. ``schedule`` is "one-cycle" or "cosine",
    stepped each batch. Data order, augmentation, and what dropout and dithering draw depend on ``seed`` and the epoch
    alone. After every epoch batch norm's running statistics are taken anew, of the weights as they are and without what
    is random in training; then the loss and accuracy (``metric``, in percent) on the test images and on the training
    images, both in evaluation mode and not augmented, and each layer's quantization noise are recorded. Of more than
    CURVE_IMAGES images a random sample is taken, the same for every run; of the noise's shape, the last epoch's only.

    During the first ``full_precision_epochs`` a quantized network computes in full precision; then its scales are set,
    and it goes on with the same schedule.

    ``precision`` is what the network computes in while it is trained: "float32" is IEEE float32 on every device,
    "bfloat16" autocast, in which the quantizers stay float32. It is measured in float32.

    ``compile`` says whether the training step goes through torch.compile; "auto" means that it does where it is faster
    here, tried where ``runs`` like this one are long enough to earn it (``compiling.pays``). A run that is resumed goes
    on as it began, and so does one ``like`` another (what that one has returned). Where there is no compiler a message
    says so, and the step is not compiled.
    The result's ``compiled`` and ``precision`` say what was done, ``images_per_second`` the training speed of each
    epoch, ``seconds`` what each took with its measurements.

    With ``control`` a full-precision network is trained with noise on its weights or its layers' inputs, or with the
    penalty that the weights' noise amounts to, and measured without. The penalty takes a second derivative: it, and
    noise on inputs, is never compiled.

    With ``checkpoint`` (a path) the state is saved after every epoch, and a run that was stopped is resumed from there;
    the numbers are those of a run never stopped (on a CPU with as many threads, bit for bit). A damaged checkpoint is
    noticed, and the one before it used; one made by other code is not used. Raises CheckpointError for a checkpoint of
    another configuration, ValueError for a model whose outputs are not the classes of ``data``, QuantizationError,
    naming the layer, for one that does not compute quantized or cannot be calibrated, FloatingPointError, naming the
    epoch, when the loss is not finite, or a quantizer's scale has died.
    """
    epochs, batch_size = recipe.epochs, recipe.batch_size
    steps = epochs * (len(data.train_labels) // batch_size)
    if steps == 0:
        raise ValueError(f"batch_size={batch_size} is larger than the training set ({len(data.train_labels)} images)")
    device = data.train_images.device
    compile = recipe.compile
    if control and control.method == "gradient-penalty" and recipe.precision != "float32":
        raise ValueError(f"precision {recipe.precision!r} is not allowed with gradient-penalty: float32")
    if control and not control.can_be_compiled:
        compile = False
    if compile != "auto":
        compile = compile and compiler_works(device)
    run = {"seed": seed, "device": device.type}
    fingerprint = training_fingerprint(
        model, _data_bytes(data, control), recipe, digest.TRAINING["classification"], **run
    )
    del fingerprint["compile"]  # what was done counts, not what was asked for
    saved = load_checkpoint(checkpoint, fingerprint)
    if saved and compile not in ("auto", saved["compiled"]):
        raise of_another_configuration(checkpoint, [f"compile {saved['compiled']}, not {compile}"])
    model.to(device, memory_format=torch.channels_last)

    first, _ = next(_batches(data, seed, 0, batch_size, recipe.augment))
    if saved:
        model.load_state_dict(saved["model"])
    else:
        with _own_random_numbers(seed, 0, device):
            calibrate(model, first)
    _check_classes(model, data)
    if compile == "auto":
        known = saved or like
        compile = known["compiled"] if known else _compiling_pays(model, data, recipe, steps * runs)
    optimizer = torch.optim.SGD(parameter_groups(model, recipe.weight_decay), recipe.learning_rate, recipe.momentum)
    scheduler = _scheduler(recipe.schedule, optimizer, recipe.learning_rate, steps)
    history, noise, speed, seconds, done = [], [], [], [], 0
    first_steps = _steps(model)
    if saved:
        first_steps = saved["first_steps"]
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        history, noise, done = saved["history"], saved["noise"], saved["epochs_done"]
        speed, seconds = saved["images_per_second"], saved["seconds"]

    batch_loss = make_batch_loss(model, recipe.alpha_decay, device, compile, precision=recipe.precision)
    splits = _measured_splits(data)
    progress = progress_bar(range(done, epochs), desc=f"seed {seed}", unit="epoch", initial=done, total=epochs)
    for epoch in progress:
        started = time.perf_counter()
        if epoch < recipe.full_precision_epochs:
            stay_in_full_precision(model)
        elif epoch == recipe.full_precision_epochs > 0:
            with _own_random_numbers(seed, epoch, device):
                start_quantizing(model, first)
            first_steps = _steps(model)
        batches = _batches(data, seed, epoch, batch_size, recipe.augment)
        backward = control.backward(model, batch_loss, seed, epoch) if control else plain_backward(batch_loss)
        with _own_random_numbers(seed, epoch, device):
            images = _train_epoch(model, batches, backward, optimizer, scheduler)
        speed.append(images / (time.perf_counter() - started))
        with _own_random_numbers(seed, epoch, device):
            layers = _layer_noise(model, first, first_steps, shape=epoch == epochs - 1)
        batches = _batches(data, seed, epoch, batch_size, recipe.augment)
        take_batch_norm_statistics(model, islice(batches, math.ceil(BATCH_NORM_IMAGES / batch_size)))
        rows = _epoch_rows(model, data, splits, overall_noise(layers))
        if not all(math.isfinite(row["loss"]) for row in rows):
            raise FloatingPointError(f"the loss is not finite after epoch {epoch} of {epochs} (seed {seed})")
        if dead := dead_scales(model):
            raise FloatingPointError(
                f"a scale has died after epoch {epoch} of {epochs} (seed {seed}): {', '.join(dead)}"
            )
        history += [{"seed": seed, "epoch": epoch, **row} for row in rows]
        noise += [{"seed": seed, "epoch": epoch, **row} for row in layers]
        seconds.append(time.perf_counter() - started)
        progress.set_postfix({row["split"]: f"{row['loss']:.3f}" for row in rows})
        if checkpoint:
            state = {
                "fingerprint": fingerprint,
                "num_classes": len(data.classes),
                "epochs_done": epoch + 1,
                "compiled": compile,
                "history": history,
                "noise": noise,
                "first_steps": first_steps,
            }
            state |= {"images_per_second": speed, "seconds": seconds}
            parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
            save_checkpoint(checkpoint, state | {name: part.state_dict() for name, part in parts.items()})
    optimizer.zero_grad()  # gradients of a compiled step may live in its CUDA graphs, which the next run discards
    facts = {"images_per_second": speed, "seconds": seconds, "compiled": compile, "precision": recipe.precision}
    return {"history": history, "noise": noise, **facts}


@contextmanager
def _own_random_numbers(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    """In the block the global generators start from ``seed`` and ``epoch``: dropout and dithering draw from them."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(2 * OWN_STREAM + epoch_seed(seed, epoch))
        yield


def take_batch_norm_statistics(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Set batch norm's running statistics to the means over ``batches`` (images, labels) of normalised images, of the
    network as it is measured: nothing is dropped, dithered or otherwise random. Its modes are as before."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    with modes_kept(model):
        model.eval()
        for norm in norms:
            norm.train()
        update_bn(((images,) for images, _ in batches), _Evaluating(model, norms))


class _Evaluating(nn.Module):
    """A network of which ``train()`` reaches only the batch norms."""

    def __init__(self, model: nn.Module, norms: list[nn.Module]):
        super().__init__()
        self.model, self._norms = model, norms

    def train(self, mode: bool = True) -> "_Evaluating":
        self.training = mode
        for norm in self._norms:
            norm.training = mode
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


def _steps(model: nn.Module) -> dict[str, list[float]]:
    """The steps of the weights' and the activations' quantizer of each layer, the mean over channels."""
    found = {}
    for name, layer in quantized_layers(model):
        quantizers = (layer.weight_quantizer, layer.activation_quantizer)
        found[name] = [math.nan if q is None else q.step_size().mean().item() for q in quantizers]
    return found


def _layer_noise(model: nn.Module, images: Tensor, first_steps: dict[str, list[float]], shape: bool) -> list[dict]:
    """``weight_noise`` and ``input_noise`` of each layer, as in training, and how many times its first each step is."""
    with modes_kept(model):
        model.eval()
        for module in model.modules():
            if isinstance(module, Quantizer):
                module.train()
        rows, inputs, steps = weight_noise(model, shape), input_noise(model, images[:NOISE_IMAGES]), _steps(model)
    for row in rows:
        moved = [now / first for now, first in zip(steps[row["layer"]], first_steps[row["layer"]], strict=True)]
        row |= {"step_moved": moved[0], **inputs.get(row["layer"], {})}
        if row["layer"] in inputs:
            row["input_step_moved"] = moved[1]
    return rows


def _compiling_pays(model: nn.Module, data: ImageDataset, recipe: ClassificationRecipe, steps: int) -> bool:
    """Whether so many training steps are faster compiled, by a few of a copy of the network."""
    if steps < FEWEST_CALLS:
        return False
    device = data.train_images.device
    copied = copy.deepcopy(model).train()
    images, labels = next(_batches(data, 0, 0, recipe.batch_size, augment=False))

    def step(compile: bool) -> Callable[[], None]:
        batch_loss = make_batch_loss(copied, recipe.alpha_decay, device, compile, precision=recipe.precision)
        return lambda: plain_backward(batch_loss)(images, labels)

    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout draws
        return pays(step(False), step(True), steps, device)


def make_batch_loss(
    model: nn.Module, alpha_decay: float, device: torch.device, compile: bool, *, precision: str = "float32"
) -> Callable:
    """A function of normalised images (N, 3, H, W) and labels (N,) to the loss that is minimised, a scalar.

    Compiled, it is one graph forward and one backward, in which the quantizers' arithmetic is fused with its
    neighbours, the same for all seeds; on CUDA these are replayed as CUDA graphs.
    """
    loss = with_shared_graph(_batch_loss, model, device) if compile else _batch_loss
    return lambda images, labels: loss(model, images, labels, alpha_decay, precision)


def _batch_loss(model: nn.Module, images: Tensor, labels: Tensor, alpha_decay: float, precision: str) -> Tensor:
    with computing_in(precision, images.device):
        return F.cross_entropy(model(images), labels) + alpha_decay / 2 * alpha_penalty(model)


def plain_backward(batch_loss: Callable) -> Callable[[Tensor, Tensor], None]:
    """The backward pass of a training run without a control."""
    return lambda images, labels: batch_loss(images, labels).backward()


def training_step(backward: Callable, optimizer, scales: list[nn.Parameter], images: Tensor, labels: Tensor) -> None:
    """One step of the optimizer; ``backward`` leaves the gradients, ``scales`` are the model's ``learned_scales``."""
    optimizer.zero_grad()
    backward(images, labels)
    limit_scale_gradients(scales)
    optimizer.step()


def _train_epoch(model, batches, backward: Callable, optimizer, scheduler) -> int:
    """One pass over ``batches``; returns the number of images."""
    model.train()
    count, scales = 0, learned_scales(model)
    for images, labels in batches:
        training_step(backward, optimizer, scales, images, labels)
        scheduler.step()
        count += len(labels)
    if labels.is_cuda:
        torch.cuda.synchronize()
    return count


@torch.no_grad()
def _check_classes(model: nn.Module, data: ImageDataset) -> None:
    outputs = model.eval()(data.normalise(data.test_images[:1])).shape[1]
    if outputs != len(data.classes):
        raise ValueError(f"the model has {outputs} outputs (num_classes), but {data.name} has {len(data.classes)}")


def _batches(data: ImageDataset, seed: int, epoch: int, batch_size: int, augment: bool):
    """Shuffled, whole batches of normalised images and labels. Each epoch has a generator of its own."""
    generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
    order = torch.randperm(len(data.train_labels), generator=generator)
    for picked in order.split(batch_size):
        if len(picked) < batch_size:
            return
        picked = picked.to(data.train_images.device, non_blocking=True)
        images = data.train_images[picked]
        if augment:
            images = data.augment(images, generator)
        yield data.normalise(images).contiguous(memory_format=torch.channels_last), data.train_labels[picked]


def _measured_splits(data: ImageDataset) -> dict[str, tuple[Tensor, Tensor]]:
    """The images and labels that are measured after every epoch."""
    return {
        "train": _sample(data.train_images, data.train_labels),
        "val": _sample(data.test_images, data.test_labels),
    }


def _sample(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """At most CURVE_IMAGES: at random, not the first, for digits come in the order of their writers."""
    if len(labels) <= CURVE_IMAGES:
        return images, labels
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:CURVE_IMAGES].to(labels.device)
    return images[chosen], labels[chosen]


def _epoch_rows(model: nn.Module, data: ImageDataset, splits: dict, noise: float) -> list[dict]:
    rows = []
    for split, (images, labels) in splits.items():
        result = measure(model, data, images, labels)
        rows.append({"split": split, "loss": result["loss"], "metric": result["accuracy"], "noise": noise})
    return rows


@ieee_float32()
@torch.inference_mode()
def outputs_on(
    model: nn.Module,
    data: ImageDataset,
    images: Tensor,
    batch_size: int = MEASURED_BATCH,
    logits: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__,
) -> Tensor:
    """Logits (N, classes) of uint8 ``images`` (N, 3, H, W), which ``data`` normalises, in evaluation mode.

    ``logits(model, x)`` computes the outputs of a batch. Weights are quantized once.
    """
    model.eval()
    with weights_quantized_once(model):
        batches = (data.normalise(x).contiguous(memory_format=torch.channels_last) for x in images.split(batch_size))
        return torch.cat([logits(model, x).clone() for x in batches])


def measure(model: nn.Module, data: ImageDataset, images: Tensor, labels: Tensor, **options) -> dict[str, float]:
    """Mean cross-entropy ``loss`` and ``accuracy`` in percent of ``outputs_on`` these images; its ``options``."""
    outputs = outputs_on(model, data, images, **options)
    correct = (outputs.argmax(1) == labels).sum().item()
    loss = F.cross_entropy(outputs, labels, reduction="sum").item()
    return {"loss": loss / len(labels), "accuracy": 100 * correct / len(labels)}


def _scheduler(name: str, optimizer, learning_rate: float, steps: int):
    if name == "one-cycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, cycle_momentum=False)
    if name == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    raise ValueError(f"schedule {name!r} is unknown; choose from one-cycle, cosine")


def _data_bytes(data: ImageDataset, control: Control | None) -> list:
    """What the digest of the data is made of; a control's noise is data, too."""
    images = [data.train_images, data.train_labels, data.test_images, data.test_labels]
    noise = [repr(control).encode()] if control else []
    return [data.name.encode(), *(tensor.cpu().contiguous().numpy() for tensor in images), *noise]
