"""KL divergence of next-token distributions, to the last digits of fp32 logits."""

from __future__ import annotations

import torch
from torch import Tensor

FAR = 80.0  # nats; e^80 is still far from fp32's end


def kl_divergence(log_r: Tensor, log_p: Tensor) -> Tensor:
    """KL(R || P), nats, of each row of fp32 log-probabilities [n, vocab]: float64 [n].

    Summed in fp64 as r * (e^d - 1 - d) with d = ln p - ln r: the same number, since r and p both sum to 1, but every
    term is positive and of second order, so fp32 rounding of the logits gives 1e-13 instead of 1e-7. A logit may be
    -inf: a token of probability 0 under R adds nothing to the KL, one that only P excludes makes it infinite.
    """
    near, furthest = near_kl_divergence(log_r, log_p)
    return near if bool((furthest <= FAR).all()) else far_kl_divergence(log_r, log_p)


def far_kl_divergence(log_r: Tensor, log_p: Tensor) -> Tensor:
    """`kl_divergence`, right for every d, with more work than where none is above FAR; waits for no device."""
    # Far above, e^d may overflow where r underflows: r * e^d is p. Where r is 0, ln r may be -inf and d no number.
    d = log_p.sub(log_r)
    r = log_r.exp()
    clamped = d.clamp(max=FAR)
    terms = torch.where(d > FAR, log_p.exp() - r - r * d, clamped.expm1().sub_(clamped).mul_(r))
    return torch.where(r == 0, log_p.exp(), terms).sum(-1, dtype=torch.float64)


def near_kl_divergence(log_r: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """`kl_divergence`, right where no d is above FAR, and the largest d [n] of each row; waits for no device.

    The largest d is infinite, or no number, where the sum is no number: P excludes what underflows under R.
    """
    d = log_p.sub(log_r)
    furthest = d.amax(-1)
    total = d.expm1().sub_(d).mul_(log_r.exp()).sum(-1, dtype=torch.float64)
    return total, furthest.masked_fill_(total.isnan(), torch.inf)
