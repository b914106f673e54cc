"""Are the committed results still true? ``make verify STUDY=quick``, or ``python -m qreg_utils.batch.verify quick``.

*A rerun*: one of the study's committed experiments, chosen at random (``--experiment`` names it), is run as the batch
runs it, in a temporary folder; of more than three seeds two, at random too (``--seeds`` names them). On the class of
machine that has made a seed (``machine_class``: versions, processor, GPU, threads) every number of metrics.csv,
history.csv and noise.csv, and of penalty.csv and sharpness.csv where there are any, must be the committed one, to the
last of its 8 digits (5 in noise.csv).

On another one it cannot be: training is chaotic, so that another order of floating-point operations gives another
network after a few epochs, as good or bad as with another seed. What must agree is the score averaged over the
corruptions, in the mean of the n seeds: it must lie in the 99% prediction interval for n other seeds, ``t * s *
sqrt(2 / n)`` around the committed mean. The spread s is that over seeds, pooled over all settings of the data set,
network and variant (three seeds of one setting alone would allow anything: t is 9.9 then). At least 1 point is allowed,
so that an accidentally small spread rejects nobody; 5 points where no setting has two seeds. It follows that one honest
run in a hundred fails, and that a bias smaller than the interval passes.

*The study's tables*: table.csv and table.md must be what its metrics.csv files give. (Tables on pages are written from
these, ``batch.pages``.)

The exit status is 0 if all of this holds, 1 if not, 2 if there is nothing to verify (an unknown study or experiment).
"""

import argparse
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pandas as pd

from qreg_utils import PROJECT
from qreg_utils.batch.display import duration, read_progress, reason, stage
from qreg_utils.metrics import (
    COMPARED_WITHIN,
    CONFIGURATION,
    cell_scores,
    corruption_average,
    results_table,
    table_text,
    with_published,
    with_variant,
)
from qreg_utils.names import DETECTION, PAPER_CORRUPTIONS, SCORES, task_of
from qreg_utils.results import (
    FRAMES,
    IMAGES,
    LAYOUT,
    THEORY,
    StudyResults,
    UnusableError,
    committed_study,
    read_experiment,
    read_study,
)
from qreg_utils.seeds import parse_seeds
from qreg_utils.study import Experiment, StudyError, load_study, params_text

COMPARED = (*FRAMES, *THEORY)
MOST_SEEDS = 3  # of more two are run, at random
CONFIDENCE = 0.99
LEAST_ALLOWED_POINTS = 1.0
ALLOWED_POINTS_WITHOUT_SPREAD = 5.0
MAX_SHOWN_DIFFERENCES = 5
INTERRUPTED = 130  # exit status of a program that Ctrl-C has ended
REPORT_INTERVAL_SECONDS = 60  # between two lines that say how far the run is
MACHINE_FACTS = ("platform", "processor", "instructions", "gpu", "threads", "compiled", "precision")  # of run.json


@dataclass(frozen=True)
class Verdict:
    passed: bool
    lines: list[str]


class RerunError(Exception):
    """The experiment could not be run again; the message says why."""


