"""Quantizers with a part left out: which part is it that regularizes?

Networks that are trained through them are measured in full precision, but clipped where these clip. A part has the
learned scales, their first values and their gradients of its whole quantizer, so that it clips, or rounds, at the scale
of as many bits.
"""

import torch
from torch import Tensor

from qreg_utils.quantizers.base import ActivationQuantizer, WeightQuantizer, positive, round_ste
from qreg_utils.quantizers.dorefa import DoReFaActivation, DoReFaWeight
from qreg_utils.quantizers.lsq import LSQActivation, LSQWeight, scaled_gradient
from qreg_utils.quantizers.pact import PACTActivation


class _Unrounded:
    """LSQ without rounding: clipped at the ends of the learned range.

    ``clamp(x / step, q_min, q_max) * step``; the gradient of the step is q_min or q_max outside of the range (times the
    scale of LSQ's section 2.2) and 0 inside.
    """

    def quantize(self, x: Tensor, q_min: int, q_max: int, gradient_scale: float) -> Tensor:
        step = scaled_gradient(positive(self.step), gradient_scale)
        return (x / step).clamp(q_min, q_max) * step


class _Unclipped:
    """LSQ without clipping: rounded to multiples of the learned step, as many as it takes."""

    def quantize(self, x: Tensor, q_min: int, q_max: int, gradient_scale: float) -> Tensor:
        step = scaled_gradient(positive(self.step), gradient_scale)
        return round_ste(x / step) * step


class _Dithered(_Unrounded):
    """LSQ with random offsets: ``(clamp(round(x / step + u), q_min, q_max) - u) * step``, u uniform from -1/2 to 1/2.

    Subtractive dither (Schuchman 1964; Gray & Stockham 1993): what it adds to a value inside the range is uniform over
    one step, as rounding's error is on many levels, but drawn anew in every step and independent of the value. In
    evaluation mode nothing is added. The gradient is LSQ's.
    """

    def quantize(self, x: Tensor, q_min: int, q_max: int, gradient_scale: float) -> Tensor:
        if not self.training:
            return super().quantize(x, q_min, q_max, gradient_scale)
        step = scaled_gradient(positive(self.step), gradient_scale)
        ratio = x / step
        offset = torch.rand_like(ratio) - 0.5
        rounded = (ratio.detach() + offset).round().clamp(q_min, q_max) - offset
        clipped = ratio.clamp(q_min, q_max)
        return (clipped + (rounded - clipped).detach()) * step


class LSQUnroundedWeight(_Unrounded, LSQWeight):
    """LSQ's range of a weight, not rounded."""


class LSQUnroundedActivation(_Unrounded, LSQActivation):
    """LSQ's range of activations, not rounded."""


class LSQUnclippedWeight(_Unclipped, LSQWeight):
    """LSQ's step of a weight, on as many levels as it takes."""


class LSQUnclippedActivation(_Unclipped, LSQActivation):
    """LSQ's step of activations, on as many levels as it takes."""

    def limits(self) -> tuple[Tensor, Tensor]:
        top = torch.full_like(self.step_size(), torch.inf)
        return -top, top


class LSQDitheredWeight(_Dithered, LSQWeight):
    """LSQ for weights, dithered in training."""


class LSQDitheredActivation(_Dithered, LSQActivation):
    """LSQ for activations, dithered in training."""


class DoReFaUnroundedWeight(DoReFaWeight):
    """DoReFa's weights, squashed and normalised, not rounded. They are clipped nowhere."""

    def forward(self, weight: Tensor) -> Tensor:
        return self.unrounded(weight)


class PACTUnroundedActivation(PACTActivation):
    """Clipped at PACT's learned alpha, not rounded; the gradient of alpha is PACT's."""

    def forward(self, x: Tensor) -> Tensor:
        self.levels()  # an error before calibration
        return _clipped(x, self.range(), self.signed)


class DoReFaUnroundedActivation(DoReFaActivation):
    """Clipped at 1, not rounded."""

    def forward(self, x: Tensor) -> Tensor:
        self.levels()  # an error before calibration
        return _clipped(x, self.alpha, self.signed)


def _clipped(x: Tensor, alpha: Tensor, signed: bool) -> Tensor:
    return torch.minimum(torch.maximum(x, -alpha if signed else torch.zeros_like(alpha)), alpha)


# method -> (weight quantizer, activation quantizer)
PARTS: dict[str, tuple[type[WeightQuantizer], type[ActivationQuantizer]]] = {
    "lsq-unrounded": (LSQUnroundedWeight, LSQUnroundedActivation),
    "lsq-unclipped": (LSQUnclippedWeight, LSQUnclippedActivation),
    "lsq-dithered": (LSQDitheredWeight, LSQDitheredActivation),
    "pact-unrounded": (DoReFaUnroundedWeight, PACTUnroundedActivation),
    "dorefa-unrounded": (DoReFaUnroundedWeight, DoReFaUnroundedActivation),
}
