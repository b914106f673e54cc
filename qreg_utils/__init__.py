"""qreg: an open reproduction of *QReg: On Regularization Effects of Quantization*."""

from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent  # the checkout: where data/ and results/ are
