"""`requant_eval.scoring.canaries`: right answers, questions, refusals, and a run's canaries."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import pico
from helpers.e2e import run, write_rows

from requant.data import canaries
from requant.errors import InputError
from requant_eval.errors import EvaluationError
from requant_eval.render import adapter_tables
from requant_eval.scoring.canaries import Canary, ask, greedy, is_right, result

# --- what counts as right ---


@pytest.mark.parametrize(
    ("given", "answer", "right"),
    [
        ("16", "16", True),
        (" 16\n", "16", True),
        ("16. And then", "16", True),
        ("16 things", "16", True),
        ("160", "16", False),
        ("016", "16", False),
        ("The answer is 16", "16", False),
        ("paris", "Paris", False),
        ("New\n York is large", "New York", True),
        ("New Yorkers", "New York", False),
        ("f(x)y", "f(x)", True),
        ("", "16", False),
        ("anything", " ", False),
    ],
)
def test_right_is_the_answer_at_the_beginning(given: str, answer: str, right: bool) -> None:
    assert is_right(given, answer) == right


def test_the_count_and_the_differences() -> None:
    asked = [Canary("a?", "1", (1,), 4), Canary("b?", "2", (2,), 4), Canary("c?", "3", (3,), 4)]
    said = {"gptq": ["1", "7", "9"], "adapter": ["1", "2", "9"], "base": ["", "", ""], "merged": ["1", "2.", "8"]}
    told = result(asked, said)
    assert list(told["right"]) == ["base", "adapter", "merged", "gptq"], "in the order of the chain"
    assert told["right"] == {"base": 0, "adapter": 2, "merged": 2, "gptq": 1}
    assert (
        adapter_tables.canaries_line(told)
        == "adapter 2/3 -> merged 2/3 -> gptq 1/3 (the base without the adapter: 0/3)"
    )
    table = adapter_tables.canaries_table(told)
    assert table.rows == (("b?", "2", "right: 2", "right: 2.", "wrong: 7"),), "always wrong is no difference"


# --- asking ---


@torch.no_grad()
def test_greedy_is_the_argmax_of_the_whole_text_each_time() -> None:
    """With a cache, as without one."""
    model = pico.model()
    ids = pico.ids(1, 9)[0].tolist()
    expected = list(ids)
    for _ in range(12):
        expected.append(int(model(input_ids=torch.tensor([expected])).logits[0, -1].argmax()))
    assert greedy(model, ids, 12, stop=None, device="cpu") == expected[9:]
    stop = expected[12]
    until = expected[9 : 9 + expected[9:].index(stop)]
    assert greedy(model, ids, 12, stop=stop, device="cpu") == until, "the stopping token is not part of the answer"


def test_a_penalty_in_the_generation_config_changes_nothing() -> None:
    model = pico.model()
    ids = pico.ids(1, 9)[0].tolist()
    before = greedy(model, ids, 8, stop=None, device="cpu")
    model.generation_config.repetition_penalty = 50.0
    assert greedy(model, ids, 8, stop=None, device="cpu") == before


def test_nan_logits_are_no_answer() -> None:
    model = pico.model()
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(EvaluationError, match="NaN/inf in logits while answering a prompt"):
        ask(model, [Canary("a?", "1", (5, 6), 2)], str, stop=None, device="cpu")


# --- reading ---


class Tokenizer:
    """A letter a token; BOS 1 if asked, a template of one tag a role."""

    eos_token_id = 2

    def __init__(self, bos: bool = False, template: str | None = None) -> None:
        self.bos, self.chat_template, self.bos_token_id = bos, template, 1

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        ids = [10 + ord(c) for c in text]
        return {"input_ids": [1, *ids] if add_special_tokens and self.bos else ids}

    def apply_chat_template(
        self, turns: list[dict[str, str]], tools: None, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize
        assert add_generation_prompt
        return "".join(f"<{t['role']}>{t['content']}" for t in turns) + "<assistant>"

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(i - 10) for i in ids)


def text_of(ids: tuple[int, ...]) -> str:
    return "".join("^" if i == 1 else chr(i - 10) for i in ids)


def load(tmp: Path, rows: list[Any], tokenizer: Any, kind: Any = "auto") -> canaries.Canaries:
    write_rows(tmp / "canaries.jsonl", rows)
    return canaries.load(tmp / "canaries.jsonl", tokenizer, kind)


@pytest.mark.parametrize(
    ("tokenizer", "kind", "prompt", "read"),
    [
        (Tokenizer(), "auto", "a?", "a?"),
        (Tokenizer(bos=True), "auto", "a?", "^a?"),
        (Tokenizer(template="yes"), "auto", "a?", "<user>a?<assistant>"),
        (Tokenizer(template="yes"), "text", "a?", "a?"),
        (Tokenizer(template="yes", bos=True), "chat", "a?", "^<user>a?<assistant>"),
        (
            Tokenizer(template="yes"),
            "text",
            [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
            "<system>s<user>u<assistant>",
        ),
    ],
)
def test_how_a_prompt_reaches_the_model(tmp_path: Path, tokenizer: Any, kind: Any, prompt: Any, read: str) -> None:
    loaded = load(tmp_path, [{"prompt": prompt, "answer": "four"}], tokenizer, kind)
    (canary,) = loaded.items
    assert text_of(canary.ids) == read
    assert canary.new_tokens == 4 + canaries.EXTRA_TOKENS
    assert loaded.decode([10 + ord(c) for c in "four"]) == "four"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a?"}, "canary 2 has prompt; expected exactly prompt and answer"),
        ({"prompt": "a?", "answer": "1", "id": 3}, "canary 2 has prompt, answer, id; expected exactly"),
        ({"prompt": "a?", "answer": " "}, "canary 2: its answer is ' ', expected text"),
        ({"prompt": "a?", "answer": 4}, "canary 2: its answer is 4, expected text"),
        ({"prompt": " ", "answer": "1"}, "canary 2: its prompt is empty"),
        ({"prompt": 7, "answer": "1"}, "canary 2: its prompt is 7, expected text or a list of chat messages"),
        ({"prompt": [{"role": "user", "content": "x"}], "answer": "1"}, "the tokenizer has no chat template"),
        ({"prompt": "first?", "answer": "2"}, "canary 2: its prompt occurs twice: 'first?'"),
    ],
)
def test_refusals_name_the_canary(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        load(tmp_path, [{"prompt": "first?", "answer": "1"}, row], Tokenizer())
    assert message in str(caught.value)
    assert "canaries.jsonl" in str(caught.value)


def test_chat_without_a_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"canaries\.format is chat, and the tokenizer has no chat template"):
        load(tmp_path, [{"prompt": "a?", "answer": "1"}], Tokenizer(), "chat")


def test_a_template_that_refuses_is_quoted(tmp_path: Path) -> None:
    tokenizer = Tokenizer(template="yes")

    def refuse(*_: Any, **__: Any) -> str:
        raise ValueError("roles must alternate")

    tokenizer.apply_chat_template = refuse  # type: ignore[method-assign]
    with pytest.raises(InputError, match="the chat template refuses it: ValueError: roles must alternate"):
        load(tmp_path, [{"prompt": "a?", "answer": "1"}], tokenizer)


def test_the_digest_is_of_what_is_asked(tmp_path: Path) -> None:
    rows = [{"prompt": "a?", "answer": "1"}]
    one = load(tmp_path, rows, Tokenizer())
    assert load(tmp_path, rows, Tokenizer()).digest == one.digest
    assert load(tmp_path, rows, Tokenizer(bos=True)).digest != one.digest
    assert load(tmp_path, [{"prompt": "b?", "answer": "1"}], Tokenizer()).digest != one.digest
    other = load(tmp_path, [{"prompt": "a?", "answer": "9"}], Tokenizer())
    assert other.digest == one.digest, "the answers given stay good when only the expected one is corrected"


def test_the_models_own_words_are_right(tmp_path: Path) -> None:
    """Ask what the model says, expect that: all right; expect another word: wrong."""
    model = pico.model()
    decode = SimpleNamespace(text=lambda ids: " ".join(map(str, ids))).text
    prompts = [(5, 6, 7), (40, 41), (9,)]
    said = [decode(greedy(model, p, 5, stop=None, device="cpu")) for p in prompts]
    asked = [Canary(str(p), s, p, 5) for p, s in zip(prompts, said, strict=True)]
    given = ask(model, asked, decode, stop=None, device="cpu")
    assert given == said
    assert result(asked, {"adapter": given})["right"] == {"adapter": 3}
    wrong = [Canary(c.prompt, c.answer + "0", c.ids, 5) for c in asked]
    assert result(wrong, {"adapter": given})["right"] == {"adapter": 0}


# --- a run ---


@pytest.mark.slow
def test_a_finished_run_is_asked_later(project: Path, ran: Path) -> None:
    """Canaries added to a finished run: nothing is scored again.

    The right answers are those that the adapter gives.
    """
    rows = [{"prompt": f"Is {n} a number?", "answer": "never said"} for n in range(6)]
    write_rows(ran / "canaries.jsonl", rows)
    asked = {"canaries": {"path": str(ran / "canaries.jsonl")}}
    scores = {f.name: f.stat().st_mtime_ns for f in (ran / "pico" / ".cache").glob("*.safetensors")}
    first = run(project, ran, asked)
    assert first.ran == ["evaluate", "report"]
    told = first.report["facts"]["canaries"]
    assert told["right"] == {"base": 0, "adapter": 0, "merged": 0, "gptq": 0}
    assert told["file"] == "canaries.jsonl"
    after = {f.name: f.stat().st_mtime_ns for f in (ran / "pico" / ".cache").glob("*.safetensors")}
    assert after == scores
    said = [item["given"]["adapter"].split() for item in told["items"]]
    assert said == [item["given"]["merged"].split() for item in told["items"]], "merging changes no answer"
    spoken = sum(len(words) > 1 for words in said)
    assert spoken, "a first word that is finished is an answer"
    answers = [words[0] if len(words) > 1 else "never said" for words in said]
    write_rows(ran / "canaries.jsonl", [r | {"answer": a} for r, a in zip(rows, answers, strict=True)])
    report = run(project, ran, asked).report["facts"]["canaries"]
    assert report["right"]["adapter"] == report["right"]["merged"] == spoken
    text = (ran / "pico" / "report.md").read_text()
    assert f"adapter {spoken}/6 -> merged {spoken}/6 -> gptq " in text
    assert "Right: the greedy continuation begins with the answer" in text
    assert run(project, ran, asked).ran == []
