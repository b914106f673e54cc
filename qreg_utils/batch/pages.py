"""Tables of results on pages that people read: written between markers of README.md and docs/ from results/.

``<!-- results: table quick -->`` ... ``<!-- /results -->`` holds the table of a study, and
``<!-- results: verdicts cifar10-cpu voc-small -->`` a row for each claim of the paper, with what these studies say;
``<!-- results: evidence mechanism+cifar10-cpu voc-small -->`` a table for each claim, with a row for each study, and
the mean of those that a plus sign calls comparable.
``python -m qreg_utils.batch.pages`` writes them all; so does every summary.
"""

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pandas as pd

from qreg_utils import PROJECT
from qreg_utils.atomic import atomic_write
from qreg_utils.claims import MOST_SEEDS, NOT_DECIDED, NOT_MEASURED
from qreg_utils.metrics import (
    COMPARED_WITHIN,
    interval_text,
    network_label,
    random_effects,
    setting_label,
    with_variant,
)
from qreg_utils.names import DATASETS, METHODS

MARKED = re.compile(r"(<!-- results: ([^>\n]+?) -->\n)(.*?)(<!-- /results -->)", re.DOTALL)
# What the paper says, in a line -> the claims of claims.csv that test it
CLAIMS = {
    "8 bits of LSQ gain on corrupted images": "8 bits beat FP32 on corrupted data",
    "4 bits gain, too (classifiers)": "4 bits beat FP32 on corrupted data (classifiers)",
    "4 bits lose (detectors)": "4 bits are worse than FP32 on corrupted data (detectors)",
    "2 bits lose": "2 bits are worse than FP32 on corrupted data",
    "noise and blur gain, contrast and fog lose": "Which corruptions gain and which lose is as published",
    "FP32 overfits where quantized networks do not": "FP32 overfits where quantized models do not (gap)",
    "the noise of quantization is normal": "The noise is normal",
    "the noise doubles with every bit less": "Noise doubles with every bit less",
    "its first-order penalty is what the noise does to the loss": "The penalty predicts the change of the loss",
    "noise on the weights is what regularizes": "Noise alone does what quantization does",
}
VERDICT_COLUMNS = ("the paper says", "found: effect [95% interval], seeds")
EVIDENCE_COLUMNS = ("study", "compared", "effect [95% interval]", "published", "seeds", "verdict")
LISTED = 3  # so many comparisons of a study have a line each in the table of the evidence
COMPARED = ["dataset", "method", "bits", "activation_bits", "detail"]  # the same comparison in another study


class PageError(ValueError):
    """A marker asks for something that there is not; the message names the page and the marker."""


def pages(project: Path) -> list[Path]:
    """Those that may have markers."""
    return [path for path in (project / "README.md", *sorted((project / "docs").glob("*.md"))) if path.exists()]


def filled(path: Path, results: Path) -> str:
    """The page with its tables made again. Raises PageError for a marker that cannot be filled."""

    def fill(match: re.Match) -> str:
        what, *studies = match[2].split()
        if what not in MAKERS or not studies:
            raise PageError(f"{path.name}: <!-- results: {match[2]} -->: one of {', '.join(MAKERS)}, and studies")
        try:
            return f"{match[1]}{MAKERS[what](results, *studies).strip()}\n{match[4]}"
        except FileNotFoundError as error:
            raise PageError(f"{path.name}: <!-- results: {match[2]} -->: {error.filename} is missing") from None

    return MARKED.sub(fill, path.read_text(encoding="utf-8"))


def _table(results: Path, study: str) -> str:
    return (results / study / "table.md").read_text(encoding="utf-8")


def _measured(results: Path, study: str) -> pd.DataFrame:
    claims = with_variant(pd.read_csv(results / study / "claims.csv"))
    return claims[claims["verdict"] != NOT_MEASURED].reset_index(drop=True)


def _verdicts(results: Path, *studies: str) -> str:
    measured = {study: _measured(results, study) for study in studies}
    rows = []
    for says, claim in CLAIMS.items():
        found = {study: _rows_of(rows, claim) for study, rows in measured.items()}
        lines = [_in_words(study, own) for study, own in found.items() if len(own)]
        rows.append(dict(zip(VERDICT_COLUMNS, (says, "<br>".join(lines) or "not measured"), strict=True)))
    return _markdown(rows, VERDICT_COLUMNS)


def _in_words(study: str, rows: pd.DataFrame) -> str:
    """One comparison with its effect; of several, how many have which verdict."""
    where = f"`{study}` ({', '.join(dict.fromkeys(map(DATASETS.label, rows['dataset'])))})"
    if len(rows) > 1:
        return f"{where}: {_counts(rows)}"
    (row,) = rows.itertuples()
    return f"{where}: {interval_text(row.effect, row.low, row.high, '+.2f')}, {row.seeds}: **{row.verdict}**"


