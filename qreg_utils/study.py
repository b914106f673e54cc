"""Params files: what a study contains, validated before anything runs.

A study is one YAML file: ``common`` holds what all experiments share, ``grid`` is a list of entries in which every
list is expanded. Each combination is one experiment: one configuration with a list of seeds, one notebook run.

A params file is not trusted: whatever is in it, it is a study or a StudyError. It cannot name a place outside the data
folder, and says nothing about where results go: that is ``results_dir``, a parameter of the notebooks which whoever
runs them gives on the command line.
"""

import difflib
import itertools
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qreg_utils.atomic import written_whole

Bits = Annotated[int, Field(ge=2, le=8)]
QUANTIZERS = ("lsq", "pact", "dorefa")
CONTROLS = ("gaussian-noise", "gradient-penalty")  # full-precision training with the noise of LSQ, or its penalty
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Severity = Annotated[int, Field(ge=1, le=5)]
# Every part of the path begins with a letter, a digit or _: not with a dot, a tilde or nothing at all.
Inside = Annotated[str, Field(pattern=r"^\w[\w .+-]*(/\w[\w .+-]*)*$")]
SPLIT = (
    "a list of folders in VOC/images or list files (.txt) in VOC, at most 100 (relative paths of letters, digits, "
    "_ - + . / and spaces, without ..), or null (the official split)"
)
HOW_MANY = "an integer from 2, or null (all); at most 1000000000"
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,][A-Za-z0-9_.,-]{0,99}$")]  # goes to sbatch's command line
WORD = "1 to 100 characters of A-Z a-z 0-9 _ - . and comma, of which the first is no -"

Gres = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,50}(:[A-Za-z0-9_.]{1,50})?(:[0-9]{1,5})?$")]  # as sbatch has it


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
    seeds: list[Seed] = Field(
        min_length=1,
        max_length=1000,
        description="a list of one or more different integers from 0 to 2147483647, at most 1000",
    )
    epochs: int = Field(ge=1, le=10_000, description="an integer from 1 to 10000")
    batch_size: int = Field(ge=2, le=65_536, description="an integer from 2 to 65536")
    learning_rate: float = Field(gt=0, le=100, description="a number above 0, at most 100")
    momentum: float = Field(ge=0, lt=1, description="a number from 0, below 1")
    weight_decay: float = Field(ge=0, le=1, description="a number from 0 to 1")
    alpha_decay: float = Field(ge=0, le=1, description="a number from 0 to 1 (L2 penalty of PACT's alphas)")
    schedule: str
    augment: bool = Field(description="true or false")
    severities: list[Severity] = Field(min_length=1, description="a list of one or more different integers from 1 to 5")
    train_images: int | None = Field(None, ge=2, le=10**9, description=HOW_MANY)
    test_images: int | None = Field(None, ge=2, le=10**9, description=HOW_MANY)

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
                raise ValueError(f"{name}: {_short(values)} is not allowed: it names one twice")
        for name, there in zip(("train_images", "test_images"), NUMBER_OF_IMAGES.get(self.dataset, ()), strict=False):
            if (getattr(self, name) or 0) > there:
                raise ValueError(f"{name}: {getattr(self, name)} is not allowed: {self.dataset} has {there}")
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
        return _validated(given, {}, "notebook parameters: ", cls)


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

    @model_validator(mode="after")
    def _check_batch(self) -> "Classification":
        images = self.train_images or NUMBER_OF_IMAGES[self.dataset][0]
        if self.batch_size > images:
            raise ValueError(f"batch_size: {self.batch_size} is not allowed: there are {images} training images")
        return self


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
    train_split: list[Inside] | None = Field(None, min_length=1, max_length=100, description=SPLIT)
    test_split: list[Inside] | None = Field(None, min_length=1, max_length=100, description=SPLIT)

    @model_validator(mode="after")
    def _check_data(self) -> "Detection":
        for name in self.classes or []:
            if name not in DETECTION_CLASSES[self.dataset]:
                allowed = ", ".join(DETECTION_CLASSES[self.dataset])
                raise ValueError(f"classes: {_short(name)} is not allowed for {self.dataset}: {allowed}")
        for name in ("train_split", "test_split"):
            value = getattr(self, name)
            if self.dataset != "voc" and value is not None:
                raise ValueError(f"{name}: {_short(value)} is not allowed: {self.dataset} has its own splits")
        return self


