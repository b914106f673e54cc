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
from torch import Tensor

from qreg_utils.names import METHODS, QUANTIZER, Method, NamesError
from qreg_utils.quantizers.base import (
    ActivationQuantizer,
    FullPrecisionWeight,
    QuantizationError,
    Quantizer,
    WeightQuantizer,
    positive,
    round_ste,
)
from qreg_utils.quantizers.dorefa import DoReFaActivation, DoReFaWeight, dorefa_unrounded, dorefa_weight
from qreg_utils.quantizers.layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear
from qreg_utils.quantizers.lsq import LSQActivation, LSQWeight, lsq, lsq_initial_step, lsq_offset
from qreg_utils.quantizers.pact import PACTActivation, clipped_uniform
from qreg_utils.quantizers.parts import PARTS

__all__ = [
    "QUANTIZERS",
    "ActivationQuantizer",
    "DoReFaActivation",
    "DoReFaWeight",
    "FullPrecisionWeight",
    "LSQActivation",
    "LSQWeight",
    "PACTActivation",
    "QuantizationError",
    "QuantizedConv2d",
    "QuantizedLayer",
    "QuantizedLinear",
    "Quantizer",
    "WeightQuantizer",
    "clipped_uniform",
    "dorefa_unrounded",
    "dorefa_weight",
    "lsq",
    "lsq_initial_step",
    "lsq_offset",
    "positive",
    "register_quantizer",
    "round_ste",
]

# method -> (weight quantizer, activation quantizer)
QUANTIZERS: dict[str, tuple[type[WeightQuantizer], type[ActivationQuantizer]]] = {
    "lsq": (LSQWeight, LSQActivation),
    "pact": (DoReFaWeight, PACTActivation),
    "dorefa": (DoReFaWeight, DoReFaActivation),
    **PARTS,
}


def register_quantizer(
    row: Method, *, weight: type[WeightQuantizer] | None = None, activation: type[ActivationQuantizer] | None = None
) -> None:
    """Make a quantizer known by the name in ``row``, to ``quantize_model`` and to params files.

    Both classes are tried out on random numbers at 2, 4 and 8 bits first. Raises NamesError, in one line, for a piece
    that is missing, a name that is taken, or more than 2^bits values.
    """
    if row.kind != QUANTIZER:
        raise row.error(f"kind {row.kind!r} is not allowed: a quantizer")
    for piece, value, base in (("weight", weight, WeightQuantizer), ("activation", activation, ActivationQuantizer)):
        if not (isinstance(value, type) and issubclass(value, base)):
            given = "is missing" if value is None else f"{value!r} is not allowed"
            raise row.error(f"{piece} {given}: a class derived from {base.__name__}")
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(8, 6, 5, 5, generator=generator)
    for bits in (2, 4, 8):
        _try_weight_quantizer(row, weight, bits, sample)
        for signed in (False, True):
            _try_activation_quantizer(row, activation, bits, sample if signed else sample.relu())
    METHODS.add(row)
    QUANTIZERS[row.name] = (weight, activation)


def _try_weight_quantizer(row: Method, kind: type[WeightQuantizer], bits: int, sample: Tensor) -> None:
    latent = sample.clone().requires_grad_()
    try:
        quantizer = kind(bits, latent)
        rounded, unrounded, step = quantizer(latent), quantizer.unrounded(latent), quantizer.step_size()
        (gradient,) = torch.autograd.grad(rounded.sum(), latent, allow_unused=True)
    except Exception as error:  # it is somebody's code
        raise _failed(row, kind, bits, error) from error
    _check_values(row, kind, bits, rounded, sample, quantizer.per_channel)
    if unrounded.shape != sample.shape:
        raise row.error(f"{kind.__name__}.unrounded returns shape {tuple(unrounded.shape)}, not the weight's")
    if not (step > 0).all() or torch.broadcast_shapes(step.shape, sample.shape) != sample.shape:
        raise row.error(f"{kind.__name__}.step_size must be positive, and a scalar or (channels, 1, ...)")
    if gradient is None or not gradient.any():
        raise row.error(f"{kind.__name__} lets no gradient through to the weight: see round_ste")


def _try_activation_quantizer(row: Method, kind: type[ActivationQuantizer], bits: int, sample: Tensor) -> None:
    try:
        quantizer = kind(bits)
        quantizer.calibrate(sample)
        rounded, (low, high) = quantizer(sample), quantizer.limits()
    except Exception as error:  # it is somebody's code
        raise _failed(row, kind, bits, error) from error
    _check_values(row, kind, bits, rounded, sample, per_channel=False)
    if not float(low) < float(high):
        raise row.error(f"{kind.__name__}.limits returns {float(low):g} and {float(high):g}: the smaller one first")


def _failed(row: Method, kind: type[Quantizer], bits: int, error: Exception) -> NamesError:
    return row.error(f"{kind.__name__} fails at {bits} bits: {type(error).__name__}: {' '.join(str(error).split())}")


def _check_values(
    row: Method, kind: type[Quantizer], bits: int, rounded: Tensor, sample: Tensor, per_channel: bool
) -> None:
    if rounded.shape != sample.shape:
        raise row.error(f"{kind.__name__} returns shape {tuple(rounded.shape)}, not that of its input")
    if not rounded.isfinite().all():
        raise row.error(f"{kind.__name__} returns values that are not finite at {bits} bits")
    values = max(part.unique().numel() for part in (rounded if per_channel else [rounded]))
    if values > 2**bits:
        where = "in one channel" if per_channel else "in a tensor"
        raise row.error(f"{kind.__name__} returns {values} values {where}; {bits} bits allow {2**bits}")
