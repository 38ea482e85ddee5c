"""GPU memory of calibration: what waiting batches need, where hidden states are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from requant.modeling.block_walk import Walk, block_linears
from requant.modeling.hidden_state_store import Shelf
from requant.modeling.moe import split_experts
from requant.runtime.device import free_bytes, hold

ROOM = 0.9  # of a GPU's free memory that waiting batches may take by our guess
ROOM_SHARED = 0.6  # the same where several ranks work together: none can do with less while the others wait for it
EXACT_TOKENS = 8  # for each input of the widest linear also run unquantized, to know what earlier layers lost
EXACT_LEAST = {"cpu": 0, "cuda": 2**17}  # tokens for that in any case: more is better, and cheap on a GPU
SQUARES = 5  # Hessian, drift, its damped copy, the factor and what factoring takes


def exact_apart(walk: Walk, windows: Tensor) -> int:
    """One batch in so many is enough to tell how far inputs have drifted."""
    widest: int = max(m.in_features for m in block_linears(walk.blocks[0]).values())
    return max(1, round(windows.numel() / max(EXACT_TOKENS * widest, EXACT_LEAST[walk.device.type])))


def shelf_for(walk: Walk, tokens: int, twice: float, every: Callable[[bool], bool], room: float = ROOM) -> Shelf:
    """Where a walk's hidden states wait: on its device if all batches may wait inside a block, on `every` rank, else on the host.

    In the first case torch gets as much of a GPU's memory in one piece: by and by it takes longer, and lies worse.
    """
    waits = every(may_wait(walk, tokens, twice, room))
    if waits and walk.device.type == "cuda":
        hold(walk.device, waiting_bytes(walk, tokens, twice))
    return Shelf(walk.device, on_host=not waits)


def may_wait(walk: Walk, tokens: int, twice: float = 0.0, room: float = ROOM) -> bool:
    """Whether all batches may wait inside a block: always on the CPU, on a GPU if there is `room`.

    twice: the share of tokens that also runs unquantized. Where `waiting_bytes` are too few, one rank alone begins again
    (`leaner`).
    """
    if walk.device.type != "cuda":
        return True
    torch.cuda.empty_cache()  # what an earlier stage or a compiled kernel's first call has left counts as free
    return waiting_bytes(walk, tokens, twice) < free_bytes(walk.device) * room


def waiting_bytes(walk: Walk, tokens: int, twice: float) -> int:
    """What is there while all batches wait inside a block: a third of the upper guess, since a linear's input and output are
    not all alive at once (bench/speed.py), and what solving needs.
    """
    block, size = walk.blocks[0], walk.dtype.itemsize
    guess = held_bytes(block, tuple(block_linears(block)), tokens, size)
    return int(guess * (1 + twice) / 3) + solving_bytes(block, size)


def solving_bytes(block: nn.Module, itemsize: int) -> int:
    """Roughly what is there while a block's widest linear is solved: its own weights, those it had before, the next block's,
    and square matrices in fp32.
    """
    widest: int = max((m.in_features for m in block_linears(block).values()), default=0)
    return 3 * itemsize * sum(p.numel() for p in block.parameters()) + SQUARES * 4 * widest**2


def held_bytes(block: nn.Module, linears: Sequence[str], tokens: int, itemsize: int) -> int:
    """An upper guess of what all batches of a block hold while they wait: every linear's input and output."""
    experts = dict(split_experts(block))
    inside = tuple(f"{name}." for name in experts)
    modules: list[Any] = [block.get_submodule(name) for name in linears if not name.startswith(inside)]
    downs: list[Any] = [m.get_submodule("0.down_proj") for m in experts.values()]  # an expert holds few rows at a time
    held = [*(sum(m.weight.shape) for m in modules), *(4 * m.out_features for m in downs)]
    return tokens * itemsize * int(sum(held))
