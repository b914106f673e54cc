"""The code that decides numbers: named once, by folders, and digested without what does not matter.

A digest is made of what a module does: of its syntax tree without comments, docstrings and formatting, so that mending
a sentence voids nothing. Checkpoints, the cache of corrupted images, the batch (what is out of date) and run.json
(``code``, ``dirty``) all use it.
"""

import ast
import hashlib
import json
import os
import subprocess
import tarfile
from collections.abc import Iterable
from functools import cache
from io import BytesIO
from pathlib import Path

from qreg_utils import PROJECT

PACKAGE = Path(__file__).parent
NAME = PACKAGE.name

# Folders and files of the package, by task. What a trained network depends on:
_SHARED = ("recipe.py", "precision.py", "datasets.py", "models", "quantizers", "quantize.py", "checkpoints.py")
_SHARED += ("theory/__init__.py", "theory/noise.py")
TRAINING = {
    "classification": (*_SHARED, "compiling.py", "controls.py", "training.py"),
    "detection": (*_SHARED, "detection"),
}
# What the pixels of a corrupted image depend on:
CORRUPTIONS = ("corruptions",)
# What all numbers of an experiment depend on:
MEASURING = {
    "classification": (*TRAINING["classification"], *CORRUPTIONS, "corrupted_images.py", "evaluation.py", "theory"),
    "detection": (*TRAINING["detection"], *CORRUPTIONS),
}
# What a summary is made of, besides the experiments' files
SUMMARY = (
    "names.py",
    "metrics.py",
    "image_chance.py",
    "ingredients.py",
    "axes.py",
    "noise_curve.py",
    "pooling.py",
    "claims.py",
    "provenance.py",
    "results.py",
    "figures",
)
# Imported by the above, and without influence on any number: labels, files, bars, and how extensions are found
PLUMBING = ("__init__.py", "folders.py", "names.py", "digest.py", "extensions.py", "atomic.py", "progress.py")


# Digests of experiments' code, and of another that is known to make the same numbers, to the last digit: both may stand
# in one study. For changes that mend or speed up what no committed number depends on, after a rerun has shown it.
SAME_NUMBERS: dict[str, str] = {
    "ea6b33b1fc2c9157": "d520cb85f28994bd",  # what is drawn to measure the noise of lsq-dithered comes from the seed
    "d520cb85f28994bd": "7bb460d69b117e1f",  # so does what is drawn to calibrate lsq-dithered, and beside dropout
    "7bb460d69b117e1f": "a8f9dff0598fc3eb",  # corruptions are faster, to the last bit (770 million pixels compared)
}


def make_the_same_numbers(code: str, other: str) -> bool:
    """Whether results of ``code`` may stand beside those of ``other``, the present one; both ``experiment_digest``."""
    seen = set()
    while code != other and code in SAME_NUMBERS and code not in seen:
        seen.add(code)
        code = SAME_NUMBERS[code]
    return code == other


def code_digest(parts: Iterable[str], extensions: Iterable[Path] = ()) -> str:
    """Of the package's ``parts`` (files and folders relative to it) and of ``extensions``, files anywhere."""
    sources = [(f"{NAME}/{path}", content) for path, content in _package_sources(tuple(parts)).items()]
    return _digest([*sources, *((path.name, path.read_bytes()) for path in extensions)])


@cache
def _package_sources(parts: tuple[str, ...]) -> dict[str, bytes]:
    """The files as they are when they are first asked for: what this process has imported."""
    return {path: (PACKAGE / path).read_bytes() for path in _selected(_all_files(), parts)}


def _all_files() -> list[str]:
    return [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")]


def _selected(paths: Iterable[str], parts: tuple[str, ...]) -> list[str]:
    return sorted(path for path in paths if any(path == part or path.startswith(f"{part}/") for part in parts))


def notebook_digest(content: bytes) -> str:
    """Of a notebook's code cells; prose, outputs and metadata do not matter."""
    return _digest([("notebook.ipynb", content)])


def _digest(sources: Iterable[tuple[str, bytes]]) -> str:
    """Of files, each with its name; a name may be there twice, as __init__.py in an extension of several folders."""
    digest = hashlib.sha256()
    for path, meaning in sorted((path, _meaning(path, content)) for path, content in sources):
        digest.update(f"{path}\0{meaning}\0".encode())
    return digest.hexdigest()[:16]


@cache
def _meaning(path: str, content: bytes) -> str:
    if path.endswith(".ipynb"):
        cells = [cell for cell in json.loads(content)["cells"] if cell["cell_type"] == "code"]
        return "\n".join(_normalised("".join(cell["source"])) for cell in cells)
    return _normalised(content.decode())


def _normalised(source: str) -> str:
    """The code's syntax tree as text, without docstrings; the same on every Python version that can run it."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a notebook's magic command
        return source
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
        if isinstance(node, ast.JoinedStr):  # Python 3.12.1 puts empty text into f-strings
            node.values = [part for part in node.values if not (isinstance(part, ast.Constant) and part.value == "")]
    return _text(tree)


def _text(node: object) -> str:
    """Like ast.dump, without fields that are empty, which come and go with Python's versions."""
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if value not in (None, []))
        return f"{type(node).__name__}({','.join(f'{name}={_text(value)}' for name, value in fields)})"
    if isinstance(node, list):
        return f"[{','.join(map(_text, node))}]"
    return repr(node)


def experiment_digest(task: str, notebook: str, extensions: Iterable[Path] = ()) -> str:
    """Of all that an experiment's numbers depend on besides its parameters and data: package, notebook, extensions."""
    content = (PROJECT / "notebooks" / notebook).read_bytes()
    return _combined(code_digest(MEASURING[task], extensions), notebook_digest(content))


def summary_digest(extensions: Iterable[Path] = ()) -> str:
    """Of what a summary is made with."""
    content = (PROJECT / "notebooks" / "summary.ipynb").read_bytes()
    return _combined(code_digest(SUMMARY, extensions), notebook_digest(content))


def _combined(*digests: str) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def git_state(task: str, notebook: str) -> dict[str, str | bool | None]:
    """The project's ``commit``, and whether the code that decides numbers is another now (``dirty``).

    Both are None without git, and where the project's folder is no repository of its own: an unpacked archive may lie
    in somebody else's.
    """
    try:
        if Path(_git("rev-parse", "--show-toplevel").decode().strip()).resolve() != PROJECT.resolve():
            return {"commit": None, "dirty": None}
        commit = _git("rev-parse", "HEAD").decode().strip()
        archive = _git("archive", "--format=tar", commit, "--", NAME, f"notebooks/{notebook}")
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    with tarfile.open(fileobj=BytesIO(archive)) as files:
        committed = {member.name: files.extractfile(member).read() for member in files if member.isfile()}
    package = {path.removeprefix(f"{NAME}/"): content for path, content in committed.items()}
    parts = [(f"{NAME}/{path}", package[path]) for path in _selected(package, MEASURING[task]) if path.endswith(".py")]
    then = _combined(_digest(parts), notebook_digest(committed[f"notebooks/{notebook}"]))
    return {"commit": commit, "dirty": then != experiment_digest(task, notebook)}


def _git(*arguments: str) -> bytes:
    # GIT_DIR and the like, as a hook or an alias sets them, would name another repository
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(["git", *arguments], cwd=PROJECT, env=environment, capture_output=True, check=True).stdout
