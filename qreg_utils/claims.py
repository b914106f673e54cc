"""The paper's claims, each as an effect that a study's results can measure, and a verdict by one rule.

A claim says that an effect lies in a region: above zero, say, or within a factor of 2 of one. An effect is a number for
each seed, with settings paired seed by seed; ``metrics.interval`` and the p-values here are Student's t over seeds. A
comparison is

- **negligible** when its interval lies within the region of practical equivalence (a claim about improvement has one),
- **supported** when its interval lies inside the claimed region,
- **contradicted** when it lies outside,
- **not decided** otherwise, and where all seeds agree to the last digit or there is only one; then it is said how many
  seeds would decide an effect of this size at this spread, and how large an effect the present ones could have missed.

Where a claim takes several comparisons, the levels are Holm's (1979). A study with ``looks`` spends its 5% over them as
O'Brien and Fleming (1979) do. docs/methods.md works one comparison by hand.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd

from qreg_utils.axes import AXES, slopes
from qreg_utils.image_chance import image_variance, of_a_difference
from qreg_utils.ingredients import ingredients, minus_the_whole, rounding_itself, with_ingredients
from qreg_utils.metrics import (
    COMPARED_WITHIN,
    CONFIGURATION,
    PAIRED,
    cell_scores,
    corruption_average,
    difference_to_fp32,
    improvement_by_seed,
    interval,
    interval_text,
    last_epoch,
    mean_over_layers,
    network_label,
    overfitting_by_seed,
    paper_settings,
    published_settings,
    relative_loss_improvement,
    setting_label,
    sort_settings,
    with_statistics,
    with_variant,
)
from qreg_utils.names import CLASSIFICATION, CONTROL, DETECTION, METHODS, MODELS, PAPER_CORRUPTIONS, Task, task_of
from qreg_utils.noise_curve import off_the_curve, points
from qreg_utils.pooling import with_pooled_variance

SUPPORTED, CONTRADICTED, NEGLIGIBLE = "supported", "contradicted", "negligible"
NOT_DECIDED, NOT_MEASURED = "not decided", "not measured"
DECIDED = (SUPPORTED, CONTRADICTED, NEGLIGIBLE)
KEYS = [*COMPARED_WITHIN, "method", "bits", "activation_bits", "detail"]  # of one comparison
EIGHT_BITS_BEAT = "8 bits beat FP32 on corrupted data"
ALL = "all"  # in the row about all comparisons
# half of the Kolmogorov distance between a uniform and a normal distribution of the same mean and variance
NEARLY_NORMAL = 0.0572 / 2
SMALLEST_PUBLISHED = 0.84  # relative error improvement, absolute: CIFAR-100, ResNet-18, 2 bits
LEVEL, POWER = 0.05, 0.8
MOST_SEEDS = 200  # an effect that would take more is said to be smaller than what so many detect


@dataclass(frozen=True)
class Claim:
    """What the paper says, the effect that tells, and the region in which the effect lies if it is right.

    An effect within ``equivalent`` of zero makes no difference in practice.
    """

    name: str
    effect: str
    low: float
    high: float
    published: str
    equivalent: float = 0.0

    def inside(self, effect: float) -> bool:
        return self.low < effect < self.high

    def edge(self, effect: float) -> float:
        """The nearest edge of the region: where an effect would have to be for the verdict to be another."""
        return min((edge for edge in (self.low, self.high) if math.isfinite(edge)), key=lambda edge: abs(edge - effect))


def claims_table(
    metrics: pd.DataFrame,
    history: pd.DataFrame,
    noise: pd.DataFrame,
    penalty: pd.DataFrame,
    published: pd.DataFrame,
    published_heatmap: pd.DataFrame | None = None,
    looks: Sequence[int] = (),
    images: pd.DataFrame | None = None,
    budgets: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """One row for each comparison: claim, what is compared, the published evidence, the effect, the verdict.

    The frames are those of ``results.read_study``; ``published`` and ``published_heatmap`` are the files table.csv and
    heatmap.csv of results/published/, ``looks`` the numbers of seeds at which it was planned to look. With ``images``,
    images.csv, the intervals of accuracies hold what the choice of test images adds to the chance. With ``budgets``
    (``axes.budgets``) claims are made of the axes along which a study's variants lie. ``effect`` is a mean
    over ``seeds``, ``low`` to ``high`` its 95% interval, ``p`` Holm's, against the nearest edge of the region.
    ``pooled_low`` to ``pooled_high`` is the interval of ``pooling``, which decides nothing.
    ``seeds_needed`` would decide an effect of this size with a power of 80%, ``detectable`` is the distance from that
    edge that the present seeds would. ``published_excluded`` says whether the paper's number for this very setting
    lies outside the interval. A claim of which the study has no measurement gets one row that says so.
    """
    averages = corruption_average(cell_scores(metrics), PAPER_CORRUPTIONS)
    improvement = with_pooled_variance(_with_image_variance(improvement_by_seed(averages), images))
    losses = with_pooled_variance(relative_loss_improvement(metrics))
    measured = [
        *_noise_claims(noise),
        _penalty_claim(penalty),
        *_improvement_claims(_quantized_settings(improvement), published),
        *_loss_claims(_quantized_settings(losses)),
        _profile_claim(metrics, published_heatmap),
        *_overfitting_claims(overfitting_by_seed(history)),
        _cause_claim(improvement),
        *_ingredient_claims(improvement, losses),
        *_curve_claims(improvement, losses, noise),
        *_axis_claims(_quantized_settings(improvement), _quantized_settings(losses), budgets),
    ]
    table = pd.concat([_judged(claim, effects, looks) for claim, effects in measured], ignore_index=True)
    if (table["verdict"] == NOT_MEASURED).all():  # as without FP32
        numbers = ["bits", "activation_bits", "effect", "low", "high", "p_alone"]
        table = table.assign(**(dict.fromkeys(KEYS) | dict.fromkeys(numbers, math.nan)))
    table = pd.concat([table, _reliable(table, _quantized_settings(improvement), published, looks)], ignore_index=True)
    return with_variant(_with_published_effects(table, published))


def _with_image_variance(improvement: pd.DataFrame, images: pd.DataFrame | None) -> pd.DataFrame:
    """``improvement`` with ``image_variance``, of its mean over seeds; 0 where it is not known.

    From points to relative error improvement by its derivative, 100 / ln 10 / error.
    """
    if images is None or images.empty:
        return improvement.assign(image_variance=0.0)
    found = improvement.merge(image_variance(images), on=CONFIGURATION, how="left")
    error = 100 - found.groupby(CONFIGURATION)["avg_corrupted"].transform("mean")
    return found.assign(
        image_variance=found["image_variance"].astype(float).fillna(0.0) * (100 / math.log(10) / error) ** 2
    )


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
                "verdict": _verdict_text(row),
            }
        )
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def verdict_lines(table: pd.DataFrame) -> str:
    """``claims_table`` as Markdown, a row for each claim that was measured: its verdicts, of one comparison with the
    effect."""
    rows = []
    for claim, own in table[table["verdict"] != NOT_MEASURED].groupby("claim", sort=False):
        counts = own["verdict"].value_counts()
        found = ", ".join(f"{f'{count} ' if len(own) > 1 else ''}**{name}**" for name, count in counts.items())
        first = own.iloc[0]
        effect = interval_text(first["effect"], first["low"], first["high"], "+.3g") if len(own) == 1 else ""
        seeds = "-".join(map(str, sorted({own["seeds"].min(), own["seeds"].max()})))
        rows.append((claim, found, effect, seeds))
    lines = pd.DataFrame(rows, columns=["claim", "verdict", "effect [95% interval]", "seeds"])
    return lines.to_markdown(index=False, disable_numparse=True)


def _verdict_text(row) -> str:
    words = f"**{row.verdict}**" if row.verdict in DECIDED else row.verdict
    if row.verdict == NOT_DECIDED and row.seeds > 1 and row.detectable > 0:
        needed = f"{row.seeds_needed:.0f} seeds would" if row.seeds_needed <= MOST_SEEDS else f"over {MOST_SEEDS} seeds"
        words += f" ({needed}; {row.detectable:.2g} could be missed)"
    return words + ("; published size excluded" if row.published_excluded is True else "")


def _setting_text(row) -> str:
    """What is compared, in words, of a row of ``claims_table``."""
    if row.method == ALL:
        return ALL
    words = [METHODS.label(row.method), network_label(row.dataset, row.model, row.variant), row.detail]
    if row.activation_bits not in (row.bits, 32):
        words.append(setting_label(int(row.bits), int(row.activation_bits)))
    return ", ".join(filter(None, words))


def _judged(claim: Claim, effects: pd.DataFrame, looks: Sequence[int] = ()) -> pd.DataFrame:
    """``effects`` has KEYS, seed and value."""
    head = {"claim": claim.name, "published": claim.published}
    effects = effects[effects["value"].map(math.isfinite)]
    if effects.empty:
        return pd.DataFrame([{**head, "measure": claim.effect, "seeds": 0, "verdict": NOT_MEASURED}])
    rows = []
    for key, found in effects.groupby(KEYS, sort=False):
        values, of_images = found["value"], found["image_variance"].mean() if "image_variance" in found else 0.0
        mean, (low, high) = values.mean(), interval(values, more_variance=of_images)
        row = {**head, **dict(zip(KEYS, key, strict=True)), "measure": claim.effect, "effect": mean}
        row |= {"low": low, "high": high, "seeds": len(values), "edge": claim.edge(mean)}
        row |= {"image_variance": of_images} | _pooled(found, mean, of_images)
        rows.append(row | _tested(claim, values, of_images))
    table = pd.DataFrame(rows)
    table["p_alone"] = table["p"]  # before Holm's correction
    compared = table["p"].notna()  # where all seeds agree to the last digit, as in zeros, nothing is compared
    table["comparisons"] = compared.sum()
    for name in ("p", "p_equivalent"):
        table.loc[compared, name] = holm(table.loc[compared, name])
    levels = table["seeds"].map(lambda seeds: level_at(seeds, looks))
    tested = zip(table["effect"], table["p"], table["p_equivalent"], levels, strict=True)
    table["verdict"] = [_verdict(claim, *row) for row in tested]
    open_ = table["verdict"] == NOT_DECIDED
    share = LEVEL / max(compared.sum(), 1)
    distance = (table["effect"] - table["edge"]).abs() / table["spread"]
    needed = [seeds_needed(d, share, looks) if o else math.nan for d, o in zip(distance, open_, strict=True)]
    table["seeds_needed"] = needed
    table["detectable"] = table["spread"] * table["seeds"].map(lambda seeds: detectable(seeds, share))
    return table.drop(columns=["edge"])


def _pooled(found: pd.DataFrame, mean: float, of_images: float) -> dict[str, float]:
    """The 95% interval with the residuals of all settings of the network pooled, where the effect is a difference of
    two of them: beside the verdict, which does not depend on it."""
    from scipy.stats import t

    df = found["pooled_df"].iloc[0] if "pooled_df" in found else 0
    if not df > 0:
        return {"pooled_low": math.nan, "pooled_high": math.nan}
    variance = found["pooled_variance"].iloc[0] / len(found) + of_images
    half_width = t.ppf((1 + 0.95) / 2, df) * math.sqrt(variance)
    return {"pooled_low": mean - half_width, "pooled_high": mean + half_width}


def _tested(claim: Claim, values: pd.Series, of_images: float) -> dict[str, float]:
    """The standard deviation over seeds and two p-values, two-sided: of the claim's region, and of equivalence."""
    mean, spread = values.mean(), values.std()
    if len(values) < 2 or not spread > 1e-9 * abs(mean):
        return {"spread": math.nan, "p": math.nan, "p_equivalent": math.nan}
    edges = [edge for edge in (claim.low, claim.high) if math.isfinite(edge)]
    if not claim.inside(mean):
        edges = [claim.edge(mean)]
    equivalent = 1.0
    if abs(mean) < claim.equivalent:
        equivalent = max(p_value(values, edge, of_images) for edge in (-claim.equivalent, claim.equivalent))
    p = max(p_value(values, edge, of_images) for edge in edges)
    return {"spread": spread, "p": p, "p_equivalent": equivalent}


