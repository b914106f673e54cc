"""Sharpness: how fast the loss rises around a trained network's weights, unrounded and quantized.

The literature disagrees on whether quantization leads to flatter minima, and means different things by it. Which
weights, and which measure, matters, because training with the straight-through estimator has two sets of weights:

* The loss that is trained, as a function of the latent weights w, is a staircase: its Hessian is zero wherever it
  exists. So rounding is taken out (``without_rounding``), and the smooth loss that is left is looked at in two places.
* At the *quantized* weights w_q training takes its gradients, and there the network is used. But the weights cannot
  move a little from there: gradients are added up in w, and w_q jumps by whole steps. The Hessian at w_q says how the
  gradient would change nearby; what a jump costs is seen by perturbations as large as one.
* At the *unrounded* weights no network is run, in training or after it. But the noise theory is about them: were w_q =
  w + noise of mean 0 and deviation sigma, E[L(w_q)] = L(w) + sigma^2 / 2 tr H(w) + ..., which favours w where H is
  small. For DoReFa and PACT they are the squashed, normalised weights that are rounded; the optimizer's own are before
  tanh.

The Hessian depends on how weights are scaled, while the network need not: a layer's weights times c, with the batch
norm behind it (or the next layer, through a ReLU) making up for it, is the same function with a curvature c^2 times
smaller (Dinh et al. 2017, arXiv 1703.04933). DoReFa puts all weights on another scale than LSQ. So only what is
relative can be compared between methods or bit widths: here weights in units of their layer's standard deviation s_l,
that is, the Hessian times s_l s_m for layers l and m. The absolute numbers are reported because the literature does.

Hessians see no kinks: of a network with ReLUs and clipped activations they are exact where they exist, but leave out
that units switch on and off nearby. Perturbations of finite size see that; for small ones, both agree
(``loss_rise`` = size^2 / 2 times ``relative_trace``).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from qreg_utils.precision import ieee_float32
from qreg_utils.quantize import quantized_layers, without_rounding
from qreg_utils.theory.noise import layer_weights
from qreg_utils.theory.penalty import with_batch_statistics

SIZES = (0.05, 0.1, 0.2)  # of a perturbation: rounding to 8, 4 and 2 bits is one of about 0.01, 0.1 and 0.5
GROUP = 8  # images that share random directions: the fewer, the more directions are averaged over for the same work
HESSIAN_BATCH = 64  # images in memory at once
LANCZOS_VECTORS = 4  # at least
LANCZOS_TOLERANCE = 0.01  # of the residual, relative to the eigenvalue


class Groups(NamedTuple):
    """How many images share random directions, and how many are in memory at once."""

    shared: int
    in_memory: int


Batch = tuple[Tensor, Tensor]  # inputs and labels
Weights = dict[str, Tensor]


@ieee_float32()
def sharpness(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
    sizes: Sequence[float] = SIZES,
    draws: int = 4,
    probes: int = 4,
    batch_size: int | None = None,
) -> list[dict]:
    """Rows weights, measure, size, value: the sharpness of the mean cross-entropy on normalised ``inputs``.

    ``inputs`` is (N, 3, H, W), ``labels`` (N,), on the model's device. ``weights`` is "unrounded" or "quantized", for a
    full-precision model "unrounded" only. Neither weights nor activations are rounded; activations are clipped.
    Measured are the weights of Conv2d and Linear layers, which is what gets quantized. ``size`` is 0.0 but for
    ``loss_rise``.

    - ``loss`` (nats): of the network that is measured, which is not quite the one that was trained. Where it is much
      larger, this is another place in the landscape, and the other rows tell little.
    - ``largest_eigenvalue``, ``trace``: of the Hessian.
    - ``relative_largest_eigenvalue``, ``relative_trace``: for weights in units of their layer's standard deviation.
    - ``loss_rise`` (nats): the mean rise of the loss when Gaussian noise is added to all weights, ``size`` times
      their layer's standard deviation; each draw is added and subtracted, so that the gradient's part cancels.

    With a ``batch_size`` batch norm has the statistics of each batch of so many of ``inputs``, as in training (those of
    a last, smaller batch are left out), and every batch gets ``draws`` perturbations and ``probes`` random directions
    of its own. Without, it uses the statistics of ``inputs`` under the weights that are
    measured, held constant. (Those collected in training belong to the quantized weights: with them, 2-bit unrounded
    weights seem to be no network at all.)
    Then every 8 images get ``draws`` perturbations and ``probes`` random directions of their own. ``seed`` sets them,
    the same for unrounded and quantized weights, on every device. For 64 images the standard error of traces and rises
    is then 10 to 25% (half of that with four times as many of both); that of their ratio, quantized to unrounded, 3% at
    4 bits.

    Raises ValueError for no images, labels of another number, ``draws`` or ``probes`` below 1, a size that is not
    positive, a model without Conv2d and Linear, or a loss that is not finite.
    """
    if len(inputs) == 0 or len(inputs) != len(labels):
        raise ValueError(f"{len(inputs)} inputs and {len(labels)} labels: give one label for each, and at least one")
    if min(draws, probes) < 1:
        raise ValueError(f"draws={draws} and probes={probes}: each must be at least 1")
    if not all(size > 0 for size in sizes):
        raise ValueError(f"sizes={sizes}: each must be positive")
    if batch_size:
        kept = len(inputs) // batch_size * batch_size or len(inputs)
        inputs, labels = inputs[:kept], labels[:kept]
    data, groups = (inputs.contiguous(), labels), Groups(batch_size or GROUP, batch_size or HESSIAN_BATCH)
    rows = []
    for kind in ("unrounded", "quantized") if any(quantized_layers(model)) else ("unrounded",):
        network = _measured_network(model, kind, data[0], batch_size)
        weights = layer_weights(network)
        loss = _loss(network, weights, data, groups).item()
        if not math.isfinite(loss):
            raise ValueError(f"the loss with {kind} weights is {loss}: there is no sharpness to measure")
        measures = {"loss": loss} | _curvature(network, weights, data, groups, probes, seed)
        rows += [{"weights": kind, "measure": name, "size": 0.0, "value": value} for name, value in measures.items()]
        for size, rise in _loss_rises(network, weights, data, groups, sizes, draws, seed).items():
            rows.append({"weights": kind, "measure": "loss_rise", "size": size, "value": rise})
    return rows


def _measured_network(model: nn.Module, kind: str, inputs: Tensor, batch_size: int | None) -> nn.Module:
    """A copy without rounding, whose batch norm has the statistics of each batch, or those of ``inputs``, frozen."""
    # second derivatives of channels_last convolutions take longer
    network = without_rounding(model, kind).to(memory_format=torch.contiguous_format)
    if batch_size:
        return with_batch_statistics(network)
    update_bn([inputs], network)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):
            network.set_submodule(name, _FrozenNorm(layer))
    return network


class _FrozenNorm(nn.Module):
    """What batch norm is in evaluation mode. PyTorch differentiates it twice in two thirds of batch norm's time."""

    @torch.no_grad()
    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        zeros = torch.zeros_like(norm.running_mean)[None, :, None, None]
        self.shift = norm(zeros)
        self.scale = norm(zeros + 1) - self.shift

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def _deviations(weights: Weights) -> Weights:
    """The standard deviation of each layer's weights, a scalar each."""
    return {name: weight.detach().std(correction=0) for name, weight in weights.items()}


