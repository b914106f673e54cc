"""What a person sees of a study while it runs."""

import json
import logging
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from qreg_utils.progress import FAILED, WAITING
from qreg_utils.seeds import BLOCKS
from qreg_utils.study import Experiment

SILENT_AFTER_SECONDS = 120  # without a sign of life, after which a run does not count as running
REPORT_INTERVAL_SECONDS = 300  # between two reports of what runs, where no terminal shows it all the time
ALREADY_REPORTED = "^(RuleException|Exiting because a job)|At least one job did not complete"  # by us
FULL_DISK_BYTES = 16 * 2**20  # with less free space a disk is called full


@dataclass(frozen=True)
class Job:
    """An experiment, or a block of its seeds ("0-3")."""

    experiment: str
    block: str = ""

    @property
    def label(self) -> str:
        return f"{self.experiment}, seeds {self.block}" if self.block else self.experiment

    @property
    def folder(self) -> Path:
        """In the study's folder of results: where it says how far it is."""
        return Path(self.experiment, BLOCKS, self.block, self.experiment) if self.block else Path(self.experiment)

    @property
    def log(self) -> Path:
        return Path(self.experiment, BLOCKS, self.block) if self.block else Path(self.experiment)


class Display(logging.Handler):
    """The state of a running study, drawn from Snakemake's events and each experiment's ``progress.json``.

    A line for each experiment that ends or fails. Below these, on a terminal, a block that is always up to date: a line
    for the study and one for each experiment that runs; elsewhere the same lines every REPORT_INTERVAL_SECONDS.
    ``experiments`` maps ids to experiments, ``results`` is the study's folder.
    """

    def __init__(self, study: str, experiments: Mapping[str, Experiment], results: Path):
        super().__init__()
        self.study, self.experiments, self.results = study, experiments, results
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self.started = time.monotonic()
        self.jobs: dict[int, Job] = {}  # by Snakemake's number
        self.planned, self.summarising = 0, False
        self.finished: list[str] = []
        self.failed: dict[str, str] = {}  # experiment -> why
        self.live = Live(get_renderable=self.block, console=self.console, transient=True, refresh_per_second=1)
        self.stopped = threading.Event()

    def start(self) -> None:
        """Begin to show; ``close`` ends it."""
        if self.planned:
            self.console.print(f"{self.study}: {self.planned} experiments to run; logs: {self.results}/*/log.txt")
        if self.console.is_terminal:
            self.live.start()
        else:
            threading.Thread(target=self._report_regularly, daemon=True).start()

    def close(self) -> None:
        self.stopped.set()
        self.live.stop()
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        event = str(getattr(record, "event", ""))
        if event == "run_info":
            self.planned = record.stats.get("experiment", 0)
        elif event == "job_info":
            self.summarising = record.rule_name == "summary"
            if record.rule_name in ("experiment", "block"):
                self.jobs[record.jobid] = Job(**record.wildcards)
        elif event == "job_finished" and self.summarising:
            self.console.print(f"summarised {self.results}  [{self._time()}]")
        elif event == "job_finished" and record.job_id in self.jobs:
            job = self.jobs.pop(record.job_id)
            self.finished += [] if job.block else [job.experiment]
            self._report_end(f"finished {job.label}")
        elif event == "job_error" and record.jobid in self.jobs:
            job = self.jobs.pop(record.jobid)
            why = reason(self.results / job.folder, getattr(record, "rule_msg", None), self.results / job.log)
            self.failed[job.experiment] = f"seeds {job.block}: {why}" if job.block else why
            self._report_end(f"FAILED {job.label}: {why}")
        elif (
            event in ("", "error")
            and record.levelno >= logging.ERROR
            and not re.search(ALREADY_REPORTED, record.getMessage())
        ):
            self.console.print(record.getMessage())  # such as sbatch's; the profiles keep Snakemake itself quiet

    def _report_end(self, how: str) -> None:
        self.console.print(f"{how}  [{self.ended} of {self.planned}, {self._time()}]")

    def _report_regularly(self) -> None:
        while not self.stopped.wait(REPORT_INTERVAL_SECONDS):
            for line in self.lines():
                self.console.print(line)

    def block(self) -> Group:
        """What a terminal shows."""
        return Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in self.lines()))

    def lines(self) -> list[str]:
        """The study's line, and one for each experiment that runs."""
        states = {job: read_progress(self.results / job.folder) for job in list(self.jobs.values())}
        running = {job: state for job, state in states.items() if state and state["stage"] != WAITING}
        width, experiments = max((len(job.label) for job in running), default=0), []
        parts = [f"{len(self.finished)} of {self.planned} experiments finished"]
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        parts += ["the summary is being made"] if self.summarising else [f"{len(running)} running"]
        parts += [f"{len(states) - len(running)} starting or queued"] if len(states) > len(running) else []
        head = f"{self.study}: {', '.join(parts)}; {self._time()}"
        for job, state in running.items():
            number = f"  (SLURM job {state['slurm_job']})" if state.get("slurm_job") else ""
            experiments.append(f"  {job.label:{width}}  {stage(self.experiments[job.experiment], state)}{number}")
        return [head, *experiments]

    @property
    def ended(self) -> int:
        return len(self.finished) + len(self.failed)

    def _time(self) -> str:
        """How long it has taken, and about how long the rest takes if it goes on like this."""
        elapsed, to_come = time.monotonic() - self.started, self.planned - self.ended
        left = f", about {duration(elapsed / self.ended * to_come)} left" if self.ended and to_come else ""
        return duration(elapsed) + left


