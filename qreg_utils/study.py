"""Params files: what a study contains, validated before anything runs.

A study is one YAML file: ``common`` holds what all experiments share, ``grid`` is a list of entries in which every
list is expanded. Each combination is one experiment: one configuration with a list of seeds, one notebook run.
"""

import difflib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qreg_utils.atomic import written_whole

Bits = Annotated[int, Field(ge=2, le=8)]
QUANTIZERS = ("lsq", "pact", "dorefa")
CONTROLS = ("gaussian-noise", "gradient-penalty")  # full-precision training with the noise of LSQ, or its penalty
SPLIT = "a list of folders in VOC/images or list files (.txt) in VOC, or null (the official split)"
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Severity = Annotated[int, Field(ge=1, le=5)]


class StudyError(ValueError):
    """A params file or a notebook parameter is wrong; the message names file, key, value and what is allowed."""


class Experiment(BaseModel):
    """One configuration with its seeds: what the parameters of both notebooks have in common."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    notebook: ClassVar[str]
    recipe: ClassVar[tuple[str, ...]] = (
        "epochs",
        "batch_size",
        "learning_rate",
        "momentum",
        "weight_decay",
        "alpha_decay",
        "schedule",
        "augment",
    )

    dataset: str
    model: str
    method: str
    weight_bits: Bits | None = Field(None, description="an integer from 2 to 8")
    activation_bits: Bits | None = Field(None, description="an integer from 2 to 8, 'same' or null (weights only)")
    first_last_bits: Bits = Field(8, description="an integer from 2 to 8")
    seeds: list[Seed] = Field(min_length=1, description="a list of one or more different integers from 0")
    epochs: int = Field(ge=1, le=10_000, description="an integer from 1 to 10000")
    batch_size: int = Field(ge=2, le=65_536, description="an integer from 2 to 65536")
    learning_rate: float = Field(gt=0, le=100, description="a number above 0, at most 100")
    momentum: float = Field(ge=0, lt=1, description="a number from 0, below 1")
    weight_decay: float = Field(ge=0, le=1, description="a number from 0 to 1")
    alpha_decay: float = Field(ge=0, le=1, description="a number from 0 to 1 (L2 penalty of PACT's alphas)")
    schedule: str
    augment: bool = Field(description="true or false")
    severities: list[Severity] = Field(min_length=1, description="a list of one or more different integers from 1 to 5")
    train_images: int | None = Field(None, ge=2, description="an integer from 2, or null (all)")
    test_images: int | None = Field(None, ge=2, description="an integer from 2, or null (all)")

    @model_validator(mode="before")
    @classmethod
    def _resolve_bits(cls, values: dict) -> dict:
        """Activations get the weights' width unless told otherwise; a control leaves them alone."""
        if values.get("activation_bits", "same") == "same":
            control = values.get("method") in CONTROLS
            return {**values, "activation_bits": None if control else values.get("weight_bits")}
        return values

    @model_validator(mode="after")
    def _check_together(self) -> "Experiment":
        if self.method == "fp32" and (self.weight_bits, self.activation_bits) != (None, None):
            raise ValueError("method fp32 takes neither weight_bits nor activation_bits")
        if self.method != "fp32" and self.weight_bits is None:
            raise ValueError(f"method {self.method} needs weight_bits, an integer from 2 to 8")
        if self.method in CONTROLS and self.activation_bits is not None:
            raise ValueError(
                f"activation_bits: {self.activation_bits} is not allowed: {self.method} is of weights only"
            )
        for name in ("seeds", *KEPT_TOGETHER):
            values = getattr(self, name, None) or []
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: {values} is not allowed: it names one twice")
        return self

    @property
    def level(self) -> str:
        """The quantization level as part of an id: fp32, lsq-w4a4, lsq-w4 (weights only)."""
        if self.method == "fp32":
            return "fp32"
        activations = "" if self.activation_bits is None else f"a{self.activation_bits}"
        return f"{self.method}-w{self.weight_bits}{activations}"

    @property
    def id(self) -> str:
        """A name that reads as a sentence; an experiment of a single seed says which."""
        seed = f"-seed{self.seeds[0]}" if len(self.seeds) == 1 else ""
        return f"{self.dataset}-{self.model}-{self.level}{seed}"

    @property
    def quantized(self) -> bool:
        """Whether the network that comes out computes with quantized weights."""
        return self.method in QUANTIZERS

    @property
    def imitated(self) -> Self | None:
        """The experiment whose noise a control imitates: LSQ at the same width, weights only. None if no control."""
        return self.model_copy(update={"method": "lsq"}) if self.method in CONTROLS else None

    @property
    def in_full_precision(self) -> Self:
        """The experiment that this one is compared with."""
        return self.model_copy(update={"method": "fp32", "weight_bits": None, "activation_bits": None})

    @property
    def columns(self) -> dict[str, Any]:
        """The columns that begin each tidy row of this experiment; 32 bits stand for full precision."""
        return {
            "experiment": self.id,
            "dataset": self.dataset,
            "model": self.model,
            "method": self.method,
            "weight_bits": self.weight_bits or 32,
            "activation_bits": self.activation_bits or 32,
        }

    def training(self) -> dict[str, Any]:
        """The budget and recipe, as keyword arguments of the task's ``fit``; equal for all levels of a study."""
        return {name: getattr(self, name) for name in self.recipe}

    @classmethod
    def from_notebook(cls, namespace: Mapping[str, Any], also: tuple[str, ...] = ()) -> "Experiment":
        """Read the parameters cell of a notebook from its ``globals()``, called right after that cell.

        Everything there that is no module, class or private name must be a parameter; ``also`` names those that
        are not the experiment's. papermill only warns about a mistyped ``-p`` name: here it is a StudyError.
        When the cell is run again by hand, the variables of later cells are there too, and are left alone.
        """
        run_before = any(isinstance(value, cls) for value in namespace.values())
        given = {
            name: value
            for name, value in namespace.items()
            if not name.startswith("_") and not isinstance(value, ModuleType | type) and name not in IPYTHON_NAMES
            if name in cls.model_fields or not run_before
        }
        for name in also:
            given.pop(name, None)
        return _validated(given, {}, "notebook parameters", cls)


