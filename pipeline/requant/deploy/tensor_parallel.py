"""How servers cut a quantized matrix into one part for each GPU (tensor parallel), and where it cannot be cut.

vLLM 0.32 (model_executor/layers/linear.py, its models, parameter.py) and SGLang alike: attention by heads, keys and values
repeated where there are fewer of them than GPUs; the matrix that leads back into the residual stream by its inputs, the
others by their outputs. A group of weights shares a scale and stays on one GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from requant.numerics.grid import Grid

DEGREES = (2, 4, 8)
# Names of the matrices that are cut by their inputs, of fused and of single ones that go by heads, of those on every GPU.
INPUTS = frozenset({"o_proj", "down_proj", "out_proj", "fc2", "c_proj", "dense", "dense_4h_to_h", "output_linear"})
FUSED_HEADS = frozenset({"qkv_proj", "query_key_value", "c_attn", "Wqkv"})
KEYS = frozenset({"k_proj", "v_proj"})
WHOLE = frozenset({"gate", "shared_expert_gate", "q_a_proj", "kv_a_proj_with_mqa"})


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention heads of a model, of queries and of keys."""

    queries: int
    keys: int

    @classmethod
    def of(cls, config: Any) -> Heads | None:
        """None where the config does not say."""
        text = config.get_text_config()
        queries = getattr(text, "num_attention_heads", None)
        multi_query = getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False)
        keys = 1 if multi_query else getattr(text, "num_key_value_heads", None) or queries
        return cls(queries, keys) if queries and keys else None

    def problem(self, degree: int) -> str | None:
        """Why they cannot be shared out to so many GPUs."""
        if self.queries % degree:
            return f"{self.queries} attention heads"
        if self.keys % degree and degree % self.keys:
            return f"{self.keys} key heads"
        return None


def part(name: str, rows: int, columns: int, degree: int, heads: Heads | None) -> tuple[int, int] | None:
    """(rows, columns) that one of `degree` GPUs holds of the matrix `name` [rows, columns]; None if it does not come out even."""
    leaf = name.rpartition(".")[2]
    if leaf in WHOLE or degree == 1:
        return rows, columns
    if leaf in INPUTS:
        return None if columns % degree else (rows, columns // degree)
    if heads and leaf in FUSED_HEADS:
        every = heads.queries + 2 * heads.keys
        own = heads.queries // degree + 2 * max(1, heads.keys // degree)
        return None if rows % every else (rows // every * own, columns)
    if heads and leaf in KEYS and heads.keys < degree:
        return rows // heads.keys, columns
    return None if rows % degree else (rows // degree, columns)


def problem(name: str, rows: int, columns: int, grid: Grid, degree: int, heads: Heads | None) -> str | None:
    """Why a quantized matrix [rows, columns] cannot be cut for `degree` GPUs, None when it can."""
    own = part(name, rows, columns, degree, heads)
    if own is None:
        by_inputs = name.rpartition(".")[2] in INPUTS
        return f"{name}: its {columns if by_inputs else rows} {'inputs' if by_inputs else 'outputs'}"
    if own[1] != columns and grid.group_size != -1 and own[1] % _kept_whole(name, grid.group_size):
        return f"{name}: {own[1]} inputs each would cut a group of {grid.group_size}"
    if own[0] % (32 // grid.bits if 32 % grid.bits == 0 else 32):
        return f"{name}: {own[0]} outputs each would cut a packed zero point"
    return None


def _kept_whole(name: str, group: int) -> int:
    """Inputs that must stay together: a group; of an expert half of it or less, down to 32 (vLLM's moe_wna16.py)."""
    return min(group, 32) if ".experts." in name else group
