"""The recipe of a training run: every hyperparameter, once, with what is allowed.

A recipe is frozen. Both ``fit`` functions take one, params files and notebooks are checked against its fields, and a
checkpoint's fingerprint holds all of it: a field that is added here is seen everywhere.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Recipe(BaseModel):
    """What classification and detection have in common."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    epochs: int = Field(ge=1, le=10_000, description="an integer from 1 to 10000")
    batch_size: int = Field(ge=2, le=65_536, description="an integer from 2 to 65536")
    learning_rate: float = Field(gt=0, le=100, description="a number above 0, at most 100")
    momentum: float = Field(ge=0, lt=1, description="a number from 0, below 1")
    weight_decay: float = Field(ge=0, le=1, description="a number from 0 to 1")
    alpha_decay: float = Field(ge=0, le=1, description="a number from 0 to 1 (L2 penalty of PACT's alphas)")
    augment: bool = Field(description="true or false")

    def settings(self) -> dict[str, str]:
        """Every field as text: the recipe's part of a fingerprint."""
        return {name: str(value) for name, value in self.model_dump().items()}


class ClassificationRecipe(Recipe):
    schedule: Literal["one-cycle", "cosine"]
    compile: bool | Literal["auto"] = Field("auto", description="auto, true or false")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="float32 or bfloat16")
    dropout: float = Field(0.0, ge=0, lt=1, description="a number from 0, below 1 (of the last layer's inputs)")
    full_precision_epochs: int = Field(0, ge=0, le=10_000, description="an integer from 0 (the first so many epochs)")


class DetectionRecipe(Recipe):
    schedule: Literal["linear", "cosine"]
    image_size: int = Field(ge=32, le=4096, multiple_of=32, description="a multiple of 32 from 32 to 4096")
    warmup_epochs: float = Field(ge=0, le=10_000, description="a number from 0 to 10000")
    classes: list[str] | None = Field(None, min_length=1, description="a list of class names, or null (all)")


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of an epoch's random numbers: they depend on these two alone, so that a resumed run draws the same."""
    return seed * 1_000_003 + epoch
