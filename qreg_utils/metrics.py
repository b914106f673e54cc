"""From accuracies to the paper's numbers: relative error improvement, averages over corruptions, intervals."""

import math

import numpy as np
import pandas as pd

CONFIGURATION = ["dataset", "model", "method", "weight_bits", "activation_bits"]
METHOD_LABELS = {  # in reading order
    "fp32": "FP32",
    "lsq": "LSQ",
    "pact": "PACT",
    "dorefa": "DoReFa",
    "gaussian-noise": "Gaussian noise",
    "gradient-penalty": "gradient penalty",
}
SCORES = {"accuracy": "accuracy, %", "map50": "mAP50, %"}  # what a task is scored by, of the metrics in metrics.csv
CLEAN = "test_set"  # the name of the uncorrupted images in the paper's heatmaps, and in metrics.csv


def relative_error_improvement(fp32: float, quantized: float) -> float:
    """``100 * log10((100 - fp32) / (100 - quantized))`` from two scores in percent (the paper's Eq. 5).

    Positive when the quantized model errs less. 2 means that the error shrank by a factor of 10^0.02, about 4.5%.
    Raises ValueError outside 0..100; 100 itself gives an infinite score.
    """
    for name, accuracy in [("fp32", fp32), ("quantized", quantized)]:
        if not 0 <= accuracy <= 100:
            raise ValueError(f"{name}={accuracy} is not allowed: an accuracy in percent, 0..100")
    if fp32 == quantized:
        return 0.0
    if 100 in (fp32, quantized):
        return math.inf if quantized == 100 else -math.inf
    return 100 * math.log10((100 - fp32) / (100 - quantized))


def confidence_interval(values: pd.Series | np.ndarray, confidence: float = 0.95) -> float:
    """Half width of Student's t interval for the mean of independent ``values``; NaN for fewer than two."""
    from scipy.stats import t

    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return math.nan
    return float(t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))


def scores(metrics: pd.DataFrame) -> pd.DataFrame:
    """The rows of metrics.csv files that hold a task's score: accuracy, or mAP50 for detection."""
    return metrics[metrics["metric"].isin(SCORES)]


def cell_scores(metrics: pd.DataFrame) -> pd.DataFrame:
    """One row for each configuration, seed and cell of the heatmap: the score, averaged over severities.

    ``metrics`` is the content of metrics.csv files. A ``cell`` is a corruption or the clean test set.
    """
    cells = scores(metrics).groupby([*CONFIGURATION, "seed", "corruption"], as_index=False)["value"].mean()
    return cells.rename(columns={"corruption": "cell", "value": "score"})


def difference_to_fp32(cells: pd.DataFrame) -> pd.DataFrame:
    """``cell_scores`` rows of quantized configurations with ``delta``: score minus FP32's of the same seed."""
    fp32 = cells[cells["method"] == "fp32"].rename(columns={"score": "fp32"})
    keys = ["dataset", "model", "seed", "cell"]
    paired = cells[cells["method"] != "fp32"].merge(fp32[[*keys, "fp32"]], on=keys, how="inner")
    return paired.assign(delta=paired["score"] - paired["fp32"])


def corruption_average(cells: pd.DataFrame, corruptions: tuple[str, ...]) -> pd.DataFrame:
    """One row for each configuration and seed: ``clean`` score and ``avg_corrupted``, the mean over corruptions.

    The clean test set is not part of the average, as in the paper. Raises ValueError when a corruption is absent,
    so that no average is silently taken over fewer.
    """
    wide = cells.pivot_table(index=[*CONFIGURATION, "seed"], columns="cell", values="score")
    wide = wide.reindex(columns=[CLEAN, *corruptions])
    if wide.isna().any(axis=None):
        absent = wide.columns[wide.isna().any()].tolist()
        raise ValueError(f"no score for {', '.join(absent)} in some experiment: cannot average")
    return pd.DataFrame({"clean": wide[CLEAN], "avg_corrupted": wide[list(corruptions)].mean(axis=1)}).reset_index()


def improvement_by_seed(averages: pd.DataFrame) -> pd.DataFrame:
    """``corruption_average`` rows with ``improvement``: the relative error improvement over FP32 of the same seed.

    NaN where that FP32 run is missing.
    """
    keys = ["dataset", "model", "seed"]
    fp32 = averages[averages["method"] == "fp32"].rename(columns={"avg_corrupted": "fp32"})
    paired = averages.merge(fp32[[*keys, "fp32"]], on=keys, how="left")
    improvement = [
        relative_error_improvement(fp32, value) if not math.isnan(fp32) else math.nan
        for fp32, value in zip(paired["fp32"], paired["avg_corrupted"], strict=True)
    ]
    return paired.assign(improvement=improvement)


def results_table(averages: pd.DataFrame) -> pd.DataFrame:
    """The paper's table with intervals: one row a configuration, means over seeds and 95% half widths (``*_ci``).

    The relative error improvement is taken seed by seed against the FP32 run of that seed, then averaged; it is NaN
    where an FP32 partner is missing.
    """
    table = (
        improvement_by_seed(averages)
        .groupby(CONFIGURATION, as_index=False)
        .agg(
            seeds=("seed", "nunique"),
            clean=("clean", "mean"),
            clean_ci=("clean", confidence_interval),
            avg_corrupted=("avg_corrupted", "mean"),
            avg_corrupted_ci=("avg_corrupted", confidence_interval),
            relative_error_improvement=("improvement", lambda scores: scores.mean(skipna=False)),
            relative_error_improvement_ci=("improvement", confidence_interval),
        )
    )
    table.loc[table["method"] == "fp32", "relative_error_improvement_ci"] = math.nan  # zero by definition
    return sort_levels(table)


