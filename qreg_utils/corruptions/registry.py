"""The table of corruptions: each function is registered together with its severity constants."""

from collections.abc import Callable
from dataclasses import dataclass

SEVERITIES = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Corruption:
    """A corruption function and its constants: family -> parameter name -> one value for each severity."""

    function: Callable
    tables: dict

    def parameters(self, family, severity):
        return {name: values[severity - 1] for name, values in self.tables[family].items()}


REGISTRY: dict[str, Corruption] = {}


def severities(**tables):
    """Register the decorated function under its own name, with one severity table for each constant family.

    A table maps a parameter to its five values, or to the one value that all severities share.
    The function is called as ``function(images, draws, **parameters)`` with images uint8 (N,3,H,W) and a generator of
    random numbers. It returns uint8 levels, or floats in units of full intensity (0..1) that are still to be clipped,
    scaled to 0..255 and truncated.
    """

    def expanded(table):
        return {
            name: value if isinstance(value, tuple) else (value,) * len(SEVERITIES) for name, value in table.items()
        }

    def register(function):
        REGISTRY[function.__name__] = Corruption(
            function, {family: expanded(table) for family, table in tables.items()}
        )
        return function

    return register
