"""The paper's claims, each as an effect that a study's results can measure, and a verdict by one rule.

A claim says that an effect lies in a region: above zero, say, or within a factor of 2 of one. An effect is a number for
each seed, with settings paired seed by seed; its interval is ``metrics.interval`` over seeds. Where a claim takes
several comparisons, each gets a corrected interval (Bonferroni: of confidence 1 - 5% / comparisons), and is

- **supported** when the corrected interval lies entirely inside the region,
- **contradicted** when it lies entirely outside,
- **not decided** at this sample size otherwise, and where all seeds agree to the last digit or there is only one.

The correction is for the comparisons of one claim, not for the number of claims.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from qreg_utils.metrics import (
    COMPARED_WITHIN,
    cell_scores,
    corruption_average,
    improvement_by_seed,
    interval,
    last_epoch,
    network_label,
    overfitting_by_seed,
    paper_settings,
    setting_label,
    sort_settings,
    with_variant,
)
from qreg_utils.names import CLASSIFICATION, CONTROL, DETECTION, METHODS, MODELS, PAPER_CORRUPTIONS, Task, task_of

SUPPORTED, CONTRADICTED, NOT_DECIDED, NOT_MEASURED = "supported", "contradicted", "not decided", "not measured"
KEYS = [*COMPARED_WITHIN, "method", "bits", "activation_bits", "detail"]  # of one comparison
EIGHT_BITS_BEAT = "8 bits beat FP32 on corrupted data"
PAIRED = [*COMPARED_WITHIN, "seed"]  # what two numbers share that are compared
ALL = "all"  # in the row about all comparisons
# half of the Kolmogorov distance between a uniform and a normal distribution of the same mean and variance
NEARLY_NORMAL = 0.0572 / 2
SMALLEST_PUBLISHED = 0.84  # relative error improvement, absolute: CIFAR-100, ResNet-18, 2 bits


@dataclass(frozen=True)
class Claim:
    """What the paper says, the effect that tells, and the region in which the effect lies if it is right."""

    name: str
    effect: str
    low: float
    high: float
    published: str

    def verdict(self, low: float, high: float) -> str:
        """Of an effect whose corrected interval is ``low`` to ``high``; NaN, as with one seed, decides nothing."""
        if low > self.low and high < self.high:
            return SUPPORTED
        return CONTRADICTED if high < self.low or low > self.high else NOT_DECIDED


def claims_table(
    metrics: pd.DataFrame, history: pd.DataFrame, noise: pd.DataFrame, penalty: pd.DataFrame, published: pd.DataFrame
) -> pd.DataFrame:
    """One row for each comparison: claim, what is compared, the published evidence, the effect, the verdict.

    The frames are those of ``results.read_study``; ``published`` is results/published/table.csv. ``effect`` is a mean
    over ``seeds``, ``low`` to ``high`` its 95% interval, ``corrected_low`` to ``corrected_high`` the one that the
    verdict is by. A claim of which the study has no measurement gets one row that says so.
    """
    improvement = improvement_by_seed(corruption_average(cell_scores(metrics), PAPER_CORRUPTIONS))
    measured = [
        *_noise_claims(noise),
        _penalty_claim(penalty),
        *_improvement_claims(_quantized_settings(improvement), published),
        *_overfitting_claims(overfitting_by_seed(history)),
        _cause_claim(improvement),
    ]
    table = pd.concat([_judged(claim, effects) for claim, effects in measured], ignore_index=True)
    table = pd.concat([table, _reliable(table, _quantized_settings(improvement), published)], ignore_index=True)
    return with_variant(table)


def claims_text(table: pd.DataFrame) -> str:
    """``claims_table`` as Markdown: a row for each comparison, the claim's name in the first of its rows."""
    rows = []
    for row in table.itertuples():
        measured = row.verdict != NOT_MEASURED
        effect = f"{row.effect:+.3g}" if measured else "-"
        if measured and row.seeds > 1:
            effect += f" [{row.low:+.3g}, {row.high:+.3g}]"
        first = row.Index == 0 or table["claim"].iloc[row.Index - 1] != row.claim
        rows.append(
            {
                "claim: what is measured": f"**{row.claim}**: {row.measure}" if first else "",
                "published": row.published if first else "",
                "setting": _setting_text(row) if measured else "",
                "bits": f"{row.bits:.0f}" if measured else "",
                "effect [95% interval]": effect,
                "seeds": row.seeds,
                "verdict": f"**{row.verdict}**" if row.verdict in (SUPPORTED, CONTRADICTED) else row.verdict,
            }
        )
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def _setting_text(row) -> str:
    """What is compared, in words, of a row of ``claims_table``."""
    if row.method == ALL:
        return ALL
    words = [METHODS.label(row.method), network_label(row.dataset, row.model, row.variant), row.detail]
    if row.activation_bits not in (row.bits, 32):
        words.append(setting_label(int(row.bits), int(row.activation_bits)))
    return ", ".join(filter(None, words))