class ClusterResources(BaseModel):
    """What a cluster job gets. No parameter of the experiment: the numbers must not depend on it.

    The defaults, which no file can give, mean that nothing is asked for.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    runtime: int = Field(0, ge=1, le=100_000, description="minutes, an integer from 1 to 100000")
    mem_mb: int = Field(0, ge=100, le=10_000_000, description="megabytes, an integer from 100 to 10000000")
    gres: Gres = Field("", description="such as gpu, gpu:1 or gpu:a100:1")
    slurm_partition: Word = Field("", description=WORD)
    slurm_account: Word = Field("", description=WORD)


# fmt: off
DETECTION_CLASSES = {
    "digit_scenes": tuple("0123456789"),
    "voc": (
        "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
        "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
    ),
}
# fmt: on
NUMBER_OF_IMAGES = {  # for training and for testing; VOC's depend on its splits
    "digits": (1442, 355),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "digit_scenes": (400, 200),
}
LEVEL = {"method", "weight_bits", "activation_bits", "first_last_bits", "seeds"}  # may differ between compared levels
KEPT_TOGETHER = ("severities", "classes", "train_split", "test_split")  # lists that are no choices of a grid
RESERVED = ("published", "scratch", "walkthroughs")  # folders of results/ that belong to no study
IPYTHON_NAMES = {"In", "Out", "exit", "quit", "get_ipython", "open"}
MAX_SIZE = 200_000  # bytes of a params file, and characters that it stands for with its aliases written out
MAX_LEVELS = 20  # of lists and mappings within each other
MAX_EXPERIMENTS = 10_000
MAX_PROBLEMS = 10  # that are told at once


@dataclass(frozen=True)
class Study:
    """A validated params file."""

    name: str
    description: str
    experiments: tuple[Experiment, ...]
    resources: Mapping[str, Mapping[str, int | str]]  # experiment id -> what the file asks for, {} where it does not


def load_study(path: str | Path) -> Study:
    """Read, validate and expand a params file; its name is the study's.

    Raises StudyError, and nothing else, with one line for each mistake, before anything else happens.
    """
    path = Path(path)
    _check_name(path)
    content = _read_yaml(path)
    for key in content:
        if key not in ("description", "common", "grid"):
            raise StudyError(f"{path}: {_unknown_key(key, ['description', 'common', 'grid'])}")
    description = "" if content.get("description") is None else content["description"]
    if not isinstance(description, str):
        raise StudyError(f"{path}: description: {_short(description)} is not allowed: text")
    common, entries = _common_and_grid(path, content)
    common, for_all = _without_resources(common, f"{path}: common: ")
    experiments, resources = [], {}
    for position, entry in enumerate(entries):
        place = f"{path}: grid[{position}]: "
        entry, for_entry = _without_resources(entry, place)
        places = dict.fromkeys(common, f"{path}: common: ") | dict.fromkeys(entry, place)
        for values in _expand(entry):
            values = {**common, **values}
            experiment = _validated(values, places, place, _task(values), also=("resources",))
            experiments.append(experiment)
            resources[experiment.id] = for_all | for_entry
    _check_grid(path, experiments)
    return Study(path.stem, description.strip(), tuple(experiments), resources)


def write_params(study: Study, params_file: str | Path, results: Path) -> None:
    """Lay out ``results``: a copy of the params file, and params.yaml for each experiment (papermill's ``-f``).

    A file that already says the same is left alone, so that its time of change means something. Raises StudyError where
    this cannot be written; a folder that was not there before is then not there either.
    """
    new = not results.exists()
    try:
        _write_if_new(results / f"{study.name}.yaml", Path(params_file).read_bytes())
        for experiment in study.experiments:
            text = yaml.safe_dump(experiment.model_dump(), sort_keys=False)
            _write_if_new(results / experiment.id / "params.yaml", text.encode())
    except OSError as error:
        if new:
            shutil.rmtree(results, ignore_errors=True)
        raise StudyError(f"{results}: cannot be written: {error.strerror or error}") from None


def _write_if_new(path: Path, content: bytes) -> None:
    if path.exists() and path.read_bytes() == content:
        return
    with written_whole(path) as part:
        part.write_bytes(content)


# --- reading YAML -----------------------------------------------------------------------------------------------------


def _check_name(path: Path) -> None:
    """The name becomes a folder of results/, and a word of the batch's shell commands."""
    if path.stem in RESERVED:
        raise StudyError(f"{path}: a study cannot be called {path.stem}: results/{path.stem} is for something else")
    if not re.fullmatch(r"\w[\w.-]{0,99}", path.stem):
        allowed = "1 to 100 letters, digits, _ - and ., of which the first is no - or ."
        raise StudyError(f"{_name(str(path))}: a study cannot be called {_short(path.stem)}: {allowed}")


def _read_yaml(path: Path) -> dict:
    text = _read_text(path)
    try:
        content = _ParamsLoader(text).get_single_data()
    except yaml.YAMLError as error:
        raise StudyError(f"{path}: not valid YAML for a params file: {_told(error, text)}") from None
    if not isinstance(content, dict):
        raise StudyError(f"{path}: {_short(content)} is not allowed: a mapping with the keys common and grid")
    return content


def _read_text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():  # /dev/zero has no end
            raise StudyError(f"{path}: not a file")
        with path.open("rb") as file:
            content = file.read(MAX_SIZE + 1)
        if len(content) > MAX_SIZE:
            raise StudyError(f"{path}: too large for a params file: more than {MAX_SIZE} bytes")
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        there = sorted(file.stem for file in path.parent.glob("*.yaml"))
        raise StudyError(f"{path}: no such file; studies there: {', '.join(there) or 'none'}") from None
    except UnicodeDecodeError as error:
        raise StudyError(f"{path}: cannot be read: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (OSError, ValueError) as error:  # a path that no system would take is a ValueError
        raise StudyError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


class _ParamsLoader(yaml.SafeLoader):
    """YAML's plain types and none of its traps.

    Refused are duplicate keys, of which pyyaml takes the last, keys that are lists or mappings, and aliases that
    contain themselves or stand for gigabytes. A date stays text; so does a number that Python cannot hold.
    """

    def construct_undefined(self, node: yaml.Node) -> None:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise _refused(
            node.start_mark, f"the tag {_short(tag)} is not allowed: text, numbers, lists and mappings need none"
        )

    yaml_constructors: ClassVar = {
        f"tag:yaml.org,2002:{kind}": getattr(yaml.SafeLoader, f"construct_yaml_{kind}")
        for kind in ("null", "bool", "int", "float", "str", "seq", "map")
    } | {"tag:yaml.org,2002:timestamp": yaml.SafeLoader.construct_yaml_str, None: construct_undefined}

    def __init__(self, text: str):
        super().__init__(text)
        self._measured: dict[yaml.Node, tuple[int, int]] = {}

    def get_single_node(self) -> yaml.Node | None:
        try:
            return super().get_single_node()
        except RecursionError:
            raise _refused(self.get_mark(), f"more than {MAX_LEVELS} levels") from None
        except (ArithmeticError, ValueError):  # pyyaml does not expect "\\Uffffffff"
            raise _refused(self.get_mark(), "a number that is too large") from None

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        node = super().compose_node(parent, index)
        if not isinstance(event, yaml.AliasEvent):
            self._measured[node] = self._measure(node)
        elif node not in self._measured:
            raise _refused(event.start_mark, "an alias of something that it is in itself")
        return node

    def _measure(self, node: yaml.Node) -> tuple[int, int]:
        """How many characters and levels a node is, with its aliases written out."""
        if isinstance(node, yaml.ScalarNode):
            if re.search("[\ud800-\udfff]", node.value):
                raise _refused(node.start_mark, "half a character (a surrogate)")
            return len(node.value) + 1, 0
        pairs = node.value if isinstance(node, yaml.MappingNode) else zip(node.value)
        parts = [self._measured[part] for pair in pairs for part in pair]
        size = 1 + sum(size for size, _ in parts)
        levels = 1 + max((levels for _, levels in parts), default=0)
        if size > MAX_SIZE:
            raise _refused(node.start_mark, f"more than {MAX_SIZE} characters, with aliases written out")
        if levels > MAX_LEVELS:
            raise _refused(node.start_mark, f"more than {MAX_LEVELS} levels")
        return size, levels

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refused(key.start_mark, "a key must be text")
            if key.value in lines:
                raise _refused(
                    key.start_mark, f"{_name(key.value)}: a duplicate key: line {lines[key.value]} has it already"
                )
            lines[key.value] = key.start_mark.line + 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, LookupError, ValueError):  # thousands of digits, 1:59:...:59.5, !!int many
            return self.constructed_objects.setdefault(node, node.value)


def _refused(mark: yaml.Mark, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _told(error: yaml.YAMLError, text: str) -> str:
    """One line instead of pyyaml's several."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"line {line}: character #x{error.character:02x} is not allowed"
    mark = error.problem_mark
    problem = ", ".join(filter(None, (error.context, error.problem)))[:200]  # it may name a tag of any length
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


# --- from values to experiments ---------------------------------------------------------------------------------------


def _common_and_grid(path: Path, content: dict) -> tuple[dict, list[dict]]:
    common, grid = content.get("common"), content.get("grid")
    common = {} if common is None else common
    if not isinstance(common, dict):
        raise StudyError(f"{path}: common: {_short(common)} is not allowed: a mapping of parameters")
    if not isinstance(grid, list) or not grid or not all(isinstance(entry, dict) for entry in grid):
        raise StudyError(f"{path}: grid: {_short(grid)} is not allowed: a list of one or more mappings")
    for position, entry in enumerate(grid):
        for key, value in entry.items():
            if value == []:
                where = f"{path}: grid[{position}]: {_name(key)}"
                raise StudyError(f"{where}: [] is not allowed: an empty list makes no experiment")
    if sum(math.prod(map(len, _choices(entry).values())) for entry in grid) > MAX_EXPERIMENTS:
        raise StudyError(f"{path}: grid: its lists make more than {MAX_EXPERIMENTS} experiments, which is not allowed")
    return common, grid


def _without_resources(parameters: dict, place: str) -> tuple[dict, dict[str, int | str]]:
    """The parameters proper, and the resources that were given beside them."""
    parameters = dict(parameters)
    given = parameters.pop("resources", None)
    if given is None:
        return parameters, {}
    if not isinstance(given, dict):
        allowed = ", ".join(ClusterResources.model_fields)
        raise StudyError(f"{place}resources: {_short(given)} is not allowed: a mapping with any of {allowed}")
    return parameters, _validated(given, {}, f"{place}resources.", ClusterResources).model_dump(exclude_unset=True)


def _task(values: dict) -> type[Experiment]:
    """Which kind of experiment some parameters mean; where they mix the two, validation says what does not fit."""
    detection = values.get("model") == "yolov5n" or values.get("dataset") in ("digit_scenes", "voc")
    return Detection if detection else Classification


def _choices(entry: dict) -> dict[Any, list]:
    """What each key is expanded to: the lists of a grid, but for those that are kept together."""
    together = (*KEPT_TOGETHER, "resources")
    return {key: value if isinstance(value, list) and key not in together else [value] for key, value in entry.items()}


def _expand(entry: dict) -> list[dict]:
    """Every combination of the entry's choices. Seeds become jobs of their own."""
    combinations = [dict(zip(entry, choice, strict=True)) for choice in itertools.product(*_choices(entry).values())]
    return [values | {"seeds": [values["seeds"]]} if "seeds" in values else values for values in combinations]


# --- telling what is wrong --------------------------------------------------------------------------------------------

Validated = TypeVar("Validated", bound=BaseModel)


def _validated(
    values: dict, places: Mapping[str, str], where: str, model: type[Validated], also: tuple[str, ...] = ()
) -> Validated:
    """``places`` says where each key stands; ``where`` stands for keys that are nowhere. ``also`` are keys that have
    been seen to, to name where a mistyped one may mean them."""
    fields = model.model_fields
    unknown = [key for key in values if key not in fields]
    lines = [f"{places.get(key, where)}{_unknown_key(key, [*fields, *also])}" for key in unknown[:MAX_PROBLEMS]]
    try:
        validated = model.model_validate({key: value for key, value in values.items() if key in fields})
    except ValidationError as error:
        problems = _first_problems(error, values).items()
        lines += [f"{places.get(key, where)}{_explain(key, values, problem, fields)}" for key, problem in problems]
    if len(unknown) > MAX_PROBLEMS or len(lines) > MAX_PROBLEMS:
        lines[MAX_PROBLEMS:] = ["... and more"]
    if lines:
        raise StudyError("\n".join(lines))
    return validated


def _first_problems(error: ValidationError, values: dict) -> dict[str, dict]:
    """The first of pydantic's errors for each key; "" is the key of what does not fit together."""
    problems: dict[str, dict] = {}
    for problem in error.errors(include_url=False):
        problems.setdefault(problem["loc"][0] if problem["loc"] else "", problem)
    if "weight_bits" in problems and values.get("activation_bits", "same") == "same":
        problems.pop("activation_bits", None)  # the same mistake, told once
    return problems


def _explain(key: str, values: dict, problem: dict, fields: Mapping[str, Any]) -> str:
    """One line for one of pydantic's errors: key, value, what is allowed."""
    if key == "":
        return problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{key}: missing; it has no default"
    allowed = fields[key].description or problem["msg"].removeprefix("Input should be ")
    hint = " (YAML reads 5e-4 as text: write 5.0e-4)" if problem["type"] == "float_type" else ""
    return f"{key}: {_short(values.get(key))} is not allowed: {allowed}{hint}"


def _unknown_key(key: object, allowed: list[str]) -> str:
    close = difflib.get_close_matches(_name(key), allowed, n=1)
    advice = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(allowed)}"
    return f"{_name(key)}: unknown key; {advice}"


def _name(key: object) -> str:
    """A key as it is, where that makes one readable line."""
    readable = isinstance(key, str) and key.isprintable() and 0 < len(key) <= 80
    return key if readable else _short(key)


def _short(value: object) -> str:
    """A value on one printable line of about 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python's own limit
        text = "an integer of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


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
                    f"{path}: {key}: {_short(theirs)} for {reference.id} but {_short(ours)} for {experiment.id}; "
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
                    f"{path}: seeds: {_short(sorted(expected))} for {dataset}-{model}-{reference} but "
                    f"{_short(sorted(found))} for {dataset}-{model}-{level}; levels that are compared need the same"
                )
