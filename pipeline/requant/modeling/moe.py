"""Mixture-of-experts layers as one Linear a projection and expert; calibration rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

FLOOR = 0.25  # of the rows each expert would see if all were chosen alike: it calibrates on at least so many
ROLES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedLayout:
    """How transformers stacks the weights of a layer's experts: [experts, out, in], or [experts, in, out].

    gated: gate and up are one tensor, one after the other or, interleaved, row by row in turns. transposed: [in, out].
    stored_interleaved: whether they are interleaved in the file.
    """

    gated: bool
    interleaved: bool
    transposed: bool
    stored_interleaved: bool

    @classmethod
    def of(cls, fused: Any) -> StackedLayout:
        """The layout of transformers' module of fused experts; of one that does not say, by its shapes."""
        sorted_by_class = getattr(fused, "_stored_interleaved", None) is not None  # set by `stored_parameters`
        if not hasattr(fused, "is_concatenated"):
            first, last = fused.gate_up_proj.shape[1:], fused.down_proj.shape[1:]
            transposed = (first[1], first[0]) == (2 * last[0], last[1])
            return cls(gated=True, interleaved=False, transposed=transposed, stored_interleaved=sorted_by_class)
        gated = bool(fused.has_gate)
        interleaved = gated and not fused.is_concatenated
        return cls(
            gated=gated,
            interleaved=interleaved,
            transposed=bool(fused.is_transposed),
            stored_interleaved=interleaved or sorted_by_class,
        )

    @property
    def roles(self) -> Mapping[str, tuple[str, ...]]:
        """Stacked parameter -> the matrices of an expert that it holds."""
        return {"gate_up_proj": ROLES[:2], "down_proj": ROLES[2:]} if self.gated else {r: (r,) for r in ROLES[1:]}

    def cut(self, entry: Tensor, place: int, count: int) -> Tensor:
        """Matrix [out, in] or bias [out] number `place` of the `count` in one expert's entry of a stacked tensor."""
        rows = entry.T if self.transposed and entry.ndim == 2 else entry
        return rows[place::count] if self.stored_interleaved else rows.chunk(count)[place]


