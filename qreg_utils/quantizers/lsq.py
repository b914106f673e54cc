"""LSQ, learned step size quantization (arXiv 1902.08153), and with an offset LSQ+ (arXiv 2004.09576)."""

import torch
from torch import Tensor, fx, nn

from qreg_utils.quantizers.base import (
    ActivationQuantizer,
    WeightQuantizer,
    inside,
    positive,
    round_ste,
    total,
)


def lsq_formula(x: Tensor, step: Tensor, q_min: int, q_max: int, gradient_scale: float = 1.0) -> Tensor:
    """Learned step size quantization, ``clamp(round(x / step), q_min, q_max) * step``, as the paper writes it down.

    ``x`` any shape, ``step`` a scalar tensor in units of ``x``, used as ``positive(step)``. Rounding is straight
    through; ``gradient_scale`` multiplies the gradient of the step and nothing else. ``lsq`` is the same, faster.
    Source: Eqs. 1-3 and section 2.2 of arXiv 1902.08153.
    """
    step = scaled_gradient(positive(step), gradient_scale)
    return round_ste((x / step).clamp(q_min, q_max)) * step


def lsq_offset_formula(x: Tensor, step: Tensor, offset: Tensor, levels: int, gradient_scale: float = 1.0) -> Tensor:
    """LSQ of ``x - offset``, put back: ``lsq_offset`` is the same, faster. Source: arXiv 2004.09576, Eqs. 1-5."""
    offset = scaled_gradient(offset, gradient_scale)
    return lsq_formula(x - offset, step, 0, levels, gradient_scale) + offset


def scaled_gradient(x: Tensor, scale: float) -> Tensor:
    """``x`` itself; its gradient is multiplied by ``scale``."""
    return (x - x * scale).detach() + x * scale


class LSQWeight(WeightQuantizer):
    """LSQ for weights: signed, levels -2^(k-1) .. 2^(k-1)-1 times a learned step, 2 mean|w| / sqrt(Q_P) at first."""

    def __init__(self, bits: int, weight: Tensor):
        super().__init__(bits, weight)
        self.q_min, self.q_max = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.gradient_scale = (weight.numel() * self.q_max) ** -0.5
        self.step = nn.Parameter(lsq_initial_step(weight, self.q_max))

    def step_size(self) -> Tensor:
        return positive(self.step)

    def forward(self, weight: Tensor) -> Tensor:
        return self.quantize(weight, self.q_min, self.q_max, self.gradient_scale)

    def quantize(self, x: Tensor, q_min: int, q_max: int, gradient_scale: float) -> Tensor:
        """``lsq`` with the learned step; what a part of LSQ has in its place."""
        return lsq(x, self.step, q_min, q_max, gradient_scale)


class LSQActivation(ActivationQuantizer):
    """LSQ for activations: a learned step; its gradient scale counts the features of one sample, not the batch.

    With ``offset`` the 2^k levels start at a learned offset (LSQ+) instead of being signed or unsigned; at first it is
    the smallest value of the calibration batch.
    """

    def __init__(self, bits: int, offset: bool = False):
        super().__init__(bits)
        self.step = nn.Parameter(torch.ones(()))
        self.offset = nn.Parameter(torch.zeros(())) if offset else None

    def initialise(self, x: Tensor) -> None:
        if self.offset is None:
            self.step.copy_(lsq_initial_step(x, self.levels()))
        else:
            self.offset.copy_(x.min())
            self.step.copy_(lsq_initial_step(x - self.offset, self.levels()))

    def description(self) -> dict:
        return super().description() | {"offset": self.offset is not None}

    def levels(self) -> int:
        levels = super().levels()  # which is an error before calibration
        return levels if self.offset is None else 2**self.bits - 1

    def step_size(self) -> Tensor:
        return positive(self.step)

    def limits(self) -> tuple[Tensor, Tensor]:
        low, high = super().limits()
        if self.offset is not None:
            return self.offset.detach(), self.offset + high
        return (low - self.step_size() if self.signed else low), high

    def forward(self, x: Tensor) -> Tensor:
        q_max = self.levels()
        scale = activation_gradient_scale(x, self.sample_dims, q_max)
        if self.offset is not None:
            return lsq_offset(x, self.step, self.offset, q_max, scale)
        q_min = -q_max - 1 if self.signed else 0
        return self.quantize(x, q_min, q_max, scale)

    def quantize(self, x: Tensor, q_min: int, q_max: int, gradient_scale: float) -> Tensor:
        """``lsq`` with the learned step; what a part of LSQ has in its place."""
        return lsq(x, self.step, q_min, q_max, gradient_scale)


