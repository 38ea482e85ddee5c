"""The linears of one block as GPTQ would leave them, from the inputs they get in the walk.

What `width_losses` changes a unit to. Experts learn from as many rows as in the run. Nothing is quantized before it, so
there is no drift to correct; sweeps over the codes, which change little, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from requant.errors import StageError
from requant.modeling.block_walk import BlockInput, Walk
from requant.modeling.linear_groups import find_linear_groups
from requant.modeling.moe import calibrate_experts
from requant.numerics import gptq, matmul_precision
from requant.numerics.grid import Grid, nearest_rows
from requant.numerics.hessian import add_to_hessian, symmetrize
from requant.numerics.solution import Order

NEAREST_FROM = 8  # bits: rounding to nearest loses too little there for a choice to hang on


@dataclass(frozen=True, kw_only=True, slots=True)
class Solving:
    """How the run will solve. damp: None: by the tokens an input, as `gptq.damping`."""

    order: Order = "activation"
    damp: float | None = None


@dataclass
class _Moments:
    """X'X of the inputs that some linears share, upper triangle, and the tokens it sums up."""

    hessian: Tensor
    tokens: int = 0
    whole: bool = False  # both triangles, divided by the tokens

    def watch(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Add the input of a linear, before its forward."""
        add_to_hessian(self.hessian, args[0])
        self.tokens += args[0].shape[:-1].numel()


class BlockSolver:
    """Solves linears of one block against the inputs that `items` give them; moves `items` on through the block.

    items: batches of the text to learn from, at this block's input. linears: full names of modules of the block.
    """

    def __init__(
        self, walk: Walk, index: int, items: Sequence[BlockInput], linears: Sequence[str], solving: Solving
    ) -> None:
        self.solving = solving
        self._of: dict[str, _Moments] = {}
        self._factors: dict[tuple[int, int], gptq.Factor] = {}
        start, block = f"{walk.prefix}.{index}.", walk.blocks[index]
        handles = []
        calibrate_experts(block, None)
        if linears:
            groups = find_linear_groups(walk, index, items[0], [name.removeprefix(start) for name in linears])
            for group in groups:
                first: Any = block.get_submodule(group.linears[0])
                moments = _Moments(torch.zeros(first.in_features, first.in_features, device=walk.device))
                self._of |= {start + name: moments for name in group.linears}
                handles.append(first.register_forward_pre_hook(moments.watch))
        try:
            with matmul_precision.tensor_cores():
                for item in items:
                    item.hidden = walk.states.put(walk.run(index, item))
        finally:
            for handle in handles:
                handle.remove()
            calibrate_experts(block, None, floor=0.0)

    def weight(self, name: str, weight: Tensor, grid: Grid) -> Tensor:
        """The weight [rows, n] of a linear of the block as it would be served, in fp32.

        Rounded to nearest from `NEAREST_FROM` bits on, and where no token came by. Raises StageError for inputs that
        are not finite.
        """
        moments = self._of[name]
        if grid.bits >= NEAREST_FROM or not moments.tokens:
            return nearest_rows(weight, grid)
        if not moments.whole:
            symmetrize(moments.hessian).div_(moments.tokens)
            moments.whole = True
        with matmul_precision.tensor_cores():
            factor = self._factor(name, moments, grid)
            solution = gptq.quantize_weight(weight.float(), moments.hessian, factor, grid, order=self.solving.order)
        return solution.weight()

    def _factor(self, name: str, moments: _Moments, grid: Grid) -> gptq.Factor:
        """The factor of a Hessian: the same for every width."""
        order = self.solving.order
        key = (id(moments), grid.group_size if order == "group" else 0)
        if key not in self._factors:
            columns = gptq.column_order(moments.hessian.diagonal(), order, grid.group_size)
            damp = gptq.damping(self.solving.damp, moments.tokens, len(moments.hessian))
            try:
                self._factors[key] = gptq.factorize(moments.hessian, columns, damp)
            except FloatingPointError as error:
                raise StageError(f"quantize.budget: {name}: its calibration inputs hold NaN or infinity") from error
        return self._factors[key]
