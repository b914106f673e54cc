"""YOLOv5n trained by ultralytics' trainer, quantized or not: same budget, data order and first weights."""

import math
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from ultralytics.data.build import build_dataloader
from ultralytics.models.yolo.detect import DetectionTrainer

from qreg_utils import digest
from qreg_utils.checkpoints import load_checkpoint, save_checkpoint, training_fingerprint
from qreg_utils.detection.datasets import DetectionDataset
from qreg_utils.detection.evaluation import BoxDataset, Validator, description
from qreg_utils.detection.yolo import YOLOv5n
from qreg_utils.precision import ieee_float32
from qreg_utils.progress import progress_bar
from qreg_utils.quantize import (
    calibrate,
    dead_scales,
    learned_scales,
    limit_scale_gradients,
    penalised_scales,
    quantized_layers,
)
from qreg_utils.recipe import DetectionRecipe, epoch_seed
from qreg_utils.theory.noise import overall_noise, weight_noise

NO_AUGMENTATION = {
    **dict.fromkeys(("mosaic", "hsv_h", "hsv_s", "hsv_v", "translate", "scale", "fliplr"), 0.0),
    "close_mosaic": 0,
}


@ieee_float32()
def fit(
    model: YOLOv5n,
    data: DetectionDataset,
    recipe: DetectionRecipe,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Train ``model`` in place with ultralytics' trainer; return history and noise rows, and facts about the speed.

    Images are letterboxed to ``image_size`` pixels. SGD with Nesterov momentum and one step for each batch, gradients
    clipped to norm 10; ``weight_decay`` spares biases, batch norms and steps, PACT's alphas get ``alpha_decay``; the
    gradients of steps and alphas are limited to a tenth of their magnitude. The learning rate rises during
    ``warmup_epochs`` and falls to a hundredth, linearly or by a cosine (``schedule``). ``augment`` means ultralytics'
    defaults (mosaic but for the last ten epochs, colours, scale, translation; mirroring where ``data.flip``). Data
    order and augmentation depend on ``seed`` and the epoch alone.

    What is measured, and what ``model`` holds in the end, is ultralytics' moving average of the weights (EMA), as is
    usual for YOLO. After every epoch: the loss on the test images and on as many training images, both in evaluation
    mode and not augmented, mAP50 in percent on the test images (``metric``; over ``classes``, or all), and each layer's
    quantization noise.

    With ``checkpoint`` (a path) the state is saved after every epoch, in full precision, and a run that was stopped
    is resumed from there. Raises ValueError for a class that cannot be measured, CheckpointError for a checkpoint of
    another configuration, FloatingPointError, naming the epoch, when the loss is not finite or a quantizer's scale has
    died, RuntimeError when a GPU has too little memory for the batch size.
    """
    data.count_objects(recipe.classes)  # a wrong class is found before any work is done
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = {"seed": seed, "device": device, "ultralytics": version("ultralytics")}
    fingerprint = training_fingerprint(model, _data_bytes(data), recipe, digest.TRAINING["detection"], **run)
    saved = load_checkpoint(checkpoint, fingerprint)
    model.to(device)
    model.criterion = None  # made again, with these settings, on this device
    if saved and saved["epochs_done"] == recipe.epochs:
        model.load_state_dict(saved["ema"])
        return saved["record"]
    with tempfile.TemporaryDirectory() as scratch, _determinism_kept():
        overrides = {
            "model": "yolov5n.yaml",
            "data": data.name,
            "save_dir": scratch,  # ultralytics makes folders there; nothing of it is kept
            "device": "0" if device == "cuda" else "cpu",
            "imgsz": recipe.image_size,
            "epochs": recipe.epochs,
            "batch": recipe.batch_size,
            "nbs": recipe.batch_size,  # nominal batch size: no accumulation over batches, no scaled weight decay
            "optimizer": "SGD",
            "lr0": recipe.learning_rate,
            "momentum": recipe.momentum,
            "weight_decay": recipe.weight_decay,
            "cos_lr": recipe.schedule == "cosine",
            "warmup_epochs": recipe.warmup_epochs,
            "warmup_bias_lr": 0.0,  # biases warm up like the rest: ultralytics' 0.1 throws short runs off
            "seed": seed,
            "patience": 0,  # never stops early: no epoch is chosen by test images
            "pretrained": False,
            "amp": False,  # rounding is the subject here; and ultralytics' check of AMP downloads a network
            "plots": False,
            "verbose": False,
            "augmentations": [],  # of albumentations, which ultralytics adds where it happens to be installed
            **(NO_AUGMENTATION if not recipe.augment else {"fliplr": 0.5 if data.flip else 0.0}),
        }
        trainer = YOLOTraining(
            model,
            data,
            recipe,
            checkpoint=checkpoint,
            fingerprint=fingerprint,
            saved=saved,
            overrides=overrides,
        )
        trainer.train()
        trainer.sample_loader.close()
    model.load_state_dict(trainer.ema.ema.state_dict())
    return trainer.record


class YOLOTraining(DetectionTrainer):
    """ultralytics' trainer for a model that may be quantized: our data, our checkpoints, its training loop.

    Its name must not contain "Trainer": ultralytics would load its integrations with MLflow, ClearML and others, which
    are on by default where they are installed.
    """

    def __init__(
        self,
        model: YOLOv5n,
        data: DetectionDataset,
        recipe: DetectionRecipe,
        *,
        checkpoint: Path | None,
        fingerprint: dict[str, str],
        saved: dict | None,
        overrides: dict,
    ):
        self.dataset, self.recipe = data, recipe
        self.checkpoint, self.fingerprint, self.saved = checkpoint, fingerprint, saved
        self.record = {"history": [], "noise": [], "images_per_second": [], "seconds": []}
        threads = torch.get_num_threads()
        super().__init__(overrides=overrides)
        torch.set_num_threads(threads)  # ultralytics chooses its own, though experiments may share the machine
        self.model, self.asked_batch_size = model, self.batch_size
        self.add_callback("on_train_epoch_start", YOLOTraining.start_epoch)
        self.add_callback("on_train_epoch_end", YOLOTraining.check_epoch)
        self.add_callback("on_fit_epoch_end", YOLOTraining.show_progress)
        self.progress = progress_bar(total=self.epochs, desc=f"seed {self.args.seed}", unit="epoch")

    # --- data ---

    def get_dataset(self) -> dict:
        return description(self.dataset)

    def build_dataset(self, img_path, mode="train", batch=None):
        return BoxDataset(img_path, self.args, self.data, augment=mode == "train", batch_size=batch)

    def start_epoch(self):
        """Random numbers and data order depend on seed and epoch alone, so that a resumed run draws the same."""
        if self.batch_size != self.asked_batch_size:  # halved by ultralytics
            raise RuntimeError(f"out of memory at batch_size={self.asked_batch_size}; settings need the same: lower it")
        self.epoch_started = time.perf_counter()
        number = epoch_seed(self.args.seed, self.epoch)
        random.seed(number)
        np.random.seed(number % 2**32)  # noqa: NPY002 (ultralytics draws from it)
        torch.manual_seed(number)
        self.train_loader.generator.manual_seed(number)
        self.train_loader.reset()

    # --- optimisation ---

    def build_optimizer(self, model, name="auto", lr=0.001, momentum=0.9, decay=1e-5, iterations=1e5):
        """Calibrate the activation quantizers, before the EMA copy is made, and spare steps and alphas weight decay."""
        batch = next(iter(self.train_loader))  # FP32 draws it too: all settings draw the same
        calibrate(model, self.preprocess_batch(batch)["img"])
        optimizer = super().build_optimizer(model, name, lr, momentum, decay, iterations)
        scales = {id(scale) for scale in learned_scales(model)}
        alphas = penalised_scales(model)
        steps = [scale for scale in learned_scales(model) if not any(scale is alpha for alpha in alphas)]
        decayed = next(group for group in optimizer.param_groups if group["param_group"] == "weight")
        decayed["params"] = [parameter for parameter in decayed["params"] if id(parameter) not in scales]
        shared = {key: value for key, value in decayed.items() if key != "params"} | {"param_group": "scale"}
        for parameters, decay in ((steps, 0.0), (alphas, self.recipe.alpha_decay)):
            if parameters:
                optimizer.add_param_group(shared | {"params": parameters, "weight_decay": decay})
        return optimizer

    def optimizer_step(self):
        limit_scale_gradients(learned_scales(self.model))
        super().optimizer_step()

    def check_epoch(self):
        self.train_seconds = time.perf_counter() - self.epoch_started
        if not math.isfinite(sum(float(value) for value in self.tloss.values())):
            self.fail("the loss is not finite")
        if dead := dead_scales(self.model):
            self.fail(f"a scale has died ({', '.join(dead)})")

    def fail(self, problem: str):
        raise FloatingPointError(f"{problem} in epoch {self.epoch} of {self.epochs} (seed {self.args.seed})")

    # --- measuring ---

    def get_validator(self):
        validator = Validator(self.test_loader, self.save_dir, self.args, self.callbacks)
        validator.quantized = any(quantized_layers(self.model))
        sample = torch.randperm(len(self.dataset.train), generator=torch.Generator().manual_seed(0))
        sample = sorted(sample[: len(self.dataset.test)].tolist())
        images = [self.dataset.train[i] for i in sample]
        batch = self.test_loader.batch_size
        dataset = self.build_dataset(images, mode="val", batch=batch)
        self.sample_loader = build_dataloader(dataset, batch, self.args.workers, shuffle=False, device=self.device)
        return validator

    def save_metrics(self, metrics):
        """Called after every epoch's validation: the rows of history and noise."""
        layers = weight_noise(self.ema.ema)
        shared = {"seed": self.args.seed, "epoch": self.epoch}
        noise = overall_noise(layers)
        losses = {"train": mean_loss(self.ema.ema, self.sample_loader, self.preprocess_batch)}
        losses["val"] = sum(value for name, value in metrics.items() if name.startswith("val/"))
        if any(map(math.isnan, losses.values())):  # of the last step; inf may be batch norm's averages lagging behind
            self.fail("the loss is not finite")
        metric = {"train": math.nan, "val": self.validator.mean_ap(self.recipe.classes)["map50"]}
        for split, loss in losses.items():
            row = {"split": split, "loss": loss, "metric": metric[split], "noise": noise}
            self.record["history"].append(shared | row)
        self.record["noise"] += [shared | row for row in layers]
        self.record["images_per_second"].append(len(self.train_loader.dataset) / self.train_seconds)
        self.record["seconds"].append(time.perf_counter() - self.epoch_started)

    def show_progress(self):
        last = self.record["history"][-2:]
        self.progress.update(self.epoch + 1 - self.progress.n)
        self.progress.set_postfix({row["split"]: f"{row['loss']:.3f}" for row in last})

    def final_eval(self):
        """Nothing: ultralytics would reload a half-precision copy and fold its batch norms. See ``evaluate``."""

    # --- checkpoints: ultralytics' are pickles in half precision ---

    def save_model(self) -> bool:
        if self.checkpoint:
            state = {"fingerprint": self.fingerprint, "epochs_done": self.epoch + 1, "updates": self.ema.updates}
            parts = {"model": self.model, "ema": self.ema.ema, "optimizer": self.optimizer}
            state |= {name: part.state_dict() for name, part in parts.items()}
            save_checkpoint(self.checkpoint, state | {"record": self.record})
        return True

    def resume_training(self, ckpt):
        if self.saved:
            self.model.load_state_dict(self.saved["model"])
            self.ema.ema.load_state_dict(self.saved["ema"])
            self.ema.updates = self.saved["updates"]
            self.optimizer.load_state_dict(self.saved["optimizer"])
            self.record, self.start_epoch = self.saved["record"], self.saved["epochs_done"]


@contextmanager
def _determinism_kept() -> Iterator[None]:
    """ultralytics trains deterministically, and then switches that off, whatever it was before."""
    names = ("CUBLAS_WORKSPACE_CONFIG", "PYTHONHASHSEED")
    variables = {name: os.environ[name] for name in names if name in os.environ}
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic, cudnn = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.deterministic = cudnn
        torch.utils.deterministic.fill_uninitialized_memory = fill
        os.environ.update(variables)


@torch.inference_mode()
def mean_loss(model: nn.Module, loader, preprocess) -> float:
    """ultralytics' validation loss (box, class and DFL terms with their gains), the mean over batches."""
    model.eval()
    total = 0.0
    for batch in loader:
        batch = preprocess(batch)
        total += sum(value.item() for value in model.loss(batch, model(batch["img"]))[1].values())
    return total / len(loader)


def _data_bytes(data: DetectionDataset) -> list:
    """What a data set's digest is made of: names and boxes, and the images' sizes in bytes."""
    images = [image for split in (data.train, data.test) for image in split]
    names = "\n".join(f"{image.file.name} {image.file.stat().st_size}" for image in images)
    boxes = [array for image in images for array in (image.classes, image.boxes)]
    return [f"{data.name} {data.classes} {len(data.train)}\n{names}".encode(), *map(np.ascontiguousarray, boxes)]
