"""What a study leaves behind: tidy files, each complete or not there, and how they are read back. No torch."""

import itertools
import json
import os
import platform
import re
import resource
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import pandas as pd
from pandas.api.types import is_numeric_dtype
from pydantic import AfterValidator, BaseModel, Field, FiniteFloat, ValidationError

from qreg_utils.atomic import atomic_write
from qreg_utils.digest import experiment_digest, git_state
from qreg_utils.extensions import load_extensions
from qreg_utils.metrics import with_variant
from qreg_utils.names import CLEAN, DETECTION, MODELS
from qreg_utils.progress import FAILED, UNFINISHED
from qreg_utils.provenance import as_markdown, source_experiments, warnings
from qreg_utils.study import Experiment, Study, StudyError, load_study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRAMES = ("metrics", "history", "noise")
IMAGES = "images"  # which test images are classified right; not of older runs, nor of detectors
THEORY = ("penalty", "sharpness")  # of experiments with theory: true
# file -> columns that name a series of numbers, columns that say where in it a number is, the number's own column
LAYOUT = {
    "metrics": (["metric"], ["seed", "corruption", "severity"], "value"),
    "images": (["experiment"], ["seed", "corruption", "severity"], "images"),
    "history": (["split"], ["seed", "epoch"], "loss"),
    "noise": (["layer"], ["seed", "epoch"], "sigma"),
    "penalty": (["statistics", "noise", "bits"], ["seed"], "measured"),
    "sharpness": (["statistics", "weights", "measure", "size"], ["seed"], "value"),
}
VERSIONS = ("torch", "numpy", "pandas", "scikit-learn", "papermill", "ultralytics")
PART = ".part"  # in an experiment's folder: where a run writes its files before they take their places


# --- writing ----------------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Numbers with 8 digits, in noise.csv with 5; without the column variant where no row has one
    (``metrics.with_variant`` adds it)."""
    if "variant" in frame and (frame["variant"] == "").all():
        frame = frame.drop(columns="variant")
    digits = 5 if path.stem == "noise" else 8
    write_text(path, frame.to_csv(index=False, float_format=f"%.{digits}g"))


def write_figure(path: Path, figure: "Figure") -> None:
    with atomic_write(path) as part:
        figure.savefig(part, format=path.suffix[1:], bbox_inches="tight")


def tidy(experiment: Experiment, rows: list[dict]) -> pd.DataFrame:
    """``rows`` as a frame, with the experiment's columns in front."""
    frame = pd.DataFrame(rows)
    for position, (name, value) in enumerate(experiment.columns.items()):
        frame.insert(position, name, value)
    return frame


def write_results(
    folder: Path,
    experiment: Experiment,
    frames: Mapping[str, pd.DataFrame],
    facts: Mapping[str, object],
    figures: Mapping[str, "Figure"] | None = None,
) -> dict:
    """Write all that a run of ``experiment`` leaves in its ``folder`` (``write_files``); returns run.json's content.

    run.json holds ``facts`` besides the parameters, the code, versions and hardware.
    """
    run = describe_run(experiment, facts)
    write_files(folder, frames, run, figures)
    return run


