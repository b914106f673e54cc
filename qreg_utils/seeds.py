"""Seeds add up: each has an entry of its own in run.json, and is kept where others are added to it. No torch.

``make study`` runs all seeds of a params file anew. ``make extend`` keeps those that the same code has made with the
same settings, on whatever machine, and adds what is missing; ``make join`` adds those of another folder.
"""

import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from qreg_utils.digest import experiment_digest, make_the_same_numbers
from qreg_utils.extensions import load_extensions
from qreg_utils.results import (
    UnusableError,
    describe_run,
    read_experiment,
    write_files,
)
from qreg_utils.study import Experiment, Study, StudyError
from qreg_utils.study.experiment import SPELLINGS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_SEEDS = 1000
LARGEST_SEED = 2**31 - 1
BLOCKS = "blocks"  # in an experiment's folder: seeds that are jobs of their own
# of a run's facts, those that every seed has of its own
OWN_FACTS = ("commit", "dirty", "code", "python", "versions")
OWN_FACTS += ("platform", "processor", "instructions", "cores", "threads", "gpu")
OWN_FACTS += ("training_seconds", "evaluation_seconds", "theory_seconds", "images_per_second", "compiled", "precision")
OWN_FACTS += ("corrupted_images", "unverified_files", "finished")


def parse_seeds(text: str) -> list[int]:
    """Seeds as on the command line: "0-15", "3", "0-3,8,9". Raises StudyError, in one line."""
    seeds: list[int] = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d{1,10})(?:-(\d{1,10}))?", part)
        if not match:
            raise StudyError(f"SEEDS={text!r} is not allowed: numbers and ranges such as 0-15 or 0-3,8")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise StudyError(f"SEEDS={text!r} is not allowed: {part} runs backwards")
        if last > LARGEST_SEED:
            raise StudyError(f"SEEDS={text!r} is not allowed: the largest seed is {LARGEST_SEED}")
        if len(seeds) + last - first >= MOST_SEEDS:
            raise StudyError(f"SEEDS={text!r} is not allowed: more than {MOST_SEEDS} seeds")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise StudyError(f"SEEDS={text!r} is not allowed: it names one twice")
    return seeds


def settings_digest(experiment: Experiment) -> str:
    """Of all parameters but the seeds."""
    settings = experiment.model_dump(exclude={"seeds"})
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def current_code(experiment: Experiment) -> str:
    """The digest of the code that an experiment would run with now."""
    return experiment_digest(experiment.task.name, experiment.task.notebook, load_extensions())


def why_not_kept(experiment: Experiment, entry: Mapping, code: str) -> str | None:
    """Why a seed's rows cannot stand beside those that ``code`` makes of ``experiment``; None if they can."""
    if "code" not in entry:
        return "made by an older version"
    if not make_the_same_numbers(entry["code"], code):
        return f"made by other code ({entry['code']}, not {code})"
    return None if entry.get("settings") == settings_digest(experiment) else "made with other parameters"


@dataclass(frozen=True)
class Found:
    """What is in an experiment's folder: run.json, the rows, the seeds that can stand beside new ones, and why others
    cannot."""

    run: dict
    frames: dict[str, pd.DataFrame]
    kept: dict[int, dict]
    refused: dict[int, str]


def find_seeds(folder: Path, experiment: Experiment) -> Found:
    """Raises UnusableError where ``folder`` has no complete results of ``experiment``."""
    run, frames = read_experiment(folder, experiment, partly=True)
    code, kept, refused = current_code(experiment), {}, {}
    for seed in run["parameters"]["seeds"]:
        entry = run.get("seeds", {}).get(str(seed), {})
        if why := why_not_kept(experiment, entry, code):
            refused[seed] = why
        else:
            kept[seed] = entry
    return Found(run, frames, kept, refused)


