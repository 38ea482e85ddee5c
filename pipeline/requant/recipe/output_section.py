"""Recipe section output: where results go, in which formats, and who is told."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from requant.recipe import section_examples
from requant.recipe.fields import AsTuple, Section, Text, fail, unique


class Output(Section):
    """Where results go and which checkpoints stay."""

    model_config = section_examples.OUTPUT

    dir: Text = Field(default="runs", description="Directory of run directories; relative to where requant is started.")
    keep: Annotated[tuple[Literal["merged", "gptq", "gptqmodel"], ...], AsTuple] = Field(
        default=("merged", "gptq"),
        description="Checkpoints that stay after the run; [gptq] saves the space of the 16-bit model. "
        "gptqmodel: of the road of this name.",
    )

    formats: Annotated[tuple[Literal["gptq", "compressed-tensors", "auto-round", "mlx", "gguf"], ...], AsTuple] = Field(
        default=("gptq",),
        description="Formats of the checkpoint that is deployed; those beside gptq hold the same codes.",
    )

    track: Annotated[tuple[Literal["wandb", "mlflow", "trackio", "tensorboard"], ...], AsTuple] = Field(
        default=(), description="Experiment trackers that get the report's numbers, curves and page when a run is done."
    )

    @field_validator("track")
    @classmethod
    def _once(cls, track: tuple[str, ...]) -> tuple[str, ...]:
        unique(track)
        return track

    @field_validator("keep")
    @classmethod
    def _product(cls, keep: tuple[str, ...]) -> tuple[str, ...]:
        unique(keep)
        if "gptq" not in keep:
            fail(((), "gptq is missing: it is what the run is for"))
        return keep

    @field_validator("formats")
    @classmethod
    def _first_format(cls, formats: tuple[str, ...]) -> tuple[str, ...]:
        unique(formats)
        if "gptq" not in formats:
            fail(((), "gptq is missing: it is what the run scores, and what the others are made of"))
        return formats
