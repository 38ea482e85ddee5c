"""Recipe section heal: how the quantized checkpoint is distilled towards the merged model."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from requant.recipe import section_examples
from requant.recipe.fields import AsTuple, Section, fail, unique
from requant.recipe.text_sections import Data, Format, MixEntry

MOST_TOKENS = 2**26  # that healing trains on: 14 times the default; they are packed in memory


def too_long(steps: int, batch: int, length: int) -> str | None:
    """What is wrong with a healing of so many steps on `batch` windows of `length` tokens; None: nothing."""
    tokens = steps * batch * length
    if tokens <= MOST_TOKENS:
        return None
    return (
        f"{steps:,} steps of {batch:,} windows of {length:,} tokens are {tokens:,} tokens, expected at most "
        f"{MOST_TOKENS:,}: lower steps, batch or length"
    )


class Heal(Section):
    """How to heal. Without data and mix the text is the calibration's."""

    model_config = section_examples.HEAL

    steps: Annotated[int, Field(gt=0, le=100_000)] = Field(default=600, description="Steps of the optimizer.")
    batch: Annotated[int, Field(gt=0, le=4096)] = Field(default=16, description="Windows for each step.")
    length: Annotated[int, Field(ge=8, le=131072)] = Field(default=512, description="Tokens a window.")
    lr: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = Field(
        default=0.005, description="Learning rate: how far a scale may move in a step, relative to its size."
    )
    code_lr: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = Field(
        default=0.001, description="Learning rate of codes: how far the value that is rounded may move in a step."
    )
    tune: Annotated[tuple[Literal["scales", "codes", "norms"], ...], AsTuple, Field(min_length=1)] = Field(
        default=("scales", "codes"),
        description="What moves. Codes take 16 bytes of memory a weight: of the model end to end, else of one block.",
    )
    target: Literal["merged", "adapter"] = Field(
        default="merged", description="Whose predictions are imitated: the merged model's, or those of base + adapter."
    )
    mode: Literal["auto", "whole", "blocks", "blocks+whole"] = Field(
        default="auto",
        description="whole: end to end. blocks: block by block. blocks+whole: block by block, then all but the codes "
        "end to end. auto: the first of whole, blocks+whole and blocks that fits in memory with codes.",
    )
    data: Data | None = Field(default=None, description="Other text than the calibration's; or use mix.")
    format: Format = Field(default="auto", description="What a row of data is, as in calibration.mix.")
    mix: Annotated[tuple[MixEntry, ...], AsTuple, Field(min_length=1)] | None = Field(
        default=None, description="Several other sources than the calibration's."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(default=0, description="Seed of the order of the text.")

    @property
    def entries(self) -> tuple[MixEntry, ...]:
        """The ingredients that are its own; none: the calibration's."""
        if self.data is not None:
            return (MixEntry(data=self.data, format=self.format),)
        return self.mix or ()

    @field_validator("tune")
    @classmethod
    def _each_once(cls, tune: tuple[str, ...]) -> tuple[str, ...]:
        unique(tune)
        return tune

    @model_validator(mode="after")
    def _possible(self) -> Self:
        problem = too_long(self.steps, self.batch, self.length)
        if problem:
            fail((("steps",), problem))
        if self.data is not None and self.mix is not None:
            fail((("mix",), "expected data or mix, got both"))
        if self.data is None and self.format != "auto":
            fail((("format",), "belongs to data: write it in the entries of mix, or remove it"))
        if self.mode == "blocks+whole" and self.tune == ("codes",):
            fail((("mode",), "the second pass trains all but the codes: use blocks, or add scales to tune"))
        if "code_lr" in self.model_fields_set and "codes" not in self.tune:
            fail((("code_lr",), "belongs to codes: add them to tune, or remove it"))
        if self.mode.startswith("blocks") and self.target == "adapter":
            fail((("target",), "adapter needs mode whole: block by block a student follows the merged model's blocks"))
        return self
