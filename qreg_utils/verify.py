"""Are the committed results still true? ``make verify STUDY=quick``, or ``python -m qreg_utils.verify quick``.

*One experiment again*: one of the study's committed experiments, chosen at random (``--experiment`` names it), is run
as the batch runs it, in a temporary folder. On the same class of machine (``machine_class``: versions, processor, GPU,
threads) every number of metrics.csv, history.csv and noise.csv, and of penalty.csv and sharpness.csv where there are
any, must be the committed one, to the last of its 8 digits.

On another one it cannot be: training is chaotic, so that another order of floating-point operations gives another
network after a few epochs, as good or bad as with another seed. What must agree is the score averaged over the
corruptions, in the mean of the n seeds: it must lie in the 99% prediction interval for n other seeds, ``t * s *
sqrt(2 / n)`` around the committed mean. The spread s is that over seeds, pooled over all levels of the data set and
network (three seeds of one level alone would allow anything: t is 9.9 then). At least 1 point is allowed, so that an
accidentally small spread rejects nobody; 5 points where no level has two seeds. It follows that one honest run in a
hundred fails, and that a bias smaller than the interval passes.

*The README's tables*: each row of its results tables (those that begin with the column "data set") must be a row of one
results/<study>/table.md; and in every study table.md and table.csv must be what its metrics.csv files give. Not checked
are the minutes in its table of studies, which are in no file, and numbers in its text.

The exit status is 0 if all of this holds, 1 if not, 2 if there is nothing to verify (an unknown study or experiment).
"""

import argparse
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pandas as pd

from qreg_utils import PROJECT
from qreg_utils.corruptions import CORRUPTIONS
from qreg_utils.display import duration, read_progress, reason, stage
from qreg_utils.metrics import CONFIGURATION, SCORES, cell_scores, corruption_average, results_table, table_text
from qreg_utils.results import FRAMES, LAYOUT, THEORY, StudyResults, read_study
from qreg_utils.study import Experiment, StudyError

COMPARED = (*FRAMES, *THEORY)
CONFIDENCE = 0.99
LEAST_ALLOWED = 1.0  # points
ALLOWED_WITHOUT_SPREAD = 5.0  # points
SHOWN = 5  # numbers that differ
INTERRUPTED = 130  # exit status of a program that Ctrl-C has ended
EVERY = 60  # seconds between two lines that say how far the run is
CLASS = ("platform", "processor", "gpu", "threads", "compiled", "precision")
PAPERMILL = (sys.executable, "-m", "papermill", "--engine", "qreg", "--log-output", "--no-progress-bar")


@dataclass(frozen=True)
class Verdict:
    passed: bool
    lines: list[str]


class RerunError(Exception):
    """The experiment could not be run again; the message says why."""


def main(arguments: list[str] | None = None, project: Path = PROJECT) -> int:
    """Check the README's tables, then one experiment; the exit status."""
    parser = argparse.ArgumentParser(prog="qreg_utils.verify", description="Are the committed results still true?")
    parser.add_argument("study", help="a folder of results/")
    parser.add_argument("--experiment", metavar="ID", help="which to run again (default: one chosen at random)")
    options = parser.parse_args(arguments)
    try:
        committed = committed_study(project / "results", options.study)
        experiment = chosen(committed, options.experiment)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    tables = check_tables(project / "README.md", project / "results")
    _tell(tables, "the README's tables")
    how = "as asked" if options.experiment else f"chosen at random of {len(committed.runs)}"
    print(f"experiment: {experiment.id}, {how}; again: make verify STUDY={options.study} EXPERIMENT={experiment.id}")
    try:
        again = verify_experiment(committed, experiment, project)
    except KeyboardInterrupt:
        print("interrupted: not verified", file=sys.stderr)
        return INTERRUPTED
    _tell(again, experiment.id)
    return 0 if tables.passed and again.passed else 1


def _tell(verdict: Verdict, what: str) -> None:
    print(*verdict.lines, f"{'PASS' if verdict.passed else 'FAIL'}: {what}", sep="\n", flush=True)


# --- one experiment again ---------------------------------------------------------------------------------------------


