"""The files that set the project up agree with each other, and what is committed is fit to be committed."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

from qreg_utils.batch.pages import filled, pages
from qreg_utils.study import Classification, Detection

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def requirements():
    extras = PROJECT["optional-dependencies"].values()
    return [*PROJECT["dependencies"], *(requirement for extra in extras for requirement in extra)]


def test_constraints_are_exact_versions_and_nothing_else():
    for line in constraints():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+", line), line
    names = [canonical(line.partition("==")[0]) for line in constraints()]
    assert len(names) == len(set(names))


def test_every_dependency_has_a_lower_bound_that_the_constraints_meet():
    pinned = {canonical(name): version for name, _, version in (line.partition("==") for line in constraints())}

    def key(version):
        return [int(part) for part in re.findall(r"\d+", version)[:3]]

    for requirement in requirements():
        name, bound = re.fullmatch(r"([A-Za-z0-9._-]+)>=([0-9.]+)", requirement).groups()
        assert canonical(name) in pinned, f"{name} has no exact version in constraints.txt"
        assert key(pinned[canonical(name)]) >= key(bound), requirement


def test_conda_installs_this_project_with_the_same_constraints():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["--constraint constraints.txt", "--editable .[study,dev,detection,docs]"]}
    python = next(item for item in conda if item.startswith("python="))
    assert tuple(map(int, python.removeprefix("python=").split("."))) >= (3, 11)
    assert PROJECT["requires-python"] == ">=3.11"
    assert {re.split("[<>=]", item)[0] for item in conda} == {"python", "make", "pip"}


def test_the_makefile_installs_the_same():
    makefile = (ROOT / "Makefile").read_text()
    assert "--constraint constraints.txt --editable '.[study,dev,detection,docs]'" in makefile


def test_installed_versions_are_those_of_the_constraints():
    """The environment that runs this was made from constraints.txt; skipped in one that was not."""
    from importlib.metadata import PackageNotFoundError, version

    if not (ROOT / ".venv" / "ready").exists():
        pytest.skip("not in the project's own environment")
    for line in constraints():
        name, _, expected = line.partition("==")
        try:
            assert version(name).split("+")[0] == expected, name
        except PackageNotFoundError:
            continue  # for another platform


def imported_modules(path):
    """The modules that a file of the package names in its import statements."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_science_imports_the_batch():
    package = ROOT / "qreg_utils"
    for path in package.rglob("*.py"):
        inside = path.relative_to(package)
        if inside.parts[0] != "batch" and inside.as_posix() != "detection/download.py":
            plumbing = [name for name in imported_modules(path) if name.startswith("qreg_utils.batch")]
            assert not plumbing, f"{inside} imports {', '.join(plumbing)}"


def test_every_folder_of_the_package_is_installed():
    for path in (ROOT / "qreg_utils").rglob("*.py"):
        assert (path.parent / "__init__.py").exists(), f"{path.parent} has no __init__.py: setuptools leaves it out"


def test_what_a_summary_starts_with_imports_no_torch():
    modules = ("names", "study", "metrics", "claims", "results", "provenance", "batch.summarise")
    code = f"import sys, {', '.join(f'qreg_utils.{name}' for name in modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_sources_are_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
            parameters = "parameters" in cell.metadata.get("tags", [])  # a line each
            limit = len(Classification.model_fields) + 2 if parameters else 15
            assert len(cell.source.splitlines()) <= limit, cell.source
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1


@pytest.mark.parametrize("kind", [Classification, Detection])
def test_the_experiment_notebooks_have_every_parameter_with_a_valid_default(kind):
    notebook = nbformat.read(ROOT / "notebooks" / kind.task.notebook, as_version=4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    namespace = {}
    exec(cell.source, {}, namespace)
    namespace.pop("__annotations__")
    of_the_run = ("results_dir", "keep_seeds")
    assert set(namespace) == {*kind.model_fields, *of_the_run}
    assert kind.from_notebook(namespace, also=of_the_run).method == "lsq"


@pytest.mark.parametrize("name", ["classification", "detection", "summary"])
def test_papermill_knows_every_parameter(name):
    """It cannot read annotations such as `int | None`, and would warn of an unknown parameter."""
    from papermill import inspect_notebook

    path = ROOT / "notebooks" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    namespace = {}
    exec(cell.source, {}, namespace)
    assert set(inspect_notebook(path)) == set(namespace) - {"__annotations__"}


def test_committed_results_belong_to_their_params():
    """results/<study>/ is what params/<study>.yaml asks for, all of it."""
    from qreg_utils.results import describe, read_study
    from qreg_utils.study import load_study

    folders = [path.parent for path in (ROOT / "results").glob("*/summary.html")]
    assert "quick" in {folder.name for folder in folders}
    for folder in folders:
        results = read_study(folder)
        assert results.missing == {}, folder.name
        assert f"**{folder.name}**" in describe(results)
        asked = load_study(ROOT / "params" / f"{folder.name}.yaml")
        assert load_study(folder / f"{folder.name}.yaml") == asked  # of which there may be more seeds (make extend)
        leftovers = {path.parent.name for path in folder.glob("*/run.json")} - set(results.runs)
        assert not leftovers, f"{folder.name}: experiments that the study does not have"


@pytest.mark.parametrize("path", pages(ROOT), ids=lambda path: path.name)
def test_the_tables_on_pages_are_those_of_results(path):
    assert filled(path, ROOT / "results") == path.read_text(encoding="utf-8"), "python -m qreg_utils.batch.pages"


def test_the_readme_is_read_in_three_minutes():
    readme = (ROOT / "README.md").read_bytes()
    assert len(readme) <= 8_000 and b"<!-- results: verdicts " in readme


def test_no_executed_notebook_names_a_path_of_the_machine_that_ran_it():
    for path in (ROOT / "results").rglob("*.ipynb"):
        papermill = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("papermill", {})
        assert not any(str(papermill.get(key, "")).startswith("/") for key in ("input_path", "output_path")), path
