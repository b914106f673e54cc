"""qreg: an open reproduction of *QReg: On Regularization Effects of Quantization*."""
