"""Tensor parallelism: how servers split a quantized matrix over GPUs, and when they cannot.

Source: vLLM 0.32 (model_executor/layers/linear.py, its models, parameter.py); SGLang does the same. Attention is split
by heads; keys and values are repeated where there are fewer of them than GPUs. Matrices that write into the residual
stream are split by inputs, all others by outputs. A group of weights shares a scale and must stay on one GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from requant.modeling.families import BY_INPUTS, FUSED_HEADS, KEY_HEADS, UNCUT
from requant.modeling.layer_configs import layer_config, layer_configs
from requant.numerics.grid import Grid

DEGREES = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention heads of a model, of queries and of keys."""

    queries: int
    keys: int

    @classmethod
    def of(cls, config: Any, module: str = "") -> Heads | None:
        """From a model's config, of the layer that a module belongs to; None where it names no heads."""
        return cls._of(layer_config(config, module))

    @classmethod
    def all_of(cls, config: Any) -> set[Heads]:
        """Those of every layer."""
        return {heads for text in layer_configs(config) if (heads := cls._of(text))}

    @classmethod
    def _of(cls, text: Any) -> Heads | None:
        queries = getattr(text, "num_attention_heads", None)
        multi_query = getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False)
        keys = 1 if multi_query else getattr(text, "num_key_value_heads", None) or queries
        return cls(queries, keys) if queries and keys else None

    def why_not(self, degree: int) -> str | None:
        """Why `degree` GPUs cannot split the heads; None when they can."""
        if self.queries % degree:
            return f"{self.queries} attention heads"
        if self.keys % degree and degree % self.keys:
            return f"{self.keys} key heads"
        return None


def shard_shape(name: str, rows: int, columns: int, degree: int, heads: Heads | None) -> tuple[int, int] | None:
    """(rows, columns) of one GPU's shard of the matrix `name` [rows, columns].

    None if it cannot be split evenly.
    """
    leaf = name.rpartition(".")[2]
    if leaf in UNCUT or degree == 1:
        return rows, columns
    if leaf in BY_INPUTS:
        return None if columns % degree else (rows, columns // degree)
    if heads and leaf in FUSED_HEADS:
        all_heads = heads.queries + 2 * heads.keys
        shard_heads = heads.queries // degree + 2 * max(1, heads.keys // degree)
        return None if rows % all_heads else (rows // all_heads * shard_heads, columns)
    if heads and leaf in KEY_HEADS and heads.keys < degree:
        return rows // heads.keys, columns
    return None if rows % degree else (rows // degree, columns)


def why_not(name: str, rows: int, columns: int, grid: Grid, degree: int, heads: Heads | None) -> str | None:
    """Why `degree` GPUs cannot split a quantized matrix [rows, columns]; None when they can."""
    shard = shard_shape(name, rows, columns, degree, heads)
    if shard is None:
        by_inputs = name.rpartition(".")[2] in BY_INPUTS
        return f"{name}: its {columns if by_inputs else rows} {'inputs' if by_inputs else 'outputs'}"
    if shard[1] != columns and grid.group_size != -1 and shard[1] % _unit_of_inputs(name, grid.group_size):
        return f"{name}: {shard[1]} inputs each would cut a group of {grid.group_size}"
    if shard[0] % (32 // grid.bits if 32 % grid.bits == 0 else 32):
        return f"{name}: {shard[0]} outputs each would cut a packed zero point"
    return None


def _unit_of_inputs(name: str, group: int) -> int:
    """Number of consecutive inputs that must stay on one GPU.

    One group; of an expert at most 32, since vLLM's moe_wna16.py halves its groups.
    """
    return min(group, 32) if ".experts." in name else group
