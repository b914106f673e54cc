"""The detection notebook and its summary, for real, at toy size: full precision and LSQ through Snakemake."""

import json

import pandas as pd
import pytest

pytest.importorskip("qreg_utils.detection")

from tests.test_batch import Project, assert_ran_to_the_end
from tests.test_study import SCENES

FP32, LSQ = "digit_scenes-yolov5n-fp32", "digit_scenes-yolov5n-lsq-w4a4"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("project"))
    (project.root / "sitecustomize.py").unlink()  # it hides ultralytics
    grid = [{"method": "fp32"}, {"method": "lsq", "weight_bits": 4}]
    project.write_study(grid, **SCENES, seeds=[0], batch_size=8)
    before = {path.name for path in project.root.iterdir()}
    done = project.snakemake()
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in project.root.iterdir()} - before <= {".snakemake"}
    return project.results


@pytest.mark.parametrize("experiment", [f"{FP32}-seed0", f"{LSQ}-seed0"])
def test_an_experiment_leaves_its_files(finished, experiment):
    folder = finished / experiment
    metrics = pd.read_csv(folder / "metrics.csv")
    assert len(metrics) == 2 * (1 + 19)
    assert set(metrics["metric"]) == {"map50", "map50_95"} and metrics["value"].between(0, 100).all()
    assert pd.read_csv(folder / "history.csv")["split"].tolist() == ["train", "val"]
    run = json.loads((folder / "run.json").read_text())
    assert run["unreadable_files"] == [] and "ultralytics" in run["versions"]
    expected = {"params.yaml", "notebook.ipynb", "metrics.csv", "history.csv", "noise.csv", "run.json"}
    expected |= {"predictions.jpg", ".done", ".lock", "log.txt", "checkpoint-seed0.pt"}
    assert {path.name for path in folder.iterdir()} == expected


@pytest.mark.parametrize("name", [f"{FP32}-seed0/notebook", f"{LSQ}-seed0/notebook", "summary"])
def test_executed_notebooks_ran_to_the_end_without_errors(finished, name):
    assert_ran_to_the_end(finished / f"{name}.ipynb")


def test_the_summary_has_detection_in_its_figures_and_tables(finished):
    names = {path.stem for path in (finished / "figures").glob("*.png")}
    assert {"heatmap", "training-digit_scenes-yolov5n", "noise-digit_scenes-yolov5n"} <= names
    table = pd.read_csv(finished / "table.csv")
    assert table[["dataset", "model"]].drop_duplicates().to_numpy().tolist() == [["digit_scenes", "yolov5n"]]
    assert "today's anchor-free head" in (finished / "summary.html").read_text()
