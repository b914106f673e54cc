"""Do the verdicts hold in other arithmetic? ``make replicate STUDY=quick`` runs a study as another processor would.

Training is chaotic: other rounding makes other networks of the same seeds. A processor with other vector instructions
adds in another order; ``ARITHMETICS`` asks this one to do so. Each rerun goes into a temporary folder, and its verdicts
are compared with the committed ones: one that turns into its opposite is a failure (exit status 1). The average over
the corruptions of each setting is compared by the rule of ``make verify``.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

from qreg_utils import PROJECT
from qreg_utils.axes import budgets
from qreg_utils.batch.display import duration, reason
from qreg_utils.batch.prepared import ADDRESS
from qreg_utils.batch.running import KERNEL_SETTINGS
from qreg_utils.batch.verify import compare_averages
from qreg_utils.claims import CONTRADICTED, KEYS, NOT_MEASURED, SUPPORTED, claims_table
from qreg_utils.metrics import cell_scores, corruption_average
from qreg_utils.names import PAPER_CORRUPTIONS
from qreg_utils.results import StudyResults, committed_study, read_study
from qreg_utils.study import Experiment, StudyError, write_params

EAGER = {"TORCHDYNAMO_DISABLE": "1"}  # compiled code would use this processor's instructions all the same
ARITHMETICS = {
    "default": {"ATEN_CPU_CAPABILITY": "default", **EAGER},
    "sse41": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", **EAGER},
}
OPPOSITE = {SUPPORTED, CONTRADICTED}


def main(arguments: list[str] | None = None, project: Path = PROJECT) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="qreg_utils.batch.replicate", description="Do the verdicts hold?")
    parser.add_argument("study", help="a folder of results/")
    parser.add_argument("--arithmetic", choices=ARITHMETICS, action="append", help="default: one after the other")
    parser.add_argument("--keep", type=Path, help="a folder that the reruns' results stay in")
    options = parser.parse_args(arguments)
    try:
        committed = committed_study(project / "results", options.study)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    opposite = 0
    for name in options.arithmetic or ARITHMETICS:
        temporary = (options.keep or Path(tempfile.mkdtemp(prefix="qreg-replicate-"))) / name / options.study
        started = time.monotonic()
        try:
            run_again(committed, ARITHMETICS[name], temporary, project)
            print(f"\n## {name}: {ARITHMETICS[name]}, {duration(time.monotonic() - started)}\n", flush=True)
            again = read_study(temporary)
            opposite += report(committed, again, project)
        finally:
            if not options.keep:
                shutil.rmtree(temporary.parent.parent, ignore_errors=True)
    return 1 if opposite else 0


def run_again(committed: StudyResults, arithmetic: dict[str, str], results: Path, project: Path) -> None:
    """Run every experiment of the study, one on each core; noise sources before their controls."""
    params = project / "results" / committed.study.name / f"{committed.study.name}.yaml"
    write_params(committed.study, params, results)
    for controls in (False, True):
        those = [experiment for experiment in committed.study.experiments if bool(experiment.noise_source) == controls]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda experiment: _run(experiment, arithmetic, results, project), those))


def _run(experiment: Experiment, arithmetic: dict[str, str], results: Path, project: Path) -> None:
    folder = results / experiment.id
    notebook = [project / "notebooks" / experiment.task.notebook, folder / "notebook.ipynb"]
    parameters = ["-f", folder / "params.yaml", "-p", "results_dir", results]
    command = [sys.executable, "-m", "qreg_utils.batch.notebooks", *map(str, [*notebook, *parameters])]
    # QREG_BATCH lets the notebook end with this process, and leave its reason when it fails
    variables = {**os.environ, **KERNEL_SETTINGS, "OMP_NUM_THREADS": "1", "QREG_BATCH": str(os.getpid()), **arithmetic}
    variables.pop(ADDRESS, None)  # PyTorch chooses its arithmetic when it is imported
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(command, cwd=project, env=variables, stdout=log, stderr=subprocess.STDOUT)
    where = "" if done.returncode == 0 else f": {reason(folder)}; log: {folder / 'log.txt'}"
    print(f"{'FAILED' if where else 'finished'} {experiment.id}{where}", flush=True)


def report(committed: StudyResults, again: StudyResults, project: Path) -> int:
    """Print how verdicts and averages compare; returns how many verdicts are the opposite."""
    pairs = verdict_pairs(committed, again, project)
    same = (pairs["verdict"] == pairs["verdict_again"]).sum()
    opposite = pairs[[{a, b} == OPPOSITE for a, b in zip(pairs["verdict"], pairs["verdict_again"], strict=True)]]
    print(f"{same} of {len(pairs)} verdicts are the same; {len(opposite)} are the opposite")
    changed = pairs[pairs["verdict"] != pairs["verdict_again"]]
    if len(changed):
        shown = ["claim", "method", "bits", "effect", "effect_again", "verdict", "verdict_again"]
        print(changed[shown].to_markdown(index=False, floatfmt="+.3g"))
    averages = [corruption_average(cell_scores(study.metrics), PAPER_CORRUPTIONS) for study in (committed, again)]
    for experiment in again.study.experiments:
        if experiment.id in again.runs and not (verdict := compare_averages(*averages, experiment)).passed:
            print(f"{experiment.id}: {verdict.lines[-1]}")
    return len(opposite)


def verdict_pairs(committed: StudyResults, again: StudyResults, project: Path) -> pd.DataFrame:
    """A row for each comparison that both have measured, with both verdicts and effects."""
    published = [pd.read_csv(project / "results" / "published" / f"{name}.csv") for name in ("table", "heatmap")]
    tables = []
    for study in (committed, again):
        measured = (study.metrics, study.history, study.noise, study.penalty)
        axes = budgets(committed.study.experiments)
        table = claims_table(*measured, *published, looks=committed.study.looks, budgets=axes)
        tables.append(table[table["verdict"] != NOT_MEASURED][["claim", *KEYS, "effect", "verdict"]])
    return tables[0].merge(tables[1], on=["claim", *KEYS], suffixes=("", "_again"))


if __name__ == "__main__":
    sys.exit(main())
