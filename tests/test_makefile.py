"""What `make` says: the list of targets, and how a study or a summary ends, with stand-ins for what it calls."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run_make(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "results" / "quick" / "one").mkdir(parents=True)
    (tmp_path / "results" / "quick" / "table.md").write_text("THE TABLE")  # as committed, from another run
    (tmp_path / ".venv" / "ready").write_text(f"{os.path.realpath(tmp_path)}\n")

    def run(name, script, *arguments, finished=()):
        program = tmp_path / ".venv" / "bin" / name
        program.write_text(f"#!/bin/sh\necho called: $* for study=$QREG_STUDY\n{script}\n")
        program.chmod(0o755)
        for experiment in finished:
            (tmp_path / "results" / "quick" / experiment / ".done").touch()
        return call_make(tmp_path, *arguments)

    return run


@pytest.fixture
def make(run_make):
    return lambda snakemake, *finished: run_make("snakemake", snakemake, "study", finished=finished)


@pytest.fixture
def make_summary(run_make):
    return lambda python, *arguments: run_make("python", python, "summary", *arguments)


def call_make(folder, *arguments):
    outside = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}  # of a `make test`
    return subprocess.run(["make", *arguments], cwd=folder, env=outside, capture_output=True, text=True)


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


@pytest.mark.parametrize("name", ["8", "007", "2026_11_25", "1e3", "true"])
def test_a_studys_name_is_taken_as_typed(run_make, name):
    done = run_make("snakemake", "exit 2", "study", f"STUDY={name}")
    assert f"for study={name}\n" in done.stdout


@pytest.fixture
def set_up(tmp_path):
    """What `make .venv/ready` does, with a stand-in for Python that makes a .venv and says what it was called with."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho "called: $* PIP_USER=$PIP_USER"\nif [ "$2" = venv ]; then mkdir -p .venv/bin; '
        "for name in python uv; do cp python .venv/bin/$name; done; fi\n"
    )
    python.chmod(0o755)
    return lambda folder=tmp_path: call_make(folder, ".venv/ready", "PYTHON=./python")


def test_the_environment_is_set_up_once(set_up):
    assert "-m venv .venv" in set_up().stdout
    assert "called" not in set_up().stdout


def test_a_venv_of_a_folder_that_was_renamed_or_copied_is_made_again(set_up, tmp_path):
    set_up()
    copy = tmp_path.with_name("copy")
    shutil.copytree(tmp_path, copy)
    (copy / ".venv" / "stale").touch()
    assert "-m venv .venv" in set_up(copy).stdout
    assert not (copy / ".venv" / "stale").exists() and "called" not in set_up(copy).stdout


def test_pips_own_settings_for_another_place_do_not_reach_the_set_up(set_up, monkeypatch):
    monkeypatch.setenv("PIP_USER", "1")
    assert "PIP_USER=1" not in set_up().stdout


TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("arguments", [(), ("help",)])
def test_plain_make_lists_every_target_and_sets_nothing_up(tmp_path, arguments):
    shutil.copy(ROOT / "Makefile", tmp_path)
    done = call_make(tmp_path, *arguments)
    assert done.returncode == 0 and [path.name for path in tmp_path.iterdir()] == ["Makefile"]
    lines = [re.fullmatch(r"make ([a-z-]+) +(\S.*)", line) for line in done.stdout.splitlines()]
    assert all(lines), done.stdout
    assert [line[1] for line in lines] == list(dict.fromkeys(TARGETS))
    assert {"study", "summary", "verify", "test-fast", "walkthroughs"} <= set(TARGETS)


def test_every_target_is_phony():
    phony = re.search(r"^\.PHONY: (([^\\\n]|\\\n)*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert set(phony.replace("\\\n", " ").split()) == set(TARGETS)


def test_a_summary_ends_with_the_table_and_where_to_look(make_summary):
    done = make_summary("echo executing >&2", "STUDY=quick")
    assert done.returncode == 0 and done.stderr == ""
    assert "called: -m qreg_utils.batch.summarise quick" in done.stdout and "THE TABLE" in done.stdout
    assert done.stdout.strip().endswith("Figures and tables: results/quick/summary.html")


def test_a_summary_that_fails_says_why_in_one_line(make_summary):
    done = make_summary("echo results/nope: no committed results >&2; exit 2", "STUDY=nope")
    assert done.returncode == 2 and "THE TABLE" not in done.stdout
    assert [line for line in done.stderr.splitlines() if "make:" not in line] == ["results/nope: no committed results"]