def _verdict(claim: Claim, effect: float, p: float, p_equivalent: float, level: float) -> str:
    if p_equivalent < level:
        return NEGLIGIBLE
    if not p < level:
        return NOT_DECIDED
    return SUPPORTED if claim.inside(effect) else CONTRADICTED


def p_value(values: Sequence[float], edge: float, more_variance: float = 0.0) -> float:
    """Of Student's t, two-sided: that the mean of independent ``values`` is ``edge``. See ``metrics.interval``."""
    from scipy.stats import sem, t

    values = np.asarray(values, dtype=float)
    statistic = (values.mean() - edge) / math.sqrt(sem(values) ** 2 + more_variance)
    return float(2 * t.sf(abs(statistic), len(values) - 1))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Adjusted for their number, step by step (Holm 1979): to be compared with the level itself."""
    p_values = np.asarray(p_values, dtype=float)
    order = np.argsort(p_values)
    stepped = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted


def level_at(seeds: int, looks: Sequence[int]) -> float:
    """The level of a verdict: LEVEL, or the share of it that is spent at the last of the planned ``looks``.

    By the spending function of Lan and DeMets (1983) after O'Brien and Fleming; the looks' shares are added, which is
    conservative. 0 before the first look.
    """
    if not looks:
        return LEVEL
    passed = [look for look in sorted(looks) if look <= seeds]
    if not passed:
        return 0.0
    now, before = passed[-1], passed[-2] if len(passed) > 1 else None
    return _spent(now / max(looks)) - (_spent(before / max(looks)) if before else 0.0)


def _spent(share: float) -> float:
    from scipy.stats import norm

    return float(2 * norm.sf(norm.isf(LEVEL / 2) / math.sqrt(share)))


def power(seeds: int, distance: float, level: float = LEVEL) -> float:
    """Of a two-sided t-test on so many seeds, for a mean that is ``distance`` standard deviations from the edge."""
    from scipy.stats import nct, t

    found = nct.sf(t.isf(level / 2, seeds - 1), seeds - 1, distance * math.sqrt(seeds))
    return 1.0 if math.isnan(found) else float(found)  # SciPy has no value far out


def seeds_needed(distance: float, level: float = LEVEL, looks: Sequence[int] = ()) -> float:
    """The fewest seeds with a power of 80%; infinite for more than MOST_SEEDS. With ``looks`` the first of them that
    has it at its share of the level; if none has, as many as without, and no fewer than the last."""
    for look in sorted(looks):
        if power(look, distance, level / LEVEL * level_at(look, looks)) >= POWER:
            return look
    if looks:
        return max(max(looks), seeds_needed(distance, level))
    if not distance > 0 or power(MOST_SEEDS, distance, level) < POWER:
        return math.inf
    return 2 + bisect_left(range(2, MOST_SEEDS + 1), POWER, key=lambda seeds: power(seeds, distance, level))


@cache
def detectable(seeds: int, level: float = LEVEL) -> float:
    """How many standard deviations from the edge so many seeds find with a power of 80%."""
    from scipy.optimize import brentq

    if seeds < 2:
        return math.nan
    return float(brentq(lambda distance: power(seeds, distance, level) - POWER, 1e-3, 1e3))


def _with_published_effects(table: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """With the paper's number for the very setting, where a claim is about it, and whether the interval excludes it."""
    theirs = published.rename(columns={"relative_error_improvement": "published_effect"})
    theirs = theirs[["dataset", "model", "method", "bits", "published_effect"]]
    table = table.merge(theirs, on=["dataset", "model", "method", "bits"], how="left")
    about_it = table["measure"].eq(IMPROVEMENT) & table["variant"].fillna("").eq("")
    table.loc[~about_it, "published_effect"] = math.nan
    outside = (table["published_effect"] < table["low"]) | (table["published_effect"] > table["high"])
    return table.assign(published_excluded=outside.where(table["published_effect"].notna(), None))