def main(arguments: list[str] | None = None, project: Path = PROJECT) -> int:
    """Check the study's tables, then one experiment; the exit status."""
    parser = argparse.ArgumentParser(
        prog="qreg_utils.batch.verify", description="Are the committed results still true?"
    )
    parser.add_argument("study", help="a folder of results/")
    parser.add_argument("--experiment", metavar="ID", help="which to run again (default: one chosen at random)")
    parser.add_argument(
        "--seeds", help="which of its seeds, such as 0-2 or 3,7 (default: up to three all, of more two)"
    )
    options = parser.parse_args(arguments)
    try:
        committed = committed_study(project / "results", options.study)
        experiment = with_seeds(chosen(committed, options.experiment), options.seeds)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    wrong = check_study(project / "results" / options.study, project / "results" / "published" / "table.csv")
    tables = Verdict(not wrong, wrong or [f"results/{options.study}: table.csv and table.md are what metrics.csv give"])
    report_verdict(tables, "the study's tables")
    how = "as asked" if options.experiment else f"chosen at random of {len(committed.runs)}"
    again = f"make verify STUDY={options.study} EXPERIMENT={experiment.id}"
    if not _is_whole(experiment, committed.runs[experiment.id]):
        print(f"seeds: {', '.join(map(str, experiment.seeds))}")
        again += f" SEEDS={','.join(map(str, experiment.seeds))}"
    print(f"experiment: {experiment.id}, {how}; again: {again}")
    try:
        numbers = verify_experiment(committed, experiment, project)
    except KeyboardInterrupt:
        print("interrupted: not verified", file=sys.stderr)
        return INTERRUPTED
    report_verdict(numbers, experiment.id)
    return 0 if tables.passed and numbers.passed else 1


def report_verdict(verdict: Verdict, what: str) -> None:
    print(*verdict.lines, f"{'PASS' if verdict.passed else 'FAIL'}: {what}", sep="\n", flush=True)


# --- the rerun --------------------------------------------------------------------------------------------------------


def chosen(study: StudyResults, wanted: str | None) -> Experiment:
    """The experiment that is asked for, or one at random, of those that have results. Raises StudyError."""
    available = {experiment.id: experiment for experiment in study.study.experiments if experiment.id in study.runs}
    if wanted in study.missing:
        raise StudyError(f"{wanted}: no committed results: {study.missing[wanted]}")
    if wanted is not None and wanted not in available:
        raise StudyError(f"{wanted}: no experiment of {study.study.name}; it has {', '.join(available)}")
    return available[wanted or random.choice(list(available))]


def with_seeds(experiment: Experiment, wanted: str | None) -> Experiment:
    """With the seeds that are asked for, or all, or two at random of more than MOST_SEEDS. Raises StudyError."""
    seeds = list(experiment.seeds)
    if wanted:
        asked = parse_seeds(wanted)
        if lacking := [seed for seed in asked if seed not in seeds]:
            raise StudyError(f"{experiment.id}: no committed seed {', '.join(map(str, lacking))}; it has {seeds}")
        if len(asked) < 2 <= len(seeds):
            raise StudyError(f"SEEDS={wanted!r} is not allowed: two at least (one alone is another experiment)")
        seeds = asked
    elif len(seeds) > MOST_SEEDS:
        seeds = sorted(random.sample(seeds, 2))
    return experiment.model_copy(update={"seeds": seeds})


def verify_experiment(committed: StudyResults, experiment: Experiment, project: Path = PROJECT) -> Verdict:
    """Run ``experiment`` in a temporary folder, which is kept if something is wrong, and compare."""
    temporary = Path(tempfile.mkdtemp(prefix="qreg-verify-"))
    results = project / "results" / committed.study.name
    rerun_results = temporary / committed.study.name
    keep = False
    try:
        prepare(rerun_results, results, experiment)
        rerun(experiment, committed.runs[experiment.id], results, rerun_results, project)
        verdict = compare(committed, _read_rerun(rerun_results, experiment), experiment)
        keep = not verdict.passed
    except RerunError as error:
        verdict, keep = Verdict(False, [f"{experiment.id}: {error}"]), True
    finally:
        if not keep:  # also when interrupted
            shutil.rmtree(temporary, ignore_errors=True)
    lines = [*verdict.lines, *_not_as_committed(results / experiment.id, project)]
    if keep:
        log = rerun_results / experiment.id / "log.txt"
        lines.append(f"log: {log}; delete {temporary} when you have seen it")
    return Verdict(verdict.passed, lines)