def committed_study(results: Path, name: str) -> StudyResults:
    """Raises StudyError when there is no such study, or none of its experiments has results."""
    studies = sorted(path.parent.name for path in results.glob("*/*.yaml") if path.stem == path.parent.name)
    if name not in studies:
        raise StudyError(f"{results.name}/{name}: no committed results; studies that have some: {', '.join(studies)}")
    study = read_study(results / name)
    if not study.runs:
        raise StudyError(f"{results.name}/{name}: no committed results: {_first(study.missing)}")
    return study


def _first(missing: Mapping[str, str]) -> str:
    return next((f"{experiment}: {why}" for experiment, why in missing.items()), "")


def chosen(study: StudyResults, wanted: str | None) -> Experiment:
    """The experiment that is asked for, or one by chance, of those that have results. Raises StudyError."""
    there = {experiment.id: experiment for experiment in study.study.experiments if experiment.id in study.runs}
    if wanted in study.missing:
        raise StudyError(f"{wanted}: no committed results: {study.missing[wanted]}")
    if wanted is not None and wanted not in there:
        raise StudyError(f"{wanted}: no experiment of {study.study.name}; it has {', '.join(there)}")
    return there[wanted or random.choice(list(there))]


def verify_experiment(committed: StudyResults, experiment: Experiment, project: Path = PROJECT) -> Verdict:
    """Run ``experiment`` in a temporary folder, which is kept if something is wrong, and compare."""
    temporary = Path(tempfile.mkdtemp(prefix="qreg-verify-"))
    results = project / "results" / committed.study.name
    place = temporary / committed.study.name
    keep = False
    try:
        prepare(place, results, experiment)
        rerun(experiment, committed.runs[experiment.id], results, place, project)
        verdict = compare(committed, _read_again(place, experiment), experiment)
        keep = not verdict.passed
    except RerunError as error:
        verdict, keep = Verdict(False, [f"{experiment.id}: {error}"]), True
    finally:
        if not keep:  # also when interrupted
            shutil.rmtree(temporary, ignore_errors=True)
    told = [*verdict.lines, *_not_as_committed(results / experiment.id, project)]
    if keep:
        told.append(f"log: {place / experiment.id / 'log.txt'}; delete {temporary} when you have seen it")
    return Verdict(verdict.passed, told)


def prepare(place: Path, results: Path, experiment: Experiment) -> None:
    """Make a results folder in which only ``experiment`` is missing: for a control with the noise that it imitates."""
    (place / experiment.id).mkdir(parents=True)
    shutil.copy(results / f"{results.name}.yaml", place)
    if experiment.imitated:
        imitated = place / experiment.imitated.id
        imitated.mkdir()
        for name in ("noise.csv", "run.json"):  # what controls.load_controls reads
            if (results / imitated.name / name).exists():  # otherwise the notebook says what is missing
                shutil.copy(results / imitated.name / name, imitated)


def rerun(experiment: Experiment, run: Mapping, results: Path, place: Path, project: Path) -> None:
    """Run the experiment's notebook as the batch does; its files go to ``place``. Raises RerunError.

    ``QREG_BATCH`` lets it end when this process is killed (``running.running_alone``).
    """
    folder = place / experiment.id
    notebooks = [project / "notebooks" / experiment.notebook, folder / "notebook.ipynb"]
    parameters = ["-f", results / experiment.id / "params.yaml", "-p", "results_dir", place]
    threads = {"OMP_NUM_THREADS": str(run["threads"])}  # sums over a batch depend on it
    print(f"running it in {folder}; the committed run took {duration(run['wall_seconds'])}", flush=True)
    started = time.monotonic()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [*PAPERMILL, *map(str, [*notebooks, *parameters])],
            cwd=project,
            env={**os.environ, **threads, "QREG_BATCH": str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that Ctrl-C comes here alone, and goes on once
        )
        try:
            _wait(process, experiment, folder)
        finally:
            _end(process)
    if process.returncode:
        raise RerunError(f"failed: {reason(folder)}")
    print(f"done in {duration(time.monotonic() - started)}", flush=True)


def _wait(process: subprocess.Popen, experiment: Experiment, folder: Path) -> None:
    while True:
        try:
            process.wait(timeout=EVERY)
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


