"""Loss of the merged model with one unit of linears rounded, for each width.

`quantize.budget` is spent by it. A unit is what engines hold as one matrix (q, k and v; gate and up; the experts of a
layer). Two things are measured on a few calibration windows, block by block, of a merge that is not written:

1. Each unit is rounded to each width, and its block runs on the merged model's own inputs. The error of the block's
   output is relative to each token's output and squared, so that tokens of huge norm do not hide the others.
2. At one width the changed output runs on through all later blocks and the head, where KL(merged || changed) is taken.
   So depth counts as the model itself counts it.

The loss of a unit at another width is that KL times the ratio of the errors, since a small KL grows with the square of
what causes it. Weights are rounded to nearest with searched scales, every input alike: GPTQ's error is smaller, in
about the same proportion everywhere. Units are changed one at a time, and their losses are taken to add up. All is in
fp32: noise of 16 bit would be as large as the KL of one unit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from requant.errors import StageError
from requant.modeling.block_walk import BlockInput, Walk
from requant.numerics.grid import Grid, nearest_rows
from requant.numerics.token_errors import relative_error
from requant_eval.scoring.kl import kl_divergence

TOKENS = {"cpu": 2**9, "cuda": 2**11}  # of all windows
LENGTH = 128  # of a window, at most


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Linears of one block that share a width. grids: module -> its grid, whatever its bits. weights: of all."""

    pattern: str
    grids: Mapping[str, Grid]
    weights: int


@dataclass
class _Seen:
    """What is known of one unit. errors: by width. hidden: states of the model with the unit changed, on the host."""

    errors: dict[int, float] = field(default_factory=dict)
    hidden: Tensor | None = None
    kl: float = 0.0

    def losses(self, width: int) -> dict[int, float]:
        """Nats a token by width; `width`: of the KL. Errors themselves where that width changes nothing."""
        scale = self.kl / self.errors[width] if self.errors[width] else 1.0
        return {bits: scale * error for bits, error in self.errors.items()}


def sample(calibration: Tensor, device: str) -> Tensor:
    """Evenly spaced calibration windows int64 [n, length], cut, for a type of device."""
    length = min(LENGTH, calibration.shape[1])
    count = min(len(calibration), max(1, TOKENS[device] // length))
    return calibration[torch.arange(count) * len(calibration) // count, :length]


def seconds_a_weight(device: torch.device) -> float:
    """Seconds to round one weight to nearest with searched scales, timed on a small matrix."""
    weight = torch.randn(256, 1024, device=device)
    for _ in range(2):  # the first loads kernels
        began = time.perf_counter()
        nearest_rows(weight, Grid(4, 64)).sum().item()
    return (time.perf_counter() - began) / weight.numel()


@torch.no_grad()
def measure(
    walk: Walk,
    units: Sequence[Unit],
    windows: Tensor,
    widths: Sequence[int],
    width: int,
    doing: Callable[[str], None] = lambda _: None,
) -> list[dict[int, float]]:
    """The loss of each unit by width, in nats a token.

    walk: over the merged model, in fp32. windows: int64 [n, length]. width: at which KL is taken, one of `widths`.
    Raises StageError for NaN or infinity.
    """
    seen = [_Seen() for _ in units]
    walk.fill_rest()
    item = walk.embed(windows, len(windows))[0]
    for index in range(len(walk)):
        doing(f"losses of {', '.join(map(str, widths))} bits, block {index + 1} of {len(walk)}")
        _block(walk, index, item, units, seen, widths, width)
    _end(walk, windows, item.hidden, seen)
    found = [one.losses(width) for one in seen]
    if not all(torch.tensor(list(own.values())).isfinite().all() for own in found):
        raise StageError("quantize.budget: NaN or infinity in the merged model's outputs: no width can be chosen")
    return found


def _block(
    walk: Walk,
    index: int,
    item: BlockInput,
    units: Sequence[Unit],
    seen: Sequence[_Seen],
    widths: Sequence[int],
    width: int,
) -> None:
    """One block: earlier units' changes run on, its own units are changed, and last the merged states go on."""
    block, start = walk.load(index), f"{walk.prefix}.{index}."
    for earlier in seen:
        if earlier.hidden is not None:
            states = earlier.hidden.to(walk.device)
            earlier.hidden = walk.forward(block, states, item.arguments[index]).cpu()
    changed: dict[tuple[int, int], Tensor] = {}
    for number, unit in enumerate(units):
        for bits in widths if all(name.startswith(start) for name in unit.grids) else ():
            with _rounded(walk.model, unit, bits):
                changed[number, bits] = walk.run(index, item).cpu()
    item.hidden = walk.run(index, item)
    for (number, bits), output in changed.items():
        seen[number].errors[bits] = float(relative_error(output.to(walk.device).double(), item.hidden.double()).mean())
        if bits == width:
            seen[number].hidden = output
    walk.release(block)


@contextmanager
def _rounded(model: nn.Module, unit: Unit, bits: int) -> Iterator[None]:
    """Context in which a unit's weights are rounded to nearest with `bits`."""
    old: dict[str, Any] = {name: model.get_submodule(name)._parameters["weight"] for name in unit.grids}
    try:
        for name, grid in unit.grids.items():
            value = nearest_rows(old[name], replace(grid, bits=bits))
            model.get_submodule(name)._parameters["weight"] = nn.Parameter(value, requires_grad=False)
        yield
    finally:
        for name, parameter in old.items():
            model.get_submodule(name)._parameters["weight"] = parameter


def _end(walk: Walk, windows: Tensor, merged: Tensor, seen: Sequence[_Seen]) -> None:
    """KL(merged || changed) of each unit, in nats a token, window by window."""
    tokens = windows.numel()
    for row, ids in enumerate(windows):
        expected = _log_probabilities(walk, ids, merged[row])
        for one in seen:
            if one.hidden is not None:
                found = _log_probabilities(walk, ids, one.hidden[row])
                one.kl += float(kl_divergence(expected, found).sum()) / tokens


def _log_probabilities(walk: Walk, ids: Tensor, states: Tensor) -> Tensor:
    """ln p [length, vocabulary] fp32 of a window from the last block's states [length, width]."""
    model: Any = walk.model
    hidden = states.to(walk.device)[None]
    with walk.instead(lambda *_, **__: hidden):
        logits: Tensor = model(input_ids=ids[None].to(walk.device), use_cache=False).logits
    return logits[0].float().log_softmax(dim=-1)
