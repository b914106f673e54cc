"""docs/architecture.md and the code agree: imports point one way, every room and every variable is on the page."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qreg_utils import digest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "qreg_utils"
MODULES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
# What a room may import besides itself, and what is on the ground floor
GROUND_FLOOR = {"__init__", "folders", "names", "recipe", "atomic", "progress", "digest", "extensions"}
TRAINING = {"precision", "compiling", "datasets", "models", "quantizers", "quantize", "checkpoints"}
TRAINING |= {"controls", "theory"}
ALLOWED = {
    "folders": {"__init__"},
    "names": set(),
    "precision": set(),
    "compiling": set(),
    "recipe": set(),
    "atomic": set(),
    "digest": {"__init__"},
    "extensions": {"__init__"},
    "progress": {"atomic"},
    "study": {"names", "recipe", "atomic", "extensions"},
    "datasets": {"__init__", "folders", "names"},
    "corruptions": {"names"},
    "transforms": {"corruptions"},
    "corrupted_images": GROUND_FLOOR | {"corruptions"},
    "models": {"names"},
    "quantizers": {"names"},
    "quantize": {"quantizers"},
    "theory": {"precision", "quantize", "quantizers"},
    "checkpoints": GROUND_FLOOR | {"models", "quantize", "study"},
    "controls": GROUND_FLOOR | {"theory", "study"},
    "training": GROUND_FLOOR | TRAINING,
    "evaluation": GROUND_FLOOR | TRAINING | {"corrupted_images", "training"},
    "metrics": {"names"},
    "image_chance": {"names", "metrics"},
    "ingredients": {"names", "metrics", "image_chance"},
    "axes": {"names", "metrics"},
    "noise_curve": {"names", "metrics", "image_chance"},
    "claims": {"names", "metrics", "image_chance", "ingredients", "axes", "noise_curve", "pooling"},
    "pooling": {"metrics"},
    "provenance": {"names", "metrics", "study"},
    "results": GROUND_FLOOR | {"metrics", "provenance", "study"},
    "figures": {"names", "metrics", "ingredients", "axes", "noise_curve"},
    "detection": GROUND_FLOOR | TRAINING | {"corruptions"},
    "seeds": GROUND_FLOOR | {"study", "results"},
    "batch": GROUND_FLOOR | {"study", "metrics", "results", "seeds", "claims", "axes"},
}


def room(file):
    """The file or folder of the package that a module is in: "quantizers/lsq.py" is in quantizers."""
    return file.split("/")[0].removesuffix(".py")


def imported_rooms(path):
    """The rooms that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    found = {name.split(".")[1] for name in names if name.startswith("qreg_utils.")}
    return {name if name in ALLOWED else "__init__" for name in found}


@pytest.mark.parametrize("file", [file for file in MODULES if file != "__init__.py"])
def test_imports_point_one_way(file):
    more = imported_rooms(MODULES[file]) - ALLOWED[room(file)] - {room(file)}
    assert not more, f"{file} imports from {', '.join(sorted(more))}"


def test_what_may_be_imported_has_no_cycle():
    remaining = {name: rooms & set(ALLOWED) - {name} for name, rooms in ALLOWED.items()}
    while remaining:
        free = {name for name, rooms in remaining.items() if not rooms & set(remaining)}
        assert free, f"a cycle among {', '.join(remaining)}"
        remaining = {name: rooms for name, rooms in remaining.items() if name not in free}


def test_every_room_is_on_the_page():
    table = PAGE.partition("from the ground floor up:")[2].partition("**Imports point one way.**")[0]
    rooms = {room(file) for file in MODULES} - {"__init__"}
    assert rooms == set(ALLOWED)
    named = {name.rstrip("/").removesuffix(".py") for name in re.findall(r"`([a-z_]+(?:/|\.py))`", table)}
    assert named == rooms


def test_every_variable_of_ours_is_on_the_page():
    files = [*MODULES.values(), *(ROOT / "tests").glob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")]
    files += [ROOT / "Snakefile", ROOT / "Makefile"]
    used = {
        name for file in files for name in re.findall(r"\bQREG_[A-Z]+(?:_[A-Z]+)*", file.read_text(encoding="utf-8"))
    }
    assert used == set(re.findall(r"\bQREG_[A-Z]+(?:_[A-Z]+)*", PAGE))


def test_what_reads_results_needs_no_torch():
    rooms = ("study", "metrics", "claims", "provenance", "results", "seeds", "figures", "figures.interactive")
    modules = [f"qreg_utils.{name}" for name in rooms]
    code = """if True:
        import importlib, sys

        for name in sys.argv[1:]:
            importlib.import_module(name)
            assert "torch" not in sys.modules, name
    """
    done = subprocess.run([sys.executable, "-c", code, *modules], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_of_the_batch_decides_numbers():
    for parts in (*digest.MEASURING.values(), digest.SUMMARY, digest.PLUMBING):
        assert not [part for part in parts if part.startswith("batch")]


def test_the_page_is_readable():
    assert len(PAGE.splitlines()) < 180