def _quantized_settings(frame: pd.DataFrame) -> pd.DataFrame:
    """The quantized ones of the paper's settings."""
    return paper_settings(frame).query("method != 'fp32'")


def _effects(frame: pd.DataFrame, value: pd.Series, detail: str | pd.Series = "") -> pd.DataFrame:
    """KEYS, seed and value of each row of ``frame``: in reading order, the widest setting first."""
    effects = sort_settings(frame.assign(detail=detail, value=value).sort_values("seed"))
    method = effects.groupby([*COMPARED_WITHIN, "method"], sort=False).ngroup()
    effects = effects.assign(_method=method).sort_values(["_method", "detail"], kind="stable")
    more = [name for name in ("image_variance", "pooled_variance", "pooled_df") if name in effects]
    return effects.assign(bits=effects["weight_bits"])[[*KEYS, "seed", "value", *more]]


IMPROVEMENT = "relative error improvement"
NO_EFFECTS = pd.DataFrame(columns=[*KEYS, "seed", "value"])


def _noise_claims(noise: pd.DataFrame) -> Iterator[tuple[Claim, pd.DataFrame]]:
    grows = Claim(
        "Noise doubles with every bit less",
        "log2 of sigma(noise) / sigma(weights), minus that of the next wider setting, a bit between them; claimed from "
        "0.75 to 1.25",
        0.75,
        1.25,
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
    relative = mean_over_layers(last, last["sigma"] / last["weight_sigma"], keys)
    relative = relative.assign(activation_bits=relative["weight_bits"])
    relative = relative.sort_values("weight_bits", ascending=False)
    series = relative.groupby([*COMPARED_WITHIN, "method", "seed"])
    wider = series["weight_bits"].shift()
    growth = (relative["value"] / series["value"].shift()).map(math.log2, na_action="ignore")
    growth = growth / (wider - relative["weight_bits"])
    steps = relative.assign(growth=growth, wider=wider).dropna()
    yield grows, _effects(steps, steps["growth"], steps["wider"].map("than {:.0f} bits".format))
    if "distance_to_normal" not in last:
        yield normal, NO_EFFECTS
    else:
        distance = mean_over_layers(last, last["distance_to_normal"], [*keys, "activation_bits"])
        yield normal, _effects(distance, distance["value"], "mean of the layers")


def _penalty_claim(penalty: pd.DataFrame) -> tuple[Claim, pd.DataFrame]:
    claim = Claim(
        "The penalty predicts the change of the loss",
        "log2 of measured over predicted change of the squared error of FP32 networks, with batch norm as in training, "
        "claimed within a factor of 2",
        -1,
        1,
        "derived, not measured",
    )
    if penalty.empty:
        return claim, NO_EFFECTS
    names = {"normal": "normal noise of this size", "quantization": "rounding the weights"}
    penalty = with_statistics(penalty)
    rows = penalty[(penalty["method"] == "fp32") & penalty["noise"].isin(names) & penalty["bits"].isin([8, 4, 2])]
    rows = rows.assign(weight_bits=rows["bits"])  # of which activations have none
    ratio = (rows["measured"] / rows["predicted"]).where(rows["measured"] > 0)  # a fall has no logarithm
    return claim, _effects(rows, ratio.map(math.log2, na_action="ignore"), rows["noise"].map(names))


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
        yield Claim(name, IMPROVEMENT, *region, evidence, SMALLEST_PUBLISHED), _effects(rows, rows["improvement"])


def _loss_claims(improvement: pd.DataFrame) -> Iterator[tuple[Claim, pd.DataFrame]]:
    """The same of the negative log-likelihood, which is several times as sensitive; of classifiers."""
    for bits, (low, high) in {8: (0, math.inf), 4: (0, math.inf), 2: (-math.inf, 0)}.items():
        name = f"In log-likelihood, {bits} bits {'beat' if high > 0 else 'are worse than'} FP32 on corrupted data"
        effect = "100 log10 of FP32's negative log-likelihood over the quantized network's"
        rows = improvement[improvement["weight_bits"] == bits]
        claim = Claim(name, effect, low, high, "stated of accuracy", SMALLEST_PUBLISHED)
        yield claim, _effects(rows, rows["improvement"])


def _profile_claim(metrics: pd.DataFrame, published: pd.DataFrame | None) -> tuple[Claim, pd.DataFrame]:
    """Of networks and data sets that are the paper's own."""
    claim = Claim(
        "Which corruptions gain and which lose is as published",
        "Spearman's correlation of the differences to FP32 with the published ones, over the corruptions",
        0,
        math.inf,
        "heatmap",
    )
    deltas = paper_settings(difference_to_fp32(cell_scores(metrics)))
    if published is None or deltas.empty:
        return claim, NO_EFFECTS
    theirs = published_settings(published).rename(columns={"delta_vs_fp32": "published_delta"})
    both = deltas[deltas["cell"].isin(PAPER_CORRUPTIONS)].merge(theirs[[*CONFIGURATION, "cell", "published_delta"]])
    both = both.dropna(subset=["published_delta"])
    if both.empty:
        return claim, NO_EFFECTS
    groups = both.groupby([*CONFIGURATION, "seed"])[["delta", "published_delta"]]
    rho = groups.apply(lambda cells: cells.corr("spearman").iloc[0, 1]).rename("value").reset_index()
    return claim, _effects(rho, rho["value"])


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
        "relative error improvement of the control minus that of its noise source (the quantizer at the same widths), "
        f"claimed within {SMALLEST_PUBLISHED} (the paper's smallest effect) of 0",
        -SMALLEST_PUBLISHED,
        SMALLEST_PUBLISHED,
        "assumed",
    )
    sources = {name: row.noise_source for name, row in METHODS.items() if row.kind == CONTROL}
    controls = improvement[improvement["method"].isin(sources)]
    controls = controls.assign(source=controls["method"].map(sources))
    keys = [*PAIRED, "source", "weight_bits", "activation_bits"]
    found = improvement.rename(columns={"method": "source"})[[*keys, "improvement", "image_variance"]]
    paired = of_a_difference(controls.merge(found, on=keys, suffixes=("", "_source")), "_source")
    return claim, _effects(paired, paired["improvement"] - paired["improvement_source"])


