"""Trainable values of a student: one vector of offsets for all scales, one for all norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


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
