"""How fast a training step is: full precision, LSQ, PACT and DoReFa at 4 bits, eager and compiled, and Brevitas' 4-bit
layers, all in one run; and where an experiment's time goes.

`make bench-training` installs Brevitas and writes docs/benchmark-training.md, or docs/benchmark-training-cuda.md where
there is a GPU.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import date
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pandas as pd
import torch
from torch import nn

from qreg_utils import PROJECT
from qreg_utils.atomic import atomic_write
from qreg_utils.batch.gpus import visible_gpus
from qreg_utils.batch.prepared import start_server
from qreg_utils.batch.running import KERNEL_SETTINGS
from qreg_utils.compiling import compiler_works
from qreg_utils.datasets import load_dataset
from qreg_utils.evaluation import corrupted_test_images
from qreg_utils.models import build_model
from qreg_utils.names import CLASSIFICATION, METHODS
from qreg_utils.quantize import calibrate, learned_scales, parameter_groups, quantize_model
from qreg_utils.results import environment
from qreg_utils.study import Classification, load_study, write_params
from qreg_utils.training import make_batch_loss, plain_backward, training_step

BITS, FIRST_LAST_BITS = 4, 8
BATCH_SIZES = {"cpu": [128], "cuda": [128, 512]}
STEPS = {"cpu": 1, "cuda": 20}  # that are timed together: a GPU is waited for only after the last, as in an epoch
WARM_UP = 5  # turns that are not timed: compiling, CUDA graphs, Brevitas' statistics of activations, TorchScript
MODES = {"eager": "0", "eager, JIT": "1"}  # of Brevitas, by the value of BREVITAS_JIT
QUANTIZERS = ("lsq", "pact", "dorefa")  # the paper's; with their variants Dynamo would compile one function too often
AT_MOST, AT_LEAST, OVERHEAD = 1.05, 2.5, 20  # the goals: times compiled FP32, times faster than Brevitas, percent
Turn = Callable[[int], float]  # trains for so many steps; returns the milliseconds of one
Name = tuple[str, str]  # layers, step: ("lsq", "compiled")


def make_turn(network: nn.Module, batch_size: int, device: torch.device, compile: bool = False) -> Turn:
    """Training steps as ``training.fit`` does them, always on the same CIFAR-shaped batch of random images."""
    images = torch.randn(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = images.to(device, memory_format=torch.channels_last)
    labels = torch.arange(batch_size, device=device) % 10
    network.to(device, memory_format=torch.channels_last)
    calibrate(network, images)
    network.train()
    optimizer = torch.optim.SGD(parameter_groups(network, weight_decay=5e-4), lr=0.01, momentum=0.9)
    backward = plain_backward(make_batch_loss(network, 5e-4, device, compile))
    scales = learned_scales(network)

    def turn(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            training_step(backward, optimizer, scales, images, labels)
        if device.type == "cuda":
            torch.cuda.synchronize()
        milliseconds = 1e3 * (time.perf_counter() - start) / steps
        optimizer.zero_grad()  # the next network's CUDA graphs may use the gradients' memory
        return milliseconds

    return turn


def our_turns(
    model: str, batch_size: int, device: torch.device, compile: bool
) -> tuple[dict[Name, Turn], dict[Name, float]]:
    """FP32 and each method, eager and (with ``compile``) compiled; and how many seconds a first compiled step took."""
    turns, seconds = {}, {}
    for step in ("eager", "compiled") if compile else ("eager",):
        for method in ("fp32", *QUANTIZERS):
            network = build_model(model, seed=0)
            if method != "fp32":
                network = quantize_model(network, method, BITS, BITS, FIRST_LAST_BITS)
            turn = turns[method, step] = make_turn(network, batch_size, device, compile=step == "compiled")
            if step == "compiled":
                seconds[method, step] = turn(1) / 1e3
                print(f"{method} compiled in {seconds[method, step]:.0f} s", file=sys.stderr)
    return turns, seconds


def with_brevitas_layers(network: nn.Module) -> nn.Module:
    """``network`` with every Conv2d and Linear replaced by Brevitas', at the widths that ``quantize_model`` gives.

    The recipe is that of Brevitas' "Getting started", its default quantizers with a bit width: weights scaled by their
    largest magnitude, activations by a learned scale. This starts from percentiles of the first 300 batches, during
    which a step takes longer; here of the first one, so that what is timed is the training after them.
    """
    from brevitas.nn import QuantConv2d, QuantLinear
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat, Uint8ActPerTensorFloat

    names = [name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for name in names:
        layer = network.get_submodule(name)
        bits = FIRST_LAST_BITS if name in (names[0], names[-1]) else BITS
        options = {"bias": layer.bias is not None, "weight_quant": Int8WeightPerTensorFloat, "weight_bit_width": bits}
        options |= {"input_quant": Int8ActPerTensorFloat if name == names[0] else Uint8ActPerTensorFloat}
        options |= {"input_bit_width": bits, "input_collect_stats_steps": 1}
        if isinstance(layer, nn.Conv2d):
            geometry = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
            quantized = QuantConv2d(*geometry, **options)
        else:
            quantized = QuantLinear(layer.in_features, layer.out_features, **options)
        quantized.load_state_dict(layer.state_dict(), strict=False)
        network.set_submodule(name, quantized)
    return network


def serve_brevitas(connection, jit: str, model: str, batch_size: int, device: torch.device) -> None:
    """What Brevitas' process does: a turn for every number of steps that it is sent."""
    os.environ["BREVITAS_JIT"] = jit  # read when Brevitas is imported
    warnings.simplefilter("ignore")  # TorchScript is deprecated
    turn = make_turn(with_brevitas_layers(build_model(model, seed=0)), batch_size, device)
    while steps := connection.recv():
        connection.send(turn(steps))


