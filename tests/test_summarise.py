"""A summary that fails or is killed leaves the one before it; with a stand-in for the notebook."""

import html
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qreg_utils.batch import summarise
from qreg_utils.study import load_study, write_params
from tests.test_batch import default_signals
from tests.test_results import leave_results
from tests.test_study import FP32, LSQ, study_file

# papermill ... <notebook> <output> -r study <study>
PAPERMILL = """
import sys, time
from pathlib import Path
*_, notebook, output, r, name, study = sys.argv
folder = Path("results", study)
(folder / "table.csv").write_text("new")
(folder / "figures" / "heatmap.png").write_text("new")
(folder / "figures" / "new.png").write_text("new")
Path("written").touch()
{ending}
Path(output).write_text('{{"cells": [], "metadata": {{}}, "nbformat": 4, "nbformat_minor": 5}}')
"""
SUMMARY = ("summary.ipynb", "summary.html", "table.csv", "table.md", "claims.csv")
NAMES = (*SUMMARY, "figures/heatmap.png", "figures/old.png")


@pytest.fixture
def project(tmp_path):
    """A study with results and a summary of them; every file of that says "old"."""
    folder = tmp_path / "results" / "toy"
    path = study_file(tmp_path, [FP32, LSQ])
    study = load_study(path)
    write_params(study, path, folder)
    for experiment in study.experiments:
        leave_results(folder, experiment)
    (folder / "figures").mkdir()
    for name in NAMES:
        (folder / name).write_text("old")
    return tmp_path


def files(project):
    return {str(path): path.read_bytes() for path in (project / "results").rglob("*") if path.is_file()}


def left_behind(project):
    return [path.name for path in (project / "results" / "toy").iterdir() if path.name in (".part", ".before")]


def start(project, ending):
    """Summarise in a process of its own, whose papermill ends like this."""
    (project / "papermill.py").write_text(PAPERMILL.format(ending=ending))
    code = "import pathlib, sys; from qreg_utils.batch.summarise import main; sys.exit(main(['toy'], pathlib.Path()))"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    how = {"env": environment, "stderr": subprocess.PIPE, "text": True, "preexec_fn": default_signals}
    return subprocess.Popen(command, cwd=project, **how)


def finish(process):
    try:
        return process.communicate(timeout=60)[1]
    finally:
        process.kill()


def test_a_summary_takes_the_place_of_the_one_before(project):
    process = start(project, "")
    errors = finish(process)
    assert process.returncode == 0, errors
    folder = project / "results" / "toy"
    assert (folder / "table.csv").read_text() == "new" and "<html" in (folder / "summary.html").read_text()
    assert sorted(path.name for path in (folder / "figures").iterdir()) == ["heatmap.png", "new.png"]
    assert not (folder / "claims.csv").exists(), "the new one has not made it"
    assert not left_behind(project)


def test_a_summary_that_fails_leaves_the_one_before(project):
    before = files(project)
    process = start(project, "raise KeyError('no such column')")
    assert "no such column" in finish(process) and process.returncode == 1
    after = files(project)
    assert {path: after[path] for path in before} == before
    assert {Path(path).name for path in set(after) - set(before)} <= {".lock"}
    assert not left_behind(project)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_summary_that_is_interrupted_leaves_the_one_before(project, how):
    before = files(project)
    process = start(project, "time.sleep(60)")
    wait_until_it_writes(project, process)
    process.send_signal(how)
    finish(process)
    assert process.returncode not in (0, None)
    after = files(project)
    assert {path: after[path] for path in before} == before and not left_behind(project)


def wait_until_it_writes(project, process):
    while not (project / "written").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


def test_after_a_kill_the_next_one_still_knows_the_last_complete_one(project):
    before = files(project)
    process = start(project, "time.sleep(60)")
    wait_until_it_writes(project, process)
    process.kill()
    finish(process)
    assert left_behind(project)
    finish(start(project, "raise KeyError"))
    after = files(project)
    assert {path: after[path] for path in before} == before and not left_behind(project)


def test_wrong_usage_is_one_line(project, monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    before = files(project)
    assert summarise.main(["nope"], project) == 2
    assert capsys.readouterr().err == "results/nope: no committed results; studies that have some: toy\n"
    assert summarise.main(["../results/toy"], project) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert files(project) == before


def test_the_page_needs_no_network_and_every_image_has_its_sentence(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    png = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    sentences = ["Accuracy & bits, <a>.", "Predictions."]
    outputs = [
        nbformat.v4.new_output("display_data", data={kind: png}, metadata={kind: {"alt": text}})
        for kind, text in zip(("image/png", "image/jpeg"), sentences, strict=True)
    ]
    cells = [nbformat.v4.new_markdown_cell("# Title\n\n$x$"), nbformat.v4.new_code_cell("secret", outputs=outputs)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "summary.ipynb")
    page = summarise.as_page(tmp_path / "summary.ipynb")
    assert re.findall(r'alt="([^"]*)"', page) == [html.escape(text) for text in sentences]
    assert "<script" not in page and "secret" not in page
    assert not re.findall(r"""(?:src|href)=["']https?:|@import|url\(["']?https?:""", page)


def test_every_image_of_the_summary_notebook_gets_a_sentence():
    source = (Path(__file__).parent.parent / "notebooks" / "summary.ipynb").read_text(encoding="utf-8")
    calls = re.findall(r"\bshow\(|\bImage\(|display\(figure", source)
    assert len(re.findall(r"alt=alt|\\\"alt\\\": alt", source)) == len(calls) - 1  # but where show is defined
