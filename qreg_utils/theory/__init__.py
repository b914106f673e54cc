"""The paper's explanation, measured: the noise of quantization, the penalty that it amounts to, and sharpness."""
