"""What a study leaves behind: tidy files, written whole or not at all, and read back for the summary."""

import itertools
import json
import os
import platform
import re
import resource
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Annotated

import pandas as pd
from matplotlib.figure import Figure
from pandas.api.types import is_numeric_dtype
from pydantic import AfterValidator, BaseModel, Field, FiniteFloat, ValidationError

from qreg_utils import PROJECT
from qreg_utils.atomic import written_whole
from qreg_utils.corruptions import CORRUPTIONS
from qreg_utils.metrics import CLEAN
from qreg_utils.provenance import as_markdown, made_by, warnings
from qreg_utils.study import Detection, Experiment, Study, load_study

FRAMES = ("metrics", "history", "noise")
THEORY = ("penalty", "sharpness")  # of classifiers, and not of studies that are older than these measurements
# file -> columns that name a series of numbers, columns that say where in it a number is, the number's own column
LAYOUT = {
    "metrics": (["metric"], ["seed", "corruption", "severity"], "value"),
    "history": (["split"], ["seed", "epoch"], "loss"),
    "noise": (["layer"], ["seed", "epoch"], "sigma"),
    "penalty": (["noise", "bits"], ["seed"], "measured"),
    "sharpness": (["weights", "measure", "size"], ["seed"], "value"),
}
VERSIONS = ("torch", "numpy", "pandas", "scikit-learn", "papermill", "ultralytics")
CODE = ("qreg_utils", "notebooks", "params", "Snakefile", "pyproject.toml", "constraints.txt")


def write_text(path: Path, text: str) -> None:
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    write_text(path, frame.to_csv(index=False, float_format="%.8g"))


def write_figure(path: Path, figure: Figure) -> None:
    with written_whole(path) as part:
        figure.savefig(part, format=path.suffix[1:], bbox_inches="tight")


def tidy(experiment: Experiment, rows: list[dict]) -> pd.DataFrame:
    """``rows`` as a frame, with the experiment's columns in front."""
    frame = pd.DataFrame(rows)
    for position, (name, value) in enumerate(experiment.columns.items()):
        frame.insert(position, name, value)
    return frame