def _ingredient_claims(improvement: pd.DataFrame, losses: pd.DataFrame) -> Iterator[tuple[Claim, pd.DataFrame]]:
    """Of studies that take quantization apart."""
    improvement, losses = with_ingredients(improvement), with_ingredients(losses)
    if ingredients(improvement).empty:
        return
    for name, effect, rows in [
        ("One ingredient beats FP32 on corrupted data", "relative error improvement of the ingredient", improvement),
        (
            "In log-likelihood, one ingredient beats FP32",
            "100 log10 of FP32's negative log-likelihood over that of the ingredient",
            losses,
        ),
    ]:
        claim = Claim(name, effect, 0, math.inf, "not tested", SMALLEST_PUBLISHED)
        yield claim, _ingredient_effects(ingredients(rows).assign(value=lambda found: found["improvement"]))
    within = f"claimed within {SMALLEST_PUBLISHED} (the paper's smallest effect) of 0"
    part = Claim(
        "One ingredient does what the whole does",
        f"relative error improvement of the ingredient minus that of the whole quantizer, {within}",
        -SMALLEST_PUBLISHED,
        SMALLEST_PUBLISHED,
        "not tested",
    )
    yield part, _ingredient_effects(minus_the_whole(improvement))
    rounding = Claim(
        "Rounding itself helps",
        "relative error improvement of the quantizer minus that of its own range without rounding",
        0,
        math.inf,
        "assumed",
        SMALLEST_PUBLISHED,
    )
    yield rounding, _ingredient_effects(rounding_itself(improvement))


