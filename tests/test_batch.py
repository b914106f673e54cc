"""The batch and the notebooks, for real, at toy size: a copy of the project runs a small study with Snakemake.

Two experiments of the study cannot succeed (a damaged data set; detection without its extra): the others must not mind.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from filelock import FileLock

from qreg_utils.results import read_study
from tests.test_study import COMMON, SCENES

ROOT = Path(__file__).resolve().parent.parent
PARTS = ["qreg_utils", "notebooks", "params", "profiles", "results/published", "Snakefile"]
TOY = {"seeds": [0, 1], "epochs": 1, "batch_size": 64, "severities": [3], "train_images": 640, "test_images": 120}
THEORY = {"theory": True, "theory_images": 2}
CLUSTER = {"resources": {"runtime": 17, "gres": "gpu:1"}}  # says nothing to a batch on one machine
GRID = [{"method": "fp32", **THEORY}, {"method": "lsq", "weight_bits": 4, **THEORY}]
CONTROLLED = [
    {"method": "gaussian-noise", "weight_bits": 4},  # needs the next, which is to run before it
    {"method": "lsq", "weight_bits": 4, "activation_bits": None},
]
BROKEN = {"dataset": "cifar10", "method": "fp32"}
DETECTION = {**SCENES, "method": "fp32"}
# every step multiplies the weights by 1 - learning rate x weight decay
DIVERGING = {"model": "resnet20", "method": "fp32", "seeds": [0], "learning_rate": 100.0, "weight_decay": 1.0}
DIVERGED = "digits-resnet20-fp32-seed0"
FP32, LSQ, CONTROL = "digits-resnet8-fp32", "digits-resnet8-lsq-w4a4", "digits-resnet8-gaussian-noise-w4"


class Project:
    """A copy of the project in a folder of its own: damaged CIFAR-10 files are its data, ultralytics is not there."""

    def __init__(self, root: Path, data: Path | None = None):
        self.root, self.data, self.results = root, data or root / "data", root / "results" / "toy"
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

    def copy(self, root: Path) -> "Project":
        """With all results, and the times of all files; it reads the same data."""
        copied = object.__new__(Project)
        shutil.copytree(self.root, root, dirs_exist_ok=True, ignore=shutil.ignore_patterns("data", "__pycache__"))
        copied.root, copied.data, copied.results = root, self.data, root / "results" / "toy"
        return copied

    def write_study(self, grid, **common):
        content = {"description": "toy", "common": {**COMMON, **TOY, **common}, "grid": grid}
        (self.root / "params" / "toy.yaml").write_text(yaml.safe_dump(content))

    def start(self, *module, **variables):
        return self.start_program(sys.executable, "-m", *module, **variables)

    def start_program(self, *command, **variables):
        paths = {"PYTHONPATH": str(self.root), "QREG_DATA": str(self.data)}
        binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            command,
            cwd=self.root,
            env={**os.environ, **paths, "PATH": binaries, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=default_signals,
        )

    def run(self, *command, **variables):
        return finish(self.start(*command, **variables))

    def start_snakemake(self, *arguments, profile="local", variables=None, **config):
        settings = [f"{key}={value}" for key, value in {"study": "toy", **config}.items()]
        options = ["--profile", f"profiles/{profile}", *arguments, "--config", *settings]
        return self.start("snakemake", *options, **(variables or {}))

    def snakemake(self, *arguments, **settings):
        return finish(self.start_snakemake(*arguments, **settings))

    def planned(self, **variables):
        """What a run would redo: experiments, and "summary"."""
        done = self.snakemake("--dry-run", "--quiet", "host", variables=variables)
        assert done.returncode == 0, done.stdout + done.stderr
        made = re.findall(r"^ *output: results/toy/(\S+)$", done.stdout + done.stderr, re.MULTILINE)
        return {"summary" if path == ".summarised" else path.removesuffix("/.done") for path in made}

    def planned_experiments(self):
        return self.planned() - {"summary"}

    def summarise(self, study="toy"):
        """What `make summary` calls."""
        return self.run("qreg_utils.batch.summarise", study)


def default_signals():
    """Ctrl-C reaches a program under test, also where the suite itself was started with SIGINT ignored (nohup)."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


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


@pytest.mark.parametrize(
    "obstacle, said",
    [
        (
            lambda root: (root / ".snakemake" / "toy.lock").mkdir(parents=True),
            "study toy cannot start: IsADirectoryError",
        ),
        (lambda root: (root / ".snakemake").touch(), "study toy cannot start: FileExistsError"),
        (lambda root: (root / "notebooks" / "summary.ipynb").unlink(), "study toy cannot start: FileNotFoundError"),
        (lambda root: (root / "results" / "toy").touch(), "results/toy: cannot be written"),
    ],
)
def test_a_batch_that_cannot_start_says_why_in_a_line(tmp_path, obstacle, said):
    project = Project(tmp_path)
    project.write_study(GRID)
    obstacle(tmp_path)
    done = project.snakemake("--dry-run")
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if said in line], done.stdout + done.stderr


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
    assert len(metrics) == 2 * (1 + 19) * 4  # seeds, sets, metrics
    assert len(pd.read_csv(folder / "images.csv")) == 2 * (1 + 19)
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


