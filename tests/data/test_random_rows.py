"""`requant.data.documents`: whatever a row holds, it is read or refused in one message."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from helpers import chat

from requant.data.documents import TextSource, tokenize
from requant.errors import InputError

VALUES: tuple[Any, ...] = (
    "text", "", None, 0, 1.5, True, float("nan"), "[]", '[{"role":"user","content":"x"}]', "null", "\ud83d", "a\nb", -1,
    "word " * 12, [], {}, ["a", "b"], [None], {"type": "text", "text": "t"}, {"type": "image"}, 10**30,
    {"role": "user", "content": "u"}, {"from": "gpt", "value": "v"},
)  # fmt: skip
KEYS = (
    "messages", "prompt", "completion", "instruction", "input", "output", "text", "system", "tools", "functions", "history",
    "context", "images", "role", "from", "value", "tool_calls", "function_call", "name", "arguments", "weight", "type", "",
)  # fmt: skip
SHAPES = (("prompt", "completion"), ("instruction", "input", "output"), ("text",), ("question", "context", "answer"))
TEMPLATES = (chat.ECHO, chat.STRICT, chat.TOOLS, chat.THINKING, chat.KNOWN, chat.SHORT_IDS, chat.TEXT_ARGUMENTS, None)


class Rows:
    """Rows drawn at random, most of them nearly right."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def value(self, depth: int = 0) -> Any:
        kind = self.draw.random()
        if depth > 3 or kind < 0.5:
            return self.draw.choice(VALUES)
        if kind < 0.75:
            return [self.value(depth + 1) for _ in range(self.draw.randint(0, 3))]
        return {self.draw.choice(KEYS): self.value(depth + 1) for _ in range(self.draw.randint(0, 4))}

    def message(self) -> dict[str, Any]:
        role = self.draw.choice(["user", "assistant", "system", "tool", "developer", "gpt", "x", None, 3])
        message = {"role": role, "content": self.draw.choice(["hi", "yo", None, self.value(2)])}
        return message | ({self.draw.choice(KEYS): self.value(1)} if self.draw.random() < 0.3 else {})

    def row(self) -> dict[str, Any]:
        if self.draw.random() < 0.5:
            row: dict[str, Any] = {"messages": [self.message() for _ in range(self.draw.randint(0, 4))]}
        else:
            row = {k: self.draw.choice(["some text", self.value(1)]) for k in self.draw.choice(SHAPES)}
        return row | ({self.draw.choice(KEYS): self.value(1)} if self.draw.random() < 0.2 else {})


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_a_row_is_read_or_refused(tmp_path: Path, template: str | None) -> None:
    rows, tokenizer = Rows(TEMPLATES.index(template)), chat.tokenizer(template)
    read, refusals = 0, list[str]()
    for _ in range(150):
        (tmp_path / "rows.jsonl").write_text(json.dumps(rows.row()))
        asked = rows.draw.choice(["auto", "chat", "completion", "text"])
        try:
            documents = tokenize(TextSource(path=tmp_path / "rows.jsonl"), tokenizer, asked, notes=[])
        except InputError as error:
            refusals.append(str(error))
            continue
        read += 1
        assert all(len(d.ids) == len(d.scored) for d in documents)
    assert read > 5
    assert len(refusals) > 5
    assert all("rows.jsonl" in message for message in refusals)
