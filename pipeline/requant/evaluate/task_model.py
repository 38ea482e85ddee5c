"""A variant as a model of lm-evaluation-harness: its Hugging Face backend, or a server.

Generation is greedy with the stop tokens that the checkpoint ships with; penalties and lengths of a generation_config
are left out, since variants may differ there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from requant.data import template_call
from requant.data.tokenizer import adds_bos
from requant.errors import StageError
from requant.evaluate.generation_settings import new_tokens
from requant_eval.scoring import answers

if TYPE_CHECKING:
    from requant_eval.scoring.fixed_steps import Capture

T = TypeVar("T")
R = TypeVar("R")
GREEDY = {"attention_mask", "do_sample", "temperature"}  # what the library says of a greedy answer
SERVED_AT_ONCE = 256  # requests that a server gets together


class Server(Protocol):
    """A server that has one variant loaded: `deploy.task_server`. described: which it is, in words."""

    described: str

    def scores(self, rows: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, bool]]:
        """(ln p of the tokens from `first` on, whether each was the most likely one) of each (ids, first)."""

    def continuations(
        self, prompts: Sequence[Sequence[int]], *, new_tokens: int, until: Sequence[str], stops: Sequence[int]
    ) -> list[list[int]]:
        """The greedy continuation of each prompt, up to a text of `until` or a token of `stops`, both included."""


def wrapped(
    model: Any,
    tokenizer: Any,
    *,
    window: int,
    batch: int,
    stops: Sequence[int],
    on_request: Callable[[], None] = lambda: None,
    server: Server | None = None,
    capture: Capture | None = None,
) -> Any:
    """The library's model of a resident one. window: its positions. batch: requests at a time.

    on_request: called when a request is answered. server: answers in the model's place, which may be without weights.
    capture: makes one launch of a step of an answer, as `requant_eval.scoring.answers` takes it.
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
            found = super().loglikelihood(requests, disable_tqdm=True)
            if any(math.isnan(value) for value, _ in found):
                raise StageError("NaN in log-likelihoods of a task: the checkpoint is damaged or overflows")
            return found

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return rendered(self.tokenizer, chat_history, ask=add_generation_prompt)

    ends = list(dict.fromkeys(stops)) or [tokenizer.eos_token_id]
    model.generation_config = GenerationConfig(eos_token_id=ends, bos_token_id=tokenizer.bos_token_id)
    kind = _served(Variant, server, ends, on_request) if server else Variant
    kind = _capturing(kind, capture, ends) if capture and not server else kind
    made = kind(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch, max_length=window)
    made.cache_hook = _Counter(on_request)
    return made


def _capturing(variant: Any, capture: Capture, ends: Sequence[int]) -> Any:
    """The library's model whose answers are written by captured steps, as long as they can be."""

    class Capturing(variant):  # type: ignore[misc]
        """The same prompts and tokens, in fewer launches."""

        captures = True

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
            if not self.captures or options.keys() - GREEDY:
                return super()._model_generate(context=context, max_length=max_length, stop=stop, **options)
            return _continued(
                self.model, context, options["attention_mask"], length=max_length, fill=self.tokenizer.pad_token_id,
                stops=ends, capture=capture, over=partial(_holds, self.tokenizer, stop),
                uncaptured=partial(setattr, self, "captures", False),
            )  # fmt: skip

    return Capturing


def _continued(model: Any, context: Tensor, seen: Tensor, *, length: int, fill: int, **how: Any) -> Tensor:
    """`context`, int64 [rows, longest], and the greedy answers to it, up to `length`; the rest is `fill`.

    seen: its attention mask. fill: a token that is no text when decoded. how: of `answers.answer`.
    """
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(context, seen, strict=True)]
    found = answers.answer(model, prompts, length - context.shape[1], device=context.device, **how)
    longest = max(map(len, found))
    filled = [ids + [fill] * (longest - len(ids)) for ids in found]
    return torch.cat([context, torch.tensor(filled, device=context.device)], dim=1)


def _holds(tokenizer: Any, texts: Sequence[str], ids: Sequence[int]) -> bool:
    """Whether an answer holds one of the texts that end it."""
    said = tokenizer.decode(ids)
    return any(text in said for text in texts if text)


def _served(variant: Any, server: Server, ends: Sequence[int], told: Callable[[], None]) -> Any:
    """The library's model whose requests a server answers."""

    class Served(variant):  # type: ignore[misc]
        """The same requests, of another's making."""

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            rows = [([*context, *answer], len(context)) for _, context, answer in requests]
            return _in_parts(rows, server.scores, told)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return _generated(server, self, [request.args for request in requests], ends, told)

    return Served


def _generated(
    server: Server,
    model: Any,
    asked: Sequence[tuple[str, Mapping[str, Any]]],
    ends: Sequence[int],
    told: Callable[[], None],
) -> list[str]:
    """The answers of a server, cut as the library cuts those of a model of its own."""
    found: list[str] = [""] * len(asked)
    settings = [(new_tokens(options), tuple(_until(options))) for _, options in asked]
    for longest, until in dict.fromkeys(settings):
        some = [i for i, own in enumerate(settings) if own == (longest, until)]
        prompts = [model.tok_batch_encode([asked[i][0]])[0][0].tolist() for i in some]

        def ask(part: Sequence[list[int]], longest: int = longest, until: Sequence[str] = until) -> list[list[int]]:
            return server.continuations(part, new_tokens=longest, until=until, stops=ends)

        for i, ids in zip(some, _in_parts(prompts, ask, told), strict=True):
            text = model.tok_decode(ids[:-1] if ids and ids[-1] in ends else ids, skip_special_tokens=True)
            for end in (*until, model.tok_decode(model.eot_token_id, skip_special_tokens=False)):
                text = text.split(end)[0] if end else text
            found[i] = text
    return found


def _until(options: Mapping[str, Any]) -> list[str]:
    """The texts that end an answer."""
    until = options.get("until") or []
    return [end for end in (until if isinstance(until, list) else [until]) if end]


def _in_parts(asked: Sequence[T], answer: Callable[[Sequence[T]], list[R]], told: Callable[[], None]) -> list[R]:
    """The answers to all, some at a time."""
    found: list[R] = []
    for at in range(0, len(asked), SERVED_AT_ONCE):
        found += answer(asked[at : at + SERVED_AT_ONCE])
        for _ in asked[at : at + SERVED_AT_ONCE]:
            told()
    return found


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
