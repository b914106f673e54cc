"""What "float32" and "bfloat16" mean here, on every device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def ieee_float32() -> Iterator[None]:
    """In the block (or the function that it decorates) float32 is IEEE float32 on a GPU too.

    By default cuDNN computes convolutions of float32 tensors in TF32, with 10 bits of mantissa, which is itself a
    rounding. Afterwards everything is as it was.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    # read by the new names, which never fail; set by the old ones, which keep both in step
    before = matmul.fp32_precision == "tf32", cudnn.conv.fp32_precision == "tf32"
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def computing_in(precision: str, device: torch.device) -> torch.autocast:
    """A context in which a network computes in ``precision``, "float32" or "bfloat16" (autocast).

    In bfloat16 parameters stay float32, and so does the quantizers' arithmetic; what they return is rounded to 8 bits
    of mantissa for the convolutions.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
