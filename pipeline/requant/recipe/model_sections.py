"""Recipe sections about models: base, adapter, merge.

A check of two keys is a validator of the later one, so that it runs whatever else is wrong in the section.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

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
    Section,
    Source,
    Text,
    Whole,
    check_source,
    fail,
    or_path,
    size_in_bytes,
)


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

    onto: Literal["auto", "dequantized", "original"] = Field(
        default="dequantized",
        description="dequantized: the 4-bit values that training saw. original: the 16-bit base behind them. auto: "
        "where both are known, the one whose merge has the lower loss on a part of the evaluation sets; "
        "dequantized where that cannot be told.",
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