class Seeds:
    """The seeds of an experiment in its ``folder``: those that are kept of what is there, and those that a run adds.

    Without ``keep`` nothing is kept, and what is there stays until all seeds are done; with it the files are written
    whole after each seed. Seeds that jobs of their own have made, in blocks/, are taken in either case.
    """

    def __init__(self, folder: Path, experiment: Experiment, *, keep: bool):
        keep = SPELLINGS.get(keep, keep)  # papermill's -p keep_seeds false arrives as text
        if not isinstance(keep, bool):
            raise StudyError(f"notebook parameters: keep_seeds: {keep!r} is not allowed: true or false")
        self.folder, self.experiment, self.keep = folder, experiment, keep
        self.entries: dict[int, dict] = {}
        self.figures: dict[str, Figure] = {}
        self.parts: list[dict[str, pd.DataFrame]] = []
        if keep:
            self._keep()
        self._collect()
        self._since = time.monotonic()

    def _keep(self) -> None:
        with suppress(UnusableError):
            found = find_seeds(self.folder, self.experiment)
            self.entries = found.kept
            self.parts = [{name: _of_seeds(frame, found.kept) for name, frame in found.frames.items()}]

    def _collect(self) -> None:
        run = None
        for folder in sorted(self.folder.glob(f"{BLOCKS}/*/{self.experiment.id}")):
            with suppress(UnusableError):
                found = find_seeds(folder, self.experiment)
                new = {seed: entry for seed, entry in found.kept.items() if seed in self.missing}
                self.entries |= new
                self.parts.append({name: _of_seeds(frame, new) for name, frame in found.frames.items()})
                run = found.run
        if run and not self.missing:
            write_seeds(self.folder, run, self.entries, self.frames)

    @property
    def missing(self) -> list[int]:
        """Those that are asked for, and not there yet."""
        return [seed for seed in self.experiment.seeds if seed not in self.entries]

    @property
    def frames(self) -> dict[str, pd.DataFrame]:
        """The rows of all seeds that are there, by file, in the order of seeds."""
        names = dict.fromkeys(name for part in self.parts for name in part)
        joined = {name: [part[name] for part in self.parts if name in part] for name in names}
        return {name: _in_order(parts) for name, parts in joined.items()}

    def add(
        self,
        seed: int,
        frames: Mapping[str, pd.DataFrame],
        facts: Mapping[str, object],
        figures: Mapping[str, "Figure"] | None = None,
    ) -> None:
        """A seed's rows, and facts about its run; written when they make the files whole.

        ``frames`` are named as in results.LAYOUT; ``facts`` is the rest of what run.json says.
        """
        now = time.monotonic()
        run = describe_run(self.experiment, facts)
        own = {name: run[name] for name in OWN_FACTS if name in run}
        self.entries[seed] = {
            "settings": settings_digest(self.experiment),
            **own,
            "seconds": round(now - self._since, 1),
        }
        self._since = now
        self.parts.append(dict(frames))
        self.figures |= figures or {}
        if self.keep or not self.missing:
            write_seeds(self.folder, run, self.entries, self.frames, self.figures)


def write_seeds(
    folder: Path,
    run: Mapping,
    entries: Mapping[int, Mapping],
    frames: Mapping[str, pd.DataFrame],
    figures: Mapping[str, "Figure"] | None = None,
) -> None:
    """The files of an experiment that has these seeds; ``run`` is what run.json says besides."""
    entries = dict(sorted(entries.items()))
    seeds = {"parameters": {**run["parameters"], "seeds": list(entries)}, "seeds": entries}
    write_files(folder, frames, {**run, **seeds, **_totals(entries.values())}, figures)


