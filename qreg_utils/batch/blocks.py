"""An experiment's seeds in blocks, each a job of its own: ``make study PROFILE=profiles/slurm SEEDS_PER_JOB=4``.

A block is the experiment with some of its seeds, run in results/<study>/<experiment>/blocks/<first>-<last>/. When all
blocks have finished, the experiment's own job collects what they have made (``seeds.Seeds``), and runs the notebook,
which has nothing left to train. Which seeds are in which block is planned once, when a batch begins.
"""

import json
import re
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from qreg_utils.atomic import atomic_write
from qreg_utils.batch import notebooks
from qreg_utils.results import UnusableError
from qreg_utils.seeds import BLOCKS, MOST_SEEDS, find_seeds
from qreg_utils.study import Experiment, Study, StudyError, load_study, write_params

PLAN = ".blocks.json"  # in a study's folder of results
FEWEST = 2  # an experiment of one seed has another name
Plan = dict[str, dict[str, list[int]]]  # experiment -> block -> seeds


def seeds_per_job(text: str) -> int:
    """The number that ``make study SEEDS_PER_JOB=`` gives, 0 for none: all seeds in one job. Raises StudyError."""
    if not text:
        return 0
    if not re.fullmatch(r"\d{1,4}", text) or not FEWEST <= int(text) <= MOST_SEEDS:
        raise StudyError(f"SEEDS_PER_JOB={text!r} is not allowed: an integer from {FEWEST} to {MOST_SEEDS}")
    return int(text)


def blocks_of(seeds: list[int], size: int) -> dict[str, list[int]]:
    """``seeds`` in blocks of ``size``, by name; one that would be alone goes with those before it. Nothing where one
    block would hold them all."""
    seeds = sorted(seeds)
    blocks = [seeds[first : first + size] for first in range(0, len(seeds), size or len(seeds) or 1)]
    if len(blocks) > 1 and len(blocks[-1]) < FEWEST:
        blocks[-2:] = [blocks[-2] + blocks[-1]]
    return {f"{block[0]}-{block[-1]}": block for block in blocks} if len(blocks) > 1 else {}


def plan_blocks(study: Study, results: Path, size: int, *, keep: bool) -> Plan:
    """The blocks of each experiment, and the file that tells the batch's jobs; with ``keep`` of those seeds that have
    no results yet."""
    plan = {}
    for experiment in study.experiments:
        present = _present(results / experiment.id, experiment) if keep and size else []
        plan[experiment.id] = blocks_of([seed for seed in experiment.seeds if seed not in present], size)
    with atomic_write(results / PLAN) as part:
        part.write_text(json.dumps(plan), encoding="utf-8")
    return plan


def read_plan(results: Path) -> Plan:
    return json.loads((results / PLAN).read_text(encoding="utf-8"))


def _present(folder: Path, experiment: Experiment) -> list[int]:
    with suppress(UnusableError):
        return list(find_seeds(folder, experiment).kept)
    return []


def run_block(results: Path, experiment: Experiment, name: str) -> None:
    """Execute the experiment's notebook with the seeds of a block of the plan; what an earlier attempt has finished of
    it is kept."""
    folder = results / experiment.id / BLOCKS / name
    block = experiment.model_copy(update={"seeds": read_plan(results)[experiment.id][name]})
    study = load_study(results / f"{results.name}.yaml")
    write_params(replace(study, experiments=(block,)), results / f"{study.name}.yaml", folder)
    if source := experiment.noise_source:
        with suppress(FileExistsError):
            (folder / source.id).symlink_to((results / source.id).resolve(), target_is_directory=True)
    own = folder / experiment.id
    options = ["-f", str(own / "params.yaml"), "-p", "results_dir", str(folder), "-p", "keep_seeds", "True"]
    notebooks.main([f"notebooks/{experiment.task.notebook}", str(own / "notebook.ipynb"), *options])


def main(arguments: list[str]) -> None:
    """Of ``python -m qreg_utils.batch.blocks <the study's folder of results> <experiment> <block>``."""
    results, name, block = Path(arguments[0]), *arguments[1:]
    study = load_study(results / f"{results.name}.yaml")
    (experiment,) = (experiment for experiment in study.experiments if experiment.id == name)
    run_block(results, experiment, block)


if __name__ == "__main__":
    main(sys.argv[1:])
