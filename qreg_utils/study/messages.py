"""What is wrong with a params file or a notebook's parameters, in one line for each mistake."""

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

MAX_PROBLEMS = 10  # that are reported at once


class StudyError(ValueError):
    """A params file or a notebook parameter is wrong; the message names file, key, value and what is allowed."""


Validated = TypeVar("Validated", bound=BaseModel)


def validated(
    values: dict, places: Mapping[str, str], where: str, model: type[Validated], also: tuple[str, ...] = ()
) -> Validated:
    """``values`` as a ``model``, or a StudyError with a line for each mistake.

    ``places`` says where each key stands; ``where`` stands for keys that are nowhere. ``also`` are keys that have been
    seen to, to name where a mistyped one may mean them.
    """
    fields = model.model_fields
    unknown = [key for key in values if key not in fields]
    lines = [f"{places.get(key, where)}{unknown_key(key, [*fields, *also])}" for key in unknown[:MAX_PROBLEMS]]
    try:
        result = model.model_validate({key: value for key, value in values.items() if key in fields})
    except ValidationError as error:
        problems = _first_problems(error, values).items()
        lines += [f"{places.get(key, where)}{_explain(key, values, problem, fields)}" for key, problem in problems]
    if len(unknown) > MAX_PROBLEMS or len(lines) > MAX_PROBLEMS:
        lines[MAX_PROBLEMS:] = ["... and more"]
    if lines:
        raise StudyError("\n".join(lines))
    return result


def _first_problems(error: ValidationError, values: dict) -> dict[str, dict]:
    """The first of pydantic's errors for each key; "" is the key of what does not fit together."""
    problems: dict[str, dict] = {}
    for problem in error.errors(include_url=False):
        problems.setdefault(problem["loc"][0] if problem["loc"] else "", problem)
    if "weight_bits" in problems and values.get("activation_bits", "same") == "same":
        problems.pop("activation_bits", None)  # the same mistake, reported once
    return problems


def _explain(key: str, values: dict, problem: dict, fields: Mapping[str, Any]) -> str:
    """One line for one of pydantic's errors: key, value, what is allowed."""
    if key == "":
        return problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{key}: missing; it has no default"
    allowed = fields[key].description or problem["msg"].removeprefix("Input should be ")
    hint = " (YAML reads 5e-4 as text: write 5.0e-4)" if problem["type"] == "float_type" else ""
    if problem["type"] == "list_type" and isinstance(values.get(key), str):
        hint = f" (papermill's -p takes no lists: write -y '{key}: [...]')"
    return f"{key}: {short(values.get(key))} is not allowed: {allowed}{hint}"


def unknown_key(key: object, allowed: list[str]) -> str:
    close = difflib.get_close_matches(key_name(key), allowed, n=1)
    advice = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(allowed)}"
    return f"{key_name(key)}: unknown key; {advice}"


def key_name(key: object) -> str:
    """A key as it is, where that makes one readable line."""
    readable = isinstance(key, str) and key.isprintable() and 0 < len(key) <= 80
    return key if readable else short(key)


def short(value: object) -> str:
    """A value on one printable line of about 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python's own limit
        text = "an integer of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
