"""``python -m qreg_utils.detection.download``: VOC 2007 and 2012 to ``data_dir()/VOC``, by ultralytics' recipe."""

import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from filelock import FileLock

from qreg_utils.datasets import DatasetError
from qreg_utils.detection.datasets import VOC_TEST, VOC_TRAIN, check_voc_counts
from qreg_utils.folders import data_dir


def download_voc() -> Path:
    """Download and convert 2.8 GB unless they are there; returns the folder.

    All of it happens in ``VOC.part``, which becomes ``VOC`` when it is complete. What an interrupted download leaves in
    it is used by the next. Raises DatasetError when something else is in the way, and when the download fails.
    """
    root = data_dir() / "VOC"
    part = root.with_name("VOC.part")
    if root.exists():  # without a lock: the folder may be one that others own
        check_voc_counts(root, VOC_TRAIN | VOC_TEST, f"move {root} away, and `make voc` downloads it")
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.parent / ".VOC.lock"):
        if root.exists():  # another process was faster
            return root
        try:
            _run_recipe(part)
        except Exception as error:  # ultralytics lets requests, zipfile and much else through
            raise DatasetError(
                f"cannot download to {part} ({type(error).__name__}: {error}); `make voc` resumes it, "
                "or starts again when you delete it"
            ) from error
        check_voc_counts(part, VOC_TRAIN | VOC_TEST, f"delete {part}, and `make voc` starts again")
        shutil.rmtree(part / "images" / "VOCdevkit", ignore_errors=True)
        for archive in (part / "images").glob("*.zip"):
            archive.unlink()
        part.rename(root)
    return root


def _run_recipe(folder: Path) -> None:
    """Download, unpack and convert as VOC.yaml of ultralytics says, but into ``folder``."""
    from ultralytics.data.utils import check_det_dataset
    from ultralytics.utils import ROOT

    recipe = yaml.safe_load((ROOT / "cfg" / "datasets" / "VOC.yaml").read_text(encoding="utf-8"))
    recipe["path"] = str(folder)
    shutil.rmtree(folder / "images" / "test2007", ignore_errors=True)  # converted last; where it is, ultralytics stops
    for unfinished in (folder / "images").glob(".*.part"):
        unfinished.unlink()
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / "VOC.yaml"
        file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        check_det_dataset(file, autodownload=True)


def main() -> None:
    os.environ["YOLO_VERBOSE"] = "true"  # its progress bars
    try:
        print(f"VOC is in {download_voc()}")
    except DatasetError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