def test_the_theory_is_measured_where_it_is_asked_for(finished):
    penalty = pd.read_csv(finished / FP32 / "penalty.csv")
    assert set(penalty["bits"]) == set(range(2, 9)) and set(penalty["noise"]) == {"normal", "uniform", "quantization"}
    assert set(pd.read_csv(finished / LSQ / "penalty.csv")["bits"]) == {4}
    assert set(pd.read_csv(finished / LSQ / "sharpness.csv")["weights"]) == {"unrounded", "quantized"}
    for file in ("penalty", "sharpness"):
        assert not (finished / CONTROL / f"{file}.csv").exists()
        for name in (FP32, LSQ):
            frame = pd.read_csv(finished / name / f"{file}.csv")
            assert set(frame["seed"]) == {0, 1} and set(frame["experiment"]) == {name}


def test_a_control_is_trained_after_its_noise_source(finished):
    noise_source = finished / "digits-resnet8-lsq-w4"
    assert (noise_source / "run.json").stat().st_mtime < (finished / CONTROL / "run.json").stat().st_mtime
    assert len(pd.read_csv(finished / CONTROL / "metrics.csv")) == 2 * (1 + 19) * 4
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
    assert {"heatmap", "improvement-digits-resnet8", "noise-digits-resnet8"} <= names
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


@contextmanager
def changed(*changes):
    """Until the block ends, files (path, old, new) have ``new`` in place of ``old``, or at their end if that is ""."""
    before = [(path, path.read_bytes(), path.stat()) for path, _, _ in changes]
    for path, old, new in changes:
        text = path.read_text()
        assert old in text, path
        path.write_text(text.replace(old, new, 1) if old else text + new)
    try:
        yield
    finally:
        for path, content, times in before:
            path.write_bytes(content)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


ALL = {FP32, LSQ, CONTROL, "digits-resnet8-lsq-w4", "summary"}
COMMENT, CODE = ("", "# what nobody needs\n"), ("", "CHANGED = True\n")
HARMLESS = {
    "qreg_utils/training.py": COMMENT,
    "qreg_utils/metrics.py": COMMENT,
    "qreg_utils/batch/display.py": CODE,
    "qreg_utils/detection/yolo.py": CODE,  # of the other task
    "notebooks/classification.ipynb": ("## What came out", "## What comes out"),  # prose
}


@pytest.mark.parametrize(
    "changes, redone",
    [
        ({"notebooks/classification.ipynb": ("start = time.time()", "start = time.time() + 0")}, ALL),
        ({"qreg_utils/evaluation.py": CODE}, ALL),
        ({"qreg_utils/quantizers/lsq.py": CODE}, ALL),
        ({"qreg_utils/figures/heatmaps.py": CODE}, {"summary"}),
        ({"notebooks/summary.ipynb": ("read_study(folder)", "read_study(folder) or None")}, {"summary"}),
        (HARMLESS, set()),
    ],
    ids=["notebook", "evaluation", "quantizer", "figure", "summary", "harmless"],
)
def test_changed_code_redoes_what_it_can_change(project, finished, changes, redone):
    with changed(*((project.root / path, *change) for path, change in changes.items())):
        assert project.planned() == redone


def test_code_that_is_as_it_was_redoes_nothing(project, finished):
    assert project.planned() == set()


def test_the_code_of_an_extension_is_code(project, finished):
    extension = project.root / "my_parts.py"
    extension.write_text("")
    assert project.planned(QREG_EXTENSIONS="my_parts") == ALL
    assert project.planned() == set()


def test_a_changed_parameter_redoes_the_experiments_it_affects(project, finished):
    project.write_study([GRID[0], {**GRID[1], "weight_bits": [4, 2]}])
    assert project.planned_experiments() == {"digits-resnet8-lsq-w2a2"}
    project.write_study(GRID, epochs=2)
    assert project.planned_experiments() == {FP32, LSQ}
    project.write_study([*GRID, *CONTROLLED])
    assert project.planned() == set()


RESULTS = ("metrics.csv", "history.csv", "noise.csv", "penalty.csv", "sharpness.csv", "run.json", "notebook.ipynb")


def results(project, experiment):
    return {name: (project.results / experiment / name).read_bytes() for name in RESULTS}


@pytest.fixture(scope="module")
def rerun(project, finished, tmp_path_factory):
    """A copy of the finished study whose code has changed: all of it is to be run again, and the new code fails."""
    copied = project.copy(tmp_path_factory.mktemp("rerun"))
    copied.write_study(GRID)
    before = results(copied, LSQ)
    wrong = '\nraise RuntimeError("this code is wrong")\n'
    with changed((copied.root / "qreg_utils" / "theory" / "sharpness.py", "", wrong)):
        assert copied.planned() == {FP32, LSQ, "summary"}
        failed = copied.snakemake()
        partial = copied.summarise()
    return copied, before, failed, partial


