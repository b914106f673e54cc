"""Controls: full-precision training with nothing of quantization but its noise, or the penalty that noise amounts to.

If quantization regularizes because it is noise, training with Gaussian noise of the same size, where it rounds, should
do the same; if the first order of the weights' noise is what counts, so should training with the penalty in its place.
The size is taken from LSQ at the same widths: layer by layer and epoch by epoch, relative to the standard deviation of
the layer's weights or inputs, because batch norm makes a layer's absolute scale meaningless.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qreg_utils.recipe import epoch_seed
from qreg_utils.theory.noise import perturbed

if TYPE_CHECKING:  # study is read from here, not needed to train
    from qreg_utils.study import Experiment

# steps from one penalty to the next, each as many times as large (lazy regularization, Karras et al. 2020, arXiv
# 1912.04958, appendix B): its second derivative makes a step five times as long
PENALTY_EVERY = 4
# added to the seed, so that the noise is not made of the random numbers that order the data; PyTorch's generator on a
# CPU takes the lower 32 bits of a seed
OWN_STREAM = 2**31
NOISE_COLUMNS = ("sigma", "weight_sigma")
INPUT_COLUMNS = ("input_noise", "input_sigma")


class ControlError(RuntimeError):
    """A control's noise source is not there or does not fit; the message names the file and what is missing."""


@dataclass(frozen=True)
class Control:
    """How one training run is perturbed: ``relative_sigma[epoch][layer]`` is the noise's sigma over the weights',
    ``relative_input_sigma`` likewise over that of the layer's inputs."""

    method: Literal["gaussian-noise", "gradient-penalty"]
    relative_sigma: tuple[Mapping[str, float], ...]
    relative_input_sigma: tuple[Mapping[str, float], ...] = ()

    @property
    def can_be_compiled(self) -> bool:
        """A second derivative cannot; noise on inputs comes from hooks, which a graph would leave out."""
        return self.method == "gaussian-noise" and not self.relative_input_sigma

    def backward(
        self, model: nn.Module, batch_loss: Callable, seed: int, epoch: int
    ) -> Callable[[Tensor, Tensor], None]:
        """What takes the place of ``batch_loss(images, labels).backward()`` during ``epoch``.

        "gaussian-noise": the gradient is that at the weights plus noise, drawn for each batch (so is a quantized
        network's gradient taken at the quantized weights, and given to the latent ones), with noise on each layer's
        inputs, where there is any, drawn for each number. "gradient-penalty": that of
        the loss plus ``gradient_penalty``. What is drawn depends on ``seed`` and ``epoch`` alone.
        """
        device = next(model.parameters()).device
        generator = torch.Generator(device).manual_seed(OWN_STREAM + epoch_seed(seed, epoch))
        step = itertools.count()
        weights = {layer: model.get_submodule(layer).weight for layer in self.relative_sigma[epoch]}
        inputs = self.relative_input_sigma[epoch] if self.relative_input_sigma else {}

        def sigmas() -> dict[str, Tensor]:
            relative = self.relative_sigma[epoch]
            return {layer: relative[layer] * weight.detach().std(correction=0) for layer, weight in weights.items()}

        def with_noise(images: Tensor, labels: Tensor) -> None:
            noise = {
                f"{layer}.weight": sigma * torch.empty_like(weights[layer]).normal_(generator=generator)
                for layer, sigma in sigmas().items()
            }
            with perturbed(model, noise), noisy_inputs(model, inputs, generator):
                batch_loss(images, labels).backward()

        def with_penalty(images: Tensor, labels: Tensor) -> None:
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            if next(step) % PENALTY_EVERY == 0:
                loss = loss + PENALTY_EVERY * gradient_penalty(logits, weights, sigmas(), generator)
            loss.backward()

        return with_noise if self.method == "gaussian-noise" else with_penalty


