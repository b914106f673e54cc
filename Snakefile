"""The batch: one papermill process for each experiment of params/<study>.yaml, then the summary.

`make study STUDY=quick` calls this; by hand: snakemake --profile profiles/local --config study=quick
"""

import atexit
import os
import shlex
import signal
import sys
from pathlib import Path

from filelock import FileLock, Timeout
from snakemake.logging import logger

from qreg_utils.batch.blocks import plan_blocks, read_plan, seeds_per_job
from qreg_utils.batch.display import Display, report_unfinished
from qreg_utils.batch.gpus import GPUError, experiments_per_gpu, visible_gpus
from qreg_utils.batch.prepared import start_server
from qreg_utils.batch.running import KERNEL_SETTINGS
from qreg_utils.digest import experiment_digest, summary_digest
from qreg_utils.extensions import load_extensions
from qreg_utils.names import TASKS
from qreg_utils.seeds import BLOCKS, extended, parse_seeds
from qreg_utils.study import ClusterResources, StudyError, load_study, write_params

STUDY = os.environ.get("QREG_STUDY") or config.get("study", "quick")
SEEDS = os.environ.get("QREG_SEEDS") or config.get("seeds", "")  # of make extend
RESULTS = f"results/{STUDY}"

# Snakemake's own lock outlives a process that was killed; the system releases this one.
running = FileLock(f".snakemake/{STUDY}.lock")
try:
    if not isinstance(STUDY, str):
        raise StudyError(f"study {STUDY!r} is not allowed: Snakemake has read a number; make study STUDY=<name> does not")
    if Path(STUDY).name != STUDY:
        raise StudyError(f"study {STUDY!r} is not allowed: the name of a file in params/, without .yaml")
    os.environ["QREG_PER_GPU"] = str(experiments_per_gpu(str(config.get("per_gpu", 1))))
    size = seeds_per_job(str(config.get("seeds_per_job") or ""))
    if workflow.is_main_process:
        study = load_study(f"params/{STUDY}.yaml")
        running.acquire(timeout=0)
        if SEEDS:
            study = extended(study, parse_seeds(str(SEEDS)), Path(RESULTS))
        write_params(study, f"params/{STUDY}.yaml", Path(RESULTS))
        plan = plan_blocks(study, Path(RESULTS), size, keep=bool(SEEDS))
    else:  # in a job of a batch, whatever has happened to params/ since that began
        study, plan = load_study(f"{RESULTS}/{STUDY}.yaml"), read_plan(Path(RESULTS))
    EXTENSIONS = load_extensions()
    CODE = {task.notebook: experiment_digest(task.name, task.notebook, EXTENSIONS) for task in TASKS.values()}
    SUMMARY_CODE = summary_digest(EXTENSIONS)
except (StudyError, GPUError) as error:
    print(error, file=sys.stderr)
    sys.exit(2)
except Timeout:
    lock = running.lock_file
    print(f"study {STUDY} is running already in this folder; if it is not, delete {lock}", file=sys.stderr)
    sys.exit(2)
