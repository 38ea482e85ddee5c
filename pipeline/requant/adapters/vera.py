"""VeRA: W + diag(b) @ B @ diag(d) @ A, A and B shared by all modules (arXiv:2310.11454)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from requant.adapters.fold import Fold, Parts, _need, product_bound, read, read_rows
from requant.checkpoint.reader import TensorInfo
from requant.errors import InputError


@dataclass(frozen=True, slots=True)
class Vera(Fold):
    """Two vectors between projections shared by the whole adapter: `a` [r, >= in] and `b` [>= out, r], cut to size."""

    a: TensorInfo
    b: TensorInfo
    lambda_b: TensorInfo
    lambda_d: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.lambda_b.shape[0], -1)

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return (self.lambda_b, self.lambda_d)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        have = self.a.shape[1]
        return f"vera_A is for {have} inputs at most, the base has {shape[1]}" if shape[1] > have else None

    def factors(self, columns: int) -> tuple[Tensor, Tensor]:
        """(left [out, r], right [r, columns]) in fp32: the delta is `left @ right`."""
        rank = self.lambda_d.shape[0]
        left = read_rows(self.b, 0, self.lambda_b.shape[0])[:, :rank] * read(self.lambda_b)[:, None]
        return left, read(self.a)[:rank, :columns] * read(self.lambda_d)[:, None]

    def apply(self, weight: Tensor) -> bool:
        left, right = self.factors(weight.shape[1])
        weight.addmm_(left, right)
        return bool(left.any()) and bool(right.any())

    def bound(self, largest: float) -> float:
        return largest + product_bound(*self.factors(self.a.shape[1]))


def _vera(module: str, found: Parts, shared: Parts) -> Fold:
    lambda_b, lambda_d = _need(module, found, "vera_lambda_b", "vera_lambda_d")
    if not {"vera_A", "vera_B"} <= set(shared):
        raise InputError(
            "save_projection was false: vera_A and vera_B are not in the file, and PEFT draws them anew from a seed whose "
            "numbers depend on the machine. Load the adapter where it was trained, set save_projection and save it again"
        )
    a, b = shared["vera_A"], shared["vera_B"]
    if b.shape[0] < lambda_b.shape[0] or min(a.shape[0], b.shape[1]) < lambda_d.shape[0]:
        raise InputError(
            f"{module}: projections {a.shape}, {b.shape} are smaller than {lambda_b.shape}, {lambda_d.shape}"
        )
    return Vera(module, a, b, lambda_b, lambda_d)