def _read_again(place: Path, experiment: Experiment) -> StudyResults:
    again = read_study(place)
    if why := again.missing.get(experiment.id):
        raise RerunError(f"the run has ended, but its results cannot be used: {why}")
    return again


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
    versions = {name: version for name, version in run["versions"].items() if _used(name, run)}
    return {"Python": python, **versions, **{name: run[name] for name in CLASS if name in run}}


def _used(package: str, run: Mapping) -> bool:
    return package != "ultralytics" or run["parameters"]["model"] == "yolov5n"


def code_and_data(run: Mapping) -> dict[str, str]:
    """What can be behind other numbers, too, and excuses none."""
    return {
        "code:": f"commit {str(run['commit'])[:10]}{' with uncommitted changes' if run['dirty'] else ''}",
        "corrupted images:": run["corrupted_images"],
        "files without the official md5:": ", ".join(sorted(run["unverified_files"])) or "none",
    }


def differing(there: Mapping, here: Mapping) -> list[str]:
    """What both say, and not the same: "torch 2.15.0 here, 2.14.0 there"."""
    return [
        f"{name} {here[name]} here, {value} there"
        for name, value in there.items()
        if name in here and here[name] != value
    ]


def compare(committed: StudyResults, again: StudyResults, experiment: Experiment) -> Verdict:
    """Whether ``again`` has the numbers that it must have, by its class of machine."""
    there, here = committed.runs[experiment.id], again.runs[experiment.id]
    other_class = differing(machine_class(there), machine_class(here))
    numbers = {
        name: beside(name, *(_rows(getattr(study, name), experiment) for study in (committed, again)))
        for name in COMPARED
    }
    lines = [_largest(numbers["metrics"])]
    if besides := differing(code_and_data(there), code_and_data(here)):
        lines.append(f"also different: {'; '.join(besides)}")
    if other_class:
        verdict = compare_averages(_averages(committed), _averages(again), experiment)
        head = f"class: another one ({'; '.join(other_class)}): the average over the corruptions must agree"
    else:
        verdict = _exact(numbers)
        head = "class: the same versions and hardware: every number must be the same"
    return Verdict(verdict.passed, [head, *lines, *verdict.lines])


def _rows(frame: pd.DataFrame, experiment: Experiment) -> pd.DataFrame:
    """The experiment's own, with the columns that its file has."""
    return frame[frame["experiment"] == experiment.id].dropna(axis=1, how="all") if len(frame) else frame


def beside(name: str, committed: pd.DataFrame, again: pd.DataFrame) -> pd.DataFrame:
    """Every number of the committed ``name``.csv, a row each: where it is, ``there``, ``here``, and if they agree."""
    series, keys, _ = LAYOUT[name]
    where = [*series, *keys]
    if committed.empty:  # the noise of FP32
        return pd.DataFrame(columns=[*where, "column", "there", "here", "same"])

    def one_a_row(frame: pd.DataFrame, place: str) -> pd.DataFrame:
        numbers = frame.drop(columns=["experiment", *CONFIGURATION])
        return numbers.melt(where, var_name="column", value_name=place)

    both = one_a_row(committed, "there").merge(one_a_row(again, "here"), on=[*where, "column"], how="left")
    same = (both["there"] == both["here"]) | both[["there", "here"]].isna().all(axis=1)
    return both.assign(same=same)


def _exact(numbers: Mapping[str, pd.DataFrame]) -> Verdict:
    other = {name: rows[~rows["same"].astype(bool)].drop(columns="same") for name, rows in numbers.items()}
    lines = []
    for name, rows in other.items():
        if numbers[name].empty:
            continue
        if rows.empty:
            lines.append(f"{name}.csv: {len(numbers[name])} numbers, all the same")
        else:
            first = rows.head(SHOWN).to_string(index=False, float_format="%.8g")
            lines += [f"{name}.csv: {len(rows)} of {len(numbers[name])} numbers are not the same; the first:", first]
    passed = all(rows.empty for rows in other.values())
    if not passed:
        lines.append(
            "Other code, other data, or a processor that has the same name and other instructions: "
            "run.json does not say more of a processor than its name."
        )
    return Verdict(passed, lines)


