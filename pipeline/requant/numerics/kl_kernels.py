"""Triton kernel of a KL divergence of logits and its gradient.

Every row is read twice, and no log-probabilities are kept. Its torch reference functions are
`requant_eval.scoring.kl.far_kl_divergence` and `requant.heal.kl_loss`.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for the CPU comes without it
    triton = None

AT_ONCE = 4096  # logits of a row that a program holds


def divergence(
    student: Tensor,
    teacher: Tensor,
    gradient: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """KL(teacher || student) of each row of logits fp32 [n, vocab] in nats: float64 [n].

    gradient: [n, vocab] of any float dtype, overwritten by (q - p) * scale with the probabilities q and p of student
    and teacher; softcap: the cap c of the student's logits x, whose gradient is also multiplied by 1 - (x / c)^2.
    A logit may be -inf, as in the reference function. All are contiguous.
    """
    value = torch.empty(len(student), dtype=torch.float64, device=student.device)
    if len(student):
        _divergence[(len(student),)](
            student, teacher, gradient, value, student.shape[1], scale, 0.0 if softcap is None else 1.0 / softcap,
            GRADIENT=gradient is not None, CAPPED=softcap is not None, AT_ONCE=AT_ONCE, num_warps=8,
            enable_fp_fusion=True,
        )  # fmt: skip
    return value


if triton is not None:

    @triton.jit
    def _log_sum(x_ptr, vocab, AT_ONCE: tl.constexpr):
        """ln of the sum of e^x over a row, and its largest x: each lane sums what it reads, then all lanes."""
        largest = tl.full([AT_ONCE], -3e38, tl.float32)
        total = tl.zeros([AT_ONCE], tl.float32)
        for begin in range(0, vocab, AT_ONCE):
            j = begin + tl.arange(0, AT_ONCE)
            x = tl.load(x_ptr + j, mask=j < vocab, other=float("-inf"))
            larger = tl.maximum(largest, x, propagate_nan=tl.PropagateNan.ALL)
            total = total * tl.exp(largest - larger) + tl.exp(x - larger)
            largest = larger
        top = tl.max(largest, axis=0)
        return top, tl.log(tl.sum(total * tl.exp(largest - top), axis=0))

    @triton.jit
    def _second_order(d):
        """e^d - 1 - d, to nearly the last place; d at most 80."""
        series = 1.0 / 40320 + d * (1.0 / 362880)
        series = 1.0 / 720 + d * (1.0 / 5040 + d * series)
        series = 0.5 + d * (1.0 / 6 + d * (1.0 / 24 + d * (1.0 / 120 + d * series)))
        return tl.where(tl.abs(d) < 0.5, d * d * series, tl.exp(tl.minimum(d, 80.0)) - 1 - d)

    @triton.jit(do_not_specialize=["scale", "inverse_cap"])
    def _divergence(
        student_ptr, teacher_ptr, gradient_ptr, value_ptr, vocab, scale, inverse_cap,
        GRADIENT: tl.constexpr, CAPPED: tl.constexpr, AT_ONCE: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * vocab
        top, log_sum = _log_sum(student_ptr + row, vocab, AT_ONCE)
        teacher_top, teacher_log_sum = _log_sum(teacher_ptr + row, vocab, AT_ONCE)
        shift = (top - teacher_top) + (log_sum - teacher_log_sum)
        total = tl.zeros([AT_ONCE], tl.float64)
        for begin in range(0, vocab, AT_ONCE):
            j = begin + tl.arange(0, AT_ONCE)
            x = tl.load(student_ptr + row + j, mask=j < vocab, other=float("-inf"))
            y = tl.load(teacher_ptr + row + j, mask=j < vocab, other=float("-inf"))
            p, q = tl.exp((y - teacher_top) - teacher_log_sum), tl.exp((x - top) - log_sum)
            d = (x - y) - shift  # ln q - ln p, without the rounding of either
            second = _second_order(d)  # p (e^d - 1 - d) sums to the same as -p d, with positive terms
            terms = tl.where(d > 80.0, q - p - p * d, p * second)  # e^d may overflow where p underflows
            total += tl.where(p == 0, q, terms).to(tl.float64)
            if GRADIENT:
                change = tl.where((p == 0) | (tl.abs(d) > 80.0), q - p, p * (second + d))
                if CAPPED:
                    change *= 1 - (x * inverse_cap) * (x * inverse_cap)
                tl.store(gradient_ptr + row + j, (change * scale).to(gradient_ptr.dtype.element_ty), mask=j < vocab)
        tl.store(value_ptr + tl.program_id(0), tl.sum(total, axis=0))
