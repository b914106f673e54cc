"""The batch and the notebooks, for real, at toy size: a copy of the project runs a small study with Snakemake.

Two experiments of the study cannot succeed (a damaged data set; detection without its extra): the others must not mind.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from filelock import FileLock

from tests.test_study import COMMON, SCENES

ROOT = Path(__file__).resolve().parent.parent
PARTS = ["qreg_utils", "notebooks", "params", "profiles", "results/published", "Snakefile"]
TOY = {"seeds": [0, 1], "epochs": 1, "batch_size": 64, "severities": [3], "train_images": 640, "test_images": 120}
THEORY = {"theory_images": 8}
CLUSTER = {"resources": {"runtime": 17, "gres": "gpu:1"}}  # says nothing to a batch on one machine
GRID = [{"method": "fp32", **THEORY}, {"method": "lsq", "weight_bits": 4, **THEORY}]
CONTROLLED = [
    {"method": "gaussian-noise", "weight_bits": 4, **THEORY},  # needs the next, which is to run before it
    {"method": "lsq", "weight_bits": 4, "activation_bits": None, **THEORY},
]
BROKEN = {"dataset": "cifar10", "method": "fp32"}
DETECTION = {**SCENES, "method": "fp32"}
# every step multiplies the weights by 1 - learning rate x weight decay
DIVERGING = {"model": "resnet20", "method": "fp32", "seeds": [0], "learning_rate": 100.0, "weight_decay": 1.0, **THEORY}
DIVERGED = "digits-resnet20-fp32-seed0"
FP32, LSQ, CONTROL = "digits-resnet8-fp32", "digits-resnet8-lsq-w4a4", "digits-resnet8-gaussian-noise-w4"


class Project:
    """A copy of the project in a folder of its own: damaged CIFAR-10 files are its data, ultralytics is not there."""

    def __init__(self, root: Path, data: Path | None = None):
        self.root, self.data = root, data or root / "data"
        for part in PARTS:
            target = root / part
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / part, target)
        damaged = self.data / "cifar-10-batches-py"
        damaged.mkdir(parents=True, exist_ok=True)
        (damaged / "data_batch_1").write_text("damaged")
        without = "import sys\nsys.modules.update(dict.fromkeys(['ultralytics', 'cv2']))\n"  # cannot be imported then
        (root / "sitecustomize.py").write_text(without)
        self.results = root / "results" / "toy"

    def write_study(self, grid, **common):
        content = {"description": "toy", "common": {**COMMON, **TOY, **common}, "grid": grid}
        (self.root / "params" / "toy.yaml").write_text(yaml.safe_dump(content))

    def start(self, *module):
        return self.start_program(sys.executable, "-m", *module)

    def start_program(self, *command):
        paths = {"PYTHONPATH": str(self.root), "QREG_DATA": str(self.data)}
        binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            command,
            cwd=self.root,
            env={**os.environ, **paths, "PATH": binaries},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command):
        return finish(self.start(*command))

    def start_snakemake(self, *arguments, profile="local", **config):
        settings = [f"{key}={value}" for key, value in {"study": "toy", **config}.items()]
        return self.start("snakemake", "--profile", f"profiles/{profile}", *arguments, "--config", *settings)

    def snakemake(self, *arguments, **settings):
        return finish(self.start_snakemake(*arguments, **settings))

    def planned(self):
        """The experiments that a run would redo."""
        done = self.snakemake("--dry-run", "--quiet", "host")
        assert done.returncode == 0, done.stdout + done.stderr
        jobs = [line.strip() for line in (done.stdout + done.stderr).splitlines() if ".done" in line]
        outputs = [line for line in jobs if line.startswith("output:")]
        return {name for name in (FP32, LSQ, "digits-resnet8-lsq-w2a2") if any(f"/{name}/" in line for line in outputs)}


def finish(process):
    """Wait for a process; its exit status and output."""
    try:
        stdout, stderr = process.communicate(timeout=600)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def failed_run(project):
    project.write_study([*GRID, BROKEN, {**DETECTION, **CLUSTER}, DIVERGING])
    first = project.snakemake()
    partial = project.snakemake(finished_only="true")
    return first, partial


def test_one_failed_experiment_does_not_stop_the_others_and_is_named(project, failed_run):
    first, _ = failed_run
    assert first.returncode == 1
    assert (project.results / FP32 / ".done").exists() and (project.results / LSQ / ".done").exists()
    assert f"finished {LSQ}" in first.stdout
    report = first.stdout + first.stderr
    assert "NOT FINISHED: cifar10-resnet8-fp32: DatasetError: " in report and "is missing; get http" in report
    assert "log: results/toy/cifar10-resnet8-fp32/log.txt" in report
    assert "digit_scenes-yolov5n-fp32: ModuleNotFoundError: detection needs ultralytics" in report
    assert "pip install -e '.[detection]'" in report
    assert not (project.results / "cifar10-resnet8-fp32" / "notebook.ipynb").exists()


def test_a_loss_that_is_not_a_number_marks_the_experiment_as_failed(project, failed_run):
    first, _ = failed_run
    failure = "FloatingPointError: the loss is not finite after epoch 0 of 1 (seed 0)"
    assert f"FAILED {DIVERGED}: {failure}" in first.stdout
    assert (project.results / DIVERGED / "failed.txt").read_text() == failure + "\n"
    assert not (project.results / DIVERGED / "run.json").exists()
    html = (project.results / "summary.html").read_text()
    assert f"MISSING: {DIVERGED}" in html and f"failed: {failure}" in html


def test_the_summary_of_the_rest_lists_what_is_missing(project, failed_run):
    _, partial = failed_run
    assert partial.returncode == 0, partial.stdout + partial.stderr
    html = (project.results / "summary.html").read_text()
    assert "MISSING: cifar10-resnet8-fp32" in html and "MISSING: digit_scenes-yolov5n-fp32" in html
    assert set(pd.read_csv(project.results / "table.csv")["dataset"]) == {"digits"}


@pytest.fixture(scope="module")
def finished(project, failed_run):
    """The same study with controls in place of the broken experiments: nothing is trained again."""
    project.write_study([*GRID, *CONTROLLED])
    before = (project.results / FP32 / "run.json").stat().st_mtime_ns
    done = project.snakemake()
    assert done.returncode == 0, done.stdout + done.stderr
    assert (project.results / FP32 / "run.json").stat().st_mtime_ns == before
    return project.results


def test_an_experiment_leaves_its_files(finished):
    folder = finished / LSQ
    metrics = pd.read_csv(folder / "metrics.csv")
    assert len(metrics) == 2 * (1 + 19) * 2  # seeds, sets, metrics
    assert metrics["value"].notna().all()
    assert len(pd.read_csv(folder / "history.csv")) == 2 * 2
    assert len(pd.read_csv(folder / "noise.csv")) == 2 * 8
    run = json.loads((folder / "run.json").read_text())
    assert run["parameters"]["weight_bits"] == 4 and run["unverified_files"] == []
    assert run["corrupted_images"].startswith("made by qreg")
    assert run["peak_memory_mib"] < 4096
    assert not list(folder.glob("*.part")) and not (folder / "unfinished.ipynb").exists()


def test_both_experiments_read_the_same_corrupted_images(project, finished):
    runs = [json.loads((finished / name / "run.json").read_text()) for name in (FP32, LSQ)]
    assert runs[0]["corrupted_images"] == runs[1]["corrupted_images"]
    files = list((project.root / "data" / "corrupted").rglob("*.npy"))
    assert len(files) == 20 and len({file.parent for file in files}) == 1


def test_the_theory_is_measured_on_every_network(finished):
    penalty = pd.read_csv(finished / FP32 / "penalty.csv")
    assert set(penalty["bits"]) == set(range(2, 9)) and set(penalty["noise"]) == {"normal", "uniform", "quantization"}
    assert set(pd.read_csv(finished / LSQ / "penalty.csv")["bits"]) == {4}
    assert set(pd.read_csv(finished / LSQ / "sharpness.csv")["weights"]) == {"latent", "quantized"}
    for name in (FP32, LSQ, CONTROL):
        for file in ("penalty", "sharpness"):
            frame = pd.read_csv(finished / name / f"{file}.csv")
            assert set(frame["seed"]) == {0, 1} and set(frame["experiment"]) == {name}


def test_a_control_is_trained_after_what_it_imitates(finished):
    imitated = finished / "digits-resnet8-lsq-w4"
    assert (imitated / "run.json").stat().st_mtime < (finished / CONTROL / "run.json").stat().st_mtime
    assert len(pd.read_csv(finished / CONTROL / "metrics.csv")) == 2 * (1 + 19) * 2
    ours, theirs = (pd.read_csv(folder / "history.csv")["loss"] for folder in (finished / CONTROL, finished / FP32))
    assert (ours != theirs).all()  # the same first weights and data, but noise


def test_the_summary_judges_every_claim(finished):
    claims = pd.read_csv(finished / "claims.csv")
    measured = claims[claims["seeds"] > 0]
    assert measured["verdict"].isin(["supported", "contradicted", "not decided"]).all()
    for name in ("The noise is normal", "The penalty predicts", "8 bits are the reliable", "Noise alone"):
        assert claims["claim"].str.startswith(name).any()
    assert measured["claim"].str.startswith("Noise alone").sum() == 1
    assert "A verdict on every claim" in (finished / "summary.html").read_text()


@pytest.mark.parametrize("name", [f"{FP32}/notebook", f"{LSQ}/notebook", f"{CONTROL}/notebook", "summary"])
def test_executed_notebooks_ran_to_the_end_without_errors(finished, name):
    assert_ran_to_the_end(finished / f"{name}.ipynb")


def assert_ran_to_the_end(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source]
    assert all(cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"], "warnings on the page"
    bars = ("it/s", "?, ?", "Caching")
    texts = [(output.get("text"), *without_images(output)) for output in outputs]  # an image may spell "it/s" in base64
    assert not [text for text in texts if any(bar in str(text) for bar in bars)], "dead progress bars"
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4


def without_images(output):
    return [content for kind, content in output.get("data", {}).items() if not kind.startswith("image/")]


def test_the_summary_leaves_figures_and_tables(finished):
    names = {path.stem for path in (finished / "figures").glob("*.png")}
    assert {"heatmap", "heatmap-published", "improvement-digits-resnet8", "noise-digits-resnet8"} <= names
    assert {"heatmap-weights", "penalty-digits-resnet8", "sharpness-digits-resnet8"} <= names
    assert {path.with_suffix(".svg").name for path in (finished / "figures").glob("*.png")} <= {
        path.name for path in (finished / "figures").iterdir()
    }
    table = pd.read_csv(finished / "table.csv")
    metrics = pd.read_csv(finished / FP32 / "metrics.csv")
    corrupted = metrics[(metrics["metric"] == "accuracy") & (metrics["corruption"] != "test_set")]["value"].mean()
    assert table.loc[table["method"] == "fp32", "avg_corrupted"].item() == pytest.approx(corrupted, rel=1e-6)
    assert "| LSQ" in (finished / "table.md").read_text()


def test_up_to_date_results_are_left_alone(project, finished):
    assert project.planned() == set()


def test_a_changed_notebook_or_package_file_redoes_what_it_affects(project, finished):
    for changed in ("notebooks/classification.ipynb", "qreg_utils/evaluation.py"):
        path = project.root / changed
        before = path.read_bytes(), path.stat()
        path.write_bytes(before[0] + b"\n")
        try:
            assert project.planned() == {FP32, LSQ}
        finally:
            path.write_bytes(before[0])
            os.utime(path, ns=(before[1].st_atime_ns, before[1].st_mtime_ns))
    assert project.planned() == set()


def test_a_changed_parameter_redoes_the_experiments_it_affects(project, finished):
    project.write_study([GRID[0], {**GRID[1], "weight_bits": [4, 2]}])
    assert project.planned() == {"digits-resnet8-lsq-w2a2"}
    project.write_study(GRID, epochs=2)
    assert project.planned() == {FP32, LSQ}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"grid": [{"method": "lsq", "weight_bits": 33}]},
            "grid[0]: weight_bits: 33 is not allowed: an integer from 2",
        ),
        ({"grid": [{"method": "fp23"}]}, "method: 'fp23' is not allowed"),
        ({"grid": GRID, "epocs": 1}, "epocs: unknown key; did you mean 'epochs'?"),
    ],
)
def test_a_bad_params_file_ends_the_batch_before_it_begins(tmp_path, change, message):
    project = Project(tmp_path)
    project.write_study(**change)
    done = project.snakemake()
    assert done.returncode == 2
    output = done.stdout + done.stderr
    assert message in output
    assert "Traceback" not in output and len(output.splitlines()) < 6
    assert not project.results.exists()


def test_a_study_that_is_not_there(tmp_path):
    project = Project(tmp_path)
    done = project.snakemake(study="nope")
    assert done.returncode == 2
    assert "params/nope.yaml: no such file; studies there: cifar10, " in done.stdout + done.stderr
    done = project.snakemake(study="../params/quick")
    assert done.returncode == 2
    assert "study '../params/quick' is not allowed" in done.stdout + done.stderr


def test_a_study_that_is_running_already(tmp_path):
    project = Project(tmp_path)
    project.write_study(GRID)
    (tmp_path / ".snakemake").mkdir()
    with FileLock(tmp_path / ".snakemake" / "toy.lock"):
        done = project.snakemake()
    assert done.returncode == 2
    assert "study toy is running already" in done.stdout + done.stderr
    assert not project.results.exists()


def test_papermill_refuses_an_unknown_parameter(tmp_path):
    project = Project(tmp_path)
    arguments = ["--engine", "qreg", "notebooks/classification.ipynb", "out.ipynb", "-p", "epocs", "3"]
    done = project.run("papermill", *arguments)
    assert done.returncode != 0
    assert "epocs: unknown key; did you mean 'epochs'?" in done.stdout + done.stderr
    assert not (tmp_path / "results" / "scratch").exists()