def _ingredient_effects(rows: pd.DataFrame) -> pd.DataFrame:
    """At the width at whose scale an ingredient is; words say where it is, unless the method's label does."""
    if rows.empty:
        return NO_EFFECTS
    same = rows.assign(weight_bits=rows["width"], activation_bits=rows["width"])
    labels = same["method"].map(METHODS.label)
    pairs = zip(same["ingredient"], labels, strict=True)
    words = ["" if text == label else text.removeprefix(f"{label}, ") for text, label in pairs]
    return _effects(same, same["value"], pd.Series(words, index=same.index))


def _curve_claims(
    improvement: pd.DataFrame, losses: pd.DataFrame, noise: pd.DataFrame
) -> Iterator[tuple[Claim, pd.DataFrame]]:
    """Of studies in which weights alone have noise of several makes; in accuracy, then in log-likelihood."""
    for measure, rows in {"": improvement, "in log-likelihood ": losses}.items():
        found = off_the_curve(points(rows.drop(columns=["pooled_variance", "pooled_df"]), noise))
        if found.empty:
            continue
        said = f"{measure}the gain follows the size of the noise on the weights, whatever makes it"
        effect = (
            "improvement over the same method without rounding, minus that of training noise of the same relative "
            f"size, claimed within {SMALLEST_PUBLISHED} (the paper's smallest effect) of 0"
        )
        region = (-SMALLEST_PUBLISHED, SMALLEST_PUBLISHED)
        yield Claim(said[0].upper() + said[1:], effect, *region, "assumed"), _effects(found, found["value"])


