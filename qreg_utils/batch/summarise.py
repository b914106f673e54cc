"""A study in figures and tables: ``make summary STUDY=quick``, or ``python -m qreg_utils.batch.summarise quick``.

Only the files that experiments have left in results/<study>/ are read, and nothing is trained. An interrupted or failed
summary leaves the one before it as it was. The exit status is 2, after one line, where there is nothing to summarise.
"""

import argparse
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from qreg_utils import PROJECT
from qreg_utils.batch.notebooks import execute_notebook
from qreg_utils.results import PART, committed_study
from qreg_utils.study import StudyError

WRITTEN = ("table.csv", "table.md", "claims.csv", "figures")  # by the notebook itself, while it runs
BACKUP = ".before"  # in the study's folder, while the notebook runs
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
    return 0


def summarise(study: str, project: Path = PROJECT) -> None:
    """Execute summary.ipynb on results/<study>/; summary.ipynb and summary.html there are replaced at the end."""
    folder = project / "results" / study
    part = folder / PART
    with FileLock(folder / ".lock"), restored_after_failure(folder):
        shutil.rmtree(part, ignore_errors=True)
        try:
            notebook = part / "summary.ipynb"
            execute_notebook(project / "notebooks" / "summary.ipynb", notebook, "-p", "study", study)
            to_html = ("nbconvert", "--log-level", "WARN", "--to", "html", "--no-input")
            subprocess.run([sys.executable, "-m", *to_html, str(notebook)], check=True)
            for path in (notebook, notebook.with_suffix(".html")):
                path.replace(folder / path.name)
        finally:
            shutil.rmtree(part, ignore_errors=True)


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
