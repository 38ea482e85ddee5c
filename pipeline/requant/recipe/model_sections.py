"""Recipe sections about models: base, adapter, merge, quantize.

A check of two keys is a validator of the later one, so that it runs whatever else is wrong in the section.
"""

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
from requant.recipe.fields import (
    SIZE,
    AnySource,
    AsTuple,
    Bits,
    GroupSize,
    Section,
    Source,
    Text,
    Whole,
    check_source,
    fail,
    or_path,
    size_in_bytes,
)
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


class AdapterSource(Source):
    """The directory or hub id of a PEFT adapter. A plain string is the path."""

    model_config = section_examples.ADAPTER_SOURCE

    expert_order: Literal["auto", "peft", "unsloth"] = Field(
        default="auto",
        description="Order of a mixture's experts in lora_B of target_parameters. auto: as the adapter records it; "
        "measured where unsloth recorded none.",
    )


AnyAdapter = Annotated[AdapterSource, or_path(AdapterSource)]


class WeightedAdapter(AdapterSource):
    """One of several adapters whose deltas are added up."""

    model_config = section_examples.WEIGHTED_ADAPTER

    weight: Annotated[float, Field(ge=-1e4, le=1e4)] = Field(
        default=1.0, description="What this adapter's delta is multiplied by; may be negative."
    )

    @field_validator("weight")
    @classmethod
    def _not_zero(cls, weight: float) -> float:
        if weight == 0:
            fail(((), "0 leaves this adapter out: remove it from the list"))
        return weight


class Nf4(Section):
    """How a 16-bit base was quantized on the fly for training; adapter_config.json doesn't record it."""

    model_config = section_examples.NF4

    quant_type: Literal["nf4", "fp4"] = Field(
        description="bnb_4bit_quant_type. No default: transformers' own is fp4, and hardly anyone means that."
    )
    double_quant: bool = Field(description="bnb_4bit_use_double_quant of the training run.")
    blocksize: Annotated[Literal[32, 64, 128, 256, 512, 1024, 2048, 4096], Whole] = Field(
        default=64, description="Weights that share one absmax; bitsandbytes' own is 64."
    )
    load_dtype: Literal["float16", "bfloat16", "float32"] = Field(
        default="bfloat16",
        description="The dtype given to from_pretrained: weights were cast to it before they were quantized.",
    )
    compute_dtype: Literal["float16", "bfloat16", "float32"] | None = Field(
        default=None, description="bnb_4bit_compute_dtype of the training run, by default load_dtype."
    )
    skip: Annotated[tuple[Text, ...], AsTuple] = Field(
        default=(),
        description="llm_int8_skip_modules of the training run, as given (module names or suffixes): "
        "empty keeps lm_head in 16 bit, a list must name it.",
    )
    transformers: Annotated[Literal[4, 5], Whole] = Field(
        default=5,
        description="Major version of transformers in training. 4 quantized single experts and routers of MoE models; "
        "5 keeps experts fused and in 16 bit.",
    )


class Base(Section):
    """The model that the adapter was trained on."""

    model_config = section_examples.BASE

    model: Text = Field(description="Directory or hub id: a bitsandbytes 4-bit checkpoint, or a 16-bit model and nf4.")
    revision: str | None = Field(default=None, description="Hub branch, tag or commit of model.")
    nf4: Literal["auto", "none"] | Nf4 = Field(
        default="auto",
        description="auto: model is a 4-bit checkpoint and its files say all. A section: model is 16-bit and training "
        "quantized it so. none: training did not quantize it (plain LoRA), or model is stored in MXFP4 or FP8.",
    )
    original: AnySource | None = Field(
        default=None, description="The 16-bit model that a 4-bit checkpoint was made from."
    )

    @property
    def source(self) -> Source:
        """`model` and `revision` as one source."""
        return Source(path=self.model, revision=self.revision)

    @property
    def sixteen_bit(self) -> Source | None:
        """The 16-bit base: `original`, or `model` itself when `nf4` is a section or none."""
        return self.original or (self.source if self.nf4 != "auto" else None)

    @model_validator(mode="after")
    def _possible(self, info: ValidationInfo) -> Self:
        check_source("model", self.model, self.revision, info)
        if self.nf4 == "none" and self.original is not None:
            fail((("original",), "nf4: none says that model itself is the 16-bit base: remove one of the two"))
        return self


class Merge(Section):
    """How the adapter is folded into the base."""

    model_config = section_examples.MERGE

    onto: Literal["dequantized", "original"] = Field(
        default="dequantized",
        description="dequantized: the 4-bit values that training saw. original: the 16-bit base behind them.",
    )
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        default="auto",
        description="Stored dtype; auto: the base's own 16-bit type, or bfloat16 where float16 is too small.",
    )
    max_shard: Annotated[str, Field(pattern=SIZE)] = Field(
        default="5GB", description="Largest safetensors file that is written."
    )

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard` in bytes: GB is 10^9, GiB is 2^30."""
        return size_in_bytes(self.max_shard)


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
        if info.data.get("signed_scales"):
            clash = "false contradicts quantize.signed_scales: true"
            problems += [((key, "symmetric"), clash) for key, item in overrides.items() if item.symmetric is False]
        if problems:
            fail(*problems)
        return overrides
