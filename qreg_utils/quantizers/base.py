"""What all quantizers share: the classes to derive from, and the arithmetic that keeps them fast."""

import torch
from torch import Tensor, nn

EPSILON = 1e-8


def positive(scale: Tensor) -> Tensor:
    """A learned scale as it is used, ``max(|scale|, EPSILON)``: positive whatever the optimizer does to it."""
    return scale.abs().clamp_min(EPSILON)


def inside(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """``grad`` where low < x < high, 0 elsewhere, without a boolean mask: those are slow on a CPU.

    Eager, it is one pass. Compiled, it is arithmetic, which is fused; a mask would be stored for the backward pass.
    """
    if torch.compiler.is_compiling():
        return grad * torch.minimum(x - low, high - x).sign().clamp_min(0)
    return torch.ops.aten.hardtanh_backward(grad, x, low, high)


def total(x: Tensor) -> Tensor:
    """The sum of ``x``; compiled, of images channel by channel, which can be fused with batch norm's own sums."""
    by_channel = x.dim() == 4 and torch.compiler.is_compiling()
    return x.sum((0, 2, 3)).sum() if by_channel else x.sum()


def round_ste(x: Tensor) -> Tensor:
    """Round to nearest; the gradient passes straight through (Bengio et al. 2013, arXiv 1308.3432)."""
    return x + (x.round() - x).detach()


class Quantizer(nn.Module):
    """A tensor in, the same shape with at most 2^bits different values out. Its parameters are learned scales."""

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def step_size(self) -> Tensor:
        """Distance between neighbouring levels, positive, on the quantizer's own scale: a scalar, or (channels, 1, ...)
        where each channel has its own."""
        raise NotImplementedError

    def penalised_scales(self) -> list[nn.Parameter]:
        """The learned scales that have an L2 penalty of their own (``alpha_decay``): PACT's alphas."""
        return []

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class WeightQuantizer(Quantizer):
    """Of a layer's weight, which its first dimension counts the channels of; made with the weight as it is at first."""

    per_channel = False  # whether each channel has 2^bits values of its own

    def __init__(self, bits: int, weight: Tensor):
        super().__init__(bits)

    def unrounded(self, weight: Tensor) -> Tensor:
        """What is rounded, in the weight's shape: the weight itself, unless the method transforms it first. Noise is
        measured against it, on its scale."""
        return weight


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
        """Set the scale from the calibration batch."""
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
