"""The code that decides numbers: what changes its digest, what does not, and that none of it is left out."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from qreg_utils import digest

ROOT = Path(__file__).resolve().parent.parent

# Of Python 3.11, and nothing newer. Among it are f-strings, which 3.12.1 takes apart in its own way.
SOURCE = '''
"""A module."""

import math
from collections.abc import Iterator

SIZES = {"small": 0.25, "large": 4}


class Ring:
    """A ring."""

    width: int = 3  # in pixels

    def __init__(self, radius=1.5, *, tags=()):
        """Make one."""
        self.radius, self.tags = radius, [*tags]

    @property
    def area(self) -> float:
        return math.pi * self.radius**2


def names(rings: list[Ring], limit: int | None = None, /) -> Iterator[str]:
    """Their names."""
    for number, ring in enumerate(rings[:limit]):
        if (area := ring.area) > 2 and not ring.tags:
            yield f"{number:>{ring.width}}, {area:.2f} {{px}} {ring.radius!r}"
        else:
            yield "small"


async def wait(task):
    """Wait."""
    match task:
        case {"seconds": seconds, **rest}:
            return await task.run(seconds, **rest)
        case [first, *_] | first:
            return lambda x, y=-1: (first @ x, y if x else ...)


try:
    found = {name: b"bytes" for name in "abc" if name != "b"}
except* (OSError, ValueError) as group:
    del found
    raise RuntimeError("no") from group
'''


@pytest.fixture
def digest_of(tmp_path):
    """A function of a module's source to its digest."""

    def find(source):
        path = tmp_path / "my_parts.py"
        path.write_text(source, encoding="utf-8")
        return digest.code_digest([], [path])

    return find


def changed(source, old, new):
    assert old in source
    return source.replace(old, new)


# --- what does not matter, and what does ---


@pytest.mark.parametrize(
    "old, new",
    [
        ('"""A module."""', '"""Another sentence,\n\nand a paragraph."""'),
        ('    """A ring."""\n', ""),
        ('        """Make one."""\n', '        # No docstring any more.\n\n        """"""\n'),
        ('    """Wait."""\n', '    "Wait for it."\n'),
        ("  # in pixels", ""),
        ("import math\n", "\n\n# Constants of mathematics\nimport math  # of Python\n\n\n"),
        ('"small"', "'small'"),
        ("SIZES = {", "SIZES = {\n    # by name\n    "),
        (
            "(self, radius=1.5, *, tags=())",
            "(\n        self,\n        radius=1.5,\n        *,\n        tags=(),\n    )",
        ),
        ("math.pi * self.radius**2", "(math.pi * (self.radius ** 2))"),
        ("    width: int = 3", "    width: int = 0b11"),
        (SOURCE, SOURCE.replace("    ", "\t")),
    ],
)
def test_comments_docstrings_and_formatting_do_not_matter(digest_of, old, new):
    assert digest_of(changed(SOURCE, old, new)) == digest_of(SOURCE)


@pytest.mark.parametrize(
    "old, new",
    [
        ("0.25", "0.26"),
        ('"large": 4', '"large": 4.0'),
        ("width: int = 3", "width: int = 4"),
        ("radius=1.5", "radius=-1.5"),
        ('yield "small"', 'yield "smaller"'),
        ("{area:.2f}", "{area:.3f}"),
        ("{ring.radius!r}", "{ring.radius}"),
        ("> 2 and not", ">= 2 and not"),
        ("rings[:limit]", "rings[limit:]"),
        ("    @property\n", ""),
        ('b"bytes"', '"bytes"'),
        ("*, tags=()", "tags=()"),
        ('            yield "small"', '            yield "small"\n            "not a docstring: it is not first"'),
    ],
)
def test_what_the_code_does_matters(digest_of, old, new):
    assert digest_of(changed(SOURCE, old, new)) != digest_of(SOURCE)


def test_a_digest_is_the_same_on_every_version_of_python(digest_of):
    """If this fails, nothing but the version of Python has changed, and all results would be called out of date."""
    assert digest_of(SOURCE) == "9771bca6d37ff2c0"


