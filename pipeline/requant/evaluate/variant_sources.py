"""Where the variants of a run are made from: directories and plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from requant.merge.base_weights import Nf4Settings
from requant.merge.plan import MergePlan
from requant.numerics.grid import Grid


@dataclass(frozen=True, kw_only=True)
class VariantSources:
    """The directories and plans that variants are made from.

    simulate: how a 16-bit base was quantized in training. grids: of every quantized module, for the variant rtn.
    ends: of token embeddings and head in the variant ends, which is the deployed checkpoint with these rounded.
    gptqmodel: the checkpoint of that library's own GPTQ, a road.
    """

    base: Path
    adapter: Path
    merged: Path
    gptq: Path
    healed: Path | None = None
    simulate: Nf4Settings | None = None
    grids: Mapping[str, Grid] = field(default_factory=dict)
    ends: Mapping[str, Grid] = field(default_factory=dict)
    deployed: Path | None = None
    original: MergePlan | None = None  # the merge onto the 16-bit base; None: no variant original
    plan: MergePlan | None = None  # its adapters make the variant adapter; None: the directory `adapter`
    live: bool = True  # whether transformers 5 can load the base as training did
    sixteen_bit: bool = False  # whether training held the base in 16 bit
    trust_remote_code: bool = False
    gptqmodel: Path | None = None

    def __post_init__(self) -> None:
        for name in ("base", "adapter", "merged", "gptq"):  # callers may give text
            object.__setattr__(self, name, Path(getattr(self, name)))

    @classmethod
    def of_checkpoint(cls, path: Path, *, gptq: Path | None = None, trust_remote_code: bool = False) -> VariantSources:
        """Every variant from the checkpoint `path`; `gptq`, if given, is the one from there."""
        return cls(base=path, adapter=path, merged=path, gptq=gptq or path, trust_remote_code=trust_remote_code)
