"""The batch: one papermill process for each experiment of params/<study>.yaml, then the summary.

`make study STUDY=quick` calls this; by hand: snakemake --profile profiles/local --config study=quick
"""

import atexit
import os
import sys
from pathlib import Path

from filelock import FileLock, Timeout
from snakemake.logging import logger

from qreg_utils.display import Display, report_unfinished
from qreg_utils.gpus import GPUError, experiments_per_gpu
from qreg_utils.study import ClusterResources, StudyError, load_study, write_params

STUDY = str(config.get("study", "quick"))
RESULTS = f"results/{STUDY}"

# Snakemake's own lock outlives a process that was killed; the system releases this one.
running = FileLock(f".snakemake/{STUDY}.lock")
try:
    if Path(STUDY).name != STUDY:
        raise StudyError(f"study {STUDY!r} is not allowed: the name of a file in params/, without .yaml")
    os.environ["QREG_PER_GPU"] = str(experiments_per_gpu(str(config.get("per_gpu", 1))))
    if workflow.is_main_process:
        study = load_study(f"params/{STUDY}.yaml")
        running.acquire(timeout=0)
        write_params(study, f"params/{STUDY}.yaml", Path(RESULTS))
    else:  # in a job of a batch, whatever has become of params/ since that began
        study = load_study(f"{RESULTS}/{STUDY}.yaml")
except (StudyError, GPUError) as error:
    print(error, file=sys.stderr)
    sys.exit(2)
except Timeout:
    print(f"study {STUDY} is running already in this folder", file=sys.stderr)
    sys.exit(2)

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
    default = (workflow.resource_settings.default_resources or {}).get(name)
    unasked = ClusterResources.model_fields[name].default
    default = unasked if default is None or default.is_evaluable() else default.value
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
    resources:
        gres="",  # no GPU, whatever the profile gives to all jobs
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


def tell_what_is_missing():
    """The last words of a batch that did not succeed, even if a full disk has ended Snakemake itself."""
    display.close()
    missing = [experiment for experiment in EXPERIMENTS if not finished(experiment)]
    if config.get("finished_only") or not missing:
        print(f"SUMMARY FAILED; log: {RESULTS}/log.txt", file=sys.stderr)
        missing = []
    report_unfinished(missing, Path(RESULTS), why=display.failed)


onstart:
    if workflow.is_main_process:
        if getattr(workflow.executor_settings, "array_jobs", None):
            print(
                "slurm-array-jobs is not allowed: what fails in a job array takes results of other experiments with it "
                "(issue 447 of Snakemake's SLURM executor)",
                file=sys.stderr,
            )
            sys.exit(2)
        display.start()
        atexit.register(tell_what_is_missing)


onsuccess:
    atexit.unregister(tell_what_is_missing)
    display.close()