def prepare(rerun_results: Path, results: Path, experiment: Experiment) -> None:
    """Make a results folder in which only ``experiment`` is missing: for a control with its noise source."""
    (rerun_results / experiment.id).mkdir(parents=True)
    shutil.copy(results / f"{results.name}.yaml", rerun_results)
    if experiment.noise_source:
        noise_source = rerun_results / experiment.noise_source.id
        noise_source.mkdir()
        for name in ("noise.csv", "run.json"):  # what controls.load_controls reads
            if (results / noise_source.name / name).exists():  # otherwise the notebook says what is missing
                shutil.copy(results / noise_source.name / name, noise_source)


def rerun(experiment: Experiment, run: Mapping, results: Path, rerun_results: Path, project: Path) -> None:
    """Run the experiment's notebook as the batch does; its files go to ``rerun_results``. Raises RerunError.

    ``QREG_BATCH`` lets it end when this process is killed (``running.exclusive_run``).
    """
    folder = rerun_results / experiment.id
    notebooks = [project / "notebooks" / experiment.task.notebook, folder / "notebook.ipynb"]
    parameters = ["-f", _params_file(experiment, run, results, folder), "-p", "results_dir", rerun_results]
    threads = {"OMP_NUM_THREADS": str(run["threads"])}  # sums over a batch depend on it
    print(f"running it in {folder}; the committed run took {duration(_seconds(experiment, run))}", flush=True)
    started = time.monotonic()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "qreg_utils.batch.notebooks", *map(str, [*notebooks, *parameters])],
            cwd=project,
            env={**os.environ, **threads, "QREG_BATCH": str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that Ctrl-C comes here alone, and is passed on once
        )
        try:
            _wait(process, experiment, folder)
        finally:
            _end(process)
    if process.returncode:
        raise RerunError(f"failed: {reason(folder)}")
    print(f"done in {duration(time.monotonic() - started)}", flush=True)


def _params_file(experiment: Experiment, run: Mapping, results: Path, folder: Path) -> Path:
    """The committed one, or one of its own where only some of the seeds are run."""
    committed = results / experiment.id / "params.yaml"
    if _is_whole(experiment, run):
        return committed
    (folder / "params.yaml").write_text(params_text(experiment), encoding="utf-8")
    return folder / "params.yaml"


def _seconds(experiment: Experiment, run: Mapping) -> float:
    """What the committed run of these seeds took."""
    each = [_of_seed(run, seed).get("seconds") for seed in experiment.seeds]
    return run["wall_seconds"] if None in each or _is_whole(experiment, run) else sum(each)


def _is_whole(experiment: Experiment, run: Mapping) -> bool:
    """Whether it has all seeds of the committed run."""
    return list(experiment.seeds) == run["parameters"]["seeds"]


def _of_seed(run: Mapping, seed: int) -> dict:
    """run.json with what it says of this seed in particular."""
    return {**run, **run.get("seeds", {}).get(str(seed), {})}


def _wait(process: subprocess.Popen, experiment: Experiment, folder: Path) -> None:
    while True:
        try:
            process.wait(timeout=REPORT_INTERVAL_SECONDS)
            return
        except subprocess.TimeoutExpired:
            if state := read_progress(folder):
                print(f"  {stage(experiment, state)}", flush=True)


