"""Error correction (QEP): move a weight to make up for inputs that earlier layers changed.

With X the inputs after earlier layers were quantized, X0 those before and drift = (X0 - X)' X, the least squares answer
in the measure of H = X' X is W + W drift (H + damping)^-1. Source: Arai & Ichikawa, QEP (arXiv:2504.09629), and Li et
al., GPTAQ (arXiv:2504.02692).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from requant.numerics import cholesky
from requant.numerics.gptq import Factor
from requant.runtime.device import profile_of
from requant.runtime.ranks import SINGLE_PROCESS, Ranks


class Correction:
    """Corrected weights of one group, by a solve for their rows or, if smaller, for the drift.

    The solve for the drift is distributed over the ranks; the rows of the weights already are.
    Tensors are released as soon as no later call needs them.
    """

    def __init__(self, drift: Tensor | None, weights: Sequence[Tensor], ranks: Ranks = SINGLE_PROCESS) -> None:
        """drift: fp32 [n, n], None for no move. weights: fp32 [rows, n] each, this rank's rows."""
        rows = sum(len(w) for w in weights) * ranks.count
        many = drift is not None and profile_of(drift.device).corrects_by_drift and rows > len(drift)
        self.ranks = ranks
        self.drift = drift if many else None
        self.pulled = [] if drift is None or many else [drift.T @ w.T for w in weights]  # then the drift is free to go
        self.solved: Tensor | None = None
        self.left = len(weights)

    def corrected(self, position: int, weight: Tensor, factor: Factor, share: float) -> Tensor:
        """The corrected weight W + share * W drift (H + damping)^-1, fp32 [rows, n].

        position: the weight's place among `weights`; each weight is corrected once.
        factor: of the Hessian; the first call's factor solves for the drift. After a failed factorization (`diagonal`)
        the weight is returned unchanged.
        """
        self.left -= 1
        if share and self.drift is not None:
            self._solve(self.drift, factor)
            self.drift = None
        move = None if factor.diagonal or not share else self._move(position, weight, factor)
        if not self.left:
            self.drift = self.solved = None
        return weight if move is None else torch.add(weight, move, alpha=share)

    def _move(self, position: int, weight: Tensor, factor: Factor) -> Tensor | None:
        if self.pulled:
            pulled, self.pulled[position] = self.pulled[position], torch.empty(0)
            return _solved(pulled, factor).T
        return None if self.solved is None else weight @ self.solved

    def _solve(self, drift: Tensor, factor: Factor) -> None:
        """Solve for this rank's rows of the drift, then gather the rows of all ranks.

        Ranks also gather after a failed factorization: the others wait for this rank's rows.
        """
        part = self.ranks.own_rows(drift)
        own = torch.zeros_like(part) if factor.diagonal else _solved(part.T, factor).T
        self.solved = self.ranks.all_gather_rows(own, len(drift))


def _solved(columns: Tensor, factor: Factor) -> Tensor:
    """(H + damping)^-1 @ columns, fp32 [n, k]."""
    blocked = profile_of(columns.device).blocked_solve
    ordered = columns[factor.order]
    solved = cholesky.solve(factor.lower, ordered) if blocked else torch.cholesky_solve(ordered, factor.lower)
    return solved.index_select(0, torch.argsort(factor.order))
