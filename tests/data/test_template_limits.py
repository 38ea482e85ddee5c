"""Chat templates that never end or take all memory: one error that names the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import chat

from requant.data import canaries, chat_template
from requant.data.documents import TextSource, tokenize
from requant.errors import InputError
from requant.runtime import guarded_process

BOMBS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a text times a number": "{{ 'a' * 10**10 }}",
    "a text that doubles": (
        "{% set n = namespace(s='aaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"
    ),
    "a block that doubles": (
        "{% set n = namespace(s='aaaa') %}{% for i in range(60) %}{% set x %}{{ n.s }}{{ n.s }}{% endset %}"
        "{% set n.s = x %}{% endfor %}{{ n.s }}"
    ),
    "a wide number": "{{ '%1000000000d' % 1 }}",
    "a wide number by format": "{{ '{:1000000000d}'.format(1) }}",
    "a wide text": "{{ 'a'|center(10**9) }}",
    "a long batch": "{{ [1]|batch(10**9, 1)|list|length }}",
    "a power in a filter": "{{ 1.5|round(10**9, 'ceil') }}",
    "calls that double": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "calls without an end": "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "made-up text": "{{ lipsum(n=10**6) }}",
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded_process, "SECONDS", 0.2)
    monkeypatch.setattr(guarded_process, "MEMORY", 128 * 2**20)


@pytest.mark.slow
@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_with_its_row(name: str, tmp_path: Path) -> None:
    tokenizer: Any = chat.tokenizer(BOMBS[name])
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=r"a\.jsonl: row 1 is not a chat row: the chat template "):
        tokenize(TextSource(path=tmp_path / "a.jsonl"), tokenizer)
    assert not chat_template.writes_bos(tokenizer)
    (tmp_path / "c.jsonl").write_text(json.dumps({"prompt": "q", "answer": "a"}) + "\n")
    with pytest.raises(InputError, match=r"c\.jsonl: canary 1: the chat template "):
        canaries.load(tmp_path / "c.jsonl", tokenizer)
