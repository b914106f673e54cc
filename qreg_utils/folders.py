"""Where things lie. What a person writes as a path is expanded and made absolute here, once, and nowhere else."""

import os
from pathlib import Path

from qreg_utils import PROJECT

IS_CHECKOUT = (PROJECT / "pyproject.toml").is_file()  # not so where the package was installed into site-packages


def absolute(path: str | Path) -> Path:
    """``path`` with ``~`` expanded; a relative one is in the project's folder, whatever the current folder is.

    (A notebook's kernel in JupyterLab runs in notebooks/, in the batch in the project's folder.) Without a checkout it
    is in the current folder.
    """
    return ((PROJECT if IS_CHECKOUT else Path.cwd()) / Path(path).expanduser()).absolute()


def default_data_dir() -> Path:
    """``data`` in the project; where there is no checkout the user's cache, never a folder of installed packages."""
    if IS_CHECKOUT:
        return PROJECT / "data"
    return absolute(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "qreg"


def data_dir() -> Path:
    """Where data sets live: the environment variable QREG_DATA (``absolute``), or ``default_data_dir``."""
    given = os.environ.get("QREG_DATA")
    return absolute(given) if given else default_data_dir()
