"""Verdicts of a rerun in other arithmetic: which are the same, and which are the opposite."""

import shutil
from unittest.mock import patch

import pandas as pd
import pytest

from qreg_utils.batch import replicate
from qreg_utils.results import read_study
from qreg_utils.study import load_study, write_params
from tests.test_results import CODE, leave_results
from tests.test_study import FP32, LSQ, study_file

LSQ_ID = "digits-resnet8-lsq-w4a4"


@pytest.fixture
def project(tmp_path):
    """With a study of FP32 and LSQ, whose scores are made up: LSQ gains on every seed."""
    study = load_study(study_file(tmp_path, [FP32, LSQ], seeds=[0, 1, 2, 3]))
    folder = tmp_path / "results" / "toy"
    write_params(study, tmp_path / "toy.yaml", folder)
    for experiment in study.experiments:
        leave_results(folder, experiment)
        set_scores(folder / experiment.id, 70 if experiment.method == "fp32" else 80)
    noise = pd.read_csv(folder / LSQ_ID / "noise.csv").assign(weight_sigma=1.0, weights=10)
    noise.to_csv(folder / LSQ_ID / "noise.csv", index=False)
    shutil.copytree(replicate.PROJECT / "results" / "published", tmp_path / "results" / "published")
    return tmp_path


def set_scores(folder, score):
    path = folder / "metrics.csv"
    lines = path.read_text().splitlines()
    rows = [line.rsplit(",", 1)[0] for line in lines[1:]]
    seeds = lines[0].split(",").index("seed")
    scores = [score + int(row.split(",")[seeds]) * (1.3 if score > 70 else 1) for row in rows]
    path.write_text("\n".join([lines[0], *(f"{row},{s:.4f}" for row, s in zip(rows, scores, strict=True))]) + "\n")


def rerun_with(lsq):
    """In place of a real rerun: the same files, with another score of LSQ."""

    def run_again(committed, arithmetic, results, project):
        shutil.copytree(project / "results" / "toy", results)
        set_scores(results / LSQ_ID, lsq)

    return run_again


def run(project, lsq, *options):
    with patch.object(replicate, "run_again", rerun_with(lsq)), patch.multiple("qreg_utils.results", **CODE):
        return replicate.main(["toy", *options], project)


def test_the_same_verdicts_pass(project, capsys):
    assert run(project, 80) == 0
    shown = capsys.readouterr().out
    assert shown.count("## ") == len(replicate.ARITHMETICS) and "0 are the opposite" in shown


def test_an_opposite_verdict_fails_and_is_shown(project, capsys):
    assert run(project, 55, "--arithmetic", "sse41") == 1
    shown = capsys.readouterr().out
    assert "1 are the opposite" in shown and "contradicted" in shown and "supported" in shown
    assert f"{LSQ_ID}: the means differ by" in shown


def test_results_are_kept_where_asked(project, tmp_path, capsys):
    assert run(project, 80, "--arithmetic", "default", "--keep", str(tmp_path / "kept")) == 0
    assert read_study(tmp_path / "kept" / "default" / "toy").missing == {}


def test_a_study_that_is_not_there(project, capsys):
    assert run(project, 80) == 0
    capsys.readouterr()
    assert replicate.main(["other"], project) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_what_is_asked_of_this_processor_is_another_arithmetic():
    """Not a misspelt variable: PyTorch says what it uses."""
    import os
    import subprocess
    import sys

    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    variables = {**os.environ, **replicate.ARITHMETICS["default"]}
    found = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True).stdout
    assert found.strip() == "DEFAULT"
