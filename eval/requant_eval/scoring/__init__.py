"""Scoring: a causal LM and token windows in, numbers a token out.

    windows            an evaluation set: documents cut into windows by protocol
    set_description    an evaluation set without its tokens: name, digest, protocol, counts
    score_loop         score(model, set): log-likelihood, KL, top-1 of every token   <- start here
    batches            which windows share a forward, padded to one length
    kl                 KL divergence of next-token distributions, which healing uses too
    lm_head            logits from hidden states in fp32, a chunk at a time
    reference_states   hidden states of the reference in a file, for KL
    reference_head     its LM head in a file that all sets share
    summed_file        safetensors files with a checksum, written row by row
    token_scores       the numbers of one variant on one set, and their file
    canaries           greedy answers to prompts with a right answer
    answers            greedy answers to many prompts at once
    fixed_steps        their steps on tensors that keep their place, for a captured graph

May import: errors, whole_files.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from requant_eval.scoring.score_loop import score
    from requant_eval.scoring.windows import make_set

__all__ = ["make_set", "score"]
_HOME = {"score": "score_loop", "make_set": "windows"}


def __getattr__(name: str) -> Any:
    """The public functions, imported on first use: reports are read without torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
