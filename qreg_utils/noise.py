"""Quantization noise: what a weight quantizer adds to the weights, layer by layer."""

import torch
from torch import nn

from qreg_utils.quantize import quantized_layers


@torch.no_grad()
def weight_noise(model: nn.Module) -> list[dict]:
    """One row for each quantized layer: sigma of w_q - w, its mean, the step, and the weights' own deviation.

    All are on the quantizer's scale: DoReFa and PACT round a squashed, normalised weight, so theirs is measured
    against that. Empty for a full-precision model.
    """
    rows = []
    for name, layer in quantized_layers(model):
        quantizer = layer.weight_quantizer
        target = quantizer.target(layer.weight)
        noise = layer.quantized_weight() - target
        rows.append(
            {
                "layer": name,
                "bits": quantizer.bits,
                "weights": layer.weight.numel(),
                "sigma": noise.std(correction=0).item(),
                "mean": noise.mean().item(),
                "step": quantizer.step_size().item(),
                "weight_sigma": target.std(correction=0).item(),
            }
        )
    return rows


def overall_noise(rows: list[dict]) -> float:
    """Noise relative to the weights, sigma / weight_sigma, averaged over layers by number of weights; 0 for FP32."""
    weights = sum(row["weights"] for row in rows)
    return sum(row["sigma"] / row["weight_sigma"] * row["weights"] for row in rows) / weights if rows else 0.0