def test_a_rerun_that_fails_leaves_the_results_that_were_there(rerun):
    copied, before, failed, _ = rerun
    assert failed.returncode == 1 and f"FAILED {LSQ}: RuntimeError: this code is wrong" in failed.stdout
    assert results(copied, LSQ) == before
    assert not (copied.results / LSQ / ".done").exists() and not (copied.results / LSQ / ".part").exists()


def test_the_summary_says_that_the_last_run_has_failed(rerun):
    copied, _, _, partial = rerun
    assert partial.returncode == 0, partial.stdout + partial.stderr
    html = (copied.results / "summary.html").read_text()
    assert f"WARNING: the last run of {LSQ} failed: RuntimeError: this code is wrong" in html
    assert "its older results are shown" in html and "MISSING" not in html


def test_a_rerun_that_is_killed_leaves_the_results_that_were_there(rerun):
    copied, before, _, _ = rerun
    batch = copied.start_snakemake()
    unfinished = copied.results / LSQ / "unfinished.ipynb"
    unfinished.unlink()
    while not unfinished.exists() or "corrupted images: made by" not in unfinished.read_text():
        assert batch.poll() is None
        time.sleep(0.05)
    batch.kill()
    finish(batch)
    with FileLock(copied.results / LSQ / ".lock", timeout=60):  # until the run has noticed it
        assert results(copied, LSQ) == before
    assert LSQ in read_study(copied.results).older


def test_a_rerun_that_succeeds_replaces_them(rerun):
    copied, before, _, _ = rerun
    done = copied.snakemake()
    assert done.returncode == 0, done.stdout + done.stderr
    after = results(copied, LSQ)
    assert all(after[name] == before[name] for name in RESULTS if name.endswith(".csv"))
    assert after["run.json"] != before["run.json"] and read_study(copied.results).older == {}
    assert "WARNING: the last run" not in (copied.results / "summary.html").read_text()


SUMMARY = ("summary.ipynb", "summary.html", "table.csv", "table.md", "claims.csv")


def test_a_summary_needs_nothing_but_the_files_that_are_committed(project, finished, tmp_path):
    """As on a fresh clone: the files that git ignores are not there, and neither are the data."""
    clone = project.copy(tmp_path / "clone")
    shutil.rmtree(clone.root / ".snakemake")
    for path in clone.results.rglob("*"):
        ignored = path.suffix in (".pt", ".part") or path.name in (".done", ".summarised", ".lock", "log.txt")
        if ignored or path.name in SUMMARY:
            path.unlink()
    shutil.rmtree(clone.results / "figures")
    clone.data = tmp_path / "nothing"
    done = clone.summarise()
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("table.csv", "table.md", "claims.csv"):
        assert (clone.results / name).read_bytes() == (finished / name).read_bytes()
    assert names(clone.results / "figures") == names(finished / "figures")
    assert (clone.results / "summary.html").exists() and not (tmp_path / "nothing").exists()
    assert_ran_to_the_end(clone.results / "summary.ipynb")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_summary_of_a_study_that_has_no_results(tmp_path):
    done = Project(tmp_path).summarise("nope")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "results/nope: no committed results; studies that have some: none\n"


def test_a_study_of_two_variants(project, finished, tmp_path):
    """With and without augmentation, side by side."""
    both = Project(tmp_path, data=project.data)
    grid = [
        {**setting, "variant": variant, "augment": augment}
        for variant, augment in (("augmented", True), ("plain", False))
        for setting in ({"method": "fp32"}, {"method": "lsq", "weight_bits": 4})
    ]
    both.write_study(grid, seeds=[0, 1], test_images=60)
    done = both.snakemake()
    assert done.returncode == 0, done.stdout + done.stderr
    results = read_study(both.results)
    assert results.missing == {} and "digits-resnet8-plain-lsq-w4a4" in results.runs
    scores = results.history.groupby("variant")["loss"].mean()
    assert set(scores.index) == {"augmented", "plain"} and scores["augmented"] != scores["plain"]
    table = pd.read_csv(both.results / "table.csv")
    assert table.groupby("variant")["method"].apply(list).to_dict() == {name: ["fp32", "lsq"] for name in scores.index}
    assert table["relative_error_improvement"].notna().all()  # each setting has an FP32 of its own variant
    assert_ran_to_the_end(both.results / "summary.ipynb")


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "QREG_EXTENSIONS: my_parts: no such module"),
        ("1 / 0", "QREG_EXTENSIONS: my_parts: ZeroDivisionError: division by zero"),
    ],
)
def test_a_bad_extension_ends_the_batch_before_it_begins(tmp_path, text, message):
    project = Project(tmp_path)
    project.write_study(GRID)
    if text:
        (tmp_path / "my_parts.py").write_text(text)
    done = project.snakemake(variables={"QREG_EXTENSIONS": "my_parts"})
    assert done.returncode == 2
    output = done.stdout + done.stderr
    assert message in output and "Traceback" not in output and len(output.splitlines()) < 6
    assert not project.results.exists()


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
    assert "params/nope.yaml: no such file; studies there: budget, cifar10, " in done.stdout + done.stderr
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
