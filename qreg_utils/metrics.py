"""From accuracies to the paper's numbers: relative error improvement, averages over corruptions, intervals."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from qreg_utils.names import (
    CLEAN,
    CONTROL,
    DATASETS,
    FULL_PRECISION,
    METHODS,
    MODELS,
    PAPER_CORRUPTIONS,
    QUANTIZER,
    SCORES,
    kind_of,
)

COMPARED_WITHIN = ["dataset", "model", "variant"]  # what settings share that are compared with each other
PAIRED = [*COMPARED_WITHIN, "seed"]  # what two numbers share that are compared
SETTING = ["method", "weight_bits", "activation_bits"]
CONFIGURATION = [*COMPARED_WITHIN, *SETTING]
PUBLISHED = ("avg_corrupted", "relative_error_improvement")  # the numbers in results/published/table.csv


def with_variant(frame: pd.DataFrame) -> pd.DataFrame:
    """``frame`` with a column variant, after model: "" where it has none, as in files of experiments without one."""
    if "variant" in frame:
        return frame.assign(variant=[value if isinstance(value, str) else "" for value in frame["variant"]])
    frame = frame.copy()
    position = frame.columns.get_loc("model") + 1 if "model" in frame else len(frame.columns)
    frame.insert(position, "variant", "")
    return frame


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


def interval(
    values: Sequence[float] | pd.Series | np.ndarray, confidence: float = 0.95, more_variance: float = 0.0
) -> tuple[float, float]:
    """Where the mean of independent ``values`` lies (Student's t); NaN, NaN for fewer than two, or no finite ones.

    ``more_variance`` is what the mean's variance has besides: what all values share, so that their spread does not show
    it. Nothing that uses it expects the mean in the middle, so that another interval (bootstrap, say) can stand here.
    """
    from scipy.stats import sem, t  # takes longer to import than all else here

    values = np.asarray(values, dtype=float)
    if len(values) < 2 or not np.isfinite(values).all():
        return math.nan, math.nan
    half_width = t.ppf((1 + confidence) / 2, len(values) - 1) * math.sqrt(sem(values) ** 2 + more_variance)
    return float(values.mean() - half_width), float(values.mean() + half_width)


def random_effects(means: Sequence[float], variances: Sequence[float]) -> tuple[float, float, float]:
    """The mean of several studies and its 95% interval, where the effect itself may differ from one to the next.

    ``variances`` are those of the studies' means. Weights are DerSimonian and Laird's (1986), the interval is Hartung
    and Knapp's (2001) by Student's t over studies, never narrower than by the weights alone: two studies say little
    about a third. NaN for fewer than two.
    """
    from scipy.stats import t

    means, variances = np.asarray(means, dtype=float), np.asarray(variances, dtype=float)
    df = len(means) - 1
    if df < 1:
        return math.nan, math.nan, math.nan
    weights = 1 / variances
    common = np.average(means, weights=weights)
    excess = (weights * (means - common) ** 2).sum() - df  # of Cochran's Q over what chance gives
    between = max(0.0, excess / (weights.sum() - (weights**2).sum() / weights.sum()))
    weights = 1 / (variances + between)
    mean = float(np.average(means, weights=weights))
    inflation = max(1.0, float((weights * (means - mean) ** 2).sum() / df))
    half_width = float(t.ppf(0.975, df) * math.sqrt(inflation / weights.sum()))
    return mean, mean - half_width, mean + half_width


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
    keys = [*PAIRED, "cell"]
    paired = cells[cells["method"] != "fp32"].merge(fp32[[*keys, "fp32"]], on=keys, how="inner")
    return paired.assign(delta=paired["score"] - paired["fp32"])


def corruption_average(cells: pd.DataFrame, corruptions: tuple[str, ...]) -> pd.DataFrame:
    """One row for each configuration and seed: ``clean`` score and ``avg_corrupted``, the mean over ``corruptions``.

    The clean test set is not part of the average, as in the paper. Raises ValueError when a corruption is absent,
    so that no average is silently taken over fewer; others than ``corruptions`` are left out.
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
    fp32 = averages[averages["method"] == "fp32"].rename(columns={"avg_corrupted": "fp32"})
    paired = averages.merge(fp32[[*PAIRED, "fp32"]], on=PAIRED, how="left")
    improvement = [
        relative_error_improvement(fp32, value) if not math.isnan(fp32) else math.nan
        for fp32, value in zip(paired["fp32"], paired["avg_corrupted"], strict=True)
    ]
    return paired.assign(improvement=improvement)


def relative_loss_improvement(metrics: pd.DataFrame) -> pd.DataFrame:
    """One row for each configuration and seed of classifiers with ``improvement``: ``100 log10(FP32 / quantized)`` of
    the negative log-likelihood, averaged over the paper's corruptions and severities; FP32 of the same seed."""
    rows = metrics[(metrics["metric"] == "loss") & metrics["corruption"].isin(PAPER_CORRUPTIONS)]
    loss = rows.groupby([*CONFIGURATION, "seed"], as_index=False)["value"].mean()
    fp32 = loss[loss["method"] == "fp32"].rename(columns={"value": "fp32"})
    paired = loss.merge(fp32[[*PAIRED, "fp32"]], on=PAIRED, how="left")
    return paired.assign(improvement=100 * np.log10((paired["fp32"] / paired["value"]).astype(float)))


def results_table(averages: pd.DataFrame) -> pd.DataFrame:
    """The paper's table with intervals: one row a configuration, means over seeds and 95% intervals.

    ``clean``, ``avg_corrupted`` and ``relative_error_improvement`` are followed by their ``_low`` and ``_high``. The
    relative error improvement is taken seed by seed against the FP32 run of that seed, then averaged; it is NaN
    where an FP32 partner is missing.
    """
    by_seed = improvement_by_seed(averages).rename(columns={"improvement": "relative_error_improvement"})
    seeds = by_seed.groupby(CONFIGURATION, as_index=False).agg(seeds=("seed", "nunique"))
    table = seeds.merge(_means(by_seed, ["clean", *PUBLISHED]), on=CONFIGURATION)
    bounds = ["relative_error_improvement_low", "relative_error_improvement_high"]
    table.loc[table["method"] == "fp32", bounds] = math.nan  # zero by definition
    return sort_settings(table)


def _means(by_seed: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """A row for each configuration: the mean over seeds of each of the columns, and its ``_low`` and ``_high``."""
    rows = []
    for key, group in by_seed.groupby(CONFIGURATION):
        row = dict(zip(CONFIGURATION, key, strict=True))
        for name in names:
            low, high = interval(group[name])
            row |= {name: group[name].mean(skipna=False), f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def published_settings(published: pd.DataFrame) -> pd.DataFrame:
    """A file of results/published/ with the columns that say which setting a row of ours is of: the paper has ``bits``
    for weights and activations, and no variants."""
    settings = with_variant(published.rename(columns={"bits": "weight_bits"}))
    return settings.assign(activation_bits=settings["weight_bits"])


def with_published(table: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """``results_table`` with the paper's numbers for the same configuration, in columns ``published_...``.

    ``published`` is results/published/table.csv. NaN where it has no such row: it has none of a variant.
    """
    theirs = published_settings(published)[[*CONFIGURATION, *PUBLISHED]]
    theirs = theirs.rename(columns={name: f"published_{name}" for name in PUBLISHED})
    return table.merge(theirs, on=CONFIGURATION, how="left")


def sort_settings(table: pd.DataFrame) -> pd.DataFrame:
    """Rows in reading order: data set, model, variant, method, then 8 bits before 4 before 2.

    Data sets, models and methods stand as in ``names``, those without a row there at the end.
    """
    tables = {"dataset": DATASETS, "model": MODELS, "method": METHODS}
    order = table.assign(**{f"_{name}": table[name].map(rows.position) for name, rows in tables.items()})
    names = ["_dataset", "dataset", "_model", "model", "variant", "_method", "method", "weight_bits", "activation_bits"]
    ascending = [name not in ("weight_bits", "activation_bits") for name in names]
    order = order.sort_values(names, ascending=ascending, ignore_index=True, kind="stable")
    return order.drop(columns=[f"_{name}" for name in tables])


def by_network(rows: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """The rows of each data set, model and variant, in reading order: label, name in the names of files, rows."""
    if rows.empty:
        return
    groups = dict(list(rows.groupby(COMPARED_WITHIN)))
    keys = sort_settings(rows[CONFIGURATION].drop_duplicates())[COMPARED_WITHIN].drop_duplicates()
    for key in keys.itertuples(index=False, name=None):
        yield network_label(*key), "-".join(filter(None, key)), groups[key]


def paper_settings(rows: pd.DataFrame) -> pd.DataFrame:
    """FP32 and the settings with quantized weights and activations: what the paper compares."""
    both = (rows["weight_bits"] < 32) & (rows["activation_bits"] < 32)
    return rows[(rows["method"] == "fp32") | (both & rows["method"].map(kind_of).eq(QUANTIZER))]


def weight_only_settings(rows: pd.DataFrame) -> pd.DataFrame:
    """FP32 and the settings in which only the weights are quantized, or perturbed as in the controls."""
    compared = rows["method"].map(kind_of).isin([FULL_PRECISION, QUANTIZER, CONTROL])
    return rows[(rows["activation_bits"] == 32) & compared]


def last_epoch(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the last epoch of each data set, model and variant, whose budgets may differ."""
    return rows[rows["epoch"] == rows.groupby(COMPARED_WITHIN)["epoch"].transform("max")]


def with_statistics(rows: pd.DataFrame, statistics: str = "batch") -> pd.DataFrame:
    """The rows measured with the batch norm statistics of each "batch", as in training, or with "frozen" ones."""
    return rows[rows["statistics"] == statistics] if "statistics" in rows else rows


def noise_shape(noise: pd.DataFrame) -> pd.DataFrame:
    """Statistics of the noise after the last epoch: means over layers (by size) and seeds, a row a setting."""
    names = ["relative_sigma", "kurtosis", "clipped", "correlation", "distance_to_normal", "distance_to_uniform"]
    last = last_epoch(noise)
    last = last.assign(relative_sigma=last["sigma"] / last["weight_sigma"])
    weighted = last[names].mul(last["weights"], axis=0).assign(weights=last["weights"])
    totals = weighted.groupby([last[name] for name in CONFIGURATION]).sum()
    return sort_settings(totals[names].div(totals["weights"], axis=0).reset_index())


def mean_over_layers(layers: pd.DataFrame, value: pd.Series, keys: list[str]) -> pd.DataFrame:
    """One row for each of ``keys`` with the mean of ``value`` over the layers, by number of ``weights``."""
    totals = layers.assign(value=value * layers["weights"]).groupby(keys, as_index=False)[["value", "weights"]].sum()
    return totals.assign(value=totals["value"] / totals["weights"])


def relative_noise(noise: pd.DataFrame) -> pd.DataFrame:
    """One row for each seed of a setting: ``relative``, the standard deviation of the noise on the weights over that of
    the weights, after the last epoch; the mean over the layers. ``noise`` is the content of noise.csv."""
    last = last_epoch(noise)
    found = mean_over_layers(last, last["sigma"] / last["weight_sigma"], [*CONFIGURATION, "seed"])
    return found.drop(columns="weights").rename(columns={"value": "relative"})


def setting_label(weight_bits: int, activation_bits: int) -> str:
    """How a setting is called in figures: "FP32", "4 bits", "4-bit weights", "w4a8"."""
    if weight_bits == activation_bits:
        return "FP32" if weight_bits == 32 else f"{weight_bits} bits"
    if weight_bits == 32:
        return f"{activation_bits}-bit activations"
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
    """How far each setting overfits: means over seeds and 95% intervals (``_low``, ``_high``), a row a setting.

    The columns are those of ``overfitting_by_seed``; the losses themselves have no interval.
    """
    by_seed = overfitting_by_seed(history).rename(columns={"train": "train_loss", "val": "val_loss"})
    losses = by_seed.groupby(CONFIGURATION, as_index=False)[["train_loss", "val_loss"]].mean()
    return sort_settings(losses.merge(_means(by_seed, ["gap", "rise"]), on=CONFIGURATION))


def network_label(dataset: str, model: str, variant: str = "") -> str:
    """What settings are compared on, in words: "ResNet-20, CIFAR-10", and the variant where there is one."""
    return ", ".join(filter(None, (MODELS.label(model), DATASETS.label(dataset), variant)))


def interval_text(mean: float, low: float = math.nan, high: float = math.nan, spec: str = ".2f") -> str:
    """Such as "98.40 [96.94, 99.86]"; "-" for NaN, and no brackets where there is no interval."""
    if math.isnan(mean):
        return "-"
    return f"{mean:{spec}}" + ("" if math.isnan(low) else f" [{low:{spec}}, {high:{spec}}]")


def frame_text(frame: pd.DataFrame, digits: int = 2) -> str:
    """``frame`` as Markdown: names as labels, means with their intervals, and variants where there are any."""
    labels = {"dataset": DATASETS, "model": MODELS, "method": METHODS}
    text = {}
    for name, values in frame.items():
        if name.endswith(("_low", "_high")) or (name == "variant" and (values == "").all()):
            continue
        if name in labels:
            text[name] = values.map(labels[name].label)
        elif f"{name}_low" in frame:
            bounds = (values, frame[f"{name}_low"], frame[f"{name}_high"])
            text[name] = [interval_text(*row, spec=f".{digits}f") for row in zip(*bounds, strict=True)]
        elif pd.api.types.is_float_dtype(values):
            text[name] = [interval_text(value, spec=f".{digits}f") for value in values]
        else:
            text[name] = values
    align = ["right" if pd.api.types.is_numeric_dtype(frame[name]) else "left" for name in text]
    return pd.DataFrame(text).to_markdown(index=False, disable_numparse=True, colalign=align)


def table_text(table: pd.DataFrame) -> str:
    """``with_published`` as Markdown in the layout of the paper's table, with its numbers beside ours where it has any.

    Names are shown as labels; the variant has a column where some setting has one.
    """
    rows = []
    for row in table.itertuples():
        improvement = (getattr(row, f"relative_error_improvement{end}") for end in ("", "_low", "_high"))
        rows.append(
            {
                "data set": DATASETS.label(row.dataset),
                "model": MODELS.label(row.model),
                "variant": row.variant,
                "method": METHODS.label(row.method),
                "bits (w/a)": f"{row.weight_bits}/{row.activation_bits}",
                "seeds": row.seeds,
                "clean, %": interval_text(row.clean, row.clean_low, row.clean_high),
                "avg corrupted, %": interval_text(row.avg_corrupted, row.avg_corrupted_low, row.avg_corrupted_high),
                "rel. error improvement": interval_text(*improvement, spec="+.2f"),
                "published: avg corrupted": interval_text(row.published_avg_corrupted),
                "published: rel. error improvement": interval_text(
                    row.published_relative_error_improvement, spec="+.2f"
                ),
            }
        )
    text = pd.DataFrame(rows)
    if (table["variant"] == "").all():
        text = text.drop(columns="variant")
    if table["published_avg_corrupted"].isna().all():  # settings that the paper did not run
        text = text.drop(columns=[name for name in text if name.startswith("published")])
    return text.to_markdown(index=False, disable_numparse=True)
