"""The loss of healing: KL(teacher || student) over the vocabulary.

The KL divergence and its gradient are computed from final hidden states, a chunk of positions at a time: logits of both
models exist for one chunk only, and only the gradient with respect to the student's hidden states is kept. The value
is summed as evaluation sums it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from requant.numerics import kl_kernels, triton_kernels
from requant.runtime.device import profile_of
from requant_eval.scoring.kl import far_kl_divergence, kl_divergence
from requant_eval.scoring.lm_head import Head


def product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product a [n, k] @ b [k, m] as fp32 [n, m].

    16-bit factors are multiplied in 16 bit and summed in fp32.
    """
    if a.dtype == torch.float32:
        return a @ b.float()
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def logits(head: Head, hidden: Tensor) -> Tensor:
    """Logits fp32 [n, vocab] of hidden states [n, hidden], as `Head.logits`.

    Multiplied in the dtype of `hidden`.
    """
    out = product(hidden, head.weight.to(hidden.dtype).T)
    if head.bias is not None:
        out += head.bias.float()
    if head.scale != 1.0:
        out *= head.scale
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)
    return out


def _by_logits(head: Head, student: Tensor, teacher: Tensor, gradient: Tensor | None) -> Tensor:
    """KL(teacher || student), float64 scalar, of logits fp32 [n, vocab].

    Both may be overwritten.
    gradient: [n, vocab], overwritten by the gradient with respect to the product of hidden states and head.
    """
    if triton_kernels.usable(student):
        return kl_kernels.divergence(student, teacher, gradient, scale=head.scale, softcap=head.softcap).sum()
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    total = far_kl_divergence(log_p, log_q).sum()
    if gradient is not None:
        difference = log_q.exp_().sub_(log_p.exp_())
        if head.softcap is not None:
            difference.mul_(student.div_(head.softcap).square_().neg_().add_(1))  # d tanh = 1 - tanh^2
        if head.scale != 1.0:
            difference *= head.scale
        gradient.copy_(difference)
    return total


class _Divergence(torch.autograd.Function):
    """Sum over positions of KL(teacher || student).

    The gradient is computed in the forward pass, chunk by chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, teacher: Tensor, teacher_head: Head, dtype: torch.dtype
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        step = max(1, profile_of(hidden.device).kl_chunk_logits // head.vocab)
        for at in range(0, len(hidden), step):
            chunk = slice(at, at + step)
            student_logits = logits(head, hidden[chunk].to(dtype))
            teacher_logits = logits(teacher_head, teacher[chunk].to(dtype))
            change = None if gradient is None else torch.empty_like(student_logits, dtype=dtype)
            total += _by_logits(head, student_logits, teacher_logits, change)
            if gradient is not None and change is not None:
                gradient[chunk] = product(change, head.weight.to(dtype)).to(hidden.dtype)
        ctx.save_for_backward(*(() if gradient is None else (gradient,)))
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None, None, None


def divergence(hidden: Tensor, head: Head, teacher: Tensor, teacher_head: Head, dtype: torch.dtype) -> Tensor:
    """Sum over n positions of KL(teacher || student) in nats, float64 scalar.

    Differentiable in `hidden`.
    hidden, teacher: final hidden states [n, width] of student and teacher. dtype: of the products with the heads.
    """
    total: Tensor = _Divergence.apply(hidden, head, teacher, teacher_head, dtype)  # type: ignore[no-untyped-call]
    return total


def measured(
    hidden: Tensor, head: Head, teacher: Tensor, teacher_head: Head, ids: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """KL(teacher || student), and how much more the text costs than with the teacher, of each window.

    hidden, teacher: final hidden states [n, length, width]. ids: int64 [n, length]; each token is predicted by the
    position before it. Means over positions in nats a token, float64 [n] on the CPU.
    """
    kl, more = [], []
    step = max(1, profile_of(hidden.device).kl_chunk_logits // head.vocab)
    for own, theirs, row in zip(hidden, teacher, ids, strict=True):
        next_tokens = row[1:]
        total, worse = (torch.zeros((), dtype=torch.float64, device=hidden.device) for _ in range(2))
        for at in range(0, len(own), step):
            log_p = logits(teacher_head, theirs[at : at + step].to(dtype)).log_softmax(-1)
            log_q = logits(head, own[at : at + step].to(dtype)).log_softmax(-1)
            total += kl_divergence(log_p, log_q).sum()
            wanted = next_tokens[at : at + step, None]
            difference = (log_p - log_q)[: len(wanted)].gather(1, wanted)
            worse += difference.double().sum()
        kl.append(total / len(own))
        more.append(worse / max(1, len(next_tokens)))
    return torch.stack(kl).cpu(), torch.stack(more).cpu()