def write_files(
    folder: Path,
    frames: Mapping[str, pd.DataFrame],
    run: Mapping[str, object],
    figures: Mapping[str, "Figure"] | None = None,
) -> None:
    """Replace the results in ``folder``: ``frames``, named as in LAYOUT, ``figures``, by their files, and ``run``.

    Everything is written beside the results of an earlier run, which stay as they are until the new ones are complete,
    and replaced by them then. While files are moved there is no run.json, without which nothing counts: files of two
    runs are never taken for one.
    """
    part = folder / PART
    shutil.rmtree(part, ignore_errors=True)
    try:
        for name, frame in frames.items():
            write_csv(part / f"{name}.csv", frame)
        for name, figure in (figures or {}).items():
            write_figure(part / name, figure)
        write_text(part / "run.json", json.dumps(run, indent=1) + "\n")
        _move_into_place(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _move_into_place(part: Path, folder: Path) -> None:
    (folder / "run.json").unlink(missing_ok=True)
    for name in LAYOUT:  # what the new run has not measured must not stay beside what it has
        (folder / f"{name}.csv").unlink(missing_ok=True)
    *others, last = sorted(part.iterdir(), key=lambda path: path.name == "run.json")
    for path in (*others, last):
        path.replace(folder / path.name)
    (folder / FAILED).unlink(missing_ok=True)  # of an earlier run


def describe_run(experiment: Experiment, facts: Mapping[str, object]) -> dict:
    """What run.json says: parameters, git commit, digest of the code, versions, hardware, ``facts``, memory."""
    code = (experiment.task.name, experiment.task.notebook)
    return {
        "parameters": experiment.model_dump(),
        **git_state(*code),
        "code": experiment_digest(*code, load_extensions()),
        **environment(),
        **facts,
        "peak_memory_mib": _peak_memory_mib(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def training_facts(records: Sequence[Mapping]) -> dict:
    """What run.json says about the training, from what ``fit`` has returned for each seed."""
    speeds = sorted(speed for record in records for speed in record["images_per_second"])
    return {
        "training_seconds": round(sum(sum(record["seconds"]) for record in records), 1),
        "images_per_second": round(speeds[len(speeds) // 2]),
        "compiled": records[0].get("compiled", False),  # a detector never is, and always in float32
        "precision": records[0].get("precision", "float32"),
    }


def _peak_memory_mib() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, but in bytes on macOS
    return peak // (1024 * 1024 if sys.platform == "darwin" else 1024)


def environment() -> dict:
    """Versions and hardware that a run's numbers and times depend on."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS if find_spec(name.replace("scikit-learn", "sklearn"))},
        "platform": f"{sys.platform} {platform.machine()}",
        "processor": _processor(),
        "instructions": _instructions(),
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


def _instructions() -> str:
    """The vector instructions that sums on the processor are made with, as far as PyTorch tells: other ones add in
    another order, and processors of one name differ in them."""
    import torch

    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return torch.backends.cpu.get_cpu_capability() + (f", oneDNN up to {limit}" if limit else "")


# --- reading ----------------------------------------------------------------------------------------------------------


class Run(BaseModel):
    """What run.json must say for its experiment to count; older ones say no more than this."""

    parameters: dict
    commit: Annotated[str, Field(pattern="^[0-9a-f]{40,64}$")] | None
    dirty: bool | None
    code: Annotated[str, Field(pattern="^[0-9a-f]{16}$")] | None = None  # digest.experiment_digest; not in older ones
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
    seeds: dict[Annotated[str, Field(pattern="^[0-9]{1,10}$")], dict] = {}  # not in older ones
    finished: Annotated[str, AfterValidator(datetime.fromisoformat)]


@dataclass(frozen=True)
class StudyResults:
    """All finished experiments of a study as tidy frames, their run.json, and what is missing."""

    study: Study
    metrics: pd.DataFrame
    history: pd.DataFrame
    noise: pd.DataFrame
    images: pd.DataFrame
    penalty: pd.DataFrame
    sharpness: pd.DataFrame
    runs: dict[str, dict]
    missing: dict[str, str]  # experiment id -> why it has no results
    older: dict[str, str]  # experiment id -> what became of its last run, where an earlier one's results are here

    def runs_behind(self, *plotted: pd.DataFrame) -> dict[str, dict]:
        """run.json of the experiments that rows which are ``plotted`` come from (``source_experiments``)."""
        finished = [experiment for experiment in self.study.experiments if experiment.id in self.runs]
        return {name: self.runs[name] for name in source_experiments(finished, *plotted)}


class UnusableError(Exception):
    """The files of an experiment cannot be used as its results; the message says why."""


def committed_study(results: Path, name: str) -> StudyResults:
    """The study of that name in the folder ``results``.

    Raises StudyError, in one line, when there is none, or none of its experiments has results.
    """
    studies = sorted(path.parent.name for path in results.glob("*/*.yaml") if path.stem == path.parent.name)
    if name not in studies:
        available = ", ".join(studies) or "none"
        raise StudyError(f"{results.name}/{name}: no committed results; studies that have some: {available}")
    study = read_study(results / name)
    if not study.runs:
        experiment, why = next(iter(study.missing.items()))
        raise StudyError(f"{results.name}/{name}: no committed results: {experiment}: {why}")
    return study


def read_study(folder: Path) -> StudyResults:
    """Read results/<study>/ (and nothing else). An experiment counts only when its run.json, which is written last,
    names the parameters that the study asks for, and its other files are complete. It may have more seeds than that."""
    study = load_study(folder / f"{folder.name}.yaml")
    frames: dict[str, list[pd.DataFrame]] = {name: [] for name in (*FRAMES, IMAGES, *THEORY)}
    runs, missing, older, experiments = {}, {}, {}, []
    for experiment in study.experiments:
        own = folder / experiment.id
        failure = _last_failure(own)
        try:
            runs[experiment.id], measured = read_experiment(own, experiment)
        except UnusableError as error:
            missing[experiment.id] = failure or str(error)
            experiments.append(experiment)
            continue
        experiments.append(experiment.model_copy(update={"seeds": runs[experiment.id]["parameters"]["seeds"]}))
        for name, frame in measured.items():
            frames[name].append(frame)
        if failure or _cut_short(own):
            older[experiment.id] = failure or "is not complete"
    joined = {name: _concatenated(measured) for name, measured in frames.items()}
    study = replace(study, experiments=tuple(experiments))
    return StudyResults(study, **joined, runs=runs, missing=missing, older=older)


def _last_failure(folder: Path) -> str:
    """What a run that failed has left in failed.txt, as one line without control characters; "" if nothing."""
    try:
        with (folder / FAILED).open(encoding="utf-8", errors="replace") as file:
            message = file.read(2000)
    except OSError:
        return ""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", message)  # without colours
    line = " ".join("".join(character if character.isprintable() else " " for character in plain).split())
    return f"failed: {line[:300]}{'…' if len(line) > 300 else ''}" if line else "failed"


def _cut_short(folder: Path) -> bool:
    """Whether a run that began after the one whose results are here was killed, or has not ended yet."""
    try:
        return (folder / UNFINISHED).stat().st_mtime > (folder / "run.json").stat().st_mtime
    except OSError:
        return False


def read_experiment(
    folder: Path, experiment: Experiment, *, partly: bool = False
) -> tuple[dict, dict[str, pd.DataFrame]]:
    """run.json and the frames, of all seeds that are there.

    Raises UnusableError unless they are complete, of this experiment, and, if not ``partly``, of all its seeds.
    """
    run = _read_run(folder / "run.json")
    ran = _experiment_of(run["parameters"], type(experiment))
    if ran is None or not ran.serves(experiment):
        raise UnusableError("made with other parameters")
    lacking = [seed for seed in experiment.seeds if seed not in ran.seeds]
    if lacking and not partly:
        raise UnusableError(f"without seed {', '.join(map(str, lacking))}")
    if not _theory(ran).items() >= _theory(experiment).items():
        raise UnusableError("made without the theory that is asked for")
    names = (*FRAMES, *THEORY) if _theory(ran) else FRAMES
    if (folder / f"{IMAGES}.csv").exists():
        names = (*names, IMAGES)
    return run, {name: _read_frame(folder / f"{name}.csv", experiment, ran.seeds) for name in names}


def _theory(experiment: Experiment) -> dict[str, int]:
    """What of the theory is measured; a run that has measured it also serves a study that does not ask for it."""
    return {"images": experiment.theory_images} if getattr(experiment, "theory", False) else {}


def _read_run(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
        Run.model_validate_json(text)
        return json.loads(text)
    except FileNotFoundError:
        raise UnusableError("not run, or not finished") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = "".join(f"{key}: " for key in problem["loc"])
        raise UnusableError(f"run.json: {where}{problem['msg']}") from error
    except (OSError, ValueError) as error:
        raise UnusableError("run.json cannot be read") from error


def _read_frame(path: Path, experiment: Experiment, seeds: list[int]) -> pd.DataFrame:
    try:
        text = path.read_text(encoding="utf-8")
        frame = _parse_csv(text, [name for name, value in experiment.columns.items() if isinstance(value, str)])
    except FileNotFoundError:
        raise UnusableError(f"{path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise UnusableError(f"{path.name} cannot be read") from error
    if not text.endswith("\n"):
        raise UnusableError(f"{path.name} ends in the middle of a line")
    frame = with_variant(frame)
    without_noise = path.stem == "noise" and not experiment.through_quantizer and frame.empty
    if not without_noise:
        _check_frame(path, frame, experiment, seeds)
    return frame


def _parse_csv(text: str, names: list[str]) -> pd.DataFrame:
    """The columns ``names`` hold text, whatever is in them: a variant may be called nan, or true."""
    frame = pd.read_csv(StringIO(text))
    words = pd.read_csv(StringIO(text), usecols=lambda name: name in names, dtype=str, keep_default_na=False)
    return frame.assign(**{name: words[name] for name in words})


def _check_frame(path: Path, frame: pd.DataFrame, experiment: Experiment, seeds: list[int]) -> None:
    """Raise UnusableError unless ``frame`` has every number that an experiment with these seeds measures."""
    if frame.empty:
        raise UnusableError(f"{path.name} has no rows")
    series, keys, value = LAYOUT[path.stem]
    if lacking := [name for name in (*experiment.columns, *series, *keys, value) if name not in frame]:
        raise UnusableError(f"{path.name} has no column {', '.join(lacking)}")
    if any((frame[name] != own).any() for name, own in experiment.columns.items()):
        raise UnusableError(f"{path.name} is of another experiment")
    expected = _expected_keys(path.stem, experiment, seeds)
    found = {
        name: [*rows[keys].itertuples(index=False, name=None)] for name, rows in frame.groupby(series, dropna=False)
    }
    for name in [*_required_series(path.stem, experiment), *found]:
        rows = found.get(name, [])
        if len(rows) != len(expected) or set(rows) != expected:
            what = (
                f"{len(rows)} rows of {' '.join(map(str, name))}, not the {len(expected)} that the parameters ask for"
            )
            raise UnusableError(f"{path.name} has {what}")
    if not is_numeric_dtype(frame[value]) or (path.stem in FRAMES and frame[value].isna().any()):
        raise UnusableError(f"{path.name} has something else than a number in {value}")


def _expected_keys(name: str, experiment: Experiment, seeds: list[int]) -> set[tuple]:
    """Where every series in a file has a number."""
    if name in ("metrics", "images"):
        images = [(CLEAN, 0), *itertools.product(experiment.corruptions, experiment.each_severity)]
        return {(seed, *which) for seed in seeds for which in images}
    if name in ("history", "noise"):
        return set(itertools.product(seeds, range(experiment.epochs)))
    return {(seed,) for seed in seeds}


def _required_series(name: str, experiment: Experiment) -> list[tuple[str]]:
    """The series that are in every such file."""
    return {"metrics": [(experiment.task.score,)], "history": [("train",), ("val",)]}.get(name, [])


def _experiment_of(parameters: dict, kind: type[Experiment]) -> Experiment | None:
    """What a run was of. A parameter that is newer than the run has its default, which is how things were."""
    try:
        return kind.model_validate(parameters)
    except ValidationError:
        return None


def _concatenated(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """One frame of all; FP32 has no noise rows, so some are empty."""
    filled = [frame for frame in frames if not frame.empty]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame()


# --- describing -------------------------------------------------------------------------------------------------------


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
        *_extra_corruptions(results.study),
        *_data_lines(results.study),
        *_file_lines(runs),
    ]
    for experiment, what in results.older.items():
        lines.append(f"**WARNING: the last run of {experiment} {as_markdown(what)}**; its older results are shown")
    for experiment, why in results.missing.items():
        lines.append(f"**MISSING: {experiment}** ({as_markdown(why)}); it is in no figure and no average below")
    return f"**{results.study.name}**: {results.study.description}\n\n" + "\n".join(f"- {line}" for line in lines)


def _severities(metrics: pd.DataFrame) -> str:
    """Such as "2, 4", or "2, 4 (digits), 3 (digit_scenes)" where data sets or variants differ."""
    corrupted = metrics[metrics["severity"] > 0]
    by_name = {
        " ".join(filter(None, name)): ", ".join(map(str, sorted(rows.unique())))
        for name, rows in corrupted.groupby(["dataset", "variant"])["severity"]
    }
    if len(set(by_name.values())) == 1:
        return next(iter(by_name.values()))
    return ", ".join(f"{severities} ({name})" for name, severities in by_name.items())


def _extra_corruptions(study: Study) -> Iterator[str]:
    extra = dict.fromkeys(name for experiment in study.experiments for name in experiment.extra_corruptions)
    if extra:
        yield f"measured besides the paper's 19 corruptions, and in no average: {', '.join(extra)}"


def _data_lines(study: Study) -> Iterator[str]:
    """What is special about the data; it says of which network or variant where that is not so for all on a data set.

    Settings that are compared have all of it in common (``study.grid``).
    """
    first: dict[str, dict[tuple, Experiment]] = {}  # data set -> what is compared on it -> an experiment
    for experiment in study.experiments:
        first.setdefault(experiment.dataset, {}).setdefault((experiment.model, experiment.variant), experiment)
    for compared in first.values():
        lines: dict[str, list[str]] = {}
        for names, experiment in compared.items():
            for line in _special_data(experiment):
                lines.setdefault(line, []).append(" ".join(filter(None, names)))
        for line, names in lines.items():
            yield line if len(names) == len(compared) else f"{line} ({', '.join(names)})"


def _special_data(experiment: Experiment) -> Iterator[str]:
    train, test = experiment.train_images, experiment.test_images
    if train or test:
        per_seed = getattr(experiment, "train_subset", "fixed") == "per-seed"
        own = " (a choice of its own for each seed)" if per_seed else ""
        yield f"**part of {experiment.dataset}:** {train or 'all'} training images{own}, {test or 'all'} test images"
    if experiment.task is DETECTION:
        classes = f"the classes {', '.join(experiment.classes)}" if experiment.classes else "all classes"
        note = f"; {row.note}" if (row := MODELS.get(experiment.model)) and row.note else ""
        yield f"{experiment.dataset}: scored by mAP50 over {classes}{note}"


def _file_lines(runs: pd.DataFrame) -> Iterator[str]:
    """Which files the experiments have read, where that was not the same or not as it should be."""
    for dataset, made in runs["corrupted_images"].groupby(runs["parameters"].str["dataset"], sort=False):
        sources = sorted(made.unique())
        warning = " **(not the same for all)**" if len(sources) > 1 else ""
        yield f"corrupted test images of {dataset}: {'; '.join(sources)}{warning}"
    unverified = sorted({file for files in runs["unverified_files"] for file in files})
    if unverified:
        yield f"**data files whose md5 is not the official one:** {', '.join(unverified)}"
    unreadable = sorted({file for files in runs.get("unreadable_files", pd.Series()).dropna() for file in files})
    if unreadable:
        named = ", ".join(map(as_markdown, unreadable[:5]))
        yield f"**images that cannot be read, and are left out:** {len(unreadable)}: {named}"
