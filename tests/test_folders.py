"""A path means the same folder wherever the command or the notebook that is given it runs."""

import subprocess
import sys
from pathlib import Path

import pytest

from qreg_utils import PROJECT, folders
from qreg_utils.folders import absolute, data_dir


@pytest.mark.parametrize("given", ["elsewhere", "~/elsewhere", "../elsewhere", "/elsewhere"])
def test_qreg_data_is_the_same_folder_for_make_study_and_make_lab(given, monkeypatch, tmp_path):
    monkeypatch.setenv("QREG_DATA", given)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = set()
    for folder in (PROJECT, PROJECT / "notebooks", tmp_path):
        monkeypatch.chdir(folder)
        found.add(data_dir())
    (found,) = found
    assert found.is_absolute() and "~" not in str(found)


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute("~/x") == tmp_path / "x"


def test_without_qreg_data_it_is_data_in_the_project(monkeypatch):
    monkeypatch.delenv("QREG_DATA", raising=False)
    assert data_dir() == PROJECT / "data"
    monkeypatch.setenv("QREG_DATA", "")
    assert data_dir() == PROJECT / "data"


def test_an_installed_package_keeps_data_out_of_site_packages(monkeypatch, tmp_path):
    monkeypatch.delenv("QREG_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(folders, "IS_CHECKOUT", False)
    assert data_dir() == tmp_path / "cache" / "qreg"
    monkeypatch.chdir(tmp_path)
    assert absolute("results/x") == tmp_path / "results" / "x"


def test_results_dir_is_expanded_in_both_notebooks():
    for name in ("classification", "detection"):
        source = (PROJECT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
        assert "absolute(results_dir)" in source and "PROJECT / results_dir" not in source


def git(folder, *arguments):
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=folder, check=True)


@pytest.fixture
def unpacked(tmp_path):
    """The package, unpacked in a folder of somebody else's repository."""
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "-m", "another project")
    project = tmp_path / "downloads" / "qreg"
    (project / "notebooks").mkdir(parents=True)
    for part in ("qreg_utils", "notebooks"):
        subprocess.run(["cp", "-r", PROJECT / part, project], check=True)
    return project


def state(project: Path, **environment) -> str:
    code = "from qreg_utils.digest import git_state; print(git_state('classification', 'classification.ipynb'))"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=project,
        env={"PYTHONPATH": str(project), "PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_an_archive_unpacked_in_another_repository_has_no_commit(unpacked):
    assert state(unpacked) == "{'commit': None, 'dirty': None}\n"


def test_git_dir_in_the_environment_does_not_name_another_commit(unpacked):
    git(unpacked, "init", "--quiet")
    git(unpacked, "add", ".")
    git(unpacked, "commit", "--quiet", "-m", "qreg")
    own = state(unpacked)
    assert "'dirty': False" in own
    assert state(unpacked, GIT_DIR=str(unpacked.parents[1] / ".git"), GIT_WORK_TREE=str(unpacked.parents[1])) == own