@contextmanager
def brevitas_turn(jit: str, model: str, batch_size: int, device: torch.device):
    """Brevitas' turn. It runs in a process of its own, which waits while others take theirs."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve_brevitas, args=(theirs, jit, model, batch_size, device), daemon=True)
    process.start()
    theirs.close()  # so that a process that failed is noticed: recv raises EOFError

    def turn(steps: int) -> float:
        ours.send(steps)
        return ours.recv()

    yield turn
    ours.send(0)
    process.join()


def measure(turns: dict[Name, Turn], steps: int, rounds: int) -> dict[Name, list[float]]:
    """The milliseconds of a step, for each round. All take their turn in each round, so that a slow moment of the
    machine meets all. Whatever compiles again in a timed round is an error."""
    for _ in range(WARM_UP):
        for turn in turns.values():
            turn(steps)
    times = {name: [] for name in turns}
    with torch.compiler.set_stance("fail_on_recompile"):
        for done in range(rounds):
            for name, turn in turns.items():
                times[name].append(turn(steps))
            print(f"round {done + 1} of {rounds}", file=sys.stderr)
    return times


def measure_model(model: str, batch_size: int, device: torch.device, rounds: int, compile: bool):
    """``measure`` of everything, and the seconds it took to compile what is compiled."""
    turns, seconds = our_turns(model, batch_size, device, compile)
    with ExitStack() as stack:
        if find_spec("brevitas"):
            for step, jit in MODES.items():
                served = brevitas_turn(jit, model, batch_size, device)
                turns["Brevitas", step] = stack.enter_context(served)
        else:
            print("Brevitas is left out: it is not installed", file=sys.stderr)
        return measure(turns, STEPS[device.type], rounds), seconds


def ratio(times: dict[Name, list[float]], name: Name, reference: Name | None) -> float | None:
    """How many times as long ``name`` takes as ``reference``: the median over the rounds."""
    if reference not in times:
        return None
    return statistics.median(a / b for a, b in zip(times[name], times[reference], strict=True))


def faster_brevitas(times: dict[Name, list[float]]) -> Name | None:
    medians = {name: statistics.median(values) for name, values in times.items() if name[0] == "Brevitas"}
    return min(medians, key=medians.get, default=None)


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def markdown(rows: list[dict], left: int) -> str:
    """A table whose first ``left`` columns are text."""
    alignment = [*["left"] * left, *["right"] * (len(rows[0]) - left)]
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True, colalign=alignment)


def speed_table(times: dict[Name, list[float]], seconds: dict[Name, float], batch_size: int) -> str:
    rows, theirs = [], faster_brevitas(times)
    for name in times:
        row = {"layers": METHODS.label(name[0]), "step": name[1]}
        row["images/s"] = number(1e3 * batch_size / statistics.median(times[name]), 0)
        row["time, FP32 eager = 1"] = number(ratio(times, name, ("fp32", "eager")))
        row["time, FP32 compiled = 1"] = number(ratio(times, name, ("fp32", "compiled")))
        row["times faster than Brevitas"] = number(theirs and ratio(times, theirs, name))
        row["compiled in s"] = number(seconds.get(name), 0)
        rows.append(row)
    return markdown(rows, left=2)


def verdict(claim: str, measured: str, reached: bool) -> str:
    return f"- {claim}: {measured}, **{'reached' if reached else 'not reached'}**"


def speed_verdicts(times: dict[Name, list[float]]) -> str:
    """Whether each method's compiled step is as fast as it must be; nothing where nothing is compiled."""
    lines, theirs = [], faster_brevitas(times)
    for method in QUANTIZERS:
        name = method, "compiled"
        if name not in times:
            continue
        longer = ratio(times, name, ("fp32", "compiled"))
        claim = f"{METHODS.label(method)} compiled, at most {AT_MOST:.2f} times compiled FP32"
        lines.append(verdict(claim, f"{longer:.2f}", longer <= AT_MOST))
        if theirs:
            faster = ratio(times, theirs, name)
            claim = f"{METHODS.label(method)} compiled, at least {AT_LEAST} times faster than Brevitas ({theirs[1]})"
            lines.append(verdict(claim, f"{faster:.2f}", faster >= AT_LEAST))
    return "\n".join(lines)