def write_run(path: Path, experiment: Experiment, **facts) -> dict:
    """Write run.json: parameters, git commit, versions, hardware, memory, and the ``facts`` given.

    Write it last: it says that the run has finished.
    """
    run = {"parameters": experiment.model_dump(), **git_state(), **environment(), **facts}
    run["peak_memory_mib"] = _peak_memory_mib()
    run["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
    write_text(path, json.dumps(run, indent=1) + "\n")
    return run


def _peak_memory_mib() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, but in bytes on macOS
    return peak // (1024 * 1024 if sys.platform == "darwin" else 1024)


def git_state() -> dict:
    """Commit of the project, and whether code differs from it; None without git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", *CODE))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def environment() -> dict:
    """Versions and hardware that a run's numbers and times depend on."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS if find_spec(name.replace("scikit-learn", "sklearn"))},
        "platform": f"{sys.platform} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


class Run(BaseModel):
    """What run.json must say for its experiment to count; older ones say no more than this."""

    parameters: dict
    commit: Annotated[str, Field(pattern="^[0-9a-f]{40,64}$")] | None
    dirty: bool | None
    python: str
    versions: dict[str, str]
    platform: str
    processor: str
    cores: int | None
    threads: int
    gpu: str | None
    wall_seconds: FiniteFloat
    unverified_files: list[str]
    unreadable_files: list[str] = []  # of detectors
    corrupted_images: str
    peak_memory_mib: int
    finished: Annotated[str, AfterValidator(datetime.fromisoformat)]


@dataclass(frozen=True)
class StudyResults:
    """All finished experiments of a study as tidy frames, their run.json, and what is not there."""

    study: Study
    metrics: pd.DataFrame
    history: pd.DataFrame
    noise: pd.DataFrame
    penalty: pd.DataFrame
    sharpness: pd.DataFrame
    runs: dict[str, dict]
    missing: dict[str, str]  # experiment id -> why

    def runs_behind(self, *drawn: pd.DataFrame) -> dict[str, dict]:
        """run.json of the experiments that the rows in ``drawn`` come from (``provenance.made_by``)."""
        finished = [experiment for experiment in self.study.experiments if experiment.id in self.runs]
        return {name: self.runs[name] for name in made_by(finished, *drawn)}


class UnusableError(Exception):
    """The files of an experiment cannot be used as its results; the message says why."""


def read_study(folder: Path) -> StudyResults:
    """Read results/<study>/ (and nothing else). An experiment counts only when its run.json, which is written last,
    names the parameters that the study asks for, and its other files are whole."""
    study = load_study(folder / f"{folder.name}.yaml")
    frames: dict[str, list[pd.DataFrame]] = {name: [] for name in (*FRAMES, *THEORY)}
    runs, missing = {}, {}
    for experiment in study.experiments:
        place = folder / experiment.id
        try:
            run, parts = _read_experiment(place, experiment)
        except UnusableError as error:
            missing[experiment.id] = _failure(place) or str(error)
            continue
        runs[experiment.id] = run
        for name, part in parts.items():
            frames[name].append(part)
    return StudyResults(study, **{name: _joined(parts) for name, parts in frames.items()}, runs=runs, missing=missing)


def _failure(place: Path) -> str:
    """What a run that failed has left in failed.txt, as one line without control characters; "" if nothing."""
    try:
        with (place / "failed.txt").open(encoding="utf-8", errors="replace") as file:
            said = file.read(2000)
    except OSError:
        return ""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", said)  # without colours
    line = " ".join("".join(character if character.isprintable() else " " for character in plain).split())
    return f"failed: {line[:300]}{'…' if len(line) > 300 else ''}" if line else "failed"


def _read_experiment(place: Path, experiment: Experiment) -> tuple[dict, dict[str, pd.DataFrame]]:
    """run.json and the frames. Raises UnusableError unless they are whole, and of this experiment."""
    run = _read_run(place / "run.json")
    if not _made_with(run["parameters"], experiment):
        raise UnusableError("made with other parameters")
    names = (*FRAMES, *THEORY) if "theory_images" in run["parameters"] else FRAMES
    return run, {name: _read_frame(place / f"{name}.csv", experiment) for name in names}


def _read_run(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
        Run.model_validate_json(text)
        return json.loads(text)
    except FileNotFoundError:
        raise UnusableError("not run, or not finished") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = "".join(f"{part}: " for part in problem["loc"])
        raise UnusableError(f"run.json: {where}{problem['msg']}") from error
    except (OSError, ValueError) as error:
        raise UnusableError("run.json cannot be read") from error


def _read_frame(path: Path, experiment: Experiment) -> pd.DataFrame:
    try:
        text = path.read_text(encoding="utf-8")
        frame = pd.read_csv(StringIO(text))
    except FileNotFoundError:
        raise UnusableError(f"{path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise UnusableError(f"{path.name} cannot be read") from error
    if not text.endswith("\n"):
        raise UnusableError(f"{path.name} ends in the middle of a line")
    without_noise = path.stem == "noise" and not experiment.quantized and frame.empty
    if not without_noise:
        _check_frame(path, frame, experiment)
    return frame


def _check_frame(path: Path, frame: pd.DataFrame, experiment: Experiment) -> None:
    """Raise UnusableError unless ``frame`` has every number that an experiment with these parameters measures."""
    if frame.empty:
        raise UnusableError(f"{path.name} has no rows")
    series, keys, value = LAYOUT[path.stem]
    if lacking := [name for name in (*experiment.columns, *series, *keys, value) if name not in frame]:
        raise UnusableError(f"{path.name} has no column {', '.join(lacking)}")
    if any((frame[name] != own).any() for name, own in experiment.columns.items()):
        raise UnusableError(f"{path.name} is of another experiment")
    places = _places(path.stem, experiment)
    found = {
        name: [*rows[keys].itertuples(index=False, name=None)] for name, rows in frame.groupby(series, dropna=False)
    }
    for name in [*_always(path.stem, experiment), *found]:
        rows = found.get(name, [])
        if len(rows) != len(places) or set(rows) != places:
            what = f"{len(rows)} rows of {' '.join(map(str, name))}, not the {len(places)} that the parameters ask for"
            raise UnusableError(f"{path.name} has {what}")
    if not is_numeric_dtype(frame[value]) or (path.stem in FRAMES and frame[value].isna().any()):
        raise UnusableError(f"{path.name} has something else than a number in {value}")


def _places(name: str, experiment: Experiment) -> set[tuple]:
    """Where every series in a file has a number."""
    if name == "metrics":
        settings = [(CLEAN, 0), *itertools.product(CORRUPTIONS, experiment.severities)]
        return {(seed, *setting) for seed in experiment.seeds for setting in settings}
    if name in ("history", "noise"):
        return set(itertools.product(experiment.seeds, range(experiment.epochs)))
    return {(seed,) for seed in experiment.seeds}


def _always(name: str, experiment: Experiment) -> list[tuple[str]]:
    """The series that are in every such file."""
    score = "map50" if isinstance(experiment, Detection) else "accuracy"
    return {"metrics": [(score,)], "history": [("train",), ("val",)]}.get(name, [])


def _made_with(parameters: dict, experiment: Experiment) -> bool:
    """Whether a run had these parameters. One that is newer than the run has its default, which is how things were."""
    try:
        return type(experiment).model_validate(parameters) == experiment
    except ValidationError:
        return False


def _joined(parts: list[pd.DataFrame]) -> pd.DataFrame:
    """One frame of all; FP32 has no noise rows, so some are empty."""
    filled = [part for part in parts if not part.empty]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame()


def _severities(metrics: pd.DataFrame) -> str:
    """Such as "2, 4", or "2, 4 (digits), 3 (digit_scenes)" where data sets differ."""
    corrupted = metrics[metrics["severity"] > 0]
    of = {name: ", ".join(map(str, sorted(rows.unique()))) for name, rows in corrupted.groupby("dataset")["severity"]}
    if len(set(of.values())) == 1:
        return next(iter(of.values()))
    return ", ".join(f"{severities} ({name})" for name, severities in of.items())


def describe(results: StudyResults) -> str:
    """What was run, on what, by which code, and what is missing or not as it should be: a Markdown list.

    Raises ValueError when no experiment of the study has finished.
    """
    if not results.runs:
        raise ValueError(f"study {results.study.name}: no experiment has finished")
    runs = pd.DataFrame(results.runs).T
    seeds = ", ".join(map(str, sorted(results.metrics["seed"].unique())))
    commits = runs["commit"].dropna().unique()
    hardware = ", ".join(map(as_markdown, runs["gpu"].fillna(runs["processor"]).unique()))
    lines = [
        f"{len(results.runs)} of {len(results.study.experiments)} experiments finished, seeds {seeds}",
        f"hardware: {hardware}; {runs['wall_seconds'].sum() / 60:.0f} minutes of notebooks in all (last run of each)",
        *([f"code: commit `{commits[0][:10]}`"] if len(commits) == 1 else []),
        *warnings(results.runs),
        f"severities averaged in the heatmaps and the table: {_severities(results.metrics)} (all in metrics.csv)",
    ]
    first: dict[str, Experiment] = {}  # of each data set: the levels have these things in common
    for experiment in results.study.experiments:
        first.setdefault(experiment.dataset, experiment)
    for dataset, experiment in first.items():
        train, test = experiment.train_images, experiment.test_images
        if train or test:
            lines.append(f"**part of {dataset}:** {train or 'all'} training images, {test or 'all'} test images")
        if isinstance(experiment, Detection):
            classes = f"the classes {', '.join(experiment.classes)}" if experiment.classes else "all classes"
            lines.append(
                f"{dataset}: scored by mAP50 over {classes}; YOLOv5n with today's anchor-free head, where "
                "the paper's of July 2022 had anchors"
            )
    for dataset, made in runs["corrupted_images"].groupby(runs["parameters"].str["dataset"], sort=False):
        sources = sorted(made.unique())
        warning = " **(not the same for all)**" if len(sources) > 1 else ""
        lines.append(f"corrupted test images of {dataset}: {'; '.join(sources)}{warning}")
    unverified = sorted({file for files in runs["unverified_files"] for file in files})
    if unverified:
        lines.append(f"**data files whose md5 is not the official one:** {', '.join(unverified)}")
    unreadable = sorted({file for files in runs.get("unreadable_files", pd.Series()).dropna() for file in files})
    if unreadable:
        named = ", ".join(map(as_markdown, unreadable[:5]))
        lines.append(f"**images that cannot be read, and are left out:** {len(unreadable)}: {named}")
    for experiment, reason in results.missing.items():
        lines.append(f"**MISSING: {experiment}** ({as_markdown(reason)}); it is in no figure and no average below")
    return f"**{results.study.name}**: {results.study.description}\n\n" + "\n".join(f"- {line}" for line in lines)
