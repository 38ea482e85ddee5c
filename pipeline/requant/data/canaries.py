"""The recipe's canaries: a file of prompts and answers as token ids, and what variants said to them.

A line is {"prompt": ..., "answer": ...}; a prompt may also be a list of chat messages. `chat` sends prompts through the
tokenizer's template, `text` gives them to the model as they are, `auto` is `chat` where there is a template.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from requant.checkpoint.reader import read_json, write_text
from requant.data.documents import Source, adds_bos, read_rows
from requant.errors import InputError

if TYPE_CHECKING:
    from requant_eval.scoring.canaries import Canary

ASKED = ("base", "adapter", "merged", "gptq", "healed")
LISTEN = 8  # tokens beyond the answer's own: other spellings of it may be longer
Format = Literal["auto", "text", "chat"]
_KEYS = {"prompt", "answer"}


@dataclass(frozen=True)
class Canaries:
    """All canaries of a file. digest: of everything that an answer depends on but the model."""

    name: str
    items: tuple[Canary, ...]
    digest: str
    stop: int | None
    decode: Callable[[list[int]], str]

    def ask(self, model: Any, device: torch.device, tell: Callable[[int, int], None]) -> list[str]:
        """What one variant answers, one text for each canary."""
        from requant_eval.scoring.canaries import ask

        return ask(model, self.items, self.decode, stop=self.stop, device=device, on_progress=tell)

    def result(self, given: Mapping[str, list[str]]) -> dict[str, Any]:
        """The facts for the report, from answers by variant."""
        from requant_eval.scoring.canaries import result

        return {"file": self.name, **result(self.items, given)}


def load(path: Path, tokenizer: Any, kind: Format = "auto") -> Canaries:
    """Read and tokenize a file of canaries; raises InputError naming the line for anything that is not one."""
    from requant_eval.scoring.canaries import Canary

    items: list[Canary] = []
    seen: set[str] = set()
    for number, row in enumerate(read_rows(Source(path=path)), 1):
        where = f"{path}: canary {number}"
        if set(row) != _KEYS:
            raise InputError(f"{where} has {', '.join(map(str, row)) or 'nothing'}; expected exactly prompt and answer")
        prompt, answer = row["prompt"], row["answer"]
        if not isinstance(answer, str) or not answer.strip():
            raise InputError(f"{where}: its answer is {answer!r}, expected text")
        shown, ids = _prompt(where, prompt, tokenizer, kind)
        if shown in seen:
            raise InputError(f"{where}: its prompt stands there twice: {shown!r}")
        seen.add(shown)
        longest = len(tokenizer(answer, add_special_tokens=False)["input_ids"]) + LISTEN
        items.append(Canary(shown, answer, ids, longest))
    asked = [(c.ids, c.new_tokens) for c in items]
    digest = hashlib.sha256(json.dumps([asked, tokenizer.eos_token_id]).encode()).hexdigest()

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    return Canaries(path.name, tuple(items), digest, tokenizer.eos_token_id, decode)


def _prompt(where: str, prompt: Any, tokenizer: Any, kind: Format) -> tuple[str, tuple[int, ...]]:
    """(the prompt as a report shows it, its token ids with the BOS that the tokenizer adds)."""
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
        from jinja2 import TemplateError

        messages = prompt if chat else [{"role": "user", "content": prompt}]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where}: the chat template refuses it: {type(error).__name__} {error}") from error
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if adds_bos(tokenizer) and ids[:1] != [bos]:
        ids = [bos, *ids]
    shown = prompt if not chat else "\n".join(f"{m.get('role', '?')}: {m.get('content', '')}" for m in prompt)
    return shown, tuple(ids)


def save(given: list[str], file: Path) -> None:
    """Keep one variant's answers."""
    write_text(file, json.dumps({"given": given}, indent=1, ensure_ascii=False) + "\n")


def saved(file: Path) -> list[str]:
    """What `save` kept."""
    given: list[str] = read_json(file)["given"]
    return given