class Classification(Experiment):
    """The parameters of ``classification.ipynb``."""

    notebook = "classification.ipynb"
    recipe = (*Experiment.recipe, "compile")

    dataset: Literal["digits", "cifar10", "cifar100"]
    model: Literal["resnet8", "resnet18", "resnet20", "resnet50", "mobilenet_v1"]
    method: Literal["fp32", "lsq", "pact", "dorefa", "gaussian-noise", "gradient-penalty"]
    schedule: Literal["one-cycle", "cosine"]
    compile: bool | Literal["auto"] = Field("auto", description="auto, true or false")
    theory_images: int = Field(64, ge=2, le=65_536, description="an integer from 2 to 65536")
    accept_unverified_files: bool = Field(False, description="true or false")


class Detection(Experiment):
    """The parameters of ``detection.ipynb``."""

    notebook = "detection.ipynb"
    recipe = (*Experiment.recipe, "image_size", "warmup_epochs", "classes")

    dataset: Literal["digit_scenes", "voc"]
    model: Literal["yolov5n"]
    method: Literal["fp32", "lsq", "pact", "dorefa"]
    schedule: Literal["linear", "cosine"]
    image_size: int = Field(ge=32, le=4096, multiple_of=32, description="a multiple of 32 from 32 to 4096")
    warmup_epochs: float = Field(ge=0, le=10_000, description="a number from 0 to 10000")
    classes: list[str] | None = Field(None, min_length=1, description="a list of class names, or null (all)")
    train_split: list[str] | None = Field(None, min_length=1, description=SPLIT)
    test_split: list[str] | None = Field(None, min_length=1, description=SPLIT)

    @model_validator(mode="after")
    def _check_data(self) -> "Detection":
        for name in self.classes or []:
            if name not in DETECTION_CLASSES[self.dataset]:
                allowed = ", ".join(DETECTION_CLASSES[self.dataset])
                raise ValueError(f"classes: {name!r} is not allowed for {self.dataset}: {allowed}")
        for name in ("train_split", "test_split"):
            if self.dataset != "voc" and getattr(self, name) is not None:
                raise ValueError(f"{name}: {getattr(self, name)} is not allowed: {self.dataset} has its own splits")
        return self