class Expert(nn.Module):
    """One expert: down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate, combined as its family does.

    fused: transformers' module of all experts of the layer, on the meta device.
    """

    def __init__(self, fused: Any, layout: StackedLayout) -> None:
        super().__init__()
        self.interleaved = layout.interleaved
        for leaf, roles in layout.roles.items():
            rows, columns = getattr(fused, leaf).shape[1:]
            outputs, inputs = (columns, rows) if layout.transposed else (rows, columns)
            for role in roles:
                bias = getattr(fused, "has_bias", False)
                linear = nn.Linear(inputs, outputs // len(roles), bias=bias, device="meta")
                self.add_module(role, linear)
        self._combine = _combination(fused, layout)

    def forward(self, x: Tensor) -> Tensor:
        linears: Any = self._modules
        parts = [linears[role](x) for role in ROLES[:2] if role in linears]
        whole = torch.stack(parts, dim=-1).flatten(-2) if self.interleaved else torch.cat(parts, dim=-1)
        result: Tensor = linears["down_proj"](self._combine(whole))
        return result


def _combination(fused: Any, layout: StackedLayout) -> Callable[[Tensor], Tensor]:
    """What a family makes of one expert's first product; a class with a method of its own may have no `act_fn`."""
    combine = getattr(fused, "_apply_gate", None) if layout.gated else None
    if combine is None:
        combine = partial(_gated, fused.act_fn) if layout.gated else fused.act_fn
    found: Callable[[Tensor], Tensor] = combine
    return found


def _gated(act: Callable[[Tensor], Tensor], whole: Tensor) -> Tensor:
    """What the classes do that have no method for it."""
    gate, up = whole.chunk(2, dim=-1)
    return act(gate) * up


class SplitExperts(nn.Module):
    """transformers' fused experts as one module of Linears for each expert, named 0, 1, 2 ...

    Every expert is called once in every forward, on the rows (tokens) routed to it, also when there are none.

    floor: while calibrating, an expert gets at least this share of the rows it would get if all were chosen alike:
    tokens routed elsewhere are added to its input, their outputs are dropped. `added` counts them by expert.
    leader: (at most one) experts that run before these on the same tokens with other hidden states. The leader's rows
    come first in each input here, so that the two inputs can be compared row by row. Neither `floor` nor `leader`
    changes what the forward returns.
    identities: experts behind the others that return their input; they have no weights. post_expert_norm: of the class,
    where it has one, on each expert's output.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.layout = StackedLayout.of(fused)
        self.count = int(fused.down_proj.shape[0])
        self.identities = int(getattr(fused, next(iter(self.layout.roles))).shape[0]) - self.count
        self.post_expert_norm = fused.post_expert_norm if getattr(fused, "has_post_expert_norm", False) else None
        for index in range(self.count):
            self.add_module(str(index), Expert(fused, self.layout))
        self.floor = 0.0
        self.leader: tuple[SplitExperts, ...] = ()  # not a submodule
        self.rows: tuple[Tensor, ...] = ()
        self.routed, self.added = [0] * self.count, [0] * self.count

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, width], top_k_* [tokens, k]; the index behind all experts means none."""
        rows = self._rows(top_k_index, hidden_states.shape[0])
        weights = top_k_weights.new_zeros(hidden_states.shape[0], self.count + self.identities + 1).scatter_(
            1, top_k_index, top_k_weights
        )
        out = torch.zeros_like(hidden_states)
        for index, own in enumerate(rows):
            share = weights[own, index, None]
            result = (self._expert(index, hidden_states[own]) * share).masked_fill_(share == 0, 0)
            out.index_add_(0, own, result.to(out.dtype))
        if self.identities:
            out += (hidden_states * weights[:, self.count : -1].sum(dim=1, keepdim=True)).to(out.dtype)
        return out

    def _expert(self, index: int, x: Tensor) -> Tensor:
        out: Tensor = self._modules[str(index)](x)  # type: ignore[misc]
        return out if self.post_expert_norm is None else self.post_expert_norm(out)

    def share_added(self, index: int) -> float:
        """Added rows of one expert as a share of all rows that it has seen while calibrating."""
        return self.added[index] / max(1, self.added[index] + self.routed[index])

    def _rows(self, top_k_index: Tensor, tokens: int) -> tuple[Tensor, ...]:
        """The token rows of each expert's input."""
        k = top_k_index.shape[1]
        flat = top_k_index.reshape(-1)
        counts = torch.bincount(flat, minlength=self.count + self.identities + 1).tolist()
        order = torch.argsort(flat, stable=True) // k
        rows: tuple[Tensor, ...] = torch.split(order, counts)[: self.count]
        if self.leader:
            (leader,) = self.leader
            return tuple(_leader_first(own, leading, tokens) for own, leading in zip(rows, leader.rows, strict=True))
        if self.floor:
            least = min(tokens, -(-int(self.floor * tokens * k) // self.count))
            filled = tuple(_fill(own, least, tokens) for own in rows)
            for index, (own, full) in enumerate(zip(rows, filled, strict=True)):
                self.routed[index] += len(own)
                self.added[index] += len(full) - len(own)
            rows = filled
        self.rows = rows
        return rows


class WeightedInputExperts(SplitExperts):
    """Experts whose inputs come weighted already, all tokens to each of them, as zeros where it is not chosen."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """hidden_states [experts * tokens, width]; outputs in the same places."""
        inputs = hidden_states.view(self.count, -1, hidden_states.shape[-1])
        chosen = (inputs != 0).any(dim=-1).T
        most = max(1, int(chosen.sum(dim=1).max()))
        index = chosen.int().topk(most, dim=1).indices
        index[~chosen.gather(1, index)] = self.count
        tokens, out = inputs.sum(dim=0), torch.zeros_like(inputs)
        for number, own in enumerate(self._rows(index, inputs.shape[1])):
            routed = chosen[own, number, None]  # others are here to calibrate on, weighted as where they go
            x = torch.where(routed, inputs[number, own], tokens[own])
            out[number, own] = self._expert(number, x).masked_fill(~routed, 0).to(out.dtype)
        return out.view(hidden_states.shape)


def split(fused: Any) -> SplitExperts:
    """The experts of a layer, fused in one module of transformers, as Linears."""
    weighted = not hasattr(fused, "is_concatenated") and len(signature(fused.forward).parameters) == 1
    return (WeightedInputExperts if weighted else SplitExperts)(fused)


def calibrate_experts(block: nn.Module, reference_block: nn.Module | None, floor: float = FLOOR) -> None:
    """Prepare the experts of a block and of its reference block for calibration."""
    for name, experts in split_experts(block):
        experts.floor = floor
        experts.routed, experts.added = [0] * experts.count, [0] * experts.count
        if reference_block is not None:
            follower: Any = reference_block.get_submodule(name)
            follower.leader = (experts,)


def pool_experts(block: nn.Module, total: Callable[[Sequence[int]], Sequence[float]]) -> None:
    """Count the rows that experts have seen anywhere; `total` sums up such counts."""
    for _, experts in split_experts(block):
        counts = [round(n) for n in total([*experts.routed, *experts.added])]
        experts.routed, experts.added = counts[: experts.count], counts[experts.count :]


def unfollow(reference_block: nn.Module) -> None:
    """Let a reference block's experts run alone again, on their own rows only."""
    for _, experts in split_experts(reference_block):
        experts.leader = ()


def share_added(block: nn.Module, linear: str) -> float:
    """Added rows as a share of all calibration rows of a block's Linear; 0 outside of experts."""
    for name, experts in split_experts(block):
        if linear.startswith(f"{name}."):
            return experts.share_added(int(linear.removeprefix(f"{name}.").split(".")[0]))
    return 0.0


def _leader_first(own: Tensor, leading: Tensor, tokens: int) -> Tensor:
    """The rows of the leader, then those that only `own` has."""
    rest = torch.ones(tokens, dtype=torch.bool, device=own.device)
    rest[leading] = False
    return torch.cat((leading, own[rest[own]]))


def _fill(own: Tensor, least: int, tokens: int) -> Tensor:
    """`own` rows, and others evenly spread over all tokens up to `least` rows."""
    lacking = least - len(own)
    if lacking <= 0:
        return own
    others = torch.ones(tokens, dtype=torch.bool, device=own.device)
    others[own] = False
    free = others.nonzero()[:, 0]
    return torch.cat((own, free[torch.arange(lacking, device=own.device) * len(free) // lacking]))


def split_experts(module: nn.Module) -> Iterator[tuple[str, SplitExperts]]:
    """The split experts inside a module, by name."""
    return ((name, m) for name, m in module.named_modules() if isinstance(m, SplitExperts))
