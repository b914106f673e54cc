"""Is the gain one curve over the size of the noise on the weights, whatever makes that noise?

Of settings with quantized weights alone. Training noise at several sizes draws the curve; a quantizer's gain over
itself without rounding (full precision, where a study has no such setting) is compared with it at the same size.
No torch.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from qreg_utils.image_chance import of_a_difference
from qreg_utils.metrics import PAIRED, relative_noise
from qreg_utils.names import METHODS, PART, QUANTIZER, kind_of

NOISE = "gaussian-noise"


def points(improvement: pd.DataFrame, noise: pd.DataFrame) -> pd.DataFrame:
    """One row for each seed of a setting with noise on its weights alone: ``relative``, the noise's standard deviation
    over the weights' after the last epoch, and ``gain``.

    ``improvement`` has the columns of ``metrics.improvement_by_seed``, ``noise`` is the content of noise.csv. Training
    noise has the size of its source, a quantizer at the same widths.
    """
    alone = improvement[(improvement["activation_bits"] == 32) & (improvement["weight_bits"] < 32)]
    kinds = alone["method"].map(kind_of)
    noisy = alone[kinds.eq(QUANTIZER) | alone["method"].eq(NOISE)]
    if noisy.empty or noise.empty:
        return noisy.iloc[:0].assign(relative=0.0, gain=0.0)
    noisy = noisy.assign(source=noisy["method"].replace({NOISE: METHODS[NOISE].noise_source}))
    sizes = relative_noise(noise).rename(columns={"method": "source"})
    found = noisy.merge(sizes, on=[*PAIRED, "source", "weight_bits", "activation_bits"])
    return _minus_unrounded(found, alone[kinds.eq(PART)])


def _minus_unrounded(noisy: pd.DataFrame, parts: pd.DataFrame) -> pd.DataFrame:
    """With ``gain``: the improvement, minus that of the method's own unrounded part, of which there is one width or
    the very width."""
    origins = parts[parts["method"].str.endswith("-unrounded")]
    rows = []
    for (method, width), own in noisy.groupby(["method", "weight_bits"]):
        origin = origins[origins["method"] == f"{method}-unrounded"]
        if len(origin["weight_bits"].unique()) > 1:
            origin = origin[origin["weight_bits"] == width]
        if origin.empty:
            rows.append(own.assign(gain=own["improvement"]))
            continue
        columns = [*PAIRED, *{"improvement", "image_variance"}.intersection(origin)]
        both = of_a_difference(own.merge(origin[columns], on=PAIRED, suffixes=("", "_origin")), "_origin")
        rows.append(both.assign(gain=both["improvement"] - both["improvement_origin"]))
    return pd.concat(rows, ignore_index=True)


def off_the_curve(points: pd.DataFrame) -> pd.DataFrame:
    """One row for each seed of a quantizer that is not itself the source of the training noise: ``value`` is its gain
    minus that of training noise of the same relative size.

    The curve is that of the same seed, with straight lines between its sizes on a logarithmic scale; outside of them
    nothing is compared.
    """
    found = [row for _, network in points.groupby(PAIRED, sort=False) for row in _off_the_curve(network)]
    return pd.concat(found, ignore_index=True) if found else points.iloc[:0].assign(value=0.0)


def _off_the_curve(network: pd.DataFrame) -> Iterator[pd.DataFrame]:
    curve = network[network["method"] == NOISE].sort_values("relative")
    others = network[~network["method"].isin([NOISE, METHODS[NOISE].noise_source])]
    if len(curve) < 2:
        return
    others = others[others["relative"].between(curve["relative"].min(), curve["relative"].max())]
    at, sizes = np.log(others["relative"]), np.log(curve["relative"])
    value = others["gain"] - np.interp(at, sizes, curve["gain"])
    if "image_variance" in others:
        others = others.assign(image_variance_curve=np.interp(at, sizes, curve["image_variance"]))
    yield of_a_difference(others.assign(value=value), "_curve")
