"""Stop tokens of a fine-tune that the base's configs do not name.

Servers stop at `eos_token_id` of generation_config.json and config.json. A fine-tune that learned another end of turn
would go on beyond it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from requant.checkpoint import model_files
from requant.runtime.guarded_process import call_guarded

_ANSWER = "Requant"


@dataclass(frozen=True, slots=True, kw_only=True)
class StopTokens:
    """Token ids that the written configs get. added: new ones, id -> text.

    generation: of generation_config.json, the base's and the new ones. config: of config.json, the new end of a turn.
    """

    generation: tuple[int, ...]
    config: int
    added: Mapping[int, str]

    def __str__(self) -> str:
        new = ", ".join(f"{text} ({number})" for number, text in self.added.items())
        return (
            f"the adapter's tokenizer ends turns with {new}, which the base's configs do not stop at: "
            f"generation_config.json gets {list(self.generation)}, config.json {self.config}"
        )


def stop_tokens(tokenizer: Any, base: Path, config: Mapping[str, Any]) -> StopTokens | None:
    """The stop tokens to write, None when those of the base are right.

    tokenizer: the fine-tune's, loaded by transformers. base: its directory. config: its config.json.
    """
    of_generation = _ids((model_files.generation_config(base) or {}).get("eos_token_id"))
    of_config = _ids(config.get("eos_token_id")) or _ids((config.get("text_config") or {}).get("eos_token_id"))
    turn = end_of_turn(tokenizer)
    ends = [i for i in (turn, tokenizer.eos_token_id) if isinstance(i, int)]
    added = [i for i in dict.fromkeys(ends) if i not in (of_generation or of_config)]
    if not added:
        return None
    return StopTokens(
        generation=tuple(dict.fromkeys((*of_generation, *of_config, *added))),
        config=ends[0] if turn is not None else added[0],
        added={i: str(tokenizer.convert_ids_to_tokens(i)) for i in added},
    )


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template writes after an answer; None without one."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = call_guarded(partial(tokenizer.apply_chat_template, turns, tokenize=False))
    except Exception:  # noqa: BLE001  # a template is a program: it can raise anything, and rows say what
        return None
    after = str(text).rpartition(_ANSWER)[2].strip()
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    return ids[0] if ids and ids[0] in special else None


def _ids(value: Any) -> tuple[int, ...]:
    """`eos_token_id` as a config writes it: a number, a list, or nothing."""
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, int) else ()
