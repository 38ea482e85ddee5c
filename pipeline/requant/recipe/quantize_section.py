"""Recipe section quantize: the GPTQ settings, and what differs in single modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self, TypedDict

from pydantic import (
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from requant.recipe import section_examples
from requant.recipe.fields import Bits, EndBits, GroupSize, Section, fail
from requant.recipe.yaml_document import KeyPath

_LAST_WORD = re.compile(r"([A-Za-z0-9_]*)\Z")
# As in `modeling.families`, which is not imported here: it would load torch. A test compares them. Without those that
# are one matrix only inside of some module: what a pattern matches is not known here.
_FUSED = {
    ("q_proj", "k_proj", "v_proj"): "[qkv]_proj",
    ("gate_proj", "up_proj"): "[gu]*_proj",
    ("q_a_proj", "kv_a_proj_with_mqa"): "*_a_proj*",
    ("in_proj_qkv", "in_proj_z"): "in_proj_[qz]*",
    ("in_proj_b", "in_proj_a"): "in_proj_[ba]",
    ("w1", "w3"): "w[13]",
}


def _fused_parts(overrides: Mapping[str, Override]) -> list[tuple[KeyPath, str]]:
    """Patterns that set parts of a fused projection (q/k/v, gate/up) differently.

    Each is a pair: the pattern's key path, and a message for the reader.
    """
    problems: list[tuple[KeyPath, str]] = []
    for pattern, setting in overrides.items():
        stem, part = _LAST_WORD.split(pattern)[:2]
        for parts, cover in _FUSED.items():
            if part in parts and any(overrides.get(stem + other) != setting for other in parts):
                example = f"{stem.rstrip('.')}.{cover}".lstrip(".")
                message = f"engines fuse {', '.join(parts)}, so they share one setting: use a pattern covering all"
                problems.append(((pattern,), f"{message}, such as {example!r}"))
    return problems


class Override(Section):
    """Settings of the modules that match one pattern; what is not set is as in `quantize`."""

    model_config = section_examples.OVERRIDE

    bits: Bits | None = Field(default=None, description="Bits a weight; default: quantize.bits.")
    group_size: GroupSize | None = Field(
        default=None, description="Inputs that share a scale, -1: the whole row; default: quantize.group_size."
    )
    symmetric: bool | None = Field(
        default=None, description="Zero point fixed at the middle; default: quantize.symmetric."
    )
    skip: bool = Field(default=False, description="Leave these modules in 16 bit.")

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        settings = [key for key in ("bits", "group_size", "symmetric") if getattr(self, key) is not None]
        if self.skip and settings:
            fail((("skip",), f"a skipped module has no {settings[0]}: keep one of the two"))
        if not self.skip and not settings:
            fail(((), "sets nothing: give it bits, group_size, symmetric or skip: true"))
        return self


class OverrideFields(TypedDict, total=False):
    """The fields of an `Override` that are set."""

    bits: int
    group_size: int
    symmetric: bool
    skip: bool


class Quantize(Section):
    """The GPTQ settings."""

    model_config = section_examples.QUANTIZE

    bits: Bits = Field(default=4, description="Bits a weight. vLLM and SGLang load 4 and 8 as GPTQ.")
    budget: Annotated[float, Field(ge=2, le=8)] | None = Field(
        default=None,
        description="In place of bits: mean bits of codes a weight of the quantized linears, such as 3.5; scales and "
        "zero points come on top. Each unit that engines fuse gets the width that measured losses give it.",
    )
    group_size: GroupSize = Field(default=128, description="Inputs that share a scale; -1: the whole row.")
    symmetric: bool = Field(
        default=True, description="Zero point fixed at the middle. false: vLLM and SGLang refuse it as GPTQ."
    )
    signed_scales: bool = Field(
        default=False,
        description="Let scales be negative: a little better, but not proven in the servers' GPU kernels.",
    )
    engine: Literal["requant", "gptqmodel"] = Field(
        default="requant", description="Whose solver quantizes: requant's, or the library gptqmodel."
    )
    scale_search: Literal["hessian", "minmax"] = Field(
        default="hessian",
        description="hessian: scales of least error on the calibration text. minmax: from the range of weights.",
    )
    order: Literal["auto", "natural", "activation", "group"] = Field(
        default="auto",
        description="Order in which columns are solved; the file does not show it. auto: by activation; with sweeps: 0 "
        "the better of two for each module.",
    )
    sweeps: Annotated[int, Field(ge=0, le=100)] = Field(
        default=2, description="Passes of coordinate descent over the codes after the column loop; 0: plain GPTQ."
    )
    correct: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.5, description="Share of the error of earlier layers that each layer's weights make up for; 0: none."
    )
    damp: Literal["auto"] | Annotated[float, Field(gt=0, lt=1)] = Field(
        default="auto",
        description="Share of its mean diagonal added to a Hessian; raise it if a factorization fails. auto: 0.05, "
        "or 0.02 from 64 tokens an input.",
    )
    dtype: Literal["auto", "float16", "bfloat16"] = Field(
        default="auto",
        description="dtype that the server will run in: that of config.json and of tensors left in 16 bit. auto: the "
        "base's own 16-bit type.",
    )
    experts: Literal["auto", "quantize", "skip"] = Field(
        default="auto",
        description="A mixture's experts. skip: leave them in 16 bit. auto: so where no server reads them quantized "
        "(gpt-oss).",
    )
    embeddings: EndBits | None = Field(
        default=None,
        description="Bits of the token embeddings, rounded to nearest in groups of group_size. Left out: 16 bit. For "
        "compressed-tensors, mlx and gguf; gptq keeps 16 bit.",
    )
    head: EndBits | None = Field(
        default=None, description="The same of the head; one matrix with the embeddings has their bits."
    )
    overrides: dict[str, Override] = Field(
        default={}, description="Pattern of full module names (fnmatch) -> what differs there. The last match wins."
    )

    @field_validator("signed_scales")
    @classmethod
    def _signed_is_symmetric(cls, signed: bool, info: ValidationInfo) -> bool:
        if signed and info.data.get("symmetric") is False:
            fail(((), "true needs symmetric: true: with a zero point the sign of a scale means nothing"))
        return signed

    @field_validator("overrides")
    @classmethod
    def _servable(cls, overrides: dict[str, Override], info: ValidationInfo) -> dict[str, Override]:
        problems = _fused_parts(overrides)
        if info.data.get("budget") is not None:
            clash = "quantize.budget chooses the bits: leave them out here, or the budget"
            problems += [((key, "bits"), clash) for key, item in overrides.items() if item.bits is not None]
        if info.data.get("signed_scales"):
            clash = "false contradicts quantize.signed_scales: true"
            problems += [((key, "symmetric"), clash) for key, item in overrides.items() if item.symmetric is False]
        if problems:
            fail(*problems)
        return overrides

    @model_validator(mode="after")
    def _bits_or_budget(self) -> Self:
        if self.budget is not None and "bits" in self.model_fields_set:
            why = f"chooses the bits of every linear, and quantize.bits is {self.bits}: leave one of the two out"
            fail((("budget",), why))
        return self
