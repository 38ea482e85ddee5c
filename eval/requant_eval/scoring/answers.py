"""Greedy answers to prompts of different lengths in one batch, for checks and side by side.

The prompts of a batch are padded on the left, with positions that begin at each prompt's first token. A model that
reads padding otherwise is found by the shortest prompt, asked alone too; its prompts are then answered one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from requant_eval.scoring.canaries import best_token

log = logging.getLogger(__name__)
AGREE = 0.1  # of the logits' spread: so much padding may change them, as sums in another order do in 16 bits


def answer(
    model: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    stops: Collection[int],
    device: torch.device | str,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The argmax continuation of every prompt: at most `new_tokens` ids, the last a stop token where one came.

    on_progress: (done, of), in prompts. Raises EvaluationError for NaN or infinity in logits.
    """
    model.eval()
    told = on_progress or (lambda done, of: None)
    found = _together(model, prompts, new_tokens, stops, device, told) if len(prompts) > 1 else None
    if found is not None:
        return found
    answers = []
    for number, prompt in enumerate(prompts, 1):
        answers.append(_alone(model, prompt, new_tokens, stops, device))
        told(number, len(prompts))
    return answers


def _together(
    model: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    stops: Collection[int],
    device: torch.device | str,
    told: Callable[[int, int], None],
) -> list[list[int]] | None:
    """All answers from one batch; None where the model does not take one."""
    try:
        return _batched(model, prompts, new_tokens, stops, device, told)
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:  # also out of memory
        log.info("answers one by one: %s: %s", type(error).__name__, error)
        return None


@torch.inference_mode()
def _batched(
    model: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    stops: Collection[int],
    device: torch.device | str,
    told: Callable[[int, int], None],
) -> list[list[int]] | None:
    ids, mask = _padded(prompts, device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    made = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    logits, cache = made.logits[:, -1], made.past_key_values
    shortest = min(range(len(prompts)), key=lambda i: len(prompts[i]))
    alone = model(input_ids=torch.tensor([list(prompts[shortest])], device=device), use_cache=True).logits[0, -1]
    if not bool((logits[shortest].float() - alone.float()).std() < AGREE * alone.float().std()):
        return None
    out: list[list[int]] = [[] for _ in prompts]
    places = positions[:, -1:]
    for _ in range(new_tokens):
        left = [i for i, said in enumerate(out) if not (said and said[-1] in stops)]
        if not left:
            break
        best = _best_tokens(logits, left)
        for i in left:
            out[i].append(best[i])
        told(len(prompts) - len(left), len(prompts))
        step, places = torch.tensor(best, device=device)[:, None], places + 1
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        made = model(input_ids=step, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True)
        logits, cache = made.logits[:, -1], made.past_key_values
    told(len(prompts), len(prompts))
    return out


def _best_tokens(logits: Tensor, rows: Sequence[int]) -> list[int]:
    """The argmax of each row of logits [batch, vocabulary], 0 of rows that have ended; EvaluationError for NaN."""
    best = [0] * len(logits)
    for i in rows:
        best[i] = best_token(logits[i])
    return best


def _padded(prompts: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(ids, attention mask), int64 [prompts, longest], padded on the left with token 0."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(p)) + list(p) for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@torch.inference_mode()
def _alone(
    model: Any, prompt: Sequence[int], new_tokens: int, stops: Collection[int], device: torch.device | str
) -> list[int]:
    step, cache, out = torch.tensor([list(prompt)], device=device), None, list[int]()
    for _ in range(new_tokens):
        made = model(input_ids=step, past_key_values=cache, use_cache=True)
        best, cache = best_token(made.logits[0, -1]), made.past_key_values
        out.append(best)
        if best in stops:
            break
        step = torch.tensor([[best]], device=device)
    return out