def _largest(numbers: pd.DataFrame) -> str:
    """Of the differences between the scores."""
    scores = numbers[numbers["metric"].isin(SCORES) & ~numbers["same"]]
    if scores.empty:
        return "largest difference of a score: none"
    there, here = scores["there"], scores["here"]
    worst = (there - here).abs().fillna(math.inf).idxmax()
    seed, corruption, severity = scores.loc[worst, ["seed", "corruption", "severity"]]
    where = f"seed {seed}, {corruption}, severity {severity}: {there[worst]:.2f} there, {here[worst]:.2f} here"
    return f"largest difference of a score: {abs(there[worst] - here[worst]):.2f} points ({where})"


def _averages(study: StudyResults) -> pd.DataFrame:
    return corruption_average(cell_scores(study.metrics), CORRUPTIONS)


def compare_averages(committed: pd.DataFrame, again: pd.DataFrame, experiment: Experiment) -> Verdict:
    """Whether the mean over the experiment's seeds is within the tolerance; frames of ``corruption_average``."""
    there, here = (_by_seed(averages, experiment) for averages in (committed, again))
    like_it = (committed["dataset"] == experiment.dataset) & (committed["model"] == experiment.model)
    allowed, why = tolerance(committed[like_it], len(there))
    difference = abs(here.mean() - there.mean())
    seeds = "; ".join(f"seed {seed}: {there[seed]:.2f} there, {here[seed]:.2f} here" for seed in there.index)
    mean = f"mean: {there.mean():.2f} there, {here.mean():.2f} here"
    lines = [
        f"average over the corruptions: {seeds}; {mean}",
        f"the means differ by {difference:.2f} points; {allowed:.2f} are allowed ({why})",
    ]
    return Verdict(bool(difference <= allowed), lines)


def _by_seed(averages: pd.DataFrame, experiment: Experiment) -> pd.Series:
    level = {name: experiment.columns[name] for name in CONFIGURATION}
    own = (averages[list(level)] == pd.Series(level)).all(axis=1) & averages["seed"].isin(experiment.seeds)
    return averages[own].set_index("seed")["avg_corrupted"]


def tolerance(averages: pd.DataFrame, seeds: int) -> tuple[float, str]:
    """By how many points two means over ``seeds`` networks each may differ, and why.

    ``averages`` are all networks of one data set and model, of any level (``corruption_average``).
    """
    from scipy.stats import t

    deviations = averages["avg_corrupted"] - averages.groupby(CONFIGURATION)["avg_corrupted"].transform("mean")
    freedom = len(averages) - averages.groupby(CONFIGURATION).ngroups
    if freedom == 0:
        return ALLOWED_WITHOUT_SPREAD, "a fixed number: no level has two seeds"
    spread = math.sqrt((deviations**2).sum() / freedom)
    half_width = float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * spread * math.sqrt(2 / seeds)
    interval = f"99% prediction interval for {seeds} other seeds: {half_width:.2f}, from a spread of {spread:.2f}"
    least = f"; at least {LEAST_ALLOWED:g}" if half_width < LEAST_ALLOWED else ""
    return max(half_width, LEAST_ALLOWED), f"{interval} over seeds in {len(averages)} networks{least}"


# --- the README's tables ----------------------------------------------------------------------------------------------

Row = dict[str, str]  # header -> cell


def check_tables(readme: Path, results: Path) -> Verdict:
    """Whether the results tables of the README are those of results/, and these what the metrics.csv files give."""
    folders = [path.parent for path in sorted(results.glob("*/table.md"))]
    wrong = [line for folder in folders for line in check_study(folder, results / "published" / "table.csv")]
    rows = {folder.name: [row for table in _tables(folder / "table.md") for row in table] for folder in folders}
    tables = [table for table in _tables(readme) if next(iter(table[0])) == "data set"]
    shown = []
    for table in tables:
        study, strangers = _nearest(table, rows)
        shown.append(study)
        wrong += [f"{readme.name}: not in results/{study}/table.md: {' | '.join(row.values())}" for row in strangers]
    if not tables:
        wrong.append(f"{readme.name}: no results table, one that begins with the column 'data set'")
    numbers = sum(len(_numbers(cell)) for table in tables for row in table for cell in row.values())
    checked = f"{readme.name}: {numbers} numbers in {sum(map(len, tables))} rows of {len(tables)} tables"
    return Verdict(not wrong, [f"{checked} looked up in results/ ({', '.join(shown)})", *wrong])


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _tables(path: Path) -> list[list[Row]]:
    return markdown_tables(_text(path))


