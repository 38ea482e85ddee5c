"""`requant.numerics.kl_kernels` against the plain functions of healing and against fp64.

In Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from requant.heal import kl_loss
from requant.numerics import kl_kernels
from requant_eval.scoring.kl import far_kl_divergence
from requant_eval.scoring.lm_head import Head

CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.gpu(interpreted=True)
DEVICE = torch.device("cuda" if CUDA else "cpu")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def found(head: Head, hidden: Tensor, teacher: Tensor, other: Head) -> tuple[float, Tensor]:
    """The divergence and three times its gradient."""
    given = hidden.clone().requires_grad_()
    loss = kl_loss.divergence(given, head, teacher, other, torch.float32)
    (gradient,) = torch.autograd.grad(3 * loss, given)
    return float(loss.detach()), gradient


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, 3.0)])
@pytest.mark.parametrize("vocab", [40, 4096, 9001])
def test_the_divergence_and_its_gradient_are_the_same(
    kernels: list[bool], vocab: int, scale: float, softcap: float | None
) -> None:
    """Vocabularies of a part of a block, a whole one, and some with a part."""
    head = Head(drawn(vocab, 16), drawn(vocab, seed=1), scale, softcap)
    other = Head(drawn(vocab, 16, seed=2), None, 2.0, None)
    hidden, teacher = drawn(5, 16, seed=3), drawn(5, 16, seed=4)
    fused = found(head, hidden, teacher, other)
    kernels[0] = False
    plain = found(head, hidden, teacher, other)
    assert fused[0] == pytest.approx(plain[0], rel=1e-5)
    torch.testing.assert_close(fused[1], plain[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [1e-4, 1e-3, 1e-2])
def test_small_divergences_and_their_gradients_are_exact(kernels: list[bool], change: float) -> None:
    """As those of 8-bit checkpoints, where both probabilities are nearly the same."""
    logits = drawn(16, 5000)
    moved = logits + change * drawn(16, 5000, seed=1)
    gradient = torch.empty_like(logits)
    value = kl_kernels.divergence(moved, logits, gradient)
    log_q, log_p = moved.double().log_softmax(-1), logits.double().log_softmax(-1)
    wanted = log_q.exp() - log_p.exp()
    torch.testing.assert_close(value, (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-3, atol=1e-13)
    assert float((gradient - wanted).norm() / wanted.norm()) < 4e-7 / change + 1e-5


def test_what_is_far_or_excluded_is_as_in_the_reference(kernels: list[bool]) -> None:
    """Probabilities that underflow, tokens that one or both exclude, a student that excludes what the teacher has."""
    far, no = 500.0, float("-inf")
    student = torch.tensor([[0.0, far, 1, 2], [0, 1, no, 2], [no, 1, 0, no], [1, 2, no, 3], [0, 0, 0, -far]])
    teacher = torch.tensor([[far, 0.0, 1, 2], [0, 1, no, 3], [no, 0, 1, no], [no, 2, no, 3], [0, 1, 0, 2]])
    student, teacher = student.to(DEVICE), teacher.to(DEVICE)
    gradient = torch.empty_like(student)
    value = kl_kernels.divergence(student, teacher, gradient)
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    torch.testing.assert_close(value, far_kl_divergence(log_p, log_q), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, log_q.exp() - log_p.exp(), rtol=1e-5, atol=1e-6)
    assert float(kl_kernels.divergence(torch.tensor([[0.0, no]]).to(DEVICE), torch.zeros(1, 2).to(DEVICE))) == float(
        "inf"
    )


def test_no_number_stays_no_number(kernels: list[bool]) -> None:
    """So that a step with it changes nothing."""
    logits = drawn(3, 50)
    broken = logits.clone()
    broken[1, 7] = float("nan")
    for student, teacher in ((broken, logits), (logits, broken)):
        assert kl_kernels.divergence(student, teacher).isnan().tolist() == [False, True, False]


def test_no_gradient_and_no_rows(kernels: list[bool]) -> None:
    head, hidden = Head(drawn(40, 16)), drawn(9, 16, seed=1)
    with torch.no_grad():
        alone = kl_loss.divergence(hidden, head, hidden + 0.1, head, torch.float32)
    kernels[0] = False
    assert float(alone) == pytest.approx(
        float(kl_loss.divergence(hidden, head, hidden + 0.1, head, torch.float32)), rel=1e-4
    )
    assert kl_kernels.divergence(drawn(0, 8), drawn(0, 8)).shape == (0,)
