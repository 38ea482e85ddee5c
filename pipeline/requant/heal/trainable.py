"""Trainable values of a student: a vector of offsets for all scales, one for all norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn


class Trainable(Protocol):
    """Values that an optimizer moves by `offset`, which has a gradient.

    unit_of_rate: what a learning rate of these is a share of: the value's own unit, or a code.
    """

    offset: Tensor
    unit_of_rate: Literal["value", "code"]

    def refresh(self) -> None:
        """Compute the values in use from `offset`."""
        ...

    def snapshot(self) -> Tensor:
        """A copy of what the values in use are made of."""
        ...

    def start(self) -> Tensor:
        """The snapshot of the file's own values."""
        ...

    def adopt(self, snapshot: Tensor) -> None:
        """Use the values of a snapshot."""
        ...

    def values(self) -> dict[str, Tensor]:
        """The values in use by stored tensor name."""
        ...


@dataclass(kw_only=True)
class TrainableVector:
    """All trainable values of one kind as one vector: current = rounding(base + unit * offset).

    parts: stored tensor name -> (begin, shape) in the vector. Where `offset` is 0, `current` is the file's own value,
    rounded or not.
    """

    base: Tensor
    unit: Tensor
    offset: Tensor
    current: Tensor
    rounding: Callable[[Tensor], Tensor]
    parts: Mapping[str, tuple[int, torch.Size]]
    unit_of_rate: Literal["value", "code"] = "value"

    @classmethod
    def concatenate(
        cls, parts: Mapping[str, tuple[Tensor, Tensor]], rounding: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> TrainableVector:
        """One vector from parts: name -> (base, unit), fp32 of one shape. dtype: of `current`."""
        begins, at = {}, 0
        for name, (base, _) in parts.items():
            begins[name] = (at, base.shape)
            at += base.numel()
        base, unit = (torch.cat([part[i].reshape(-1) for part in parts.values()]) for i in range(2))
        offset = torch.zeros_like(base)
        offset.grad = torch.zeros_like(base)
        return cls(
            base=base,
            unit=unit,
            offset=offset,
            current=base.to(dtype, copy=True),
            rounding=rounding,
            parts=begins,
        )

    def view(self, vector: Tensor, name: str) -> Tensor:
        """The part of a vector that belongs to one stored tensor, in its own shape."""
        begin, shape = self.parts[name]
        return vector[begin : begin + shape.numel()].view(shape)

    def parameter(self, name: str) -> nn.Parameter:
        """The part of `offset` as a parameter whose gradient is the part of `offset.grad`."""
        assert self.offset.grad is not None
        parameter = nn.Parameter(self.view(self.offset, name))
        parameter.grad = self.view(self.offset.grad, name)
        return parameter

    def refresh(self) -> None:
        """Compute `current` from `offset`."""
        self.current.copy_(torch.where(self.offset == 0, self.base, self.rounding(self.base + self.unit * self.offset)))

    def snapshot(self) -> Tensor:
        """A copy of the offsets."""
        return self.offset.clone()

    def start(self) -> Tensor:
        """Offsets of zero."""
        return torch.zeros_like(self.offset)

    def adopt(self, snapshot: Tensor) -> None:
        """Use these offsets."""
        self.offset.copy_(snapshot)
        self.refresh()

    def values(self) -> dict[str, Tensor]:
        """Current values by stored name, fp32 (scales [out, groups])."""
        return {name: self.view(self.current, name).float().clone() for name in self.parts}