def markdown_tables(text: str) -> list[list[Row]]:
    """The tables that have rows; their lines begin with ``|``."""
    blocks = re.findall(r"(?:^[ \t]*\|.*(?:\n|\Z))+", text, flags=re.MULTILINE)
    tables = []
    for header, _, *rows in (
        [_cells(line) for line in block.splitlines()] for block in blocks if "\n" in block.strip()
    ):
        if rows:
            tables.append([dict(zip(header, row, strict=False)) for row in rows])
    return tables


def _cells(line: str) -> list[str]:
    return [" ".join(cell.split()) for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def _numbers(cell: str) -> list[str]:
    """Not the 8 of resnet8."""
    return re.findall(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?![\w.])", cell)


def _nearest(table: list[Row], studies: Mapping[str, list[Row]]) -> tuple[str, list[Row]]:
    """The study that a table is of, and those of its rows that the study does not have."""
    strangers = {study: [row for row in table if row not in rows] for study, rows in studies.items()}
    study = min(strangers, key=lambda name: len(strangers[name]), default="*")
    return study, strangers.get(study, table)


def check_study(folder: Path, published: Path) -> list[str]:
    """What is wrong with table.csv and table.md in results/<study>/; both are made again from its metrics.csv files."""
    try:
        results = read_study(folder)
        if not results.runs:
            return [f"results/{folder.name}: no experiment has results: {_first(results.missing)}"]
        made = study_table(results, pd.read_csv(published))
        wrong = [*_wrong_numbers(pd.read_csv(folder / "table.csv"), made)]
        wrong = [f"results/{folder.name}/table.csv: {line}" for line in wrong]
        lines = zip_longest(_text(folder / "table.md").splitlines(), table_text(made).splitlines())
    except (OSError, ValueError) as error:
        return [f"results/{folder.name}: {error}"]
    missing = [f"results/{folder.name}: {name}: {why}" for name, why in results.missing.items()]
    wrong += [f"results/{folder.name}/table.md: {line}, not {other}" for line, other in lines if line != other]
    return [*wrong, *missing] if wrong else []


def study_table(results: StudyResults, published: pd.DataFrame) -> pd.DataFrame:
    """table.csv as summary.ipynb makes it, from the metrics of all experiments and the paper's table."""
    names = {name: f"published_{name}" for name in ("avg_corrupted", "relative_error_improvement")}
    beside = published.rename(columns={"bits": "weight_bits", **names})
    beside["activation_bits"] = beside["weight_bits"]
    return results_table(_averages(results)).merge(beside, on=CONFIGURATION, how="left")


def _wrong_numbers(stored: pd.DataFrame, made: pd.DataFrame) -> Iterator[str]:
    """Where the stored table is not the one made again, to 8 digits."""
    if list(stored) != list(made) or len(stored) != len(made):
        yield f"{len(stored)} rows of {', '.join(stored)}; metrics.csv give {len(made)} of {', '.join(made)}"
        return
    for name in made:
        ours, theirs = stored[name], made[name]
        close = _same_to_8_digits(ours, theirs) if _numeric(ours, theirs) else ours == theirs
        for row in np.flatnonzero(~close):
            level = " ".join(map(str, made.loc[row, CONFIGURATION]))
            yield f"{name} of {level}: {ours[row]}, but metrics.csv give {theirs[row]:.8g}"


def _same_to_8_digits(stored: pd.Series, made: pd.Series) -> pd.Series:
    """Nearly half a unit of the 8th digit is lost in writing; what is nearly zero is compared to 9 decimals."""
    unit = 10 ** (np.floor(np.log10(np.maximum(made.abs(), 0.01))) - 7)
    return ((stored - made).abs() <= 0.6 * unit) | (stored.isna() & made.isna())


def _numeric(*columns: pd.Series) -> bool:
    return all(pd.api.types.is_numeric_dtype(column) for column in columns)


if __name__ == "__main__":
    sys.exit(main())