def _judged(claim: Claim, effects: pd.DataFrame) -> pd.DataFrame:
    """``effects`` has KEYS, seed and value."""
    head = {"claim": claim.name, "published": claim.published}
    effects = effects[effects["value"].map(math.isfinite)]
    if effects.empty:
        return pd.DataFrame([{**head, "measure": claim.effect, "seeds": 0, "verdict": NOT_MEASURED}])
    groups = effects.groupby(KEYS, sort=False)["value"]
    corrected = 1 - 0.05 / len(groups)
    rows = []
    for key, values in groups:
        mean, (low, high) = values.mean(), interval(values)
        corrected_low, corrected_high = interval(values, corrected)
        row = {**head, **dict(zip(KEYS, key, strict=True)), "measure": claim.effect, "effect": mean}
        row |= {"low": low, "high": high, "seeds": len(values), "comparisons": len(groups)}
        row |= {"corrected_low": corrected_low, "corrected_high": corrected_high}
        seeds_differ = corrected_high - corrected_low > 2e-9 * abs(mean)
        rows.append(row | {"verdict": claim.verdict(corrected_low, corrected_high) if seeds_differ else NOT_DECIDED})
    return pd.DataFrame(rows)


def _quantized_settings(frame: pd.DataFrame) -> pd.DataFrame:
    """The quantized ones of the paper's settings."""
    return paper_settings(frame).query("method != 'fp32'")


def _effects(frame: pd.DataFrame, value: pd.Series, detail: str | pd.Series = "") -> pd.DataFrame:
    """KEYS, seed and value of each row of ``frame``: in reading order, the widest setting first."""
    effects = sort_settings(frame.assign(detail=detail, value=value).sort_values("seed"))
    method = effects.groupby([*COMPARED_WITHIN, "method"], sort=False).ngroup()
    effects = effects.assign(_method=method).sort_values(["_method", "detail"], kind="stable")
    return effects.assign(bits=effects["weight_bits"])[[*KEYS, "seed", "value"]]


NO_EFFECTS = pd.DataFrame(columns=[*KEYS, "seed", "value"])


def _noise_claims(noise: pd.DataFrame) -> Iterator[tuple[Claim, pd.DataFrame]]:
    grows = Claim(
        "Noise grows as bits shrink",
        "log2 of sigma(noise) / sigma(weights), minus that of the next wider setting",
        0,
        math.inf,
        "assumed",
    )
    normal = Claim(
        "The noise is normal",
        f"Kolmogorov distance to a normal distribution, claimed below {NEARLY_NORMAL:.4f} (half of a uniform's)",
        -math.inf,
        NEARLY_NORMAL,
        "assumed",
    )
    if noise.empty:
        yield grows, NO_EFFECTS
        yield normal, NO_EFFECTS
        return
    last = last_epoch(_quantized_settings(noise))
    keys = [*COMPARED_WITHIN, "method", "weight_bits", "seed"]  # the activations' width is no part of this noise
    relative = _mean_over_weights(last, last["sigma"] / last["weight_sigma"], keys)
    relative = relative.assign(activation_bits=relative["weight_bits"])
    relative = relative.sort_values("weight_bits", ascending=False)
    series = relative.groupby([*COMPARED_WITHIN, "method", "seed"])
    wider = series["weight_bits"].shift()
    growth = (relative["value"] / series["value"].shift()).map(math.log2, na_action="ignore")
    steps = relative.assign(growth=growth, wider=wider).dropna()
    yield grows, _effects(steps, steps["growth"], steps["wider"].map("than {:.0f} bits".format))
    if "distance_to_normal" not in last:
        yield normal, NO_EFFECTS
    else:
        distance = _mean_over_weights(last, last["distance_to_normal"], [*keys, "activation_bits"])
        yield normal, _effects(distance, distance["value"], "mean of the layers")


def _mean_over_weights(layers: pd.DataFrame, value: pd.Series, keys: list[str]) -> pd.DataFrame:
    """The layers' mean, by number of weights."""
    totals = layers.assign(value=value * layers["weights"]).groupby(keys, as_index=False)[["value", "weights"]].sum()
    return totals.assign(value=totals["value"] / totals["weights"])


def _penalty_claim(penalty: pd.DataFrame) -> tuple[Claim, pd.DataFrame]:
    claim = Claim(
        "The penalty predicts the change of the loss",
        "measured / predicted change of the squared error of FP32 networks, claimed between 1/2 and 2",
        0.5,
        2,
        "derived, not measured",
    )
    if penalty.empty:
        return claim, NO_EFFECTS
    names = {"normal": "normal noise of this size", "quantization": "rounding the weights"}
    rows = penalty[(penalty["method"] == "fp32") & penalty["noise"].isin(names) & penalty["bits"].isin([8, 4, 2])]
    rows = rows.assign(weight_bits=rows["bits"])  # of which activations have none
    return claim, _effects(rows, rows["measured"] / rows["predicted"], rows["noise"].map(names))


