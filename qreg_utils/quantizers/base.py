"""What all quantizers share: the classes to derive from, and the arithmetic that keeps them fast."""

import json

import torch
from torch import Tensor, nn

EPSILON = 1e-8
FULL_PRECISION_BITS = 32
DEAD = 1e-6  # a step that is no larger is not used any more: healthy ones are a thousand times as large


class QuantizationError(ValueError):
    """A model cannot be quantized as asked, or is not quantized where it must be."""


def smallest_scale(dtype: torch.dtype) -> float:
    """The floor of scales of this type: EPSILON; in half precision, where that is 0, its smallest normal number."""
    return max(EPSILON, torch.finfo(dtype).tiny)


def positive(scale: Tensor) -> Tensor:
    """A learned scale as it is used, ``max(|scale|, smallest_scale)``: positive whatever the optimizer does to it."""
    return scale.abs().clamp_min(smallest_scale(scale.dtype))


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
    """A tensor in, the same shape with at most 2^bits different values out. Its parameters are learned scales.

    Its method and its bits travel in the state_dict: scales are not loaded into a quantizer of another kind.
    """

    method: str | None = None  # "lsq", ...: set by quantize_model

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

    @torch.no_grad()
    def is_dead(self) -> bool:
        """Whether the step is at its floor or not finite: rounded to such levels, everything is clipped."""
        step = self.step_size()
        return not ((step > max(DEAD, smallest_scale(step.dtype))).any() and step.isfinite().all())

    def extra_repr(self) -> str:
        return f"bits={self.bits}"

    def description(self) -> dict[str, str | int | bool | None]:
        """What must be the same where the scales are loaded; plain values."""
        return {"method": self.method, "bits": int(self.bits)}

    def get_extra_state(self) -> Tensor:
        return _as_tensor(self.description())

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to set: a state that differs is refused."""

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        """Called by ``load_state_dict``, which raises RuntimeError with what is added to ``error_msgs``."""
        here = any(key.startswith(prefix) for key in state_dict)
        if here and (differences := self._differences(state_dict, prefix)):
            error_msgs.append(f"{prefix.removesuffix('.') or 'quantizer'}: the state has {', '.join(differences)}")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _differences(self, state_dict: dict[str, Tensor], prefix: str) -> list[str]:
        """How the quantizer that the state was saved from differs from this one."""
        saved, ours = _as_dict(state_dict.get(f"{prefix}_extra_state")), self.description()
        if not saved:
            return ["neither method nor bits (another version saved it)"]
        return [f"{key} {saved.get(key)}, not {value}" for key, value in ours.items() if saved.get(key) != value]


def _as_tensor(values: dict) -> Tensor:
    """JSON in bytes: others expect nothing but tensors in a state_dict."""
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def _as_dict(state: Tensor | None) -> dict:
    """What ``_as_tensor`` made ``state`` of; empty if it was something else."""
    try:
        values = json.loads(bytes(state.tolist()))
    except (AttributeError, TypeError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


class WeightQuantizer(Quantizer):
    """Of a layer's weight, which its first dimension counts the channels of; made with the weight as it is at first."""

    per_channel = False  # whether each channel has 2^bits values of its own
    used = False  # whether its layer has computed; kept where no activation quantizer's calibration says it
    bypassed = False  # whether ``calibrate`` has found that something else reads the weight, unquantized

    def __init__(self, bits: int, weight: Tensor):
        super().__init__(bits)

    def unrounded(self, weight: Tensor) -> Tensor:
        """What is rounded, in the weight's shape: the weight itself, unless the method transforms it first. Noise is
        measured against it, on its scale."""
        return weight

    def get_extra_state(self) -> Tensor:
        return _as_tensor(self.description() | {"used": self.used and not self.bypassed})

    def set_extra_state(self, state: Tensor) -> None:
        self.used = bool(_as_dict(state).get("used"))


class FullPrecisionWeight(WeightQuantizer):
    """Of a layer whose activations alone are quantized: the weight as it is."""

    method = "none"

    def __init__(self):
        nn.Module.__init__(self)
        self.bits = FULL_PRECISION_BITS

    def step_size(self) -> Tensor:
        """There are no levels."""
        return torch.tensor(torch.nan)

    def is_dead(self) -> bool:
        return False

    def forward(self, weight: Tensor) -> Tensor:
        return weight


UNKNOWN = -1  # the sign before calibration


class ActivationQuantizer(Quantizer):
    """Learns from its first batch whether its input is ever negative; ``calibrate`` must see one before use.

    The sign is in a buffer, which load_state_dict and DistributedDataParallel write to.
    """

    sample_dims = 1  # dimensions of one sample; a batch of them has at least one more. Set by the layer: 3 for images

    def __init__(self, bits: int):
        super().__init__(bits)
        self.register_buffer("sign", torch.tensor(UNKNOWN, dtype=torch.int8))  # 1: signed, 0: unsigned
        self._read: tuple[Tensor | None, int | None] = (None, None)  # the buffer that was read last, and its version
        self._signed: bool | None = None

    @property
    def signed(self) -> bool | None:
        """Whether there are levels below zero; None until calibrated. A plain value, so that torch.compile sees a
        constant, and a GPU is not waited for."""
        self._read_sign()
        return self._signed

    @signed.setter
    def signed(self, signed: bool | None) -> None:
        self.sign.fill_(UNKNOWN if signed is None else signed)

    def _read_sign(self) -> None:
        """Read the buffer when it has changed."""
        sign = self.sign
        if type(sign) is not Tensor or sign.is_meta:  # it has no value, as while torch.export traces
            return
        version = None if sign.is_inference() else sign._version
        if version is None or sign is not self._read[0] or version != self._read[1]:
            try:
                value = sign.item()
            except RuntimeError as error:  # of vmap, which has one for each member of an ensemble
                raise RuntimeError("the buffer 'sign' of an activation quantizer has no single value here") from error
            self._signed, self._read = None if value == UNKNOWN else bool(value), (sign, version)

    # as torch.compiler.assume_constant_result does, which takes seconds to import: torch.compile calls it, while it
    # traces, and then sees ``_signed``
    _read_sign._dynamo_marked_constant = True

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set sign and scale from a batch ``x`` of shape (N, ...).

        Raises QuantizationError for a batch that is empty, not finite or all zero, or that gives no usable step.
        """
        if not x.numel():
            raise QuantizationError("the calibration batch is empty")
        if not x.isfinite().all():
            raise QuantizationError("the calibration batch has values that are not finite")
        if not x.any():
            raise QuantizationError("the calibration batch is all zero")
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # squares overflow in half precision
        self.signed = bool(x.min() < 0)
        self.initialise(x)
        if self.is_dead():
            raise QuantizationError(f"the calibration batch gives no usable step: {self.step_size().max().item():.3g}")

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

    def set_extra_state(self, state: Tensor) -> None:
        self._read_sign()  # has been loaded before

    def _differences(self, state_dict: dict[str, Tensor], prefix: str) -> list[str]:
        differences, theirs = super()._differences(state_dict, prefix), state_dict.get(f"{prefix}sign")
        if self.signed is not None and theirs is not None and theirs.item() == (not self.signed):
            levels = ("signed", "unsigned") if theirs else ("unsigned", "signed")
            differences.append("{} levels, and this model was calibrated to {} ones".format(*levels))
        return differences
