"""Tables of results on pages that people read: written between markers of README.md and docs/ from results/.

``<!-- results: table quick -->`` ... ``<!-- /results -->`` holds the table of a study, and
``<!-- results: verdicts cifar10-cpu voc-small -->`` a row for each claim of the paper, with what these studies say.
``python -m qreg_utils.batch.pages`` writes them all; so does every summary.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from qreg_utils import PROJECT
from qreg_utils.atomic import atomic_write
from qreg_utils.claims import NOT_MEASURED
from qreg_utils.metrics import with_variant
from qreg_utils.names import DATASETS

MARKED = re.compile(r"(<!-- results: ([^>\n]+?) -->\n)(.*?)(<!-- /results -->)", re.DOTALL)
# What the paper says, in a line -> the claims of claims.csv that test it
CLAIMS = {
    "8 bits of LSQ gain on corrupted images": "8 bits beat FP32 on corrupted data",
    "4 bits gain, too (classifiers)": "4 bits beat FP32 on corrupted data (classifiers)",
    "2 bits lose": "2 bits are worse than FP32 on corrupted data",
    "noise and blur gain, contrast and fog lose": "Which corruptions gain and which lose is as published",
    "FP32 overfits where quantized networks do not": "FP32 overfits where quantized models do not (gap)",
    "the noise of quantization is normal": "The noise is normal",
    "it doubles with every bit less": "Noise doubles with every bit less",
    "its first-order penalty is what it does to the loss": "The penalty predicts the change of the loss",
    "noise on the weights is what regularizes": "Noise alone does what quantization does",
}


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
        found = {study: rows[rows["claim"] == claim] for study, rows in measured.items()}
        lines = [_in_words(study, own) for study, own in found.items() if len(own)]
        rows.append(
            {"the paper says": says, "found: effect [95% interval], seeds": "<br>".join(lines) or "not measured"}
        )
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def _in_words(study: str, rows: pd.DataFrame) -> str:
    """One comparison with its effect; of several, how many have which verdict."""
    where = f"`{study}` ({', '.join(dict.fromkeys(map(DATASETS.label, rows['dataset'])))})"
    if len(rows) > 1:
        verdicts = rows["verdict"].value_counts()
        return f"{where}: {', '.join(f'{count} {verdict}' for verdict, count in verdicts.items())}"
    (row,) = rows.itertuples()
    effect = f"{row.effect:+.2f}" + ("" if pd.isna(row.low) else f" [{row.low:+.2f}, {row.high:+.2f}]")
    return f"{where}: {effect}, {row.seeds}: **{row.verdict}**"


MAKERS: dict[str, Callable[..., str]] = {"table": _table, "verdicts": _verdicts}


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
