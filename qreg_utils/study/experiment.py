"""An experiment: one configuration with its seeds, as a params file or the parameters cell of a notebook gives it."""

import ast
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from qreg_utils.extensions import ExtensionError, load_extensions
from qreg_utils.names import (
    CLASSIFICATION,
    CONTROL,
    CORRUPTIONS,
    DATASETS,
    DETECTION,
    FULL_PRECISION,
    METHODS,
    MODELS,
    PAPER_CORRUPTIONS,
    PART,
    QUANTIZER,
    REGULARIZER,
    Task,
)
from qreg_utils.recipe import ClassificationRecipe, DetectionRecipe, Recipe
from qreg_utils.study.messages import StudyError, short, validated

Bits = Annotated[int, Field(ge=2, le=8)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Severity = Annotated[int, Field(ge=1, le=5)]
# Every part of the path begins with a letter, a digit or _: not with a dot, a tilde or nothing at all.
Inside = Annotated[str, Field(pattern=r"^\w[\w .+-]*(/\w[\w .+-]*)*$")]
SPLIT = (
    "a list of folders in VOC/images or list files (.txt) in VOC, at most 100 (relative paths of letters, digits, "
    "_ - + . / and spaces, without ..), or null (the official split)"
)
IMAGE_COUNT = "an integer from 2, or null (all); at most 1000000000"
LISTS = ("severities", "extra_corruptions", "classes", "train_split", "test_split")  # that are no choices of a grid
THEORY = {"theory", "theory_images"}  # decide what is measured of a trained network, besides its scores
PARAMETERS_CELL = {"dataset", "model", "method", "seeds"}  # are assigned in no other cell
SPELLINGS = {"true": True, "false": False, "null": None}  # YAML's, on papermill's command line
IPYTHON_NAMES = {"In", "Out", "exit", "quit", "get_ipython", "open"}


class Experiment(BaseModel):
    """One configuration with its seeds: what the parameters of both notebooks have in common."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    task: ClassVar[Task]
    recipe_type: ClassVar[type[Recipe]]

    dataset: str
    model: str
    variant: str | None = Field(
        None,
        pattern="^[a-z][a-z0-9_]{0,29}$",
        description="a word of a-z 0-9 _ that begins with a letter, at most 30 long, or null",
    )
    method: str
    weight_bits: Bits | None = Field(None, description="an integer from 2 to 8, or null (activations only)")
    activation_bits: Bits | None = Field(None, description="an integer from 2 to 8, 'same' or null (weights only)")
    first_last_bits: Bits = Field(8, description="an integer from 2 to 8")
    seeds: list[Seed] = Field(
        min_length=1,
        max_length=1000,
        description="a list of one or more different integers from 0 to 2147483647, at most 1000",
    )
    severities: Annotated[list[Severity], Field(min_length=1)] | Literal["rotating"] = Field(
        description="a list of one or more different integers from 1 to 5, or rotating (each image at one of them)"
    )
    extra_corruptions: list[str] = Field([], description="a list of registered corruptions besides the paper's 19")
    train_images: int | None = Field(None, ge=2, le=10**9, description=IMAGE_COUNT)
    test_images: int | None = Field(None, ge=2, le=10**9, description=IMAGE_COUNT)

    @model_validator(mode="before")
    @classmethod
    def _resolve_bits(cls, values: dict) -> dict:
        """Activations get the weights' width unless told otherwise; a control leaves them alone."""
        if values.get("activation_bits", "same") == "same":
            control = _kind(values.get("method")) == CONTROL
            return {**values, "activation_bits": None if control else values.get("weight_bits")}
        return values

    @field_validator("dataset", "model", "method")
    @classmethod
    def _check_name(cls, value: str, info: ValidationInfo) -> str:
        """The rows of the table of names that are for this task are what is allowed."""
        rows = {"dataset": DATASETS, "model": MODELS, "method": METHODS}[info.field_name].values()
        names = [
            row.name for row in rows if cls.task.name in (row.tasks if info.field_name == "method" else [row.task])
        ]
        if value not in names:
            *most, last = map(repr, names)
            raise PydanticCustomError(
                "name", "{allowed}", {"allowed": f"{', '.join(most)} or {last}" if most else last}
            )
        return value

    @field_validator("extra_corruptions")
    @classmethod
    def _check_corruptions(cls, values: list[str]) -> list[str]:
        extra = [name for name in CORRUPTIONS if name not in PAPER_CORRUPTIONS]
        if not set(values) <= set(extra):
            raise ValueError("none is registered" if not extra else f"some of {', '.join(extra)}")
        return values

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        without_widths = (self.weight_bits, self.activation_bits) == (None, None)
        if _kind(self.method) in (FULL_PRECISION, REGULARIZER):
            if not without_widths:
                raise ValueError(f"method {self.method} takes neither weight_bits nor activation_bits")
        elif without_widths:
            raise ValueError(f"method {self.method} needs weight_bits, an integer from 2 to 8")
        if self.method == "gradient-penalty" and self.activation_bits is not None:
            raise ValueError(
                f"activation_bits: {self.activation_bits} is not allowed: {self.method} is of weights only"
            )
        if self.severities == "rotating" and (self.test_images or 5) < 5:
            raise ValueError(f"test_images: {self.test_images} is not allowed: rotating severities take 5 at least")
        for name in ("seeds", *LISTS):
            values = getattr(self, name, None) or []
            values = [] if values == "rotating" else values
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: {short(values)} is not allowed: it names one twice")
        for name in ("train_images", "test_images"):
            asked, available = getattr(self, name), getattr(DATASETS[self.dataset], name)
            if asked and available and asked > available:
                raise ValueError(f"{name}: {asked} is not allowed: {self.dataset} has {available}")
        return self

    @property
    def setting(self) -> str:
        """Method and widths as part of an id: fp32, lsq-w4a4, lsq-w4 (weights only), lsq-a4 (activations only)."""
        widths = {"w": self.weight_bits, "a": self.activation_bits}
        text = "".join(f"{letter}{bits}" for letter, bits in widths.items() if bits is not None)
        return "-".join(filter(None, (self.method_and_strength, text)))

    @property
    def method_and_strength(self) -> str:
        """The method; of an ordinary regularizer with how much of it: weight-decay-0.005."""
        strength = METHODS[self.method].strength
        return f"{self.method}-{getattr(self, strength):g}" if strength else self.method

    @property
    def id(self) -> str:
        """A name that reads as a sentence; an experiment of a single seed says which."""
        seed = f"seed{self.seeds[0]}" if len(self.seeds) == 1 else None
        return "-".join(filter(None, (self.dataset, self.model, self.variant, self.setting, seed)))

    @property
    def quantized(self) -> bool:
        """Whether the network that comes out computes with quantized weights."""
        return _kind(self.method) == QUANTIZER

    @property
    def through_quantizer(self) -> bool:
        """Whether the network is trained through a quantizer, or a part of one."""
        return _kind(self.method) in (QUANTIZER, PART)

    @property
    def each_severity(self) -> list[int]:
        """The severities that occur."""
        return [1, 2, 3, 4, 5] if self.severities == "rotating" else self.severities

    @property
    def noise_source(self) -> Self | None:
        """The experiment whose noise a control has: a quantizer at the same widths; None if no control."""
        if _kind(self.method) != CONTROL:
            return None
        return self.model_copy(update={"method": METHODS[self.method].noise_source})

    def training_parameters(self) -> dict[str, Any]:
        """The parameters without those that only say what of the theory is measured on the trained networks."""
        return self.model_dump(exclude=THEORY)

    def serves(self, other: "Experiment") -> bool:
        """Whether both train alike but for the seeds. One of a single seed, which its id names, has no other."""
        if len(other.seeds) == 1 and self.seeds != other.seeds:
            return False
        unlike = THEORY | {"seeds"}
        return self.model_dump(exclude=unlike) == other.model_dump(exclude=unlike)

    @property
    def in_full_precision(self) -> Self:
        """The experiment that this one is compared with."""
        return self.model_copy(update={"method": "fp32", "weight_bits": None, "activation_bits": None})

    @property
    def corruptions(self) -> tuple[str, ...]:
        """What it is measured on: the paper's 19, and what the params add."""
        return (*PAPER_CORRUPTIONS, *self.extra_corruptions)

    @property
    def columns(self) -> dict[str, Any]:
        """The columns that begin each tidy row of this experiment; 32 bits stand for full precision."""
        return {
            "experiment": self.id,
            "dataset": self.dataset,
            "model": self.model,
            "variant": self.variant or "",
            "method": self.method_and_strength,
            "weight_bits": self.weight_bits or 32,
            "activation_bits": self.activation_bits or 32,
        }

    @property
    def recipe(self) -> Recipe:
        """The hyperparameters, which the task's ``fit`` takes; equal for all settings that are compared."""
        return self.recipe_type(**{name: getattr(self, name) for name in self.recipe_type.model_fields})

    @classmethod
    def from_notebook(cls, namespace: Mapping[str, Any], also: tuple[str, ...] = ()) -> Self:
        """Read the parameters cell of a notebook from its ``globals()``, called right after that cell.

        What that cell assigns, and the cell that papermill adds behind it, must be parameters; ``also`` names those
        that are not the experiment's. papermill only warns about a mistyped ``-p`` name: here it is a StudyError.
        Variables of IPython's startup files and, when the cell is run again by hand, those of later cells are left
        alone. ``-p augment false`` and ``-p train_images null`` arrive as text, and mean what they say.
        """
        run_before = any(isinstance(value, cls) for value in namespace.values())
        assigned = _assigned_as_parameters(namespace.get("In", []), run_before)
        if assigned is None:
            assigned = set() if run_before else _plain_variables(namespace)
        names = {*cls.model_fields, *assigned}
        given = {name: namespace[name] for name in namespace if name in names and name not in also}
        given = {
            name: SPELLINGS.get(value, value) if isinstance(value, str) else value for name, value in given.items()
        }
        try:
            load_extensions()
        except ExtensionError as error:
            raise StudyError(str(error)) from None
        return validated(given, {}, "notebook parameters: ", cls)


def _assigned_as_parameters(executed: Sequence[str], run_before: bool) -> set[str] | None:
    """The names that a notebook's parameters cell has assigned when it was last run, and papermill's cell behind it.

    ``executed`` is IPython's list of what was run, of which the last is running. None where no such cell is among it.
    """
    cells = [_assigned(cell) for cell in executed[:-1]]
    last = max((i for i, names in enumerate(cells) if names >= PARAMETERS_CELL), default=None)
    if last is None:
        return None
    return cells[last] if run_before else set().union(*cells[last:])


def _assigned(cell: str) -> set[str]:
    """The names that a cell assigns a value to, outside of functions and the like."""
    try:
        statements = ast.parse(cell).body
    except SyntaxError:  # a magic command
        return set()
    targets = [target for s in statements for target in getattr(s, "targets", [getattr(s, "target", None)])]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _plain_variables(namespace: Mapping[str, Any]) -> set[str]:
    """The names that may be meant as parameters where IPython's list does not say it."""
    return {
        name
        for name, value in namespace.items()
        if not name.startswith("_") and not isinstance(value, ModuleType | type) and name not in IPYTHON_NAMES
    }


def _kind(method: object) -> str | None:
    """What a method is; None for a name that has no row."""
    return METHODS[method].kind if isinstance(method, str) and method in METHODS else None


class Classification(ClassificationRecipe, Experiment):
    """The parameters of ``classification.ipynb``."""

    task = CLASSIFICATION
    recipe_type = ClassificationRecipe

    train_subset: Literal["fixed", "per-seed"] = Field("fixed", description="fixed or per-seed")
    theory: bool = Field(False, description="true or false")
    theory_images: int = Field(256, ge=2, le=65_536, description="an integer from 2 to 65536")
    accept_unverified_files: bool = Field(False, description="true or false")

    @model_validator(mode="after")
    def _check_precision(self) -> Self:
        if self.method == "gradient-penalty" and self.precision != "float32":
            raise ValueError(f"precision: {self.precision} is not allowed: {self.method} is computed in float32")
        return self

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if (self.method == "dropout") != (self.dropout > 0):
            raise ValueError(
                f"dropout: {self.dropout:g} is not allowed for method {self.method}: above 0 for dropout, else 0"
            )
        if self.full_precision_epochs >= self.epochs and self.method != "fp32":
            raise ValueError(
                f"full_precision_epochs: {self.full_precision_epochs} is not allowed: fewer than epochs ({self.epochs})"
            )
        if self.theory and self.through_quantizer and self.weight_bits is None:
            raise ValueError(f"theory: true is not allowed for {self.setting}: it is of quantized weights")
        return self

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        images = self.train_images or DATASETS[self.dataset].train_images
        if images and self.batch_size > images:
            raise ValueError(f"batch_size: {self.batch_size} is not allowed: there are {images} training images")
        return self


class Detection(DetectionRecipe, Experiment):
    """The parameters of ``detection.ipynb``."""

    task = DETECTION
    recipe_type = DetectionRecipe

    train_split: list[Inside] | None = Field(None, min_length=1, max_length=100, description=SPLIT)
    test_split: list[Inside] | None = Field(None, min_length=1, max_length=100, description=SPLIT)

    @model_validator(mode="after")
    def _check_data(self) -> Self:
        row = DATASETS[self.dataset]
        if self.severities == "rotating":
            raise ValueError("severities: rotating is not allowed: mAP50 is of whole sets of images")
        for name in self.classes or []:
            if name not in row.classes:
                raise ValueError(f"classes: {short(name)} is not allowed for {self.dataset}: {', '.join(row.classes)}")
        for name in ("train_split", "test_split"):
            value = getattr(self, name)
            if value is not None and not row.named_splits:
                raise ValueError(f"{name}: {short(value)} is not allowed: {self.dataset} has its own splits")
        return self


EXPERIMENTS: Mapping[str, type[Experiment]] = {kind.task.name: kind for kind in (Classification, Detection)}
