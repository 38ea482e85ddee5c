"""How each metric is computed from the scores of two variants, and its sums over documents.

A new metric is one entry in `OF_STEP`, and one in `gate.METRICS` that says how the report shows it and a gate limits
it. A metric that a gate may limit relative to the control's also has its sums over documents in `DOCUMENT_SUMS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from requant_eval.metrics import statistics as st
from requant_eval.scoring.token_scores import TokenScores


@dataclass(frozen=True, kw_only=True)
class Step:
    """Scores of two variants on the same tokens.

    from_reference: whether `before` is the reference, the variant that KL is measured against.
    """

    before: TokenScores
    after: TokenScores
    paired: st.Paired
    from_reference: bool


Estimated = st.Estimate | st.Divergence | None
Sums = npt.NDArray[Any] | None


def _divergence(step: Step) -> Estimated:
    """Mean and quantiles of KL(reference || variant).

    None for steps that do not begin at the reference, and without its hidden states.
    """
    kl = step.after.kl if step.from_reference else None
    return None if kl is None else st.divergence(kl, step.after.document)


def _agreement(step: Step) -> Estimated:
    """Share of tokens whose top-1 prediction is the reference's; None where KL is None."""
    agree = step.after.agree if step.from_reference else None
    return None if agree is None else st.share(agree, step.after.document)


def _right_to_wrong(step: Step) -> Estimated:
    return st.share(step.before.top1 & ~step.after.top1, step.after.document)


def _wrong_to_right(step: Step) -> Estimated:
    return st.share(~step.before.top1 & step.after.top1, step.after.document)


# Key of a step in the report -> how it is computed from the scores of both ends.
OF_STEP: dict[str, Callable[[Step], Estimated]] = {
    "loss_percent": lambda step: step.paired.loss_percent,
    "kl": _divergence,
    "agreement": _agreement,
    "right_to_wrong": _right_to_wrong,
    "wrong_to_right": _wrong_to_right,
}


def _counts(flags: npt.NDArray[np.bool_] | None, document: npt.NDArray[np.int32]) -> Sums:
    return None if flags is None else st.document_sums(flags, document).astype(int)


# Column of `documents` in the report -> sums over each document of a variant's tokens; None where it was not scored.
# The second argument: scores of the reference, None where no reference was scored.
DOCUMENT_SUMS: dict[str, Callable[[TokenScores, TokenScores | None], Sums]] = {
    "n": lambda scores, _: np.bincount(scores.document),
    "nll": lambda scores, _: st.document_sums(scores.nll, scores.document),
    "top1": lambda scores, _: _counts(scores.top1, scores.document),
    "agree": lambda scores, _: _counts(scores.agree, scores.document),
    "right_to_wrong": lambda scores, before: _counts(
        None if before is None else before.top1 & ~scores.top1, scores.document
    ),
    "wrong_to_right": lambda scores, before: _counts(
        None if before is None else ~before.top1 & scores.top1, scores.document
    ),
    "kl": lambda scores, _: None if scores.kl is None else st.document_sums(scores.kl, scores.document),
}
