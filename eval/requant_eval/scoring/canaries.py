"""Canaries: questions whose answers the fine-tune knows, asked greedily of every variant.

An answer is right when the greedy continuation of the prompt begins with it and does not continue inside a word: "16"
is not a right "1". Runs of white space count as one blank. Case counts. What follows the answer does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from requant_eval.errors import EvaluationError

RULE = (
    "Right: the greedy continuation begins with the answer (white space and what follows it aside, case counts) "
    "and does not go on inside a word."
)
LOOKED_AT = 16  # tokens of an answer between two looks at whether it is over
DAMAGED = "NaN/inf in logits while answering a prompt: the checkpoint is damaged or overflows"
ORDER = ("base", "adapter", "merged", "original", "gptq", "healed", "ends")


@dataclass(frozen=True)
class Canary:
    """One question and its answer.

    ids: the prompt's tokens, BOS and template included. new_tokens: at most so many tokens are generated.
    """

    prompt: str
    answer: str
    ids: tuple[int, ...]
    new_tokens: int


def is_right(given: str, answer: str) -> bool:
    """Whether a continuation is the right answer, by the module's rule."""
    continuation, expected = _plain(given), _plain(answer)
    if not expected or not continuation.startswith(expected):
        return False
    follows = continuation[len(expected) : len(expected) + 1]
    return not (expected[-1].isalnum() and follows.isalnum())


def ask(
    model: Any,
    canaries: Sequence[Canary],
    decode: Callable[[list[int]], str],
    *,
    stop: int | None,
    device: torch.device | str,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The model's answer to every canary, by argmax one token at a time, up to the token `stop`.

    decode: token ids -> text without special tokens. A model with `last_logits` (the logits of many sequences in one
    pass, for models that load their weights block by block) generates a token of every canary in each pass.

    Raises:
        EvaluationError: NaN/inf in logits.
    """
    model.eval()
    if hasattr(model, "last_logits"):
        return [decode(ids) for ids in _in_step(model.last_logits, canaries, stop, on_progress)]
    given = []
    for number, canary in enumerate(canaries):
        given.append(decode(greedy(model, canary.ids, canary.new_tokens, stop=stop, device=device)))
        if on_progress is not None:
            on_progress(number + 1, len(canaries))
    return given


@torch.inference_mode()
def greedy(
    model: Any, ids: Sequence[int], new_tokens: int, *, stop: int | None, device: torch.device | str
) -> list[int]:
    """The argmax continuation of `ids`, at most `new_tokens` long, without `stop` at its end.

    Not `generate`: that takes penalties and lengths from a model's generation_config, and variants may differ there.
    """
    step, cache, out = torch.tensor([list(ids)], device=device), None, []
    for _ in range(new_tokens):
        answer = model(input_ids=step, past_key_values=cache, use_cache=True)
        best, cache = best_token(answer.logits[0, -1]), answer.past_key_values
        if best == stop:
            break
        out.append(best)
        step = torch.tensor([[best]], device=device)
    return out


def best_token(logits: Tensor) -> int:
    if not torch.isfinite(logits).all():
        raise EvaluationError(DAMAGED)
    return int(logits.float().argmax())


@torch.inference_mode()
def _in_step(
    last_logits: Callable[[list[Tensor]], list[Tensor]],
    canaries: Sequence[Canary],
    stop: int | None,
    on_progress: Callable[[int, int], None] | None,
) -> list[list[int]]:
    """The greedy continuation of every canary, one token of each in a pass."""
    out: list[list[int]] = [[] for _ in canaries]
    open_ = [i for i, c in enumerate(canaries) if c.new_tokens]
    while open_:
        sequences = [torch.tensor([*canaries[i].ids, *out[i]]) for i in open_]
        best = [best_token(logits) for logits in last_logits(sequences)]
        for i, token in zip(open_, best, strict=True):
            out[i] += [] if token == stop else [token]
        open_ = [
            i for i, token in zip(open_, best, strict=True) if token != stop and len(out[i]) < canaries[i].new_tokens
        ]
        if on_progress is not None:
            on_progress(len(canaries) - len(open_), len(canaries))
    return out


def result(canaries: Sequence[Canary], given: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The canaries' section of the report: right of total by variant, and every answer."""
    names = [n for n in ORDER if n in given] + [n for n in given if n not in ORDER]
    items = [
        {
            "prompt": c.prompt,
            "answer": c.answer,
            "given": {n: given[n][i] for n in names},
            "right": {n: is_right(given[n][i], c.answer) for n in names},
        }
        for i, c in enumerate(canaries)
    ]
    return {
        "rule": RULE,
        "total": len(items),
        "right": {n: sum(item["right"][n] for item in items) for n in names},  # type: ignore[index]
        "items": items,
    }


def _plain(text: str) -> str:
    return " ".join(text.split())
