"""A sharper interval from few seeds: the spread that all settings of a network share, pooled. No torch.

With ``y_sj`` the logarithm of the error of seed s in setting j, FP32 among them, the additive model of a randomized
block design is ``y_sj = mean + seed_s + setting_j + e_sj``: a seed's choice of images is good or bad for all settings,
and what is left has one variance (Fisher 1935; Montgomery, *Design and Analysis of Experiments*). A difference of two
settings over S seeds has the variance ``2 var(e) / S``, with the residual's degrees of freedom in place of S - 1.
"""

import numpy as np
import pandas as pd

from qreg_utils.metrics import COMPARED_WITHIN, SETTING


def with_pooled_variance(improvement: pd.DataFrame) -> pd.DataFrame:
    """``improvement`` with ``pooled_variance``, of the difference of two settings of one seed, and ``pooled_df``, for
    each data set, model and variant; NaN and 0 where fewer than two settings and two seeds leave no residual.

    FP32, whose improvement is 0, is among the settings: subtracting FP32 from a seed's settings changes no residual.
    """
    found = improvement.dropna(subset=["improvement"])
    rows = [(*key, *_residual(own)) for key, own in found.groupby(COMPARED_WITHIN)]
    pooled = pd.DataFrame(rows, columns=[*COMPARED_WITHIN, "pooled_variance", "pooled_df"])
    return improvement.merge(pooled, on=COMPARED_WITHIN, how="left")


def _residual(table: pd.DataFrame) -> tuple[float, int]:
    """Twice the variance of the residuals of ``seed + setting``, by least squares, and their degrees of freedom."""
    seeds, settings = pd.factorize(table["seed"])[0], table.groupby(SETTING).ngroup().to_numpy()
    design = np.hstack([np.eye(seeds.max() + 1)[seeds], np.eye(settings.max() + 1)[settings]])
    y = table["improvement"].to_numpy(dtype=float)
    solution, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    df = len(y) - rank
    return (2 * np.square(y - design @ solution).sum() / df, df) if df > 0 else (np.nan, 0)
