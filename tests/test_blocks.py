"""An experiment's seeds in blocks, each a job of its own."""

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qreg_utils.batch.blocks import blocks_of, plan_blocks, read_plan, seeds_per_job
from qreg_utils.results import read_study
from qreg_utils.seeds import BLOCKS, Seeds
from qreg_utils.study import StudyError
from tests.test_batch import CONTROLLED, Project
from tests.test_seeds import LSQ_ID, digested_once, run_seeds, study  # noqa: F401 (fixtures)

FP32, CONTROL = "digits-resnet8-fp32", "digits-resnet8-gaussian-noise-w4"


@pytest.mark.parametrize(
    "seeds, size, blocks",
    [
        (range(6), 2, {"0-1": [0, 1], "2-3": [2, 3], "4-5": [4, 5]}),
        (range(5), 2, {"0-1": [0, 1], "2-4": [2, 3, 4]}),  # none is of one seed
        ([7, 3, 9, 1], 2, {"1-3": [1, 3], "7-9": [7, 9]}),
        (range(4), 4, {}),
        (range(4), 0, {}),
        ([], 3, {}),
    ],
)
def test_blocks(seeds, size, blocks):
    assert blocks_of(list(seeds), size) == blocks


@given(st.sets(st.integers(0, 2**31 - 1), max_size=60), st.integers(2, 20))
def test_each_seed_is_in_one_block_and_none_is_alone(seeds, size):
    blocks = blocks_of(list(seeds), size)
    assert not blocks or sorted(seed for block in blocks.values() for seed in block) == sorted(seeds)
    assert all(2 <= len(block) <= size + 1 for block in blocks.values())
    assert bool(blocks) == (len(seeds) > size + 1)


@pytest.mark.parametrize("text", ["1", "0", "1001", "-2", "2.5", "two", "99999"])
def test_sizes_that_are_refused(text):
    with pytest.raises(StudyError, match=r"SEEDS_PER_JOB=.* is not allowed: an integer from 2 to 1000"):
        seeds_per_job(text)


def test_sizes():
    assert (seeds_per_job(""), seeds_per_job("2"), seeds_per_job("1000")) == (0, 2, 1000)


def test_an_extension_has_blocks_of_what_is_missing(study, tmp_path):  # noqa: F811
    lsq = study.experiments[1]
    run_seeds(tmp_path, lsq)
    larger = lsq.model_copy(update={"seeds": [*range(6)]})
    asked = type(study)(**{**vars(study), "experiments": (larger,)})
    assert plan_blocks(asked, tmp_path, 2, keep=True) == {LSQ_ID: {"2-3": [2, 3], "4-5": [4, 5]}} == read_plan(tmp_path)
    assert list(plan_blocks(asked, tmp_path, 2, keep=False)[LSQ_ID]) == ["0-1", "2-3", "4-5"]


@pytest.mark.parametrize("keep", [False, True])
def test_the_experiment_collects_what_its_blocks_have_made(study, tmp_path, keep):  # noqa: F811
    lsq = study.experiments[1].model_copy(update={"seeds": [*range(6)]})
    run_seeds(tmp_path, lsq.model_copy(update={"seeds": [0, 1]}), value=0.0)
    for first in (0, 2, 4):
        block = lsq.model_copy(update={"seeds": [first, first + 1]})
        run_seeds(tmp_path / LSQ_ID / BLOCKS / f"{first}-{first + 1}", block, keep=True, value=10.0)
    seeds = Seeds(tmp_path / LSQ_ID, lsq, keep=keep)
    assert seeds.missing == [] and list(seeds.frames["metrics"]["seed"].unique()) == [*range(6)]
    written = pd.read_csv(tmp_path / LSQ_ID / "metrics.csv").groupby("seed")["value"].first()
    assert written.to_dict() == {0: 0 if keep else 10, 1: 1 if keep else 11, 2: 12, 3: 13, 4: 14, 5: 15}


def test_what_a_block_has_not_finished_is_still_missing(study, tmp_path):  # noqa: F811
    lsq = study.experiments[1].model_copy(update={"seeds": [*range(4)]})
    block = lsq.model_copy(update={"seeds": [2, 3]})
    run_seeds(tmp_path / LSQ_ID / BLOCKS / "2-3", block, keep=True, only=1)
    assert Seeds(tmp_path / LSQ_ID, lsq, keep=False).missing == [0, 1, 3]
    assert not (tmp_path / LSQ_ID / "run.json").exists()


def test_a_study_in_blocks(tmp_path):
    """Of a quantizer and of a control, which has its noise from it; nothing of the blocks is left. (Without FP32 there
    is nothing to compare with, and the summary says so.)"""
    project = Project(tmp_path)
    project.write_study(CONTROLLED, seeds=[*range(4)], train_images=320)
    done = project.snakemake(seeds_per_job=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished digits-resnet8-lsq-w4, seeds 2-3" in done.stdout
    assert f"finished {CONTROL}  [2 of 2" in done.stdout
    assert not [*project.results.glob(f"*/{BLOCKS}")]
    results = read_study(project.results)
    assert {tuple(run["seeds"]) for run in results.runs.values()} == {("0", "1", "2", "3")}
    assert len(results.metrics.drop_duplicates(["experiment", "seed"])) == 8
    assert project.planned() == set()
    assert "finished" not in project.snakemake().stdout  # SEEDS_PER_JOB may go again


def test_a_block_that_fails_is_named(tmp_path):
    project = Project(tmp_path)
    project.write_study([{"method": "fp32", "learning_rate": 100.0, "weight_decay": 1.0}], seeds=[*range(4)])
    done = project.snakemake(seeds_per_job=2)
    assert done.returncode == 1
    failure = "FloatingPointError: the loss is not finite after epoch 0 of 1 (seed "
    assert f"FAILED {FP32}, seeds 0-1: {failure}0)" in done.stdout
    assert f"NOT FINISHED: {FP32}: seeds " in done.stderr
    done = project.snakemake(seeds_per_job=1)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("SEEDS_PER_JOB='1' is not allowed: ")