def _groups(data: Batch, size: int) -> list[Batch]:
    """All images and labels, ``size`` at a time."""
    return list(zip(*(part.split(size) for part in data), strict=True))


@torch.no_grad()
def _loss(network: nn.Module, weights: Weights, data: Batch, groups: Groups) -> Tensor:
    """The mean cross-entropy, a scalar, of ``network`` with these ``weights``."""
    total = 0.0
    for inputs, labels in _groups(data, groups.in_memory):
        total = total + F.cross_entropy(functional_call(network, weights, inputs), labels, reduction="sum")
    return total / len(data[1])


@torch.no_grad()
def _loss_rises(
    network: nn.Module,
    weights: Weights,
    data: Batch,
    groups: Groups,
    sizes: Sequence[float],
    draws: int,
    seed: int,
) -> dict[float, float]:
    """The mean rise of the loss for each size; all sizes share their random directions."""
    generator = torch.Generator().manual_seed(seed)
    deviations = _deviations(weights)
    rises = dict.fromkeys(sizes, 0.0)
    for group in _groups(data, groups.shared):
        share = len(group[1]) / len(data[1]) / draws
        before = _loss(network, weights, group, groups)
        for _ in range(draws):
            noise = {name: deviations[name] * _normal(weight, generator) for name, weight in weights.items()}
            for size in sizes:
                after = [_loss(network, _moved(weights, noise, step), group, groups) for step in (size, -size)]
                rises[size] += share * (sum(after) / 2 - before).item()
    return rises