def _totals(entries: Iterable[Mapping]) -> dict:
    """Of all seeds, what run.json says of the experiment."""
    entries = list(entries)
    totals = {
        name: round(sum(entry[name] for entry in entries), 1)
        for name in ("training_seconds", "evaluation_seconds", "theory_seconds")
        if all(name in entry for entry in entries)
    }
    speeds = sorted(entry["images_per_second"] for entry in entries if "images_per_second" in entry)
    return totals | ({"images_per_second": speeds[len(speeds) // 2]} if speeds else {})


def _of_seeds(frame: pd.DataFrame, seeds: Iterable[int]) -> pd.DataFrame:
    return frame[frame["seed"].isin(list(seeds))] if len(frame) else frame


def _in_order(parts: list[pd.DataFrame]) -> pd.DataFrame:
    filled = [part for part in parts if len(part)]
    if not filled:  # the noise of FP32
        return parts[0]
    return pd.concat(filled, ignore_index=True).sort_values("seed", kind="stable", ignore_index=True)


# --- a study with more seeds ------------------------------------------------------------------------------------------


def extended(study: Study, seeds: Iterable[int], results: Path) -> Study:
    """``study`` with ``seeds`` besides those whose results are in the folder ``results``.

    Raises StudyError, naming the experiment, where its results there cannot stand beside new ones: those of other
    code, or other parameters. (``make study`` would run all seeds anew.)
    """
    experiments = []
    for experiment in study.experiments:
        if len(experiment.seeds) == 1:
            raise StudyError(
                f"{experiment.id} is an experiment of one seed: it is not extended; list two seeds or more"
            )
        present = _present(results / experiment.id, experiment)
        together = sorted({*present, *seeds})
        if len(together) == 1:  # it would be an experiment of another name
            raise StudyError(f"{experiment.id}: no results yet: begin with two seeds or more, such as SEEDS=0-1")
        if len(together) > MOST_SEEDS:
            raise StudyError(f"{experiment.id}: {len(together)} seeds are not allowed: at most {MOST_SEEDS}")
        experiments.append(experiment.model_copy(update={"seeds": together}))
    return replace(study, experiments=tuple(experiments))


def _present(folder: Path, experiment: Experiment) -> list[int]:
    """The seeds that have results in ``folder``; StudyError if others cannot be added to them."""
    if not (folder / "run.json").exists():
        return []
    try:
        found = find_seeds(folder, experiment)
    except UnusableError as error:
        raise StudyError(f"{folder}: {error}: it cannot be extended") from None
    for reason in found.refused.values():
        raise StudyError(f"{folder}: {reason}: it cannot be extended; make study runs all seeds anew")
    return list(found.kept)


# --- seeds of another folder ------------------------------------------------------------------------------------------


def join(study: Study, results: Path, source: Path) -> tuple[Study, list[str]]:
    """Add to ``results`` the seeds of ``source`` that can stand beside those that are there.

    Returns the study with all seeds, and a line for each experiment: what was added, or why nothing was. What cannot be
    read, or is of other code or parameters, changes nothing.
    """
    experiments, lines = [], []
    for experiment in study.experiments:
        seeds, line = _join_experiment(experiment, results / experiment.id, source / experiment.id)
        experiments.append(experiment.model_copy(update={"seeds": seeds}))
        lines.append(f"{experiment.id}: {line}")
    return replace(study, experiments=tuple(experiments)), lines


def _join_experiment(experiment: Experiment, folder: Path, source: Path) -> tuple[list[int], str]:
    """The seeds afterwards, and what was done."""
    try:
        present = _present(folder, experiment)
        found = find_seeds(source, experiment)
    except (StudyError, UnusableError) as error:
        return experiment.seeds, f"nothing added: {error}"
    new = [seed for seed in found.kept if seed not in present]
    said = [f"seed {seed} is {why}" for seed, why in found.refused.items()]
    if both := [seed for seed in (*found.kept, *found.refused) if seed in present]:
        said.append(f"here already: {_numbers(both)}")
    if not new:
        return sorted({*experiment.seeds, *present}), f"nothing added: {'; '.join(said)}"
    here = Seeds(folder, experiment, keep=True)
    here.entries |= {seed: found.kept[seed] for seed in new}
    here.parts.append({name: _of_seeds(frame, new) for name, frame in found.frames.items()})
    write_seeds(folder, found.run, here.entries, here.frames)
    return sorted({*experiment.seeds, *present, *new}), "; ".join([f"added: {_numbers(new)}", *said])


def _numbers(seeds: Iterable[int]) -> str:
    return f"seeds {', '.join(map(str, seeds))}"