@contextmanager
def noisy_inputs(model: nn.Module, relative_sigma: Mapping[str, float], generator: torch.Generator) -> Iterator[None]:
    """In the block each of these layers sees its input with Gaussian noise, ``relative_sigma`` times the standard
    deviation of the batch's input. The gradient passes through."""

    def add_noise(layer: nn.Module, inputs: tuple[Tensor], relative: float) -> tuple[Tensor]:
        (x,) = inputs
        return (x + relative * x.detach().std() * torch.empty_like(x).normal_(generator=generator),)

    hooks = [
        model.get_submodule(layer).register_forward_pre_hook(partial(add_noise, relative=relative))
        for layer, relative in relative_sigma.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def gradient_penalty(
    logits: Tensor, weights: Mapping[str, Tensor], sigma: Mapping[str, Tensor], generator: torch.Generator
) -> Tensor:
    """What weight noise adds to the mean cross-entropy to first order in sigma^2: an unbiased estimate, a scalar.

    ``logits`` (m, k) with their graph; ``weights`` and ``sigma`` by layer. Noise on the weights moves the logits by
    J noise, which adds half the curvature of the loss in the logits times the variance of that:
    ``sum_l sigma_l^2 / (2 m) * sum_i trace(J_il^T (diag(p_i) - p_i p_i^T) J_il)``. For the squared error, whose
    curvature is 2, the same sum is the paper's ``sigma^2 / m * sum_i ||grad y_i||^2``. With r of random signs and
    ``v_i = (diag(sqrt p_i) - p_i sqrt(p_i)^T) r_i``, the covariance of v_i is the curvature, so that
    ``sigma_l^2 / (2 m) * ||sum_i J_il^T v_i||^2`` has that expectation: one more backward pass in place of m * k.
    """
    log_p = logits.log_softmax(1)
    root = (log_p / 2).exp()  # of p; has a gradient where p underflows, too
    signs = torch.randint(0, 2, logits.shape, generator=generator, device=logits.device) * 2 - 1
    v = root * signs - log_p.exp() * (root * signs).sum(1, keepdim=True)
    gradients = torch.autograd.grad(logits, list(weights.values()), v, create_graph=True)
    squares = (sigma[layer] ** 2 * g.square().sum() for layer, g in zip(weights, gradients, strict=True))
    return sum(squares) / (2 * len(logits))


def load_controls(results: Path, experiment: "Experiment") -> dict[int, Control | None]:
    """For each seed of ``experiment`` the Control to train it with; None for all if its method is no control.

    The noise is read from noise.csv of its noise source, in the folder ``results``. Raises ControlError when that
    experiment has not finished or had other parameters, or a column, a seed or an epoch is missing.
    """
    noise_source = experiment.noise_source
    if noise_source is None:
        return dict.fromkeys(experiment.seeds)
    path, run = (results / noise_source.id / name for name in ("noise.csv", "run.json"))
    if not (path.exists() and run.exists()):
        raise ControlError(
            f"{path}: no finished run; {experiment.id} has its noise from there: run {noise_source.id} first"
        )
    # a parameter that is newer than the run had its default
    defaults = {name: field.get_default() for name, field in type(noise_source).model_fields.items()}
    source = defaults | json.loads(run.read_text(encoding="utf-8"))["parameters"]
    expected = noise_source.training_parameters()
    keys = [key for key, value in expected.items() if key != "seeds" and source.get(key) != value]
    other = [f"{key}: {source.get(key)}, not {expected[key]}" for key in keys]
    if other:
        raise ControlError(f"{run}: the noise source of {experiment.id} had other parameters ({'; '.join(other)})")
    noise = pd.read_csv(path)
    asked = [columns for columns, bits in _asked(experiment) if bits]
    missing = [name for name in ("seed", "epoch", "layer", *itertools.chain(*asked)) if name not in noise]
    if missing:
        raise ControlError(f"{path}: no layer statistics: the columns {', '.join(missing)} are missing")
    return {seed: _control(experiment, noise[noise["seed"] == seed], path, seed) for seed in experiment.seeds}


def _asked(experiment: "Experiment") -> list[tuple[tuple[str, str], int | None]]:
    """The columns of noise.csv of what has noise, weights and inputs, each with the width that it is noise of."""
    return [(NOISE_COLUMNS, experiment.weight_bits), (INPUT_COLUMNS, experiment.activation_bits)]


def _control(experiment: "Experiment", noise: pd.DataFrame, path: Path, seed: int) -> Control:
    if sorted(noise["epoch"].unique()) != list(range(experiment.epochs)):
        raise ControlError(f"{path}: no layer statistics of seed {seed} for each of {experiment.epochs} epochs")
    return Control(experiment.method, *(_relative(noise, columns, bits) for columns, bits in _asked(experiment)))


def _relative(noise: pd.DataFrame, columns: tuple[str, str], bits: int | None) -> tuple[Mapping[str, float], ...]:
    """For each epoch the noise of each layer over what it is added to; nothing where ``bits`` is None."""
    if bits is None:
        return () if columns is INPUT_COLUMNS else ({},) * noise["epoch"].nunique()
    relative = (noise[columns[0]] / noise[columns[1]]).groupby(noise["epoch"])
    return tuple(dict(zip(noise.loc[rows.index, "layer"], rows, strict=True)) for _, rows in relative)
