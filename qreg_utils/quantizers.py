"""LSQ, PACT and DoReFa: how a tensor is rounded to 2^k levels, and what its gradient is said to be.

Each method is a pure function with its paper's formula (forward and backward), and a small module that
holds what the function needs: a bit width, perhaps a learned scale. Everything is per tensor, as in the papers.

==========  ===========================================  ==========================================
method      weights                                      activations
==========  ===========================================  ==========================================
``lsq``     learned step (arXiv 1902.08153)              learned step
``pact``    as DoReFa                                    clipped at a learned alpha (1805.06085)
``dorefa``  tanh, normalised to [-1, 1] (1606.06160)     clipped to [0, 1]
==========  ===========================================  ==========================================

The papers assume activations that are never negative (they follow a ReLU). Where the calibration batch shows
negative values, as at the network's input, all three quantizers become signed instead of clipping them away; for
networks with SiLU, LSQ can learn an offset instead (LSQ+).
"""

import torch
from torch import Tensor, nn

EPSILON = 1e-8


def positive(scale: Tensor) -> Tensor:
    """A learned scale as it is used, ``max(|scale|, EPSILON)``: positive whatever the optimizer does to it."""
    return scale.abs().clamp_min(EPSILON)


def _inside(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """``grad`` where low < x < high, 0 elsewhere, without a boolean mask: those are slow on a CPU.

    Eager, it is one pass. Compiled, it is arithmetic, which is fused; a mask would be stored for the backward pass.
    """
    if torch.compiler.is_compiling():
        return grad * torch.minimum(x - low, high - x).sign().clamp_min(0)
    return torch.ops.aten.hardtanh_backward(grad, x, low, high)


def _total(x: Tensor) -> Tensor:
    """The sum of ``x``; compiled, of images channel by channel, which can be fused with batch norm's own sums."""
    by_channel = x.dim() == 4 and torch.compiler.is_compiling()
    return x.sum((0, 2, 3)).sum() if by_channel else x.sum()


class _LSQ(torch.autograd.Function):
    """Eqs. 1-3 and 5 of the LSQ paper; the gradient of the step is scaled as in its section 2.2."""

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
        grad_x = _inside(grad, ratio, ctx.q_min, ctx.q_max)
        if x_q is None:
            x_q = ratio.round().clamp_(ctx.q_min, ctx.q_max).mul_(step)
        # d x_q / d step: round(x/s) - x/s inside the range, -Q_N or Q_P outside; first, times the step
        grad_step = _total((grad * x_q).addcmul_(grad_x, x, value=-1)) / step.copysign(signed_step)
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
        grad_x = _inside(grad, (x - offset).div_(step), 0, ctx.levels)
        grad_offset = _total(grad - grad_x)  # 1 outside the range, 0 inside
        # as for LSQ, of x - offset and x_q - offset
        times_step = _total((grad * x_q).addcmul_(grad_x, x, value=-1)) - offset * grad_offset
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


class _ClippedUniform(torch.autograd.Function):
    """Eqs. 1-3 of the PACT paper, extended to signed inputs by symmetry."""

    @staticmethod
    def forward(x, alpha, levels, signed):
        return (x / alpha).clamp_(-1 if signed else 0, 1).mul_(levels).round_().mul_(alpha / levels)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, alpha, _, signed = inputs
        ctx.low = -1 if signed else 0
        ctx.save_for_backward(x, alpha)

    @staticmethod
    def backward(ctx, grad):
        x, alpha = ctx.saved_tensors
        ratio = x / alpha
        grad_x = _inside(grad, ratio, ctx.low, 1)
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None
        # d x_q / d alpha: 1 at and above alpha, -1 at and below -alpha for signed inputs, 0 elsewhere
        grad_alpha = ratio.clamp_(ctx.low, 1).mul_(grad - grad_x)
        return grad_x, _total(grad_alpha), None, None


def clipped_uniform(x: Tensor, alpha: Tensor, levels: int, signed: bool = False) -> Tensor:
    """Clip to [0, alpha] (or [-alpha, alpha]), then round to ``levels`` equal steps between 0 and alpha.

    ``x`` any shape, ``alpha`` a positive scalar tensor in units of ``x``. Gradients: straight through for ``x``
    inside the range; for ``alpha`` 1 where ``x >= alpha`` (and -1 where ``x <= -alpha``), 0 elsewhere.
    Source: PACT, Choi et al. 2018, arXiv 1805.06085, Eqs. 1-3. With alpha = 1 it is DoReFa's activation.
    """
    return _ClippedUniform.apply(x, alpha, levels, signed)


def round_ste(x: Tensor) -> Tensor:
    """Round to nearest; the gradient passes straight through (Bengio et al. 2013, arXiv 1308.3432)."""
    return x + (x.round() - x).detach()


def dorefa_target(weight: Tensor) -> Tensor:
    """What DoReFa rounds: ``tanh(w) / max|tanh(w)|``, in [-1, 1]. Source: arXiv 1606.06160, Eq. 9."""
    squashed = weight.tanh()
    return squashed / squashed.abs().amax().clamp_min(EPSILON)


def dorefa_weight(weight: Tensor, bits: int) -> Tensor:
    """DoReFa's k-bit weights: ``2 * quantize_k(target / 2 + 1/2) - 1``, 2^k levels in [-1, 1].

    The gradient is straight through the rounding and exact through tanh and the maximum.
    Source: Zhou et al. 2016, arXiv 1606.06160, Eqs. 5, 6 and 9.
    """
    levels = 2**bits - 1
    return 2 * round_ste((dorefa_target(weight) / 2 + 0.5) * levels) / levels - 1


class Quantizer(nn.Module):
    """A tensor in, the same shape with at most 2^bits different values out."""

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def step_size(self) -> Tensor:
        """Distance between neighbouring levels, a positive scalar, on the quantizer's own scale."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class LSQWeight(Quantizer):
    """LSQ for weights: signed, levels -2^(k-1) .. 2^(k-1)-1 times a learned step, 2 mean|w| / sqrt(Q_P) at first."""

    def __init__(self, bits: int, weight: Tensor):
        super().__init__(bits)
        self.q_min, self.q_max = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.gradient_scale = (weight.numel() * self.q_max) ** -0.5
        self.step = nn.Parameter(lsq_initial_step(weight, self.q_max))

    def step_size(self) -> Tensor:
        return positive(self.step)

    def target(self, weight: Tensor) -> Tensor:
        """The full-precision weight that quantization replaces."""
        return weight

    def forward(self, weight: Tensor) -> Tensor:
        return lsq(weight, self.step, self.q_min, self.q_max, self.gradient_scale)


class DoReFaWeight(Quantizer):
    """DoReFa for weights, also used by PACT. Nothing is learned; ``weight`` is taken for a common signature."""

    def __init__(self, bits: int, weight: Tensor):
        super().__init__(bits)

    def step_size(self) -> Tensor:
        return torch.tensor(2 / (2**self.bits - 1))

    def target(self, weight: Tensor) -> Tensor:
        """What is rounded: the squashed, normalised weight. Noise is measured against it, on this scale."""
        return dorefa_target(weight)

    def forward(self, weight: Tensor) -> Tensor:
        return dorefa_weight(weight, self.bits)


class ActivationQuantizer(Quantizer):
    """Learns from its first batch whether its input is ever negative; ``calibrate`` must see one before use.

    The sign is a plain Python value, so that torch.compile sees a constant; it travels in the state_dict.
    """

    def __init__(self, bits: int):
        super().__init__(bits)
        self.signed: bool | None = None  # None until calibrated

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set sign and scale from a batch ``x`` of shape (N, ...)."""
        self.signed = bool(x.min() < 0)
        self.initialise(x)

    def initialise(self, x: Tensor) -> None:
        raise NotImplementedError

    def levels(self) -> int:
        """Steps between zero and the upper end of the range."""
        if self.signed is None:
            raise RuntimeError("activation quantizer is not calibrated: call calibrate(model, images) first")
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    def limits(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value that it can return, scalars in units of its input."""
        top = self.levels() * self.step_size()
        return (-top if self.signed else torch.zeros_like(top)), top

    def get_extra_state(self) -> Tensor:
        return torch.tensor(-1 if self.signed is None else int(self.signed))

    def set_extra_state(self, state: Tensor) -> None:
        self.signed = None if state < 0 else bool(state)


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
        scale = (x.numel() // len(x) * q_max) ** -0.5
        if self.offset is not None:
            return lsq_offset(x, self.step, self.offset, q_max, scale)
        q_min = -q_max - 1 if self.signed else 0
        return lsq(x, self.step, q_min, q_max, scale)


class PACTActivation(ActivationQuantizer):
    """PACT: clipped at a learned alpha, which has an L2 penalty of its own (see ``training.fit``).

    The paper starts from a fixed, large alpha and shrinks it over many epochs; we start from the calibration
    batch, at 4 root mean squares, so that short runs begin with a sensible range too.
    """

    def __init__(self, bits: int):
        super().__init__(bits)
        self.alpha = nn.Parameter(torch.ones(()))

    def initialise(self, x: Tensor) -> None:
        self.alpha.copy_(4 * x.square().mean().sqrt())

    def range(self) -> Tensor:
        return positive(self.alpha)

    def step_size(self) -> Tensor:
        return self.range() / self.levels()

    def forward(self, x: Tensor) -> Tensor:
        return clipped_uniform(x, self.range(), self.levels(), self.signed)


class DoReFaActivation(ActivationQuantizer):
    """DoReFa: clipped to [0, 1] as in the paper; a signed input is clipped at the calibration batch's largest |x|."""

    def __init__(self, bits: int):
        super().__init__(bits)
        self.register_buffer("alpha", torch.ones(()))

    def initialise(self, x: Tensor) -> None:
        if self.signed:
            self.alpha.copy_(x.abs().amax())

    def step_size(self) -> Tensor:
        return self.alpha / self.levels()

    def forward(self, x: Tensor) -> Tensor:
        return clipped_uniform(x, self.alpha, self.levels(), self.signed)


def lsq_initial_step(x: Tensor, q_max: int) -> Tensor:
    """``2 mean|x| / sqrt(Q_P)``, a positive scalar. Source: LSQ, section 2.1."""
    return (2 * x.detach().abs().mean() / q_max**0.5).clamp_min(EPSILON)


# method -> (weight quantizer, activation quantizer)
METHODS = {
    "lsq": (LSQWeight, LSQActivation),
    "pact": (DoReFaWeight, PACTActivation),
    "dorefa": (DoReFaWeight, DoReFaActivation),
}