def _end(process: subprocess.Popen) -> None:
    """After Ctrl-C: papermill ends the notebook's kernel, and tidies up."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=30)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()


def _read_rerun(rerun_results: Path, experiment: Experiment) -> StudyResults:
    study = load_study(rerun_results / f"{rerun_results.name}.yaml")
    try:
        run, frames = read_experiment(rerun_results / experiment.id, experiment)
    except UnusableError as error:
        raise RerunError(f"the run has ended, but its results cannot be used: {error}") from None
    empty = {name: pd.DataFrame() for name in (*COMPARED, IMAGES)}
    return StudyResults(study, **(empty | frames), runs={experiment.id: run}, missing={}, older={})


def _not_as_committed(folder: Path, project: Path) -> list[str]:
    """A warning if git knows that the files compared with are not the committed ones, as after ``make study``."""
    files = [str(folder / name) for name in ("run.json", *(f"{name}.csv" for name in COMPARED))]
    try:
        command = ["git", "status", "--porcelain", "--", *files]
        done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    names = ", ".join(line[3:] for line in done.stdout.splitlines())
    return [f"WARNING: compared with files that are not as committed: {names}"] if names else []


# --- comparing --------------------------------------------------------------------------------------------------------


def machine_class(run: Mapping) -> dict[str, object]:
    """What numbers depend on besides parameters, code and data; without what an older run.json does not say."""
    python = ".".join(run["python"].split(".")[:2])
    versions = {name: version for name, version in run["versions"].items() if _is_used(name, run["parameters"])}
    return {"Python": python, **versions, **{name: run[name] for name in MACHINE_FACTS if name in run}}


def _is_used(package: str, parameters: Mapping) -> bool:
    return package != "ultralytics" or task_of(parameters.get("model"), parameters.get("dataset")) is DETECTION


def code_and_data(run: Mapping) -> dict[str, str]:
    """What can be behind other numbers, too, and excuses none."""
    return {
        "code:": f"commit {str(run['commit'])[:10]}{' with uncommitted changes' if run['dirty'] else ''}",
        "corrupted images:": run["corrupted_images"],
        "files without the official md5:": ", ".join(sorted(run["unverified_files"])) or "none",
    }


def differing(committed: Mapping, rerun: Mapping) -> list[str]:
    """What both say, and not the same: "torch 2.15.0 in the rerun, 2.14.0 committed"."""
    return [
        f"{name} {rerun[name]} in the rerun, {value} committed"
        for name, value in committed.items()
        if name in rerun and rerun[name] != value
    ]


def compare(committed: StudyResults, rerun: StudyResults, experiment: Experiment) -> Verdict:
    """Whether ``rerun`` has the numbers that it must have, by its class of machine."""
    pairs = [[_of_seed(study.runs[experiment.id], seed) for study in (committed, rerun)] for seed in experiment.seeds]
    other_class = _once(line for pair in pairs for line in differing(*map(machine_class, pair)))
    numbers = {
        name: pair_numbers(name, *(_rows(getattr(study, name), experiment) for study in (committed, rerun)))
        for name in COMPARED
    }
    lines = [_largest(numbers["metrics"])]
    if besides := _once(line for pair in pairs for line in _other_code_or_data(*pair)):
        lines.append(f"also different: {'; '.join(besides)}")
    if other_class:
        verdict = compare_averages(_averages(committed), _averages(rerun), experiment)
        head = f"class: another one ({'; '.join(other_class)}): the average over the corruptions must agree"
    else:
        verdict = _exact(numbers)
        head = "class: the same versions and hardware: every number must be the same"
    return Verdict(verdict.passed, [head, *lines, *verdict.lines])


def _once(lines: Iterable[str]) -> list[str]:
    """What is said of several seeds."""
    return list(dict.fromkeys(lines))


def _other_code_or_data(committed: Mapping, rerun: Mapping) -> list[str]:
    theirs, ours = code_and_data(committed), code_and_data(rerun)
    if committed.get("code") is not None and committed["code"] == rerun.get("code"):
        del ours["code:"]  # another commit, and the same code
    return differing(theirs, ours)


def _rows(frame: pd.DataFrame, experiment: Experiment) -> pd.DataFrame:
    """The experiment's own, of its seeds, with the columns that its file has."""
    if not len(frame):
        return frame
    own = (frame["experiment"] == experiment.id) & frame["seed"].isin(experiment.seeds)
    return frame[own].dropna(axis=1, how="all")


