"""What `make study` tells a person when experiments fail, with a stand-in for Snakemake."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def make(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "results" / "quick" / "one").mkdir(parents=True)
    (tmp_path / "results" / "quick" / "table.md").write_text("THE TABLE")  # as committed, from another run
    (tmp_path / ".venv" / "ready").touch()

    def run(snakemake, *finished):
        program = tmp_path / ".venv" / "bin" / "snakemake"
        program.write_text(f"#!/bin/sh\necho called: $*\n{snakemake}\n")
        program.chmod(0o755)
        for name in finished:
            (tmp_path / "results" / "quick" / name / ".done").touch()
        outside = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}  # of a `make test`
        return subprocess.run(["make", "study"], cwd=tmp_path, env=outside, capture_output=True, text=True)

    return run


def test_success_ends_with_the_table_and_where_to_look(make):
    done = make("exit 0")
    assert done.returncode == 0
    assert "study=quick" in done.stdout and "THE TABLE" in done.stdout
    assert done.stdout.strip().endswith("Figures and tables: results/quick/summary.html")


def test_after_a_failure_what_has_finished_is_summarised(make):
    done = make('case "$*" in *finished_only*) exit 0;; *) exit 1;; esac', "one")
    assert done.returncode != 0
    assert "finished_only=true" in done.stdout and "THE TABLE" in done.stdout


@pytest.mark.parametrize("snakemake, finished", [("exit 1", []), ("exit 1", ["one"]), ("exit 2", ["one"])])
def test_no_table_of_another_run_is_shown(make, snakemake, finished):
    done = make(snakemake, *finished)
    assert done.returncode != 0
    assert "THE TABLE" not in done.stdout
