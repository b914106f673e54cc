"""torch.compile: whether it works here and pays, and one graph for all networks that differ in nothing but numbers."""

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import nn

# Seconds of eager work from which compiling is tried. It takes 25 to 125 s the first time, and saves 2 to 40% of a
# training step on a CPU; on a GPU, where small networks wait for Python, more than half.
TRIED_FROM_SECONDS = {"cpu": 600, "cuda": 100}
FEWEST_CALLS = 200  # with fewer nothing is timed
TIMED_CALLS = 5

_compiled_for: list[tuple] = [()]  # what torch's compiler has graphs of


@cache
def compiler_works(device: torch.device) -> bool:
    """Whether torch.compile can make code for ``device`` here; says so, once, when it cannot."""
    torch.compiler.reset()  # what it remembers would need no compiler
    _compiled_for[0] = ()
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except Exception as error:  # torch has many, for a missing C++ compiler, missing headers, no Triton
        reason = str(error).strip().splitlines() or [type(error).__name__]
        print(f"nothing is compiled: {reason[0]}")
        return False
    return True


def with_shared_graph(function: Callable, model: nn.Module, device: torch.device) -> Callable:
    """``function(model, ...)`` compiled as one graph, for inputs of one shape.

    The network is an argument, not a constant: one of the same structure, as that of the next seed, uses the same
    graph. One of another structure starts over. (So does every network on CUDA, where a graph is replayed with the
    addresses of the tensors that it was recorded with.)
    """
    structure = (repr(model), device)
    if structure != _compiled_for[0] or device.type == "cuda":
        torch.compiler.reset()
        _compiled_for[0] = structure
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def pays(eager: Callable[[], object], compiled: Callable[[], object], calls: int, device: torch.device) -> bool:
    """Whether so many calls are faster ``compiled`` than ``eager``, by a few calls of each.

    False, without compiling, where ``calls`` eager ones take less than TRIED_FROM_SECONDS, or there is no compiler.
    """
    if calls < FEWEST_CALLS:
        return False
    seconds = _seconds_of(eager, device)
    if seconds * calls < TRIED_FROM_SECONDS[device.type] or not compiler_works(device):
        return False
    return _seconds_of(compiled, device) < seconds


def _seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """The median of a few calls, after two that are not timed."""
    seconds = []
    for _ in range(2 + TIMED_CALLS):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[2:])[TIMED_CALLS // 2]