def pair_numbers(name: str, committed: pd.DataFrame, rerun: pd.DataFrame) -> pd.DataFrame:
    """Every number of the committed ``name``.csv, a row each: its keys, ``committed``, ``rerun``, and ``same``."""
    series, keys, _ = LAYOUT[name]
    where = [*series, *keys]
    if committed.empty:  # the noise of FP32
        return pd.DataFrame(columns=[*where, "column", "committed", "rerun", "same"])

    def one_a_row(frame: pd.DataFrame, value_name: str) -> pd.DataFrame:
        numbers = frame.drop(columns=["experiment", *CONFIGURATION])
        return numbers.melt(where, var_name="column", value_name=value_name)

    pairs = one_a_row(committed, "committed").merge(one_a_row(rerun, "rerun"), on=[*where, "column"], how="left")
    same = (pairs["committed"] == pairs["rerun"]) | pairs[["committed", "rerun"]].isna().all(axis=1)
    return pairs.assign(same=same)


def _exact(numbers: Mapping[str, pd.DataFrame]) -> Verdict:
    other = {name: rows[~rows["same"].astype(bool)].drop(columns="same") for name, rows in numbers.items()}
    lines = []
    for name, rows in other.items():
        if numbers[name].empty:
            continue
        if rows.empty:
            lines.append(f"{name}.csv: {len(numbers[name])} numbers, all the same")
        else:
            first = rows.head(MAX_SHOWN_DIFFERENCES).to_string(index=False, float_format="%.8g")
            lines += [f"{name}.csv: {len(rows)} of {len(numbers[name])} numbers are not the same; the first:", first]
    passed = all(rows.empty for rows in other.values())
    if not passed:
        lines.append(
            "Other code, other data, or a processor that has the same name and other instructions: "
            "an older run.json does not say more of a processor than its name."
        )
    return Verdict(passed, lines)


def _largest(numbers: pd.DataFrame) -> str:
    """Of the differences between the scores."""
    scores = numbers[numbers["metric"].isin(SCORES) & ~numbers["same"]]
    if scores.empty:
        return "largest difference of a score: none"
    committed, rerun = scores["committed"], scores["rerun"]
    worst = (committed - rerun).abs().fillna(math.inf).idxmax()
    seed, corruption, severity = scores.loc[worst, ["seed", "corruption", "severity"]]
    where = f"seed {seed}, {corruption}, severity {severity}: {_both(committed[worst], rerun[worst])}"
    return f"largest difference of a score: {abs(committed[worst] - rerun[worst]):.2f} points ({where})"


def _both(committed: float, rerun: float) -> str:
    return f"{committed:.2f} committed, {rerun:.2f} in the rerun"


def _averages(study: StudyResults) -> pd.DataFrame:
    return corruption_average(cell_scores(study.metrics), PAPER_CORRUPTIONS)


def compare_averages(committed: pd.DataFrame, rerun: pd.DataFrame, experiment: Experiment) -> Verdict:
    """Whether the mean over the experiment's seeds is within the tolerance; frames of ``corruption_average``."""
    theirs, ours = (_by_seed(averages, experiment) for averages in (committed, rerun))
    group = pd.Series({name: experiment.columns[name] for name in COMPARED_WITHIN})
    allowed, why = tolerance(committed[(committed[COMPARED_WITHIN] == group).all(axis=1)], len(theirs))
    difference = abs(ours.mean() - theirs.mean())
    seeds = "; ".join(f"seed {seed}: {_both(theirs[seed], ours[seed])}" for seed in theirs.index)
    lines = [
        f"average over the corruptions: {seeds}; mean: {_both(theirs.mean(), ours.mean())}",
        f"the means differ by {difference:.2f} points; {allowed:.2f} are allowed ({why})",
    ]
    return Verdict(bool(difference <= allowed), lines)


def _by_seed(averages: pd.DataFrame, experiment: Experiment) -> pd.Series:
    configuration = pd.Series({name: experiment.columns[name] for name in CONFIGURATION})
    own = (averages[CONFIGURATION] == configuration).all(axis=1) & averages["seed"].isin(experiment.seeds)
    return averages[own].set_index("seed")["avg_corrupted"]