def _counts(rows: pd.DataFrame) -> str:
    """How many comparisons have which verdict."""
    return ", ".join(f"{count} {verdict}" for verdict, count in rows["verdict"].value_counts().items())


def _evidence(results: Path, *groups: str) -> str:
    """A table for each claim, with a row for each study and comparison; under studies that are one group ("a+b") the
    mean over them."""
    measured = {study: _measured(results, study) for group in groups for study in group.split("+")}
    parts = []
    for says, claim in CLAIMS.items():
        lines = []
        for group in groups:
            found = pd.concat([_rows_of(measured[study], claim).assign(study=study) for study in group.split("+")])
            for _, rows in found.groupby("study", sort=False):
                lines += [_listed(row) for row in _one_by_one(rows)] if len(rows) <= LISTED else [_counted(rows)]
            lines += [_together(rows) for _, rows in found.groupby(COMPARED, sort=False, dropna=False) if len(rows) > 1]
        table = _markdown(lines, EVIDENCE_COLUMNS) if lines else "Not measured."
        parts.append(f"### {says[0].upper()}{says[1:]}\n\n{table}\n")
    return "\n".join(["", *parts])


def _markdown(rows: Sequence[dict[str, str]], columns: Sequence[str]) -> str:
    """A table without padding: rows are long, and padded to the longest they would fill a page."""
    cells = [list(columns), ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _unbroken(text: str) -> str:
    """With spaces at which no line ends."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _rows_of(measured: pd.DataFrame, claim: str) -> pd.DataFrame:
    return measured[measured["claim"] == claim]


def _one_by_one(rows: pd.DataFrame) -> list[pd.DataFrame]:
    return [rows.iloc[[position]] for position in range(len(rows))]


def _listed(comparison: pd.DataFrame) -> dict[str, str]:
    (row,) = comparison.itertuples()
    published = "" if pd.isna(row.published_effect) else f"{row.published_effect:+.2f}"
    return {
        "study": _study(comparison),
        "compared": _compared(row),
        "effect [95% interval]": _unbroken(interval_text(row.effect, row.low, row.high, "+.2f")),
        "published": published,
        "seeds": f"{row.seeds:.0f}",
        "verdict": f"**{row.verdict}**{_would_decide(comparison)}",
    }


def _counted(rows: pd.DataFrame) -> dict[str, str]:
    """Many comparisons of a study in one line."""
    return {
        "study": _study(rows),
        "compared": f"{len(rows)} settings",
        "seeds": _range(f"{seeds:.0f}" for seeds in (rows["seeds"].min(), rows["seeds"].max())),
        "verdict": _counts(rows) + _would_decide(rows),
    }


def _together(rows: pd.DataFrame) -> dict[str, str]:
    """The mean over studies of one comparison."""
    variances = rows["spread"] ** 2 / rows["seeds"] + rows["image_variance"].fillna(0)
    mean, low, high = random_effects(rows["effect"], variances)
    first = next(rows.itertuples())
    return {
        "study": f"mean of {len(rows)} studies",
        "compared": _compared(first),
        "effect [95% interval]": _unbroken(interval_text(mean, low, high, "+.2f")),
    }


def _study(rows: pd.DataFrame) -> str:
    """The study that rows are of, and its network."""
    first = rows.iloc[0]
    return f"`{first['study']}`: {network_label(*first[COMPARED_WITHIN])}"


def _compared(row) -> str:
    words = [METHODS.label(row.method), setting_label(int(row.bits), int(row.activation_bits))]
    return ", ".join([*words, row.detail] if isinstance(row.detail, str) and row.detail else words)


def _would_decide(rows: pd.DataFrame) -> str:
    """How many seeds would decide what is not decided."""
    needed = rows.loc[rows["verdict"] == NOT_DECIDED, "seeds_needed"].dropna()
    if needed.empty:
        return ""
    ends = (f"{seeds:.0f}" if seeds <= MOST_SEEDS else f"over {MOST_SEEDS}" for seeds in (needed.min(), needed.max()))
    return f" ({_range(ends)} seeds would)"


def _range(ends: Iterable[str]) -> str:
    return " to ".join(dict.fromkeys(ends))


MAKERS: dict[str, Callable[..., str]] = {"table": _table, "verdicts": _verdicts, "evidence": _evidence}


def write_pages(project: Path) -> list[Path]:
    """Fill all pages; those that have changed."""
    changed = []
    for path in pages(project):
        text = filled(path, project / "results")
        if text != path.read_text(encoding="utf-8"):
            with atomic_write(path) as part:
                part.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed


def main(project: Path = PROJECT) -> int:
    try:
        for path in write_pages(project):
            print(f"tables written: {path.relative_to(project)}")
    except PageError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