# parameter -> what is claimed of the improvement along its axis, and the region of the slope
ALONG_AXES = {
    "epochs": ("quantization gains more the longer the training", 0, math.inf),
    "train_images": ("quantization gains less the more training images there are", -math.inf, 0),
    "augment": ("quantization gains less beside augmentation", -math.inf, 0),
    "full_precision_epochs": (
        "a start from full precision changes nothing",
        -SMALLEST_PUBLISHED,
        SMALLEST_PUBLISHED,
    ),
}


def _axis_claims(
    improvement: pd.DataFrame, losses: pd.DataFrame, budgets: pd.DataFrame | None
) -> Iterator[tuple[Claim, pd.DataFrame]]:
    """Of studies whose variants lie along axes; in accuracy, then in log-likelihood."""
    if budgets is None:
        return
    for axis in AXES:
        name, *region = ALONG_AXES[axis.parameter]
        for measure, rows in {"": improvement, "in log-likelihood ": losses}.items():
            found = slopes(axis, budgets, rows)
            if found.empty:
                continue
            said = f"{measure}{name}"
            claim = Claim(said[0].upper() + said[1:], f"change of the improvement {axis.step}", *region, "not tested")
            yield claim, _effects(found, found["value"], found["detail"])


def _reliable(
    table: pd.DataFrame, improvement: pd.DataFrame, published: pd.DataFrame, looks: Sequence[int]
) -> pd.DataFrame:
    """The claim about all of the 8-bit comparisons: as strong as the weakest of them, so that no correction is due.

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
    row = _judged(claim, effects, looks)
    each = table[table["claim"] == EIGHT_BITS_BEAT]
    if (each["verdict"] == CONTRADICTED).any():
        return row.assign(verdict=CONTRADICTED)
    levels = each["seeds"].map(lambda seeds: level_at(seeds, looks))
    gains = (each["effect"] > 0) & (each["p_alone"] < levels) & (each["verdict"] != NEGLIGIBLE)
    all_gain = len(each) and gains.all()
    measured = not (each["verdict"] == NOT_MEASURED).any()
    return row.assign(verdict=(SUPPORTED if all_gain else NOT_DECIDED) if measured else NOT_MEASURED)