def _improvement_claims(improvement: pd.DataFrame, published: pd.DataFrame) -> Iterator[tuple[Claim, pd.DataFrame]]:
    above, below = (0, math.inf), (-math.inf, 0)
    classifiers, detectors = (CLASSIFICATION,), (DETECTION,)
    for name, bits, tasks, region in [
        (EIGHT_BITS_BEAT, 8, (*classifiers, *detectors), above),
        ("4 bits beat FP32 on corrupted data (classifiers)", 4, classifiers, above),
        ("4 bits are worse than FP32 on corrupted data (detectors)", 4, detectors, below),
        ("2 bits are worse than FP32 on corrupted data", 2, (*classifiers, *detectors), below),
    ]:
        theirs = _of_tasks(published[published["bits"] == bits], tasks)
        evidence = ", ".join(
            f"{row.relative_error_improvement:+.2f} ({MODELS.label(row.model)})" for row in theirs.itertuples()
        )
        rows = _of_tasks(improvement[improvement["weight_bits"] == bits], tasks)
        yield Claim(name, "relative error improvement", *region, evidence), _effects(rows, rows["improvement"])


def _of_tasks(rows: pd.DataFrame, tasks: tuple[Task, ...]) -> pd.DataFrame:
    found = [task_of(*network) in tasks for network in zip(rows["model"], rows["dataset"], strict=True)]
    return rows[np.array(found, dtype=bool)]


def _overfitting_claims(overfitting: pd.DataFrame) -> Iterator[tuple[Claim, pd.DataFrame]]:
    fp32 = overfitting[overfitting["method"] == "fp32"][[*PAIRED, "gap", "rise"]]
    paired = _quantized_settings(overfitting).merge(fp32, on=PAIRED, suffixes=("", "_fp32"))
    for measure, effect in [
        ("gap", "FP32's validation minus training loss, minus the quantized network's"),
        ("rise", "how far FP32's validation loss rises above its lowest, minus the quantized network's"),
    ]:
        name = f"FP32 overfits where quantized models do not ({measure})"
        claim = Claim(name, effect, 0, math.inf, "stated, of YOLOv5n's curves")
        yield claim, _effects(paired, paired[f"{measure}_fp32"] - paired[measure])


def _cause_claim(improvement: pd.DataFrame) -> tuple[Claim, pd.DataFrame]:
    claim = Claim(
        "Noise alone does what quantization does",
        "relative error improvement of the control minus that of its noise source (the quantizer, on weights alone), "
        f"claimed within {SMALLEST_PUBLISHED} (the paper's smallest effect) of 0",
        -SMALLEST_PUBLISHED,
        SMALLEST_PUBLISHED,
        "assumed",
    )
    sources = {name: row.noise_source for name, row in METHODS.items() if row.kind == CONTROL}
    controls = improvement[improvement["method"].isin(sources)]
    controls = controls.assign(source=controls["method"].map(sources))
    weights_only = improvement[improvement["activation_bits"] == 32].rename(columns={"method": "source"})
    keys = [*PAIRED, "source", "weight_bits"]
    paired = controls.merge(weights_only[[*keys, "improvement"]], on=keys, suffixes=("", "_source"))
    return claim, _effects(paired, paired["improvement"] - paired["improvement_source"])


def _reliable(table: pd.DataFrame, improvement: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """The claim about all of the 8-bit comparisons: as strong as the weakest of them.

    Its effect is their mean, over the seeds that all of them have.
    """
    eight = improvement[improvement["weight_bits"] == 8]
    by_setting = eight.pivot_table(index="seed", columns=[*COMPARED_WITHIN, "method"], values="improvement")
    mean = by_setting.dropna().mean(axis=1).rename("value").reset_index()
    gains = published.loc[published["bits"] == 8, "relative_error_improvement"] > 0
    evidence = f"{gains.sum()} of {len(gains)} settings gain"
    claim = Claim(
        "8 bits are the reliable regularizer",
        "relative error improvement, mean over all networks, data sets and methods; the verdict is by each of them",
        0,
        math.inf,
        evidence,
    )
    everything = dict.fromkeys(["dataset", "model", "method"], ALL)
    variants = set(improvement["variant"])
    everything["variant"] = variants.pop() if len(variants) == 1 else ALL
    effects = mean.assign(**everything, bits=8, activation_bits=8, detail="").reindex(columns=[*KEYS, "seed", "value"])
    row = _judged(claim, effects)
    each = set(table.loc[table["claim"] == EIGHT_BITS_BEAT, "verdict"])
    if CONTRADICTED in each:
        return row.assign(verdict=CONTRADICTED)
    return row.assign(verdict=each.pop() if len(each) == 1 else NOT_DECIDED)
