"""What a study leaves behind: tidy files, written whole or not at all, and read back for the summary."""

import json
import os
import platform
import resource
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from pydantic import ValidationError

from qreg_utils import PROJECT
from qreg_utils.atomic import written_whole
from qreg_utils.study import Detection, Experiment, Study, load_study

FRAMES = ("metrics", "history", "noise")
THEORY = ("penalty", "sharpness")  # of classifiers, and not of studies that are older than these measurements
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


def read_study(folder: Path) -> StudyResults:
    """Read results/<study>/ (and nothing else). An experiment counts only when its run.json, which is written last,
    is there and names the parameters that the study asks for."""
    study = load_study(folder / f"{folder.name}.yaml")
    frames: dict[str, list[pd.DataFrame]] = {name: [] for name in (*FRAMES, *THEORY)}
    runs, missing = {}, {}
    for experiment in study.experiments:
        place = folder / experiment.id
        if not (place / "run.json").exists():
            missing[experiment.id] = "not run, or not finished"
            continue
        run = json.loads((place / "run.json").read_text(encoding="utf-8"))
        if not _made_with(run["parameters"], experiment):
            missing[experiment.id] = "made with other parameters"
            continue
        runs[experiment.id] = run
        for name, parts in frames.items():
            path = place / f"{name}.csv"
            if name in FRAMES or path.exists():
                parts.append(pd.read_csv(path))
    return StudyResults(study, **{name: _joined(parts) for name, parts in frames.items()}, runs=runs, missing=missing)


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
    commits = ", ".join(f"`{str(commit)[:10]}`" for commit in runs["commit"].unique())
    hardware = ", ".join(runs["gpu"].fillna(runs["processor"]).unique())
    lines = [
        f"{len(results.runs)} of {len(results.study.experiments)} experiments finished, seeds {seeds}",
        f"hardware: {hardware}; {runs['wall_seconds'].sum() / 60:.0f} minutes of notebooks in all (last run of each)",
        f"code: {commits}" + (" **with uncommitted changes**" if runs["dirty"].any() else ""),
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
        lines.append(
            f"**images that cannot be read, and are left out:** {len(unreadable)}: {', '.join(unreadable[:5])}"
        )
    for experiment, reason in results.missing.items():
        lines.append(f"**MISSING: {experiment}** ({reason}); it is in no figure and no average below")
    return f"**{results.study.name}**: {results.study.description}\n\n" + "\n".join(f"- {line}" for line in lines)
