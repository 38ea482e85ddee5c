"""A variant of ours as a model of lm-evaluation-harness, through its Hugging Face backend.

Generation is greedy with the stop tokens that the checkpoint ships with; penalties and lengths of a generation_config
are left out, since variants may differ there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from requant.data import template_call
from requant.data.tokenizer import adds_bos
from requant.errors import StageError


def wrapped(
    model: Any,
    tokenizer: Any,
    *,
    window: int,
    batch: int,
    stops: Sequence[int],
    on_request: Callable[[], None] = lambda: None,
) -> Any:
    """The library's model of a resident one. window: its positions. batch: requests at a time.

    on_request: called when a request is answered.
    """
    from lm_eval.models.huggingface import HFLM
    from transformers import GenerationConfig

    class Variant(HFLM):  # type: ignore[misc]
        """HFLM with our way to write BOS and to call chat templates."""

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
            ids: list[int] = super().tok_encode(string, add_special_tokens=add_special_tokens, **options)
            return ids if add_special_tokens is False else _with_bos(self.tokenizer, ids)

        def tok_batch_encode(self, strings: list[str], *args: Any, **options: Any) -> Any:
            bos = self.tokenizer.bos_token if getattr(self.tokenizer, "needs_bos", False) else None
            given = [s if bos is None or s.startswith(bos) else bos + s for s in strings]
            return super().tok_batch_encode(given, *args, **options)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            answers = super().loglikelihood(requests, disable_tqdm=True)
            if any(math.isnan(value) for value, _ in answers):
                raise StageError("NaN in log-likelihoods of a task: the checkpoint is damaged or overflows")
            return answers

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return rendered(self.tokenizer, chat_history, ask=add_generation_prompt)

    ends = list(dict.fromkeys(stops)) or [tokenizer.eos_token_id]
    model.generation_config = GenerationConfig(eos_token_id=ends, bos_token_id=tokenizer.bos_token_id)
    made = Variant(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch, max_length=window)
    made.cache_hook = _Counter(on_request)
    return made


def rendered(tokenizer: Any, messages: list[dict[str, str]], *, ask: bool) -> str:
    """A conversation through the chat template. ask: with the beginning of an answer, else the last turn stays open."""
    if ask:
        return template_call.apply(tokenizer, messages, None, ask=True)
    return str(tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True))


def tokens(tokenizer: Any, text: str) -> int:
    """How many tokens a prompt is, as it is given to the model."""
    return len(_with_bos(tokenizer, tokenizer(text, verbose=False)["input_ids"]))


def _with_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    bos = tokenizer.bos_token_id
    return [bos, *ids] if getattr(tokenizer, "needs_bos", False) and adds_bos(tokenizer) and ids[:1] != [bos] else ids


class _Counter:
    """What the library tells of each answer: it is counted, not kept."""

    def __init__(self, on_request: Callable[[], None]) -> None:
        self.on_request = on_request

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        self.on_request()
