"""DoReFa (Zhou et al. 2016, arXiv 1606.06160): weights through tanh, activations clipped to [0, 1]."""

import torch
from torch import Tensor, fx

from qreg_utils.quantizers.base import ActivationQuantizer, WeightQuantizer, positive, round_ste
from qreg_utils.quantizers.pact import clipped_uniform


def dorefa_unrounded(weight: Tensor) -> Tensor:
    """What DoReFa rounds: ``tanh(w) / max|tanh(w)|``, in [-1, 1]. Source: arXiv 1606.06160, Eq. 9."""
    squashed = weight.tanh()
    every = tuple(range(weight.dim()))  # ONNX has no maximum without dimensions
    return squashed / positive(squashed.abs().amax(every))


def dorefa_weight(weight: Tensor, bits: int) -> Tensor:
    """DoReFa's k-bit weights: ``2 * quantize_k(unrounded / 2 + 1/2) - 1``, 2^k levels in [-1, 1].

    The gradient is straight through the rounding and exact through tanh and the maximum.
    Source: Zhou et al. 2016, arXiv 1606.06160, Eqs. 5, 6 and 9.
    """
    levels = 2**bits - 1
    return 2 * round_ste((dorefa_unrounded(weight) / 2 + 0.5) * levels) / levels - 1


class DoReFaWeight(WeightQuantizer):
    """DoReFa for weights, also used by PACT. Nothing is learned."""

    def step_size(self) -> Tensor:
        return torch.tensor(2 / (2**self.bits - 1))

    def unrounded(self, weight: Tensor) -> Tensor:
        """The squashed, normalised weight."""
        return dorefa_unrounded(weight)

    def forward(self, weight: Tensor) -> Tensor:
        return dorefa_weight(weight, self.bits)


class DoReFaActivation(ActivationQuantizer):
    """DoReFa: clipped to [0, 1] as in the paper; a signed input at the calibration batch's largest absolute value."""

    def __init__(self, bits: int):
        super().__init__(bits)
        self.register_buffer("alpha", torch.ones(()))

    def initialise(self, x: Tensor) -> None:
        self.alpha.fill_(x.abs().amax() if self.signed else 1)

    def step_size(self) -> Tensor:
        return self.alpha / self.levels()

    def forward(self, x: Tensor) -> Tensor:
        return clipped_uniform(x, self.alpha, self.levels(), self.signed)


# torch.fx records a call of these; of what is inside, it would not see the gradients
fx.wrap("clipped_uniform")
fx.wrap("dorefa_weight")
