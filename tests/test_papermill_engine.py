"""A kernel of the batch is this project's, whatever the person who starts it has set up for Jupyter and matplotlib."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
CELL = """
import sys, os, matplotlib
assert "favourite" not in globals(), "a startup file of IPython's has run"
assert matplotlib.rcParams["lines.linewidth"] != 77, "a matplotlibrc of the user's counts"
print("kernel of", sys.executable)
"""


@pytest.fixture
def surroundings(tmp_path):
    """A home with an IPython startup file, a matplotlibrc and a broken kernel called python3; a long TMPDIR."""
    startup = tmp_path / ".ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "mine.py").write_text("from rich import print\nfavourite = 7\n")
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 77\n")
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "Broken", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    long = tmp_path / ("long" * 25)
    long.mkdir()
    return {
        "HOME": str(tmp_path),
        "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"),
        "JUPYTER_PATH": str(tmp_path / "jupyter"),
        "TMPDIR": str(long),
    }


def test_a_persons_own_settings_do_not_reach_the_kernel(surroundings, tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    notebook.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(notebook, tmp_path / "in.ipynb")
    command = [sys.executable, "-m", "qreg_utils.batch.notebooks", tmp_path / "in.ipynb", tmp_path / "out.ipynb"]
    environment = {**os.environ, **surroundings}
    environment.pop("IPYTHONDIR", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"kernel of {sys.executable}" in (tmp_path / "out.ipynb").read_text()
