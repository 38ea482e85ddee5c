"""VeRA: W + diag(b) @ B @ diag(d) @ A, A and B shared by all modules (arXiv:2310.11454)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from requant.adapters import fp64
from requant.adapters.fold import Fold, product_bound, read, read_rows
from requant.adapters.module_tensors import ModuleTensors, TensorKey, parameters
from requant.checkpoint.reader import TensorInfo

TENSORS = parameters("vera_lambda_b", "vera_lambda_d") | dict.fromkeys(("vera_A", "vera_B"), TensorKey(shared=True))
SETTINGS = frozenset({"r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Vera(Fold):
    """VeRA of one module: two vectors, and random projections shared by all modules.

    Of the projections `a` [r, >= in] and `b` [>= out, r] a part of the module's size is used.
    """

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

    def why_it_does_not_fit(self, shape: tuple[int, ...]) -> str | None:
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

    def exact_rows(self, rows: Tensor, index: list[int]) -> fp64.Exact:
        rank, columns = self.lambda_d.shape[0], rows.shape[1]
        left = fp64.read64(self.b)[index][:, :rank] * fp64.read64(self.lambda_d)
        left = fp64.read64(self.lambda_b)[index][:, None] * left
        out, bound = fp64.add_product(rows, left, fp64.read64(self.a)[:rank, :columns], 1.0)
        return fp64.Exact(out, bound * 2)


def build(tensors: ModuleTensors) -> Fold:
    """The VeRA of one module.

    Raises InputError when the shared projections are not in the file or too small.
    """
    lambda_b, lambda_d = tensors.exactly("vera_lambda_b", "vera_lambda_d")
    shared = tensors.shared
    if not {"vera_A", "vera_B"} <= set(shared):
        raise tensors.error(
            "save_projection was false: vera_A and vera_B are not in the file, and PEFT draws them anew from a seed "
            "whose numbers depend on the machine. Load the adapter where it was trained, set save_projection and save "
            "it again"
        )
    a, b = shared["vera_A"], shared["vera_B"]
    if b.shape[0] < lambda_b.shape[0] or min(a.shape[0], b.shape[1]) < lambda_d.shape[0]:
        raise tensors.error(
            f"{tensors.module}: projections {a.shape}, {b.shape} are smaller than {lambda_b.shape}, {lambda_d.shape}"
        )
    return Vera(module=tensors.module, a=a, b=b, lambda_b=lambda_b, lambda_d=lambda_d)
