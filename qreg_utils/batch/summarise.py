"""A study in figures and tables: ``make summary STUDY=quick``, or ``python -m qreg_utils.batch.summarise quick``.

Only the files that experiments have left in results/<study>/ are read, and nothing is trained. An interrupted or failed
summary leaves the one before it as it was. The exit status is 2, after one line, where there is nothing to summarise.
"""

import argparse
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path

from filelock import FileLock

from qreg_utils import PROJECT
from qreg_utils.batch.notebooks import execute_notebook, from_here
from qreg_utils.batch.pages import PageError, write_pages
from qreg_utils.results import PART, committed_study, write_text
from qreg_utils.study import StudyError

WRITTEN = ("table.csv", "table.md", "claims.csv", "figures")  # by the notebook itself, while it runs
BACKUP = ".before"  # in the study's folder, while the notebook runs
NO_ALT = "No description has been provided for this image"  # nbconvert's
ON_PAPER = """@media print {
  body { font-size: 9pt; } table { font-size: 7pt; } td, th { padding: 2px !important; white-space: normal !important; }
  img { max-width: 100%; height: auto; } tr, img { break-inside: avoid; }
}"""
TERMINATED = 143  # exit status of a program that SIGTERM has ended


def main(arguments: list[str] | None = None, project: Path = PROJECT) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="qreg_utils.batch.summarise", description="A study in figures and tables.")
    parser.add_argument("study", help="a folder of results/")
    name = parser.parse_args(arguments).study
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # so that the backup is put back
    try:
        committed_study(project / "results", name)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    summarise(name, project)
    try:
        write_pages(project)
    except PageError as error:  # of a study that is not here any more: the summary is made all the same
        print(error, file=sys.stderr)
    return 0


def summarise(study: str, project: Path = PROJECT) -> None:
    """Execute summary.ipynb on results/<study>/; summary.ipynb and summary.html there are replaced at the end."""
    folder = project / "results" / study
    part = folder / PART
    with FileLock(folder / ".lock"), restored_after_failure(folder):
        shutil.rmtree(part, ignore_errors=True)
        try:
            notebook = part / "summary.ipynb"
            source = project / "notebooks" / "summary.ipynb"
            execute_notebook(from_here(source), from_here(notebook), "-r", "study", study)
            write_text(notebook.with_suffix(".html"), as_page(notebook))
            for path in (notebook, notebook.with_suffix(".html")):
                path.replace(folder / path.name)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def as_page(notebook: Path) -> str:
    """An executed notebook as HTML without its code, which needs no network: its formulas are MathML, its figures are
    in it, it fits on paper, and the scripts that nbconvert would load from elsewhere (MathJax, RequireJS, Mermaid) are
    left out.

    Images get the ``alt`` of their output's metadata, which nbconvert does not look at.
    """
    import nbformat
    from nbconvert import HTMLExporter

    executed = nbformat.read(notebook, as_version=4)
    for cell in executed.cells:
        if cell.cell_type == "markdown":
            cell.source = with_mathml(cell.source)
    exporter = HTMLExporter(exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True)
    page, _ = exporter.from_notebook_node(executed)
    texts = iter(_image_texts(executed))
    page = re.sub(NO_ALT, lambda _: escape(next(texts)), page)
    page = re.sub(r"<script\b[^>]*>.*?</script>", "", page, flags=re.DOTALL)
    return page.replace("</head>", f"<style>{ON_PAPER}</style></head>", 1)


def with_mathml(markdown: str) -> str:
    """Markdown whose TeX formulas, between dollar signs, are MathML, which browsers draw by themselves."""
    from latex2mathml.converter import convert

    text = re.sub(r"\$\$(.+?)\$\$", lambda tex: convert(tex[1].strip(), display="block"), markdown, flags=re.DOTALL)
    return re.sub(r"\$([^$\n]+)\$", lambda tex: convert(tex[1]), text)


def _image_texts(notebook) -> list[str]:
    """What stands for each image of a notebook's outputs, in their order."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    kinds = ("image/png", "image/jpeg")
    return [output.metadata.get(kind, {}).get("alt", "") for output in outputs for kind in kinds if kind in output.data]


@contextmanager
def restored_after_failure(folder: Path) -> Iterator[None]:
    """Put the files of the last summary back when the block fails; after it, delete those that it has not renewed.

    A backup that a killed process has left is that of the last complete summary.
    """
    backup = folder / BACKUP
    if not backup.exists():
        part = backup.with_name(f"{BACKUP}.part")
        shutil.rmtree(part, ignore_errors=True)
        _copy(folder, part)
        part.rename(backup)
    before = _times(folder)
    try:
        yield
    except BaseException:
        _delete(folder)
        _copy(backup, folder)
        shutil.rmtree(backup)
        raise
    now = _times(folder)
    for path in (path for path, time in before.items() if now.get(path) == time):
        path.unlink()
    shutil.rmtree(backup)


def _copy(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for path in (source / name for name in WRITTEN if (source / name).exists()):
        if path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copy2(path, target)


def _delete(folder: Path) -> None:
    for name in WRITTEN:
        shutil.rmtree(folder / name, ignore_errors=True)
        if (folder / name).is_file():
            (folder / name).unlink()


def _times(folder: Path) -> dict[Path, int]:
    """When each of a summary's files was written."""
    paths = [path for name in WRITTEN for path in (folder / name, *(folder / name).glob("*"))]
    return {path: path.stat().st_mtime_ns for path in paths if path.is_file()}


if __name__ == "__main__":
    sys.exit(main())
