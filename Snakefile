"""The batch: one papermill process for each experiment of params/<study>.yaml, then the summary.

`make study STUDY=quick` calls this; by hand: snakemake --profile profiles/local --config study=quick
"""

import os
import sys
from pathlib import Path

from filelock import FileLock, Timeout
from snakemake.logging import logger

from qreg_utils.display import Display, report
from qreg_utils.gpus import GPUError, experiments_per_gpu
from qreg_utils.study import StudyError, load_study, write_params

STUDY = str(config.get("study", "quick"))
RESULTS = f"results/{STUDY}"
PARAMS = f"params/{STUDY}.yaml"

# Snakemake's own lock outlives a process that was killed; the system releases this one.
running = FileLock(f".snakemake/{STUDY}.lock")
try:
    if Path(STUDY).name != STUDY:
        raise StudyError(f"study {STUDY!r} is not allowed: the name of a file in params/, without .yaml")
    study = load_study(PARAMS)
    os.environ["QREG_PER_GPU"] = str(experiments_per_gpu(str(config.get("per_gpu", 1))))
    if workflow.is_main_process:
        running.acquire(timeout=0)
except (StudyError, GPUError) as error:
    print(error, file=sys.stderr)
    sys.exit(2)
except Timeout:
    print(f"study {STUDY} is running already in this folder", file=sys.stderr)
    sys.exit(2)

write_params(study, PARAMS, Path(RESULTS))
EXPERIMENTS = {experiment.id: experiment for experiment in study.experiments}
PACKAGE = sorted(str(path) for path in Path("qreg_utils").rglob("*.py"))
PAPERMILL = "papermill --engine qreg --log-output --no-progress-bar"
display = Display(STUDY, EXPERIMENTS, Path(RESULTS))
if workflow.is_main_process:
    logger.addHandler(display)


def finished(experiment):
    """Whether this machine has run the experiment, and what it imitates, to the end; .done is not committed."""
    other = EXPERIMENTS[experiment].imitated
    return Path(RESULTS, experiment, ".done").exists() and (other is None or finished(other.id))


def summarised(wildcards):
    """The summary waits for all experiments, or takes those that have finished (after a failure)."""
    wanted = filter(finished, EXPERIMENTS) if config.get("finished_only") else EXPERIMENTS
    return [f"{RESULTS}/{experiment}/.done" for experiment in wanted]


def imitated(wildcards):
    """A control waits for the experiment whose noise it imitates."""
    other = EXPERIMENTS[wildcards.experiment].imitated
    return [f"{RESULTS}/{other.id}/noise.csv"] if other else []


def resource(name):
    """What an experiment's ``resources`` in the params file ask of a cluster, or else the profile's defaults do."""
    default = workflow.resource_settings.default_resources.get(name)
    default = None if default is None or default.is_evaluable() else default.value
    return lambda wildcards: study.resources[wildcards.experiment].get(name, default)


rule summary:
    input:
        experiments=summarised,
        notebook="notebooks/summary.ipynb",
        params=f"{RESULTS}/{STUDY}.yaml",
        published=["results/published/table.csv", "results/published/heatmap.csv"],
        package=PACKAGE,
    output:
        notebook=f"{RESULTS}/summary.ipynb",
        html=f"{RESULTS}/summary.html",
        table=f"{RESULTS}/table.csv",
        text=f"{RESULTS}/table.md",
        claims=f"{RESULTS}/claims.csv",
        figures=directory(f"{RESULTS}/figures"),
    log:
        f"{RESULTS}/log.txt",
    params:
        unfinished=f"{RESULTS}/unfinished.ipynb",
    shell:
        "{{ {PAPERMILL} {input.notebook} {params.unfinished} -p study {STUDY}"
        " && mv {params.unfinished} {output.notebook}"
        " && jupyter nbconvert --to html --no-input {output.notebook} ; }} > {log} 2>&1"


rule experiment:
    input:
        notebook=lambda wildcards: f"notebooks/{EXPERIMENTS[wildcards.experiment].notebook}",
        params=f"{RESULTS}/{{experiment}}/params.yaml",
        imitated=imitated,
        package=PACKAGE,
    output:
        notebook=f"{RESULTS}/{{experiment}}/notebook.ipynb",
        metrics=f"{RESULTS}/{{experiment}}/metrics.csv",
        history=f"{RESULTS}/{{experiment}}/history.csv",
        noise=f"{RESULTS}/{{experiment}}/noise.csv",
        run=f"{RESULTS}/{{experiment}}/run.json",
        done=touch(f"{RESULTS}/{{experiment}}/.done"),
    wildcard_constraints:
        experiment="|".join(EXPERIMENTS),
    log:
        f"{RESULTS}/{{experiment}}/log.txt",
    params:
        unfinished=f"{RESULTS}/{{experiment}}/unfinished.ipynb",
    threads: 1
    resources:
        **{name: resource(name) for name in set().union(*study.resources.values())},
    shell:
        "{{ QREG_BATCH=$PPID {PAPERMILL} {input.notebook} {params.unfinished} -f {input.params} -p results_dir {RESULTS}"
        " && mv {params.unfinished} {output.notebook} ; }} > {log} 2>&1"


onstart:
    if workflow.is_main_process:
        display.start()


onsuccess:
    display.close()


onerror:
    display.close()
    if config.get("finished_only"):
        print(f"SUMMARY FAILED; log: {RESULTS}/log.txt", file=sys.stderr)
    else:
        report((experiment for experiment in EXPERIMENTS if not finished(experiment)), Path(RESULTS))