def test_a_files_name_matters_and_its_place_does_not(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for name in ("a.py", "b.py"):
            (tmp_path / folder / name).write_text("SIZE = 3\n")
    first, other_folder, other_name = (
        digest.code_digest([], [tmp_path / path]) for path in ("one/a.py", "two/a.py", "one/b.py")
    )
    assert first == other_folder != other_name


def test_of_files_with_the_same_name_all_matter(tmp_path):
    """Those of an extension that is a package of packages."""
    files = [tmp_path / "__init__.py", tmp_path / "more" / "__init__.py"]
    files[1].parent.mkdir()
    for file in files:
        file.write_text("SIZE = 3\n")
    before = digest.code_digest([], files)
    for file in files:
        file.write_text("SIZE = 4\n")
        assert digest.code_digest([], files) != before
        file.write_text("SIZE = 3\n")
    assert digest.code_digest([], files) == before


def test_of_a_notebook_the_code_matters():
    def digest_with(change):
        notebook = nbformat.v4.new_notebook()
        code = nbformat.v4.new_code_cell("x = 3  # a number")
        notebook.cells = [nbformat.v4.new_markdown_cell("# Title"), code, nbformat.v4.new_code_cell("%time f(x)")]
        change(notebook)
        return digest.notebook_digest(nbformat.writes(notebook).encode())

    def execute(notebook):
        notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="3")]
        notebook.cells[1].execution_count = 7

    before = digest_with(lambda notebook: None)
    assert before == digest_with(lambda notebook: notebook.cells[0].update(source="# Another title"))
    assert before == digest_with(lambda notebook: notebook.cells[1].update(source="x = 3"))
    assert before == digest_with(execute)
    assert before == digest_with(
        lambda notebook: notebook.metadata.update(kernelspec={"name": "p", "display_name": "p"})
    )
    assert before != digest_with(lambda notebook: notebook.cells[1].update(source="x = 4"))
    assert before != digest_with(lambda notebook: notebook.cells[2].update(source="%time f(x + 1)"))  # not Python


# --- nothing is left out ---

TRAIN_AND_EVALUATE = """
import os
import torch
from qreg_utils.datasets import load_dataset
from qreg_utils.models import build_model
from qreg_utils.quantize import quantize_model
from qreg_utils.recipe import ClassificationRecipe
from qreg_utils.training import fit
from pathlib import Path

torch.set_num_threads(1)
recipe = ClassificationRecipe(
    epochs=1, batch_size=16, learning_rate=0.1, momentum=0.9, weight_decay=0.0, alpha_decay=0.0, schedule="cosine",
    augment=True,
)
data = load_dataset("digits").subset(32, 16)
model = quantize_model(build_model("resnet8", seed=0), "lsq", 4, 4)
run = fit(model, data, recipe, seed=0, checkpoint=Path(os.environ["QREG_DATA"], "checkpoint.pt"))
report("fit")

from qreg_utils.evaluation import corrupted_test_images, evaluate
from qreg_utils.theory.penalty import penalty_rows
import qreg_utils.theory.sharpness

evaluate({0: model}, data, corrupted_test_images(data), [3], quantized=True)
images, labels = data.normalise(data.train_images[:2]), data.train_labels[:2]
penalty_rows(model, images, labels, seed=0, draws=1)
report("evaluate")
"""

DETECTION = """
import qreg_utils.detection.training, qreg_utils.detection.evaluation, qreg_utils.detection.yolo
report("evaluate")
"""

REPORT = """
import json, sys
def report(what):
    files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    ours = {name: file for name, file in files.items() if name.partition(".")[0] == "qreg_utils" and file}
    print(json.dumps({what: ours}), file=sys.stderr)
"""


