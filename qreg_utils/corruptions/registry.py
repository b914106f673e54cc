"""The table of corruptions: each function is registered together with its severity constants."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qreg_utils.corruptions.counter_rng import CounterGenerator
from qreg_utils.names import CORRUPTIONS, FAMILIES
from qreg_utils.names import Corruption as CorruptionRow

SEVERITIES = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Corruption:
    """A corruption function and its constants: family -> parameter name -> one value for each severity.

    ``chunks`` says how many of the usual chunks of pixels are worked on at a time.
    """

    function: Callable
    tables: dict
    chunks: int = 1

    def parameters(self, family, severity):
        return {name: values[severity - 1] for name, values in self.tables[family].items()}


REGISTRY: dict[str, Corruption] = {}


def register_corruption(
    row: CorruptionRow, function: Callable | None = None, *, cifar: dict | None = None, imagenet: dict | None = None
) -> None:
    """Make a corruption known by the name in ``row``, to ``corrupt`` and to params files (``extra_corruptions``).

    ``function`` and the severity tables of the families are as for ``severities``; without a table for a family its
    data sets cannot have it. It is tried out on random images first. Raises NamesError, in one line, for a piece that
    is missing, a name that is taken, or a result of another shape, or that depends on the other images of a batch.
    """
    if not callable(function):
        raise row.error("function is missing: of images, draws and its parameters")
    tables = {family: table for family, table in {"cifar": cifar, "imagenet": imagenet}.items() if table is not None}
    if not tables:
        raise row.error(f"severities are missing: a table for one of {', '.join(FAMILIES)}")
    for family, table in tables.items():
        for parameter, values in table.items():
            if isinstance(values, tuple) and len(values) != len(SEVERITIES):
                raise row.error(f"{family}: {parameter} has {len(values)} values, not {len(SEVERITIES)}")
    corruption = Corruption(function, {family: _expanded(table) for family, table in tables.items()})
    for family in tables:
        for severity in SEVERITIES:
            _try_out(row, corruption, family, severity)
    CORRUPTIONS.add(row)
    REGISTRY[row.name] = corruption


def _try_out(row: CorruptionRow, corruption: Corruption, family: str, severity: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=generator)
    where = f"{getattr(corruption.function, '__name__', 'function')} at severity {severity} ({family})"
    results = []
    for some in (images, images[:1]):
        draws = CounterGenerator(row.name, severity, 0, 0, len(some), some.device)
        try:
            result = corruption.function(some.clone(), draws, **corruption.parameters(family, severity))
        except Exception as error:  # it is somebody's code
            reason = " ".join(str(error).split())
            raise row.error(f"{where} fails: {type(error).__name__}: {reason}") from error
        if not isinstance(result, torch.Tensor) or result.shape != some.shape:
            given = f"shape {tuple(result.shape)}" if isinstance(result, torch.Tensor) else type(result).__name__
            raise row.error(f"{where} returns {given}, not {tuple(some.shape)}")
        results.append(result if result.dtype == torch.uint8 else result.clamp(0, 1) * 255)
    if (results[0][:1].float() - results[1].float()).abs().max() > 1:
        raise row.error(f"{where} makes something else of an image alone: its random numbers must come from draws")


def severities(*, chunks=1, **tables):
    """Register the decorated function under its own name, with one severity table for each constant family.

    A table maps a parameter to its five values, or to the one value that all severities share.
    The function is called as ``function(images, draws, **parameters)`` with images uint8 (N,3,H,W) and a generator of
    random numbers. It returns uint8 levels, or floats in units of full intensity (0..1) that are still to be clipped,
    scaled to 0..255 and truncated. More ``chunks`` at a time are for a function with so little to do for each pixel
    that calling it takes as long.
    """

    def register(function):
        expanded = {family: _expanded(table) for family, table in tables.items()}
        REGISTRY[function.__name__] = Corruption(function, expanded, chunks)
        return function

    return register


def _expanded(table):
    """Each parameter with its five values."""
    return {name: value if isinstance(value, tuple) else (value,) * len(SEVERITIES) for name, value in table.items()}