def sort_levels(table: pd.DataFrame) -> pd.DataFrame:
    """Rows in reading order: data set, model, method, then 8 bits before 4 before 2."""
    order = table.assign(_method=table["method"].map(list(METHOD_LABELS).index))
    keys = ["dataset", "model", "_method", "weight_bits", "activation_bits"]
    ascending = [True, True, True, False, False]
    return order.sort_values(keys, ascending=ascending, ignore_index=True).drop(columns="_method")


def paper_levels(rows: pd.DataFrame) -> pd.DataFrame:
    """FP32 and the levels with quantized weights and activations: what the paper compares."""
    return rows[(rows["method"] == "fp32") | (rows["activation_bits"] < 32)]


def weight_levels(rows: pd.DataFrame) -> pd.DataFrame:
    """FP32 and the levels in which only the weights are quantized, or perturbed as in the controls."""
    return rows[rows["activation_bits"] == 32]


def last_epoch(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the last epoch of each data set and model, whose budgets may differ."""
    return rows[rows["epoch"] == rows.groupby(["dataset", "model"])["epoch"].transform("max")]


def noise_shape(noise: pd.DataFrame) -> pd.DataFrame:
    """Statistics of the noise after the last epoch: means over layers (by size) and seeds, a row a level."""
    names = ["relative_sigma", "kurtosis", "clipped", "correlation", "distance_to_normal", "distance_to_uniform"]
    last = last_epoch(noise)
    last = last.assign(relative_sigma=last["sigma"] / last["weight_sigma"])
    weighted = last[names].mul(last["weights"], axis=0).assign(weights=last["weights"])
    totals = weighted.groupby([last[name] for name in CONFIGURATION]).sum()
    return sort_levels(totals[names].div(totals["weights"], axis=0).reset_index())


def level_label(weight_bits: int, activation_bits: int) -> str:
    """How a level is called in figures: "FP32", "4 bits", "4-bit weights", "w4a8"."""
    if weight_bits == activation_bits:
        return "FP32" if weight_bits == 32 else f"{weight_bits} bits"
    return f"{weight_bits}-bit weights" if activation_bits == 32 else f"w{weight_bits}a{activation_bits}"


def overfitting_by_seed(history: pd.DataFrame) -> pd.DataFrame:
    """One row for each configuration and seed: losses ``train`` and ``val`` after the last epoch, ``gap``, ``rise``.

    ``gap`` is validation loss minus training loss after the last epoch, ``rise`` the validation loss after the last
    epoch minus its smallest one.
    """
    keys = [*CONFIGURATION, "seed"]
    loss = last_epoch(history).pivot_table(index=keys, columns="split", values="loss").reset_index()
    lowest = history[history["split"] == "val"].groupby(keys, as_index=False)["loss"].min()
    loss = loss.merge(lowest.rename(columns={"loss": "lowest"}), on=keys)
    return loss.assign(gap=loss["val"] - loss["train"], rise=loss["val"] - loss["lowest"])


def generalization_gap(history: pd.DataFrame) -> pd.DataFrame:
    """How far each level overfits: means over seeds and 95% half widths (``*_ci``), a row a level.

    The columns are those of ``overfitting_by_seed``.
    """
    table = (
        overfitting_by_seed(history)
        .groupby(CONFIGURATION, as_index=False)
        .agg(
            train_loss=("train", "mean"),
            val_loss=("val", "mean"),
            gap=("gap", "mean"),
            gap_ci=("gap", confidence_interval),
            rise=("rise", "mean"),
            rise_ci=("rise", confidence_interval),
        )
    )
    return sort_levels(table)


def table_text(table: pd.DataFrame) -> str:
    """``results_table`` as Markdown in the layout of the paper's table, with its numbers beside ours where it has any.

    ``table`` has the columns published_avg_corrupted and published_relative_error_improvement too.
    """

    def number(mean: float, half_width: float = math.nan, sign: str = "") -> str:
        if math.isnan(mean):
            return "-"
        return f"{mean:{sign}.2f}" + ("" if math.isnan(half_width) else f" ± {half_width:.2f}")

    rows = [
        {
            "data set": row.dataset,
            "model": row.model,
            "method": METHOD_LABELS[row.method],
            "bits (w/a)": f"{row.weight_bits}/{row.activation_bits}",
            "seeds": row.seeds,
            "clean, %": number(row.clean, row.clean_ci),
            "avg corrupted, %": number(row.avg_corrupted, row.avg_corrupted_ci),
            "rel. error improvement": number(row.relative_error_improvement, row.relative_error_improvement_ci, "+"),
            "published: avg corrupted": number(row.published_avg_corrupted),
            "published: rel. error improvement": number(row.published_relative_error_improvement, sign="+"),
        }
        for row in table.itertuples()
    ]
    text = pd.DataFrame(rows)
    if table["published_avg_corrupted"].isna().all():  # a setting that the paper did not run
        text = text.drop(columns=[name for name in text if name.startswith("published")])
    return text.to_markdown(index=False, disable_numparse=True)
