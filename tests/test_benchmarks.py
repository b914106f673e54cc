"""The benchmarks run, and their tables have a row for everything. (How fast things are is no matter for a test.)"""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch

from benchmarks import training
from qreg_utils.corruptions import CORRUPTIONS
from qreg_utils.models import build_model

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    output = tmp_path_factory.mktemp("benchmark") / "report.md"
    toy = ["--rounds", "1", "--images", "2", "--layout-images", "3"]
    subprocess.run([sys.executable, "benchmarks/corruptions.py", "--output", output, *toy], cwd=ROOT, check=True)
    return output.read_text()


def test_every_corruption_is_timed_at_both_sizes(report):
    assert all(report.count(f"| {name} ") == 2 for name in CORRUPTIONS)


def test_the_layout_is_written(report):
    assert "285 corrupted images of 3 test images by two processes" in report


def test_the_committed_table_is_complete():
    text = (ROOT / "docs" / "benchmark-corruptions.md").read_text()
    assert all(text.count(f"| {name} ") == 2 for name in CORRUPTIONS)
    assert "950,000 corrupted images" in text


CPU = torch.device("cpu")
TIMES = {  # milliseconds of a step in two rounds; a compiled LSQ step is 1.05 times FP32's, PACT's 1.2 times
    ("fp32", "eager"): [10.0, 20.0],
    ("fp32", "compiled"): [10.0, 10.0],
    ("lsq", "compiled"): [10.0, 11.0],
    ("pact", "compiled"): [12.0, 12.0],
    ("Brevitas", "eager"): [30.0, 30.0],
    ("Brevitas", "eager, JIT"): [40.0, 40.0],
}


def test_a_step_of_everything_is_timed():
    times, seconds = training.measure_model("resnet8", 4, CPU, rounds=1, compile=False)
    assert {"fp32", *training.QUANTIZERS} <= {layers for layers, _ in times} and seconds == {}
    assert all(len(values) == 1 and values[0] > 0 for values in times.values())
    table = training.speed_table(times, seconds, batch_size=4)
    assert len(table.splitlines()) == 2 + len(times)
    assert training.speed_verdicts(times) == ""


def test_what_compiles_during_the_rounds_is_an_error():
    compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    with pytest.raises(RuntimeError, match="recompile"):
        sizes = iter(range(1, 100))
        training.measure({("fp32", "compiled"): lambda steps: compiled(torch.zeros(next(sizes)))}, steps=1, rounds=1)


def test_ratios_are_of_the_same_round_and_brevitas_is_its_faster_self():
    table = training.speed_table(TIMES, {("lsq", "compiled"): 61.0}, batch_size=128)
    assert columns(table, "LSQ") == ["LSQ", "compiled", "12,190", "0.78", "1.05", "2.86", "61"]
    verdicts = training.speed_verdicts(TIMES).splitlines()
    assert len(verdicts) == 4
    assert verdicts[0].endswith("1.05, **reached**") and verdicts[1].endswith("2.86, **reached**")
    assert verdicts[2].endswith("1.20, **not reached**") and verdicts[3].endswith("2.50, **reached**")
    assert "Brevitas (eager)" in verdicts[1]


def columns(table, first):
    line = next(line for line in table.splitlines() if line.startswith(f"| {first} "))
    return [text.strip() for text in line.strip("|").split("|")]


def test_brevitas_has_our_widths():
    pytest.importorskip("brevitas")
    network = training.with_brevitas_layers(build_model("resnet8", seed=0))
    training.make_turn(network, 4, CPU)(steps=3)
    found = {
        name: (layer.quant_weight().value.unique().numel(), round(layer.input_quant.bit_width().item()))
        for name, layer in network.named_modules()
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)
    }
    assert len(found) == 10 - 2 and found["conv1"][1] == found["fc"][1] == 8
    inner = [pair for name, pair in found.items() if name not in ("conv1", "fc")]
    assert all(weights <= 2**4 and bits == 4 for weights, bits in inner)
    assert found["conv1"][0] > 2**4


@pytest.fixture(scope="module")
def experiments(tmp_path_factory):
    params = tmp_path_factory.mktemp("study") / "toy.yaml"
    text = (ROOT / "params" / "quick.yaml").read_text()
    toy = {"seeds: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]": "seeds: [0]", "seeds: [[0, 1, 2, 3, 4]]": "seeds: [[0]]"}
    toy |= {"epochs: 15": "epochs: 1", "train_images: 400": "train_images: 64\n  test_images: 16"}
    for old, new in toy.items():
        assert old in text
        text = text.replace(old, new)
    params.write_text(text)
    return training.run_experiments(params)


def test_an_experiments_seconds_are_all_accounted_for(experiments):
    assert list(experiments) == [f"few_digits-small_resnet8-{setting}-seed0" for setting in ("fp32", "lsq-w4a4")]
    for groups in experiments.values():
        assert min(groups.values()) > -0.1  # run.json rounds to a tenth of a second
        assert {"training", "evaluation"} < set(groups)
        assert 50 < training.overhead(groups) < 100  # hardly anything is trained
    table = training.overhead_table(experiments)
    assert "The data" in table and "Every seed" in table
    assert training.overhead_verdicts(experiments).count("not reached") == 2


def test_the_seconds_are_split_by_section():
    def code(seconds):
        return nbformat.v4.new_code_cell("", metadata={"papermill": {"duration": seconds}})

    sections = ["## Every seed", "## What came out"]
    cells = [code(2.0)]
    for section, seconds in zip(sections, [[41.0, 1.0], [0.5]], strict=True):
        cells += [nbformat.v4.new_markdown_cell(section), *map(code, seconds)]
    run = {"training_seconds": 29.0, "evaluation_seconds": 8.0, "theory_seconds": 3.0}
    groups = training.split(nbformat.v4.new_notebook(cells=cells), run, wall=50.0)
    assert list(groups.values()) == [29.0, 8.0, 3.0, 5.5, 2.0, 2.0, 0.5]
    assert training.overhead(groups) == pytest.approx(20.0)
