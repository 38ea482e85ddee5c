"""GPU memory of calibration: bytes of paused batches, and whether they fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from requant.modeling.block_walk import Walk
from requant.modeling.blocks import block_linears, kinds
from requant.modeling.moe import split_experts
from requant.runtime.device import free_bytes, profile_of

MEMORY_SHARE = 0.9  # of a GPU's free memory that paused batches may take by our estimate
MEMORY_SHARE_OF_RANKS = 0.6  # with several ranks, none of which can restart a block while the others wait
UNQUANTIZED_TOKENS = 8  # run unquantized too, for each input of the widest linear, to measure what earlier layers lost
SQUARES = 5  # Hessian, drift, its damped copy, the factor and what factoring takes


def unquantized_every(walk: Walk, windows: Tensor) -> int:
    """One batch in this many also runs unquantized, to measure the drift of inputs."""
    widest: int = max(m.in_features for block in kinds(walk.blocks) for m in block_linears(block).values())
    return max(
        1, round(windows.numel() / max(UNQUANTIZED_TOKENS * widest, profile_of(walk.device).least_unquantized_tokens))
    )


def fits_inside_block(walk: Walk, tokens: int, unquantized: float = 0.0, memory_share: float = MEMORY_SHARE) -> bool:
    """Whether all batches can pause inside a block; always on the CPU.

    memory_share: of a GPU's free memory that they may take. unquantized: the share of tokens that also runs
    unquantized. The estimate may be too low: a single rank then restarts the block with a plan that takes less
    (`out_of_memory`).
    """
    if walk.device.type != "cuda":
        return True
    torch.cuda.empty_cache()  # what an earlier stage or a compiled kernel's first call has left counts as free
    return waiting_bytes(walk, tokens, unquantized) < free_bytes(walk.device) * memory_share


def waiting_bytes(walk: Walk, tokens: int, unquantized: float) -> int:
    """Memory while all batches pause inside the block that takes most, and while its widest linear is solved.

    A third of `activation_bytes`: a linear's input and output are not all alive at once (bench/speed.py).
    """
    size = walk.dtype.itemsize

    def of(block: nn.Module) -> int:
        activations = activation_bytes(block, tuple(block_linears(block)), tokens, size)
        return int(activations * (1 + unquantized) / 3) + solving_bytes(block, size)

    return max(of(block) for block in kinds(walk.blocks))


def solving_bytes(block: nn.Module, itemsize: int) -> int:
    """Rough memory while a block's widest linear is solved: three blocks and square matrices.

    The three are the block's own weights, those it had before, and the next block's.
    """
    widest: int = max((m.in_features for m in block_linears(block).values()), default=0)
    return 3 * itemsize * sum(p.numel() for p in block.parameters()) + SQUARES * 4 * widest**2


def activation_bytes(block: nn.Module, linears: Sequence[str], tokens: int, itemsize: int) -> int:
    """Upper bound of the activations that paused batches hold: every linear's input and output."""
    experts = dict(split_experts(block))
    inside = tuple(f"{name}." for name in experts)
    modules: list[Any] = [block.get_submodule(name) for name in linears if not name.startswith(inside)]
    downs: list[Any] = [m.get_submodule("0.down_proj") for m in experts.values()]  # an expert holds few rows at a time
    widths = [*(sum(m.weight.shape) for m in modules), *(4 * m.out_features for m in downs)]
    return tokens * itemsize * int(sum(widths))