# fmt: off
DETECTION_CLASSES = {
    "digit_scenes": tuple("0123456789"),
    "voc": (
        "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
        "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
    ),
}
# fmt: on
LEVEL = {"method", "weight_bits", "activation_bits", "first_last_bits", "seeds"}  # may differ between compared levels
KEPT_TOGETHER = ("severities", "classes", "train_split", "test_split")  # lists that are no choices of a grid
RESERVED = ("published", "scratch", "walkthroughs")  # folders of results/ that belong to no study
IPYTHON_NAMES = {"In", "Out", "exit", "quit", "get_ipython", "open"}


@dataclass(frozen=True)
class Study:
    """A validated params file."""

    name: str
    description: str
    experiments: tuple[Experiment, ...]


def load_study(path: str | Path) -> Study:
    """Read, validate and expand a params file; its name is the study's.

    Raises StudyError, with one line for each mistake, before anything else happens.
    """
    path = Path(path)
    if path.stem in RESERVED:
        raise StudyError(f"{path}: a study cannot be called {path.stem}: results/{path.stem} is for something else")
    content = _read_yaml(path)
    for key in content:
        if key not in ("description", "common", "grid"):
            raise StudyError(f"{path}: {_unknown_key(key, ['description', 'common', 'grid'])}")
    common, grid = content.get("common") or {}, content.get("grid")
    if not isinstance(common, dict):
        raise StudyError(f"{path}: common: {common!r} is not allowed: a mapping of parameters")
    if not isinstance(grid, list) or not grid or not all(isinstance(entry, dict) for entry in grid):
        raise StudyError(f"{path}: grid: {grid!r} is not allowed: a list of one or more mappings")
    experiments = []
    for position, entry in enumerate(grid):
        places = dict.fromkeys(common, f"{path}: common") | dict.fromkeys(entry, f"{path}: grid[{position}]")
        for key, value in entry.items():
            if value == []:
                raise StudyError(f"{places[key]}: {key}: [] is not allowed: an empty list makes no experiment")
        for values in _expand(entry):
            values = {**common, **values}
            experiments.append(_validated(values, places, f"{path}: grid[{position}]", _task(values)))
    _check_grid(path, experiments)
    return Study(path.stem, str(content.get("description") or "").strip(), tuple(experiments))


def write_params(study: Study, params_file: str | Path, results: Path) -> None:
    """Lay out ``results``: a copy of the params file, and params.yaml for each experiment (papermill's ``-f``).

    A file that already says the same is left alone, so that its time of change means something.
    """
    _write_if_new(results / f"{study.name}.yaml", Path(params_file).read_text(encoding="utf-8"))
    for experiment in study.experiments:
        text = yaml.safe_dump(experiment.model_dump(), sort_keys=False)
        _write_if_new(results / experiment.id / "params.yaml", text)


def _write_if_new(path: Path, text: str) -> None:
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")


