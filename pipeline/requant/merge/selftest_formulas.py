"""The formulas of adapters a second time, in fp64 and row by row, with a bound of what fp32 may be off: for the self-test.

Each returns (exact rows, slack). The slack is a count of fp32 roundings times the sum of the magnitudes they act on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from requant.adapters.fold import Fold
from requant.adapters.ia3 import Ia3
from requant.adapters.loha import Loha
from requant.adapters.lokr import Lokr
from requant.adapters.lora import Lora
from requant.adapters.oft import Oft
from requant.adapters.stacked_lora import Experts
from requant.adapters.trained_tokens import Rows
from requant.adapters.vera import Vera
from requant.checkpoint.reader import TensorInfo, read_tensor

EPS = torch.finfo(torch.float32).eps
Result = tuple[Tensor, Tensor]


def folded(rows: Tensor, fold: Fold, index: list[int]) -> Result:
    """`fold` applied to fp64 `rows` [n, columns] (of stacked experts: [n, rows, columns]), rows `index` of the weight."""
    if isinstance(fold, Lora):
        return _lora(rows, fold, index)
    if isinstance(fold, Experts):
        return _experts(rows, fold, index)
    if isinstance(fold, Loha):
        return _loha(rows, fold, index)
    if isinstance(fold, Lokr):
        return _lokr(rows, fold, index)
    if isinstance(fold, Vera):
        return _vera(rows, fold, index)
    if isinstance(fold, Oft):
        return _oft(rows, fold)
    if isinstance(fold, Ia3):
        scale = _read(fold.scale).expand(-1, rows.shape[1]) if fold.inputs else _read(fold.scale)[index]
        return rows * scale, (rows * scale).abs() * 2 * EPS
    if isinstance(fold, Rows):
        new = _read(fold.rows)
        out = torch.stack(
            [new[fold.indices.index(i)] if i in fold.indices else r for i, r in zip(index, rows, strict=True)]
        )
        return out, out.abs() * EPS
    raise TypeError(f"no twin of {type(fold).__name__}")


def _read(info: TensorInfo) -> Tensor:
    return read_tensor(info).double()


def _sum(rows: Tensor, left: Tensor, right: Tensor, scaling: float) -> Result:
    """rows + scaling * left @ right."""
    size = rows.abs() + abs(scaling) * left.abs() @ right.abs()
    return rows + scaling * (left @ right), size * (left.shape[-1] + 4) * EPS


def _lora(rows: Tensor, fold: Lora, index: list[int]) -> Result:
    a, b = _read(fold.a), _read(fold.b)
    left, right = (a.T[index], b.T) if fold.embedding else (b[index], a)
    out, slack = _sum(rows, left, right, fold.scaling)
    if fold.magnitude is None:
        return out, slack
    scale = _read(fold.magnitude).reshape(-1, 1)[index] / out.norm(dim=1, keepdim=True)
    return out * scale, slack * scale.abs() + (out * scale).abs() * (EPS * 8 + EPS * out.shape[1] ** 0.5)


def _experts(rows: Tensor, fold: Experts, index: list[int]) -> Result:
    a, b = _read(fold.a), _read(fold.b)
    rank = a.shape[0] // fold.experts

    def factors(expert: int) -> tuple[Tensor, Tensor]:
        columns = [r * fold.experts + expert for r in range(rank)]
        return b[:, columns], a[[expert * rank + r for r in range(rank)]]

    each = [factors(e) for e in (index if fold.expert is None else [fold.expert])]
    pairs = [(right.T, left.T) if fold.transposed else (left, right) for left, right in each]
    if fold.expert is not None:
        (left, right), chosen = pairs[0], [fold.first + i for i in index]
        return _sum(rows, left[chosen], right, fold.scaling)
    done = [_sum(row, left, right, fold.scaling) for row, (left, right) in zip(rows, pairs, strict=True)]
    return torch.stack([d[0] for d in done]), torch.stack([d[1] for d in done])


def _loha(rows: Tensor, fold: Loha, index: list[int]) -> Result:
    a, b = [_read(t)[index] for t in fold.a], [_read(t) for t in fold.b]
    delta = fold.scaling * (a[0] @ b[0]) * (a[1] @ b[1])
    size = abs(fold.scaling) * (a[0].abs() @ b[0].abs()) * (a[1].abs() @ b[1].abs())
    return rows + delta, (rows.abs() + size) * (2 * b[0].shape[0] + 8) * EPS


def _lokr(rows: Tensor, fold: Lokr, index: list[int]) -> Result:
    one, two = ([_read(t) for t in many] for many in (fold.w1, fold.w2))
    terms = sum(many[0].shape[1] for many in (one, two) if len(many) == 2)
    height = two[0].shape[0]
    w1, w2 = (many[0] @ many[1] if len(many) == 2 else many[0] for many in (one, two))
    s1, s2 = (m[0].abs() @ m[1].abs() if len(m) == 2 else m[0].abs() for m in (one, two))
    delta = torch.stack([torch.cat([v * w2[i % height] for v in w1[i // height]]) for i in index])
    size = torch.stack([torch.cat([v * s2[i % height] for v in s1[i // height]]) for i in index])
    return rows + fold.scaling * delta, (rows.abs() + abs(fold.scaling) * size) * (terms + 8) * EPS


def _vera(rows: Tensor, fold: Vera, index: list[int]) -> Result:
    rank, columns = fold.lambda_d.shape[0], rows.shape[1]
    left = _read(fold.b)[index][:, :rank] * _read(fold.lambda_d)
    out, slack = _sum(rows, _read(fold.lambda_b)[index][:, None] * left, _read(fold.a)[:rank, :columns], 1.0)
    return out, slack * 2


def _oft(rows: Tensor, fold: Oft) -> Result:
    vectors, block = _read(fold.vectors), fold.block
    out, size = torch.empty_like(rows), torch.empty_like(rows)
    upper = torch.triu_indices(block, block, 1).tolist()
    for start in range(0, rows.shape[1], block):
        skew = torch.zeros(block, block, dtype=torch.float64)
        skew[upper[0], upper[1]] = vectors[start // block % len(vectors)]
        skew = skew - skew.T
        rotation = torch.linalg.inv(torch.eye(block).double() + skew) @ (torch.eye(block).double() - skew)
        if fold.terms is not None:
            powers = [torch.linalg.matrix_power(skew, k) for k in range(fold.terms)]
            ends = (0, fold.terms - 1) if fold.terms > 2 else (0,)
            rotation = torch.stack([p * (1 if k in ends else 2) for k, p in enumerate(powers)]).sum(dim=0)
        out[:, start : start + block] = rows[:, start : start + block] @ rotation.T
        size[:, start : start + block] = rows[:, start : start + block].abs() @ rotation.abs().T
    return out, size * (block + 16) * (fold.terms or block) * EPS
