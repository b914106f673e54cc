"""Other people's parts: modules that ``QREG_EXTENSIONS`` names, which register quantizers, models, data sets and
corruptions (docs/extending.md).

The variable is the only way in: a params file cannot name code. It holds module names with commas between them, found
on Python's path, in the folder in which the command was started, or in the project's.
"""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

from qreg_utils import PROJECT


class ExtensionError(ValueError):
    """An extension is missing, or lacks a piece; the message is one line that says which, and what."""


_loaded: dict[str, ModuleType] = {}


def load_extensions() -> tuple[Path, ...]:
    """Import the modules that ``QREG_EXTENSIONS`` names, each once; returns their source files, which count as code.

    Raises ExtensionError.
    """
    names = [name.strip() for name in os.environ.get("QREG_EXTENSIONS", "").split(",")]
    modules = [_loaded.get(name) or _load(name) for name in names if name]
    return tuple(file for module in modules for file in _source_files(module))


def _load(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ExtensionError(f"QREG_EXTENSIONS: {name!r} is not allowed: names of Python modules, such as my_parts")
    folders = [os.getcwd(), str(PROJECT)]  # a notebook that is run by hand begins in the folder notebooks/
    sys.path += [folder for folder in folders if folder not in sys.path]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise ExtensionError(f"QREG_EXTENSIONS: {name}: needs {error.name}, which is not installed") from error
        where = f"neither on Python's path (PYTHONPATH) nor in {' or '.join(dict.fromkeys(folders))}"
        raise ExtensionError(f"QREG_EXTENSIONS: {name}: no such module, {where}") from None
    except Exception as error:  # it is somebody's code
        reason = " ".join(str(error).split()) or "no reason given"
        kind = "" if type(error).__module__.startswith("qreg_utils") else f"{type(error).__name__}: "
        raise ExtensionError(f"QREG_EXTENSIONS: {name}: {kind}{reason}") from error
    if not str(getattr(module, "__file__", None)).endswith(".py"):
        raise ExtensionError(f"QREG_EXTENSIONS: {name}: it has no source; a folder of modules needs an __init__.py")
    _loaded[name] = module
    return module


def _source_files(module: ModuleType) -> list[Path]:
    file = Path(module.__file__)
    return sorted(file.parent.rglob("*.py")) if hasattr(module, "__path__") else [file]