def tolerance(averages: pd.DataFrame, seeds: int) -> tuple[float, str]:
    """By how many points two means over ``seeds`` networks each may differ, and why.

    ``averages`` are all networks of one data set, model and variant, in any setting (``corruption_average``).
    """
    from scipy.stats import t

    deviations = averages["avg_corrupted"] - averages.groupby(CONFIGURATION)["avg_corrupted"].transform("mean")
    degrees_of_freedom = len(averages) - averages.groupby(CONFIGURATION).ngroups
    if degrees_of_freedom == 0:
        return ALLOWED_POINTS_WITHOUT_SPREAD, "a fixed number: no setting has two seeds"
    spread = math.sqrt((deviations**2).sum() / degrees_of_freedom)
    half_width = float(t.ppf((1 + CONFIDENCE) / 2, degrees_of_freedom)) * spread * math.sqrt(2 / seeds)
    interval = f"99% prediction interval for {seeds} other seeds: {half_width:.2f}, from a spread of {spread:.2f}"
    least = f"; at least {LEAST_ALLOWED_POINTS:g}" if half_width < LEAST_ALLOWED_POINTS else ""
    return max(half_width, LEAST_ALLOWED_POINTS), f"{interval} over seeds in {len(averages)} networks{least}"


# --- the study's tables -----------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def check_study(folder: Path, published: Path) -> list[str]:
    """What is wrong with table.csv and table.md in results/<study>/; both are made again from its metrics.csv files."""
    try:
        results = read_study(folder)
        if not results.runs:
            experiment, why = next(iter(results.missing.items()))
            return [f"results/{folder.name}: no experiment has results: {experiment}: {why}"]
        made = study_table(results, pd.read_csv(published))
        stored = with_variant(pd.read_csv(folder / "table.csv"))
        wrong = [f"results/{folder.name}/table.csv: {line}" for line in _wrong_numbers(stored, made)]
        lines = zip_longest(_text(folder / "table.md").splitlines(), table_text(made).splitlines())
    except (OSError, ValueError) as error:
        return [f"results/{folder.name}: {error}"]
    missing = [f"results/{folder.name}: {name}: {why}" for name, why in results.missing.items()]
    wrong += [f"results/{folder.name}/table.md: {line}, not {other}" for line, other in lines if line != other]
    return [*wrong, *missing] if wrong else []


def study_table(results: StudyResults, published: pd.DataFrame) -> pd.DataFrame:
    """table.csv as summary.ipynb makes it, from the metrics of all experiments and the paper's table."""
    return with_published(results_table(_averages(results)), published)


def _wrong_numbers(stored: pd.DataFrame, made: pd.DataFrame) -> Iterator[str]:
    """Where the stored table is not the one made again, to 8 digits."""
    if list(stored) != list(made) or len(stored) != len(made):
        yield f"{len(stored)} rows of {', '.join(stored)}; metrics.csv give {len(made)} of {', '.join(made)}"
        return
    for name in made:
        theirs, ours = stored[name], made[name]
        close = _same_to_8_digits(theirs, ours) if _numeric(theirs, ours) else theirs == ours
        for row in np.flatnonzero(~close):
            configuration = " ".join(str(value) for value in made.loc[row, CONFIGURATION] if value != "")
            yield f"{name} of {configuration}: {theirs[row]}, but metrics.csv give {ours[row]:.8g}"


def _same_to_8_digits(stored: pd.Series, made: pd.Series) -> pd.Series:
    """Nearly half a unit of the 8th digit is lost in writing; what is nearly zero is compared to 9 decimals."""
    unit = 10 ** (np.floor(np.log10(np.maximum(made.abs(), 0.01))) - 7)
    return ((stored - made).abs() <= 0.6 * unit) | (stored.isna() & made.isna())


def _numeric(*columns: pd.Series) -> bool:
    return all(pd.api.types.is_numeric_dtype(column) for column in columns)


if __name__ == "__main__":
    sys.exit(main())
