"""How notebooks are executed: one papermill command line for the batch, summaries, ``make verify`` and walkthroughs.

``python -m qreg_utils.batch.notebooks <notebook> <output> [papermill's options]``
"""

import argparse
import os
import runpy
import signal
import sys
from pathlib import Path

from qreg_utils.batch.prepared import forked
from qreg_utils.progress import UNFINISHED

OPTIONS = ("--engine", "qreg", "--log-output", "--no-progress-bar")


def execute_notebook(notebook: Path, output: Path, *options: str) -> None:
    """Run papermill in this process; ``output`` is there, or replaced, only when every cell has succeeded.

    Until then, and after a failure, what there is of it is called unfinished.ipynb. ``options`` are papermill's, such
    as ``-p``. papermill writes both paths into the notebook: see ``from_here``. Raises what papermill raises, and
    SystemExit where it refuses its arguments.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(UNFINISHED)
    sys.modules.setdefault("rfc3987_syntax", None)  # jsonschema's check of IRIs, optional: two seconds, for no notebook
    outside, sys.argv = sys.argv, ["papermill", *OPTIONS, str(notebook), str(unfinished), *options]
    try:
        runpy.run_module("papermill", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code:
            raise
    finally:
        sys.argv = outside
    unfinished.replace(output)


def from_here(path: Path) -> Path:
    """Relative to the working directory where it lies within: so that a notebook which is committed names no path of
    the machine that ran it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def execute(arguments: list[str]) -> None:
    """``execute_notebook``, of a command line."""
    parser = argparse.ArgumentParser(prog="qreg_utils.batch.notebooks", description=execute_notebook.__doc__)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("output", type=Path)
    known, options = parser.parse_known_args(arguments)
    execute_notebook(known.notebook, known.output, *options)


def main(arguments: list[str]) -> None:
    """In a process that the batch has prepared, or in this one where there is none."""
    process = forked("notebook", arguments, dict(os.environ), [0, 1, 2])
    if process is None:
        execute(arguments)
        return
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        status = process.wait()
    sys.exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    main(sys.argv[1:])