def run_experiment(results: Path, experiment: str) -> dict[str, float]:
    """Run one experiment as the batch does, on one thread; where the seconds of its process went."""
    folder = results / experiment
    command = [sys.executable, "-m", "qreg_utils.batch.notebooks"]
    command += [PROJECT / "notebooks" / CLASSIFICATION.notebook, folder / "notebook.ipynb"]
    command += ["-f", folder / "params.yaml", "-p", "results_dir", results]
    variables = os.environ | KERNEL_SETTINGS | {"OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=PROJECT, env=variables, capture_output=True, text=True)
    wall = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{experiment} failed: {done.stderr.strip().splitlines()[-1]}")
    run = json.loads((folder / "run.json").read_text())
    return split(nbformat.read(folder / "notebook.ipynb", as_version=4), run, wall)


def split(notebook: nbformat.NotebookNode, run: dict, wall: float) -> dict[str, float]:
    """What the ``wall`` seconds of an executed notebook's process went into.

    run.json says what training, evaluation and the theory took, papermill how long each cell took: what is left of the
    cells is summed for each section of the notebook, what is left of the process is the start and end of papermill and
    kernel.
    """
    sections, section = {}, "before the sections: parameters, imports"
    for part in notebook.cells:
        if part.cell_type == "markdown" and part.source.startswith("## "):
            section = part.source.splitlines()[0].removeprefix("## ")
        elif part.cell_type == "code":
            sections[section] = sections.get(section, 0.0) + part.metadata.papermill.duration
    ends = wall - sum(sections.values())
    parts = {"training": "training", "evaluation": "evaluation", "penalty and sharpness": "theory"}
    measured = {part: run.get(f"{name}_seconds", 0.0) for part, name in parts.items()}
    sections["Every seed"] -= sum(measured.values())
    besides = {f"besides, in *{name}*": seconds for name, seconds in sections.items()}
    return {**measured, "papermill and kernel, start and end": ends, **besides}


def overhead(groups: dict[str, float]) -> float:
    """Percent of an experiment's wall time that are neither training, nor evaluation, nor the theory."""
    measured = groups["training"] + groups["evaluation"] + groups["penalty and sharpness"]
    return 100 * (1 - measured / sum(groups.values()))


def run_experiments(params: Path) -> dict[str, dict[str, float]]:
    """``split`` of a study's FP32 and LSQ experiments, run for real and side by side in a temporary folder."""
    study = load_study(params)
    settings = ("fp32", None, None), ("lsq", BITS, BITS)
    classification = [e for e in study.experiments if isinstance(e, Classification)]
    names = [e.id for e in classification if (e.method, e.weight_bits, e.activation_bits) in settings]
    corrupted_test_images(load_dataset(study.experiments[0].dataset))  # as a batch's first experiment leaves them
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(names)) as pool:
        write_params(study, params, Path(folder))
        return dict(zip(names, pool.map(partial(run_experiment, Path(folder)), names), strict=True))