def _moved(weights: Weights, direction: Weights, step: float) -> Weights:
    return {name: weight + step * direction[name] for name, weight in weights.items()}


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers, the same on every device."""
    return torch.randn(like.shape, generator=generator).to(like)


def _curvature(
    network: nn.Module, weights: Weights, data: Batch, groups: Groups, probes: int, seed: int
) -> dict[str, float]:
    """Largest eigenvalue and trace of the Hessian, absolute and relative."""
    units = torch.cat([unit.expand(weights[name].numel()) for name, unit in _deviations(weights).items()])
    units = torch.where(units > 0, units, 1)  # a layer whose weights are all the same
    trace, relative_trace = _traces(network, weights, units, data, groups.shared, probes, seed)
    hessian = _Hessian(network, weights, _groups(data, groups.in_memory))
    start = torch.randn(units.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        units.device
    )
    return {
        "largest_eigenvalue": _largest_eigenvalue(hessian.times, start),
        "trace": trace,
        "relative_largest_eigenvalue": _largest_eigenvalue(lambda v: units * hessian.times(units * v), start),
        "relative_trace": relative_trace,
    }


class _Hessian:
    """The Hessian of the mean loss over ``groups`` with respect to all ``weights`` as one vector (n,)."""

    def __init__(self, network: nn.Module, weights: Weights, groups: list[Batch]):
        self.network, self.groups = network, groups
        self.weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        self.images = sum(len(labels) for _, labels in groups)
        # of one group the graph of the gradient is kept: making it is half of a product's work
        self.gradients = self._gradients(*groups[0]) if len(groups) == 1 else None

    def _gradients(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        loss = F.cross_entropy(functional_call(self.network, self.weights, inputs), labels, reduction="sum")
        return torch.autograd.grad(
            loss / self.images, list(self.weights.values()), create_graph=True, materialize_grads=True
        )

    def times(self, vector: Tensor) -> Tensor:
        """The product with ``vector`` (n,), in float64."""
        weights = list(self.weights.values())
        parts = vector.to(weights[0].dtype).split([weight.numel() for weight in weights])
        total = torch.zeros(vector.shape, dtype=torch.float64, device=vector.device)
        for group in self.groups:
            gradients = self.gradients or self._gradients(*group)
            # a gradient that depends on no weight, as where all units are dead, adds nothing
            pairs = [(g, v.view_as(g)) for g, v in zip(gradients, parts, strict=True) if g.requires_grad]
            if pairs:
                outputs, vectors = zip(*pairs, strict=True)
                keep = {"retain_graph": self.gradients is not None, "materialize_grads": True}
                products = torch.autograd.grad(outputs, weights, vectors, **keep)
                total += torch.cat([product.flatten() for product in products])
        return total


def _traces(
    network: nn.Module, weights: Weights, units: Tensor, data: Batch, group: int, probes: int, seed: int
) -> tuple[float, float]:
    """Unbiased estimates of the traces of H and of D H D, where D = diag(units).

    With random signs v, E[v^T A v] = tr A (Hutchinson 1989); the products H D v serve both A = D H D and A = D^-1 H D.
    """
    generator = torch.Generator().manual_seed(seed)
    trace = relative_trace = 0.0
    for inputs, labels in _groups(data, group):
        hessian = _Hessian(network, weights, [(inputs, labels)])
        share = len(labels) / len(data[1]) / probes
        for signs in 2 * torch.randint(2, (len(units), probes), generator=generator).T.to(units) - 1:
            product = hessian.times(units * signs)
            trace += share * (signs / units * product).sum().item()
            relative_trace += share * (signs * units * product).sum().item()
    return trace, relative_trace


def _largest_eigenvalue(times: Callable[[Tensor], Tensor], start: Tensor) -> float:
    """The largest (not the largest in magnitude) eigenvalue of a symmetric matrix, given by its products with vectors.

    Lanczos' method with full reorthogonalization, from the vector ``start`` (n,) in float64, until the residual is
    below LANCZOS_TOLERANCE of the eigenvalue: an eigenvalue is then as near as that, and the largest one much nearer.
    SciPy's would take about twice as many products: it looks at the residual only after a fixed number of them.
    """
    from scipy.linalg import eigh_tridiagonal  # here, because it takes a moment

    basis, diagonal, beside = [start / start.norm()], [], []
    while True:
        vector = times(basis[-1])
        diagonal.append((vector @ basis[-1]).item())
        for other in basis * 2:  # once would leave rounding errors
            vector = vector - (vector @ other) * other
        values, vectors = eigh_tridiagonal(diagonal, beside)
        beside.append(vector.norm().item())
        residual = beside[-1] * abs(vectors[-1, -1])
        enough = len(basis) >= LANCZOS_VECTORS and residual <= LANCZOS_TOLERANCE * abs(values[-1])
        if enough or len(basis) == len(start) or beside[-1] == 0:
            return values[-1].item()
        basis.append(vector / beside[-1])