except Exception as error:  # with the batch's settings Snakemake would say nothing
    print(f"study {STUDY} cannot start: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)

EXPERIMENTS = {experiment.id: experiment for experiment in study.experiments}
# The digest of its code is a parameter of each rule, and Snakemake runs again what had other parameters: an edited
# comment changes none, a figure only the summary's. Files that a job's own program replaces when the new ones are
# complete (results, a summary) are no outputs here: Snakemake would delete them before the job begins.
PYTHON = shlex.quote(sys.executable)
KEEP_SEEDS = bool(SEEDS)
display = Display(STUDY, EXPERIMENTS, Path(RESULTS))
if workflow.is_main_process:
    logger.addHandler(display)


def finished(experiment):
    """Whether this machine has run the experiment, and its noise source, to the end; .done is not committed."""
    source = EXPERIMENTS[experiment].noise_source
    return Path(RESULTS, experiment, ".done").exists() and (source is None or finished(source.id))


def summarised_experiments(wildcards):
    """The summary waits for all experiments, or for none but those that have finished (after a failure)."""
    wanted = filter(finished, EXPERIMENTS) if config.get("finished_only") else EXPERIMENTS
    return [f"{RESULTS}/{experiment}/.done" for experiment in wanted]


def noise_source(wildcards):
    """A control waits for the experiment whose noise it has."""
    source = EXPERIMENTS[wildcards.experiment].noise_source
    return [f"{RESULTS}/{source.id}/.done"] if source else []


def blocks(wildcards):
    """Of seeds that are jobs of their own: the experiment waits for them, and collects what they have made."""
    return [f"{RESULTS}/{wildcards.experiment}/{BLOCKS}/{block}/.done" for block in plan[wildcards.experiment]]


def notebook_name(wildcards):
    return EXPERIMENTS[wildcards.experiment].task.notebook


def resource(name):
    """What an experiment's ``resources`` in the params file ask of a cluster, or else the profile's defaults do."""
    default = (workflow.resource_settings.default_resources or {}).get(name)
    unasked = ClusterResources.model_fields[name].default
    default = unasked if default is None or default.is_evaluable() else default.value
    return lambda wildcards: study.resources[wildcards.experiment].get(name, default)


rule summary:
    input:
        experiments=summarised_experiments,
        params=f"{RESULTS}/{STUDY}.yaml",
        published=["results/published/table.csv", "results/published/heatmap.csv"],
    output:
        done=touch(f"{RESULTS}/.summarised"),
    log:
        f"{RESULTS}/log.txt",
    params:
        code=SUMMARY_CODE,
    resources:
        gres="",  # no GPU, whatever the profile gives to all jobs
    shell:
        "{PYTHON} -m qreg_utils.batch.summarise {STUDY} > {log} 2>&1"


rule experiment:
    input:
        params=f"{RESULTS}/{{experiment}}/params.yaml",
        noise_source=noise_source,
        blocks=blocks,
    output:
        done=touch(f"{RESULTS}/{{experiment}}/.done"),
    wildcard_constraints:
        experiment="|".join(EXPERIMENTS),
    log:
        f"{RESULTS}/{{experiment}}/log.txt",
    params:
        notebook=notebook_name,
        executed=f"{RESULTS}/{{experiment}}/notebook.ipynb",
        blocks=f"{RESULTS}/{{experiment}}/{BLOCKS}",
        code=lambda wildcards: CODE[notebook_name(wildcards)],
    threads: 1
    resources:
        **{name: resource(name) for name in set().union(*study.resources.values())},
    shell:
        "QREG_BATCH=$PPID {PYTHON} -m qreg_utils.batch.notebooks notebooks/{params.notebook} {params.executed}"
        " -f {input.params} -p results_dir {RESULTS} -p keep_seeds {KEEP_SEEDS} > {log} 2>&1 && rm -rf {params.blocks}"


rule block:
    input:
        params=f"{RESULTS}/{{experiment}}/params.yaml",
        noise_source=noise_source,
    output:
        done=temp(touch(f"{RESULTS}/{{experiment}}/{BLOCKS}/{{block}}/.done")),
    wildcard_constraints:
        experiment="|".join(EXPERIMENTS),
        block=r"\d+-\d+",
    log:
        f"{RESULTS}/{{experiment}}/{BLOCKS}/{{block}}/log.txt",
    params:
        code=lambda wildcards: CODE[notebook_name(wildcards)],
    threads: 1
    resources:
        **{name: resource(name) for name in set().union(*study.resources.values())},
    shell:
        "QREG_BATCH=$PPID {PYTHON} -m qreg_utils.batch.blocks {RESULTS} {wildcards.experiment} {wildcards.block}"
        " > {log} 2>&1"


def report_missing():
    """What a batch that did not succeed reports at its end, even if a full disk has ended Snakemake itself."""
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
        if workflow.local_exec and not visible_gpus():
            start_server(KERNEL_SETTINGS)
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as nohup and a script's & start programs
            print(f"Ctrl-C does not reach this batch, which was started so; to end it: kill {os.getpid()}", flush=True)
        atexit.register(report_missing)


onsuccess:
    atexit.unregister(report_missing)
    display.close()
