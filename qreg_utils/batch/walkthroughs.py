"""The numbered notebooks, executed into results/walkthroughs/: ``make walkthroughs``, or some by their numbers."""

import re
import sys
from pathlib import Path

import nbformat

from qreg_utils import PROJECT
from qreg_utils.batch.notebooks import execute_notebook, from_here

WALKTHROUGH = re.compile(r"\d\w*_\w+\.ipynb")
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s]+)\)")


def relinked(markdown: str, source: Path, target: Path) -> str:
    """The text of a notebook in the folder ``source``, with relative links as seen from ``target``; both are relative
    to the project. A link to another walkthrough stays: it is executed there, too."""
    up = Path(*[".."] * len(target.parts))

    def moved(match: re.Match) -> str:
        if WALKTHROUGH.fullmatch(match[1]):
            return match[0]
        parts: list[str] = []
        for part in (source / match[1]).parts:
            if part == "..":
                parts.pop()
            else:
                parts.append(part)
        return f"]({up.joinpath(*parts).as_posix()})"

    return LINK.sub(moved, markdown)


def execute_walkthrough(notebook: Path, target: Path) -> None:
    """``target`` is a folder of the project; its links lead to where those of ``notebook`` do."""
    executed = target / notebook.name
    execute_notebook(from_here(notebook), from_here(executed))
    content = nbformat.read(executed, as_version=4)
    for cell in content.cells:
        if cell.cell_type == "markdown":
            folders = (path.relative_to(PROJECT) for path in (notebook.parent, target))
            cell.source = relinked(cell.source, *folders)
    nbformat.write(content, executed)


def main(numbers: list[str]) -> None:
    """``numbers`` are what names begin with: 1, 1b; none stands for all."""
    for notebook in sorted((PROJECT / "notebooks").glob("[0-9]*_*.ipynb")):
        if not numbers or notebook.name.partition("_")[0] in numbers:
            execute_walkthrough(notebook, PROJECT / "results" / "walkthroughs")


if __name__ == "__main__":
    main(sys.argv[1:])
