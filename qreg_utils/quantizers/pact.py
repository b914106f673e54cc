"""PACT (Choi et al. 2018, arXiv 1805.06085): activations clipped at a learned alpha."""

import torch
from torch import Tensor, fx, nn

from qreg_utils.quantizers.base import ActivationQuantizer, inside, positive, round_ste, total


def clipped_uniform_formula(x: Tensor, alpha: Tensor, levels: int, signed: bool = False) -> Tensor:
    """Clip to [0, alpha] (or [-alpha, alpha]), then round to ``levels`` steps, as the paper writes it down.

    The clipped value is differentiated in ``x`` and ``alpha``; rounding is straight through, with its scale held fixed.
    ``clipped_uniform`` is the same, faster. Source: PACT, arXiv 1805.06085, Eqs. 1-3.
    """
    clipped = torch.minimum(torch.maximum(x, -alpha if signed else torch.zeros_like(alpha)), alpha)
    step = alpha.detach() / levels
    return round_ste(clipped / step) * step


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

    def penalised_scales(self) -> list[nn.Parameter]:
        """Section 3.1 of the paper: alpha shrinks unless the loss needs it."""
        return [self.alpha]

    def step_size(self) -> Tensor:
        return self.range() / self.levels()

    def forward(self, x: Tensor) -> Tensor:
        return clipped_uniform(x, self.range(), self.levels(), self.signed)


# --- the same, faster -------------------------------------------------------------------------------------------------


class _ClippedUniform(torch.autograd.Function):
    """Eqs. 1-3 of the PACT paper, extended to signed inputs by symmetry."""

    generate_vmap_rule = True

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
        grad_x = inside(grad, ratio, ctx.low, 1)
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None
        # d x_q / d alpha: 1 at and above alpha, -1 at and below -alpha for signed inputs, 0 elsewhere
        grad_alpha = (grad - grad_x).mul_(ratio.clamp_(ctx.low, 1))
        return grad_x, total(grad_alpha), None, None


def clipped_uniform(x: Tensor, alpha: Tensor, levels: int, signed: bool = False) -> Tensor:
    """Clip to [0, alpha] (or [-alpha, alpha]), then round to ``levels`` equal steps between 0 and alpha.

    ``x`` any shape, ``alpha`` a positive scalar tensor in units of ``x``. Gradients: straight through for ``x``
    inside the range; for ``alpha`` 1 where ``x >= alpha`` (and -1 where ``x <= -alpha``), 0 elsewhere.
    Source: PACT, Choi et al. 2018, arXiv 1805.06085, Eqs. 1-3. With alpha = 1 it is DoReFa's activation.
    """
    return _ClippedUniform.apply(x, alpha, levels, signed)


# torch.fx records a call of these; of what is inside, it would not see the gradients
fx.wrap("clipped_uniform")
fx.wrap("positive")