def read_progress(folder: Path) -> dict | None:
    """What an experiment's run says of itself, or None when there is no sign of life."""
    path = folder / "progress.json"
    try:
        if time.time() - path.stat().st_mtime > SILENT_AFTER_SECONDS:
            return None
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def stage(experiment: Experiment, state: dict) -> str:
    """What a run does now, in words: "seed 1 (2 of 3), epoch 3 of 5, loss train=0.312, 40 s of training left"."""
    name, done, total, left = (state.get(key) for key in ("stage", "done", "total", "seconds_left"))
    if total is None:
        return str(name)
    seed = re.fullmatch(r"seed (\d+)", name or "")
    if not seed or int(seed[1]) not in experiment.seeds:
        return f"{name}, {done} of {total}" + (f", {duration(left)} left" if left is not None else "")
    position = experiment.seeds.index(int(seed[1])) + 1
    parts = [f"{name} ({position} of {len(experiment.seeds)}), epoch {done} of {total}"]
    parts += [f"loss {state['note']}"] if state.get("note") else []
    if left is not None and done < total:
        seeds_to_come = len(experiment.seeds) - position
        parts += [f"{duration(left + seeds_to_come * left * total / (total - done))} of training left"]
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Such as "40 s", "12 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def reason(folder: Path, executor: str | None = None, log: Path | None = None) -> str:
    """Why an experiment has not finished: what its run recorded, or else the executor and the end of its log, which is
    in the same folder unless ``log`` names another."""
    recorded, last = _last_line(folder / FAILED), _last_line((log or folder) / "log.txt")
    if recorded or not (last or executor):
        return recorded or "not started"
    how = " ".join(executor.split())[:500] if executor else "ended without a message (killed, cancelled, out of time?)"
    return f"{how}; its log ends with: {last}" if last else how


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""


def report_unfinished(unfinished: Iterable[str], results: Path, why: Mapping[str, str]) -> None:
    """At the end: what has not finished, ``why`` if that is known, where to look, and whether a disk is full."""
    for experiment in unfinished:
        folder = results / experiment
        print(
            f"NOT FINISHED: {experiment}: {why.get(experiment) or reason(folder)}\n  log: {folder / 'log.txt'}",
            file=sys.stderr,
        )
    free = shutil.disk_usage(results).free
    if free < FULL_DISK_BYTES:
        print(
            f"THE DISK IS FULL: {free / 2**20:.0f} MB are left where {results} lies; make room and run it again",
            file=sys.stderr,
        )