def modules_that(code, folder):
    """For each ``report(what)`` in ``code`` the package's modules that are imported by then, with their paths in it."""
    environment = os.environ | {"QREG_DATA": str(folder), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("QREG_EXTENSIONS", None)
    command = [sys.executable, "-c", REPORT + code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    return {
        what: {name: Path(file).relative_to(digest.PACKAGE).as_posix() for name, file in modules.items()}
        for report in reports
        for what, modules in report.items()
    }


def left_out(modules, parts):
    """The modules whose files are neither among ``parts`` nor in one of them."""
    return [
        name for name, file in modules.items() if not any(file == part or file.startswith(f"{part}/") for part in parts)
    ]


@pytest.fixture(scope="module")
def classification(tmp_path_factory):
    return modules_that(TRAIN_AND_EVALUATE, tmp_path_factory.mktemp("data"))


@pytest.mark.slow
def test_all_that_fit_imports_is_digested(classification):
    assert {"qreg_utils.training", "qreg_utils.quantizers.lsq", "qreg_utils.theory.noise"} < set(classification["fit"])
    assert left_out(classification["fit"], (*digest.TRAINING["classification"], *digest.PLUMBING)) == []


@pytest.mark.slow
def test_all_that_evaluate_and_the_theory_import_is_digested(classification):
    modules = classification["evaluate"]
    assert {"qreg_utils.evaluation", "qreg_utils.corruptions.blur", "qreg_utils.theory.sharpness"} < set(modules)
    assert left_out(modules, (*digest.MEASURING["classification"], *digest.PLUMBING)) == []


@pytest.mark.slow
def test_what_is_left_out_of_the_digest_is_named(classification):
    parts = [part for part in digest.MEASURING["classification"] if part not in ("quantizers", "training.py")]
    found = left_out(classification["evaluate"], (*parts, *digest.PLUMBING))
    assert {"qreg_utils.training", "qreg_utils.quantizers", "qreg_utils.quantizers.lsq"} <= set(found)


@pytest.mark.slow
def test_all_that_a_detector_is_trained_and_measured_with_is_digested(tmp_path):
    pytest.importorskip("ultralytics")
    modules = modules_that(DETECTION, tmp_path)["evaluate"]
    assert {"qreg_utils.detection.training", "qreg_utils.corruptions.weather"} < set(modules)
    assert left_out(modules, (*digest.MEASURING["detection"], *digest.PLUMBING)) == []


def test_every_part_that_is_named_is_there():
    lists = [*digest.TRAINING.values(), *digest.MEASURING.values(), digest.CORRUPTIONS, digest.SUMMARY, digest.PLUMBING]
    for part in {part for parts in lists for part in parts}:
        assert (digest.PACKAGE / part).exists(), part
    for task, parts in digest.TRAINING.items():
        assert set(parts) <= set(digest.MEASURING[task])
        assert not set(digest.PLUMBING) & set(digest.MEASURING[task])


@pytest.mark.parametrize("part", ["training.py", "quantizers/lsq.py", "corruptions/blur.py", "recipe.py"])
def test_the_digest_of_an_experiment_depends_on_all_its_parts(part, monkeypatch):
    before = digest.experiment_digest("classification", "classification.ipynb")
    sources = digest._package_sources(digest.MEASURING["classification"])
    monkeypatch.setattr(digest, "_package_sources", lambda parts: sources | {part: sources[part] + b"\nMORE = 1\n"})
    assert digest.experiment_digest("classification", "classification.ipynb") != before


def test_extensions_count_as_code(tmp_path):
    extension = tmp_path / "my_parts.py"
    digests = []
    for content in ("SIZE = 3", "SIZE = 4", "SIZE = 3  # as before"):
        extension.write_text(content)
        digests.append(digest.experiment_digest("classification", "classification.ipynb", [extension]))
    assert digests[0] == digests[2] != digests[1]
    assert digest.experiment_digest("classification", "classification.ipynb") not in digests


# --- the state of a checkout ---


def git(folder, *arguments):
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def git_state(folder, path=os.environ["PATH"]):
    """What a process that has the package from ``folder`` says."""
    code = "import json; from qreg_utils.digest import git_state as s; print(json.dumps(s(*{!r})))"
    command = [sys.executable, "-c", code.format(("classification", "classification.ipynb"))]
    environment = {"PATH": path, "PYTHONPATH": str(folder), "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    return json.loads(subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True).stdout)


def copy_of_the_project(folder):
    for part in ("qreg_utils", "notebooks"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    return folder


@pytest.fixture
def clone(tmp_path):
    """An untouched checkout."""
    project = copy_of_the_project(tmp_path / "project")
    git(project, "init", "--quiet")
    git(project, "add", ".")
    git(project, "commit", "--quiet", "-m", "all of it")
    return project


def edit(path, old, new):
    path.write_text(changed(path.read_text(encoding="utf-8"), old, new), encoding="utf-8")


@pytest.mark.slow
def test_only_a_change_of_what_the_code_does_makes_a_checkout_dirty(clone):
    training, notebook = clone / "qreg_utils" / "training.py", clone / "notebooks" / "classification.ipynb"
    before = git_state(clone)
    assert before["dirty"] is False and len(before["commit"]) == 40
    edit(training, "CURVE_IMAGES = 1_000", "# how many images\nCURVE_IMAGES = 1000")
    edit(notebook, "## The data", "## Data")
    metrics = clone / "qreg_utils" / "metrics.py"  # decides nothing in an experiment
    metrics.write_text(metrics.read_text(encoding="utf-8") + "\n\nMORE = 1\n", encoding="utf-8")
    assert git_state(clone) == before
    edit(training, "CURVE_IMAGES = 1000", "CURVE_IMAGES = 1001")
    assert git_state(clone) == before | {"dirty": True}
    git(clone, "commit", "--quiet", "--all", "-m", "another constant")
    after = git_state(clone)
    assert after["dirty"] is False and after["commit"] != before["commit"]


@pytest.mark.slow
def test_changed_notebook_code_and_a_file_that_is_not_committed_make_a_checkout_dirty(clone):
    edit(clone / "notebooks" / "classification.ipynb", "torch.randperm", "torch.arange")
    assert git_state(clone)["dirty"] is True
    git(clone, "checkout", "--", ".")
    assert git_state(clone)["dirty"] is False
    (clone / "qreg_utils" / "quantizers" / "more.py").write_text("SIZE = 3\n")
    assert git_state(clone)["dirty"] is True


@pytest.mark.slow
def test_without_git_nothing_is_known(clone, tmp_path):
    nothing = {"commit": None, "dirty": None}
    assert git_state(clone, path=str(tmp_path / "no programs")) == nothing
    assert git_state(copy_of_the_project(tmp_path / "archive")) == nothing