def lsq_initial_step(x: Tensor, q_max: int) -> Tensor:
    """``2 mean|x| / sqrt(Q_P)``, a positive scalar. Source: LSQ, section 2.1."""
    return positive(2 * x.detach().abs().mean() / q_max**0.5)


def activation_gradient_scale(x: Tensor, sample_dims: int, q_max: int) -> float:
    """``1 / sqrt(features * Q_P)``: the features of one sample, which has ``sample_dims`` dimensions."""
    features = (x.shape[1:] if x.dim() > sample_dims else x.shape).numel()
    return (max(features, 1) * q_max) ** -0.5


# --- the same, faster: forward and backward in as few passes over memory as they take ---------------------------------


class _LSQ(torch.autograd.Function):
    """Eqs. 1-3 and 5 of the LSQ paper; the gradient of the step is scaled as in its section 2.2."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, step, q_min, q_max, gradient_scale):
        step = positive(step)
        return (x / step).round_().clamp_(q_min, q_max).mul_(step)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, step, ctx.q_min, ctx.q_max, ctx.gradient_scale = inputs
        # eager, the next layer keeps the output anyway; compiled, to compute it again costs less than to keep it
        ctx.save_for_backward(x, step, None if torch.compiler.is_compiling() else output)

    @staticmethod
    def backward(ctx, grad):
        x, signed_step, x_q = ctx.saved_tensors
        step = positive(signed_step)
        ratio = x / step
        grad_x = inside(grad, ratio, ctx.q_min, ctx.q_max)
        if x_q is None:
            x_q = ratio.round().clamp_(ctx.q_min, ctx.q_max).mul_(step)
        # d x_q / d step: round(x/s) - x/s inside the range, -Q_N or Q_P outside; first, times the step
        grad_step = total((grad * x_q).addcmul_(grad_x, x, value=-1)) / step.copysign(signed_step)
        return grad_x, grad_step * ctx.gradient_scale, None, None, None


def lsq(x: Tensor, step: Tensor, q_min: int, q_max: int, gradient_scale: float = 1.0) -> Tensor:
    """Learned step size quantization: ``clamp(round(x / step), q_min, q_max) * step``.

    ``x`` any shape, ``step`` a scalar tensor in units of ``x``, used as ``positive(step)``. Gradients: straight through
    for ``x`` inside the range and 0 outside; for ``step`` the closed form of Eq. 3 times ``gradient_scale``.
    Source: Esser et al. 2020, arXiv 1902.08153.
    """
    return _LSQ.apply(x, step, q_min, q_max, gradient_scale)


class _LSQOffset(torch.autograd.Function):
    """Eqs. 1-5 of the LSQ+ paper: LSQ of x - offset, put back; both gradients scaled alike."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, step, offset, levels, gradient_scale):
        step = positive(step)
        return (x - offset).div_(step).round_().clamp_(0, levels).mul_(step).add_(offset)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, step, offset, ctx.levels, ctx.gradient_scale = inputs
        ctx.save_for_backward(x, step, offset, output)

    @staticmethod
    def backward(ctx, grad):
        x, signed_step, offset, x_q = ctx.saved_tensors
        step = positive(signed_step)
        grad_x = inside(grad, (x - offset).div_(step), 0, ctx.levels)
        grad_offset = total(grad - grad_x)  # 1 outside the range, 0 inside
        # as for LSQ, of x - offset and x_q - offset
        times_step = total((grad * x_q).addcmul_(grad_x, x, value=-1)) - offset * grad_offset
        grad_step = times_step / step.copysign(signed_step)
        return grad_x, grad_step * ctx.gradient_scale, grad_offset * ctx.gradient_scale, None, None


def lsq_offset(x: Tensor, step: Tensor, offset: Tensor, levels: int, gradient_scale: float = 1.0) -> Tensor:
    """LSQ with a learned offset: ``clamp(round((x - offset) / step), 0, levels) * step + offset``.

    ``x`` any shape, ``step`` (used as ``positive(step)``) and ``offset`` scalar tensors in units of ``x``. For
    activations with a short negative and a long positive side (SiLU, Swish), where signed levels would waste half the
    range.
    Gradients: as ``lsq``; for ``offset`` 1 outside the range and 0 inside, times ``gradient_scale``.
    Source: LSQ+, Bhalgat et al. 2020, arXiv 2004.09576.
    """
    return _LSQOffset.apply(x, step, offset, levels, gradient_scale)


# torch.fx records a call of these; of what is inside, it would not see the gradients
for _function in (lsq, lsq_offset, activation_gradient_scale):
    fx.wrap(_function.__name__)
