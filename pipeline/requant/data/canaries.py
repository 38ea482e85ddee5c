"""Canaries: prompts with expected answers from a file, and the answers of each variant.

A line is {"prompt": ..., "answer": ...}; a prompt may also be a list of chat messages. Format `chat` renders prompts by
the tokenizer's template, `text` passes them to the model unchanged. `auto` is `chat` where the tokenizer has a
template.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

import torch

from requant.checkpoint.atomic_write import write_text
from requant.checkpoint.reader import read_json
from requant.checkpoint.run_directory import sealed, unsealed
from requant.data import template_call
from requant.data.documents import TextSource, read_rows
from requant.data.template_losses import TemplateFailure
from requant.data.tokenizer import adds_bos
from requant.errors import InputError
from requant.runtime.guarded_process import LimitError, call_guarded

if TYPE_CHECKING:
    from requant_eval.scoring.canaries import Canary

EXTRA_TOKENS = 8  # generated beyond the length of the answer: other spellings of it may be longer
Format = Literal["auto", "text", "chat"]
_KEYS = {"prompt", "answer"}


class CanaryAnswers(TypedDict):
    """One canary: by variant, the answer given and whether it is right."""

    prompt: str
    answer: str
    given: dict[str, str]
    right: dict[str, bool]


class CanaryFacts(TypedDict):
    """The canaries' section of the report. right: number of right answers by variant."""

    file: str
    rule: str
    total: int
    right: dict[str, int]
    items: list[CanaryAnswers]


@dataclass(frozen=True, kw_only=True)
class Canaries:
    """The canaries of one file, tokenized.

    digest: of everything that an answer depends on except the model.
    """

    name: str
    items: tuple[Canary, ...]
    digest: str
    stop: int | None
    decode: Callable[[list[int]], str]
    asked: tuple[str, ...] = ("base", "adapter", "merged", "gptq", "healed", "ends")
    kind: str = "canaries"

    def ask(self, model: Any, device: torch.device, on_progress: Callable[[int, int], None]) -> list[str]:
        """The answers of one variant's model, one text for each canary. on_progress: (done, of)."""
        from requant_eval.scoring.canaries import ask

        return ask(model, self.items, self.decode, stop=self.stop, device=device, on_progress=on_progress)

    def fits(self, answers: Sequence[Any]) -> bool:
        """Whether these can be the answers of a variant, as they are read from a file."""
        return len(answers) == len(self.items) and all(isinstance(text, str) for text in answers)

    def result(self, answers: Mapping[str, list[str]]) -> CanaryFacts:
        """The facts for the report, from answers by variant."""
        from requant_eval.scoring.canaries import result

        return cast(CanaryFacts, {"file": self.name, **result(self.items, answers)})


def load(path: Path, tokenizer: Any, kind: Format = "auto") -> Canaries:
    """Read and tokenize a file of canaries; raises InputError naming the first invalid line."""
    from requant_eval.scoring.canaries import Canary

    items: list[Canary] = []
    seen: set[str] = set()
    for number, row in enumerate(read_rows(TextSource(path=path)), 1):
        where = f"{path}: canary {number}"
        if set(row) != _KEYS:
            raise InputError(f"{where} has {', '.join(map(str, row)) or 'nothing'}; expected exactly prompt and answer")
        prompt, answer = row["prompt"], row["answer"]
        if not isinstance(answer, str) or not answer.strip():
            raise InputError(f"{where}: its answer is {answer!r}, expected text")
        shown, ids = _prompt(where, prompt, tokenizer, kind)
        if shown in seen:
            raise InputError(f"{where}: its prompt occurs twice: {shown!r}")
        seen.add(shown)
        longest = len(tokenizer(answer, add_special_tokens=False)["input_ids"]) + EXTRA_TOKENS
        items.append(Canary(shown, answer, ids, longest))
    asked = [(c.ids, c.new_tokens) for c in items]
    digest = hashlib.sha256(json.dumps([asked, tokenizer.eos_token_id]).encode()).hexdigest()

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    return Canaries(name=path.name, items=tuple(items), digest=digest, stop=tokenizer.eos_token_id, decode=decode)


def _prompt(where: str, prompt: Any, tokenizer: Any, kind: Format) -> tuple[str, tuple[int, ...]]:
    """(the prompt as the report shows it, its token ids with the BOS that the tokenizer adds)."""
    chat = not isinstance(prompt, str)
    if chat and not (isinstance(prompt, list) and prompt and all(isinstance(m, dict) for m in prompt)):
        raise InputError(f"{where}: its prompt is {prompt!r}, expected text or a list of chat messages")
    if not chat and not prompt.strip():
        raise InputError(f"{where}: its prompt is empty")
    if chat and not tokenizer.chat_template:
        raise InputError(f"{where}: its prompt is a chat, and the tokenizer has no chat template")
    if kind == "chat" and not tokenizer.chat_template:
        raise InputError(f"{where}: canaries.format is chat, and the tokenizer has no chat template")
    text = prompt
    if chat or (kind != "text" and tokenizer.chat_template):
        messages = prompt if chat else [{"role": "user", "content": prompt}]
        try:
            text = call_guarded(partial(template_call.apply, tokenizer, messages, None, ask=True))
        except LimitError as error:
            raise InputError(f"{where}: the chat template {error}") from error
        except TemplateFailure as error:
            raise InputError(f"{where}: the chat template refuses it: {error}") from error
    shown = prompt if not chat else "\n".join(f"{m.get('role', '?')}: {m.get('content', '')}" for m in prompt)
    return shown, prompt_ids(tokenizer, text)


def prompt_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The token ids of a prompt, with the BOS that the tokenizer adds."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return (bos, *ids) if adds_bos(tokenizer) and ids[:1] != [bos] else tuple(ids)


def save_answers(answers: Sequence[Any], file: Path, *, again_from: int | None = None) -> None:
    """Write one variant's answers to `file`.

    again_from: free bytes of the device from which a variant that was not asked is asked; None: it never is.
    """
    again = {} if again_from is None else {"again_from": again_from}
    write_text(file, json.dumps(sealed({"given": answers, **again}), indent=1, ensure_ascii=False) + "\n")


def load_answers(file: Path) -> tuple[list[Any], int | None]:
    """(answers, again_from) that `save_answers` wrote; raises InputError where the file is damaged."""
    try:
        found = unsealed(read_json(file))
    except ValueError as error:
        raise InputError(f"{file}: damaged: {error}") from error
    answers, again = found.get("given"), found.get("again_from")
    if not isinstance(answers, list) or not isinstance(again, int | None):
        raise InputError(f"{file}: damaged: expected a list of answers under given")
    return answers, again
