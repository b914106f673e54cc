"""torch.compile: whether it works here, and one graph for all networks that differ in nothing but their numbers."""

from collections.abc import Callable
from functools import cache

import torch
from torch import nn

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