def _read_yaml(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = sorted(file.stem for file in path.parent.glob("*.yaml"))
        raise StudyError(f"{path}: no such file; studies there: {', '.join(there) or 'none'}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise StudyError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise StudyError(f"{path}: {content!r} is not allowed: a mapping with the keys common and grid")
    return content


def _task(values: dict) -> type[Experiment]:
    """Which kind of experiment some parameters mean; where they mix the two, validation says what does not fit."""
    detection = values.get("model") == "yolov5n" or values.get("dataset") in ("digit_scenes", "voc")
    return Detection if detection else Classification


def _expand(entry: dict) -> list[dict]:
    """Every combination of the entry's lists, but for KEPT_TOGETHER. Seeds become jobs of their own."""
    choices = [
        value if isinstance(value, list) and key not in KEPT_TOGETHER else [value] for key, value in entry.items()
    ]
    combinations = [dict(zip(entry, choice, strict=True)) for choice in itertools.product(*choices)]
    return [values | {"seeds": [values["seeds"]]} if "seeds" in values else values for values in combinations]


def _validated(values: dict, places: Mapping[str, str], where: str, task: type[Experiment]) -> Experiment:
    """``places`` says where each key stands; ``where`` stands for keys that are nowhere."""
    try:
        return task.model_validate(values)
    except ValidationError as error:
        problems: dict[Any, dict] = {}  # the first of each key
        for problem in error.errors():
            problems.setdefault(problem["loc"][0] if problem["loc"] else "", problem)
        if "weight_bits" in problems and values.get("activation_bits", "same") == "same":
            problems.pop("activation_bits", None)  # the same mistake, told once
        lines = [
            f"{places.get(key, where)}: {_explain(key, values, problem, task.model_fields)}"
            for key, problem in problems.items()
        ]
        raise StudyError("\n".join(lines)) from None


def _explain(key: Any, values: dict, problem: dict, fields: Mapping[str, Any]) -> str:
    """One line for one of pydantic's errors: key, value, what is allowed."""
    if key == "":
        return problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("extra_forbidden", "invalid_key"):  # YAML reads on: and 1: as keys that are no strings
        return _unknown_key(key, list(fields))
    if problem["type"] == "missing":
        return f"{key}: missing; it has no default"
    allowed = fields[key].description or problem["msg"].removeprefix("Input should be ")
    value = values.get(key)
    hint = " (YAML reads 5e-4 as text: write 5.0e-4)" if problem["type"] == "float_type" else ""
    return f"{key}: {value!r} is not allowed: {allowed}{hint}"


def _unknown_key(key: object, allowed: list[str]) -> str:
    close = difflib.get_close_matches(str(key), allowed, n=1)
    advice = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(allowed)}"
    return f"{key}: unknown key; {advice}"


def _check_grid(path: Path, experiments: list[Experiment]) -> None:
    """Ids are unique, levels that will be compared have the same data, budget, recipe and seeds, and what a control
    imitates is there."""
    seen: dict[str, Experiment] = {}
    first: dict[tuple[str, str], Experiment] = {}
    for experiment in experiments:
        if experiment.id in seen:
            raise StudyError(f"{path}: grid: {experiment.id} is there twice")
        seen[experiment.id] = experiment
        reference = first.setdefault((experiment.dataset, experiment.model), experiment)
        for key in (name for name in type(experiment).model_fields if name not in LEVEL):
            ours, theirs = getattr(experiment, key), getattr(reference, key)
            if ours != theirs:
                raise StudyError(
                    f"{path}: {key}: {theirs!r} for {reference.id} but {ours!r} for {experiment.id}; "
                    "levels that are compared need the same"
                )
    for experiment in experiments:
        if experiment.imitated and seen.get(experiment.imitated.id) != experiment.imitated:
            raise StudyError(
                f"{path}: grid: {experiment.id} imitates the noise of {experiment.imitated.id}, which is not there; "
                f"add method: lsq, weight_bits: {experiment.weight_bits}, activation_bits: null, with the same seeds "
                f"and first_last_bits: {experiment.first_last_bits}"
            )
    seeds: dict[tuple[str, str], dict[str, set[int]]] = {}
    for experiment in experiments:
        levels = seeds.setdefault((experiment.dataset, experiment.model), {})
        levels.setdefault(experiment.level, set()).update(experiment.seeds)
    for (dataset, model), levels in seeds.items():
        (reference, expected), *others = levels.items()
        for level, found in others:
            if found != expected:
                raise StudyError(
                    f"{path}: seeds: {sorted(expected)} for {dataset}-{model}-{reference} but {sorted(found)} for "
                    f"{dataset}-{model}-{level}; levels that are compared need the same"
                )
