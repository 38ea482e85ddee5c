"""Loss of the merged model with one unit of linears quantized, for each width.

`quantize.budget` is spent by it. A unit is what engines hold as one matrix (q, k and v; gate and up; the experts of a
layer). Three things are measured, block by block, of a merge that is not written:

1. Each unit is solved by GPTQ for each width, from the inputs that most of the calibration text gives it. Rounding to
   nearest would not do: how much of its error GPTQ makes up for differs from unit to unit, most where a few inputs are
   huge.
2. Its block runs with it on a few other windows, with the merged model's own states. The error of the block's output is
   relative to each token's output and squared, so that tokens of huge norm do not hide the others.
3. At one width the changed output runs on through all later blocks and the head, where KL(merged || changed) is taken.
   So depth counts as the model itself counts it.

The loss of a unit at another width is that KL times the ratio of the errors, since a small KL grows with the square of
what causes it. Units are changed one at a time, and their losses are taken to add up. What is compared is in fp32:
noise of 16 bit would be as large as the KL of one unit.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from requant.errors import StageError
from requant.evaluate.unit_solver import BlockSolver, Solving
from requant.modeling.block_walk import BlockInput, Walk
from requant.numerics import gptq
from requant.numerics.grid import Grid
from requant.numerics.token_errors import relative_error
from requant_eval.scoring.kl import kl_divergence

TOKENS = {"cpu": 2**9, "cuda": 2**11}  # that losses are measured on
LENGTH = 128  # of a window of these, at most
MIN_WINDOWS = 4  # of calibration text: one is measured on, the others are learned from
LEARNED = {"cpu": 8, "cuda": 32}  # tokens for each input of the widest linear that GPTQ learns from
BATCH = {"cpu": 2**11, "cuda": 2**13}  # tokens of a batch of these
_BLOCK = re.compile(r".*?\.\d+(?=\.|$)")


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """Token ids int64 [n, length]. learned: what GPTQ learns from. measured: what losses are measured on."""

    learned: Tensor
    measured: Tensor


def texts(calibration: Tensor, device: str, inputs: int) -> Texts:
    """The calibration windows int64 [n, length] as two texts, for a type of device.

    Measured are evenly spaced windows, cut, at most one in MIN_WINDOWS, so that most are left to learn from; learned
    are others, evenly spaced too. inputs: of the widest linear. There are MIN_WINDOWS windows or more.
    """
    length = min(LENGTH, calibration.shape[1])
    count = min(len(calibration) // MIN_WINDOWS, max(1, TOKENS[device] // length))
    chosen = torch.arange(count) * len(calibration) // count
    others = torch.ones(len(calibration), dtype=torch.bool)
    others[chosen] = False
    rest = calibration[others]
    wanted = min(len(rest), -(-LEARNED[device] * inputs // rest.shape[1]))
    return Texts(learned=rest[torch.arange(wanted) * len(rest) // wanted], measured=calibration[chosen, :length])


def widest(units: Sequence[Unit], shapes: Mapping[str, tuple[int, int]]) -> int:
    """The inputs of the widest linear of all units. shapes: module -> (outputs, inputs)."""
    return max(shapes[name][1] for unit in units for name in unit.grids)


def solver_numbers(units: Sequence[Unit], shapes: Mapping[str, tuple[int, int]]) -> int:
    """Numbers that are held to solve the block that takes most: each input's Hessian and factor, and one in the making.

    An expert has inputs of its own. shapes: module -> (outputs, inputs).
    """
    inputs = {(unit.pattern, name.rpartition(".")[0], shapes[name][1]) for unit in units for name in unit.grids}
    held = Counter[str]()
    for _, owner, n in inputs:
        block = _BLOCK.match(owner)
        held[block[0] if block else ""] += 2 * n * n
    return max(held.values()) + widest(units, shapes) ** 2


def seconds_a_weight(device: torch.device) -> float:
    """Seconds to solve one weight, timed on a small matrix with its factor."""
    weight, inputs = torch.randn(256, 1024, device=device), torch.randn(2048, 1024, device=device)
    hessian, grid = inputs.T @ inputs / len(inputs), Grid(4, 64)
    for _ in range(2):  # the first loads kernels
        began = time.perf_counter()
        factor = gptq.factorize(hessian, gptq.column_order(hessian.diagonal(), "activation", 64), 0.05)
        gptq.quantize_weight(weight, hessian, factor, grid).errors.sum().item()
    return (time.perf_counter() - began) / weight.numel()


@torch.no_grad()
def measure(
    walk: Walk,
    units: Sequence[Unit],
    text: Texts,
    widths: Sequence[int],
    width: int,
    solving: Solving,
    doing: Callable[[str], None] = lambda _: None,
) -> list[dict[int, float]]:
    """The loss of each unit by width, in nats a token.

    walk: over the merged model, in fp32. width: at which KL is taken, one of `widths`.
    Raises StageError for NaN or infinity.
    """
    seen, windows = [_Seen() for _ in units], text.measured
    walk.fill_rest()
    item = walk.embed(windows, len(windows))[0]
    learned = walk.embed(text.learned, max(1, BATCH[walk.device.type] // text.learned.shape[1]))
    for index in range(len(walk)):
        doing(f"losses of {', '.join(map(str, widths))} bits, block {index + 1} of {len(walk)}")
        block, start = walk.load(index), f"{walk.prefix}.{index}."
        _run_on(walk, block, item, index, seen)
        own = {n: unit for n, unit in enumerate(units) if all(name.startswith(start) for name in unit.grids)}
        solver = BlockSolver(walk, index, learned, [name for unit in own.values() for name in unit.grids], solving)
        changed: dict[tuple[int, int], Tensor] = {}
        for number, unit in own.items():
            for bits in widths:
                with _quantized(walk.model, unit, bits, solver):
                    changed[number, bits] = walk.run(index, item).cpu()
        item.hidden = walk.run(index, item)
        _compare(changed, item.hidden, seen, width)
        walk.release(block)
    _end(walk, windows, item.hidden, seen)
    found = [one.losses(width) for one in seen]
    if not all(torch.tensor(list(own.values())).isfinite().all() for own in found):
        raise StageError("quantize.budget: NaN or infinity in the merged model's outputs: no width can be chosen")
    return found


def _run_on(walk: Walk, block: nn.Module, item: BlockInput, index: int, seen: Sequence[_Seen]) -> None:
    """One block on the states of every earlier unit's change."""
    for earlier in seen:
        if earlier.hidden is not None:
            states = earlier.hidden.to(walk.device)
            earlier.hidden = walk.forward(block, states, item.arguments[index]).cpu()


def _compare(changed: Mapping[tuple[int, int], Tensor], merged: Tensor, seen: Sequence[_Seen], width: int) -> None:
    """Keep the error of each changed output against the merged one, and the output itself at `width`."""
    for (number, bits), output in changed.items():
        seen[number].errors[bits] = float(relative_error(output.to(merged.device).double(), merged.double()).mean())
        if bits == width:
            seen[number].hidden = output


@contextmanager
def _quantized(model: nn.Module, unit: Unit, bits: int, solver: BlockSolver) -> Iterator[None]:
    """Context in which a unit's weights are those of `bits`."""
    old: dict[str, Any] = {name: model.get_submodule(name)._parameters["weight"] for name in unit.grids}
    try:
        for name, grid in unit.grids.items():
            value = solver.weight(name, old[name], replace(grid, bits=bits))
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