def overhead_table(experiments: dict[str, dict[str, float]]) -> str:
    first = next(iter(experiments.values()))
    rows = [{"seconds": part} | {e: number(groups[part], 1) for e, groups in experiments.items()} for part in first]
    rows.append({"seconds": "**whole process**"} | {e: number(sum(g.values()), 1) for e, g in experiments.items()})
    return markdown(rows, left=1)


def overhead_verdicts(experiments: dict[str, dict[str, float]]) -> str:
    shares = {experiment: overhead(groups) for experiment, groups in experiments.items()}
    claim = "neither training nor measuring, under {} % of the process: {}"
    return "\n".join(
        verdict(claim.format(OVERHEAD, experiment), f"{share:.1f} %", share < OVERHEAD)
        for experiment, share in shares.items()
    )


def hardware(device: torch.device) -> str:
    system = environment()
    cpu = f"{system['processor']}, {system['threads']} of {system['cores']} cores"
    return f"{system['gpu']}, bf16 autocast ({cpu})" if device.type == "cuda" else cpu


def brevitas_version() -> str:
    return f"Brevitas {version('brevitas')}" if find_spec("brevitas") else "without Brevitas"


def steps_report(arguments: argparse.Namespace, device: torch.device) -> str:
    compile = compiler_works(device)
    text = f"""
## Training steps

A step is `training.training_step`: forward, backward, the limit on the scales' gradients, SGD with momentum; on one
batch of random images of CIFAR's shape, channels-last, quantized to {BITS} bits (first and last layer
{FIRST_LAST_BITS}). Everything is built and compiled first; then in each of {arguments.rounds} rounds everything takes
its turn (steps in a turn: {STEPS[device.type]}), and nothing compiles (that would be an error). Ratios are medians of
the rounds' ratios, images per second those of the median round; compile times are those of the first step, with empty
caches. Brevitas has the recipe of its "Getting started" (`Int8WeightPerTensorFloat`, `Uint8ActPerTensorFloat`
with a bit width) in the same network with the same batch and optimizer, without and with `BREVITAS_JIT=1`; its faster
one is compared with. It is not compiled: its layers branch on the values of tensors, at which `torch.compile` breaks
the graph, and 0.13.4 was slower in the many pieces (ResNet-8 on a CPU: 2.2 times) than eager.
"""
    for batch_size in arguments.batch_sizes:
        times, seconds = measure_model(arguments.model, batch_size, device, arguments.rounds, compile)
        text += f"\n### {arguments.model}, batches of {batch_size}\n\n{speed_table(times, seconds, batch_size)}\n\n"
        text += speed_verdicts(times) + "\n"
    return text


def overhead_report(arguments: argparse.Namespace) -> str:
    if not visible_gpus():
        start_server(KERNEL_SETTINGS)
    experiments = run_experiments(arguments.study)
    return f"""
## Where an experiment's time goes

Two experiments of the {arguments.study.stem} study, run side by side on one thread each, as `make study` runs them, and
timed from the start of papermill's process to its end. Where the batch does so, it and its kernel are forked from a
process that has imported the packages.

{overhead_table(experiments)}

{overhead_verdicts(experiments)}
"""


def report(arguments: argparse.Namespace, device: torch.device) -> str:
    parts = {"steps": lambda: steps_report(arguments, device), "overhead": lambda: overhead_report(arguments)}
    options = sys.argv[1:]
    command = shlex.join(["python", "benchmarks/training.py", *options]) if options else "make bench-training"
    return f"""# Speed of training

Written by `{command}` on {date.today()}: {hardware(device)}, torch
{torch.__version__}, {brevitas_version()}.
{"".join(parts[name]() for name in arguments.parts)}"""


def arguments_for(device: torch.device) -> argparse.Namespace:
    output = PROJECT / "docs" / ("benchmark-training-cuda.md" if device.type == "cuda" else "benchmark-training.md")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=output)
    parser.add_argument("--parts", nargs="+", choices=("steps", "overhead"), default=("steps", "overhead"))
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=BATCH_SIZES[device.type])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--study", type=Path, default=PROJECT / "params" / "quick.yaml")
    return parser.parse_args()


def main() -> None:
    if not KERNEL_SETTINGS.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KERNEL_SETTINGS)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments = arguments_for(device)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # empty, so that everything is compiled
        text = report(arguments, device)
    with atomic_write(arguments.output) as part:
        part.write_text(text, encoding="utf-8")
    print(f"{text}\nwrote {arguments.output}")


if __name__ == "__main__":
    main()
