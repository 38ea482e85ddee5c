"""Greedy answers in one batch are those of each prompt alone; models that read padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import pico, tiny

from requant_eval.errors import EvaluationError
from requant_eval.scoring import answers
from requant_eval.scoring.canaries import greedy

PROMPTS = [(5, 6, 7), (40, 41), (9,), (11, 12, 13, 14, 15, 16, 17, 18, 19, 20)]


def alone(model: Any, new_tokens: int) -> list[list[int]]:
    return [greedy(model, p, new_tokens, stop=None, device="cpu") for p in PROMPTS]


def counted(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each forward pass from now on."""
    rows: list[int] = []
    forward = model.forward

    def seen(*args: Any, **given: Any) -> Any:
        rows.append(len(given["input_ids"]))
        return forward(*args, **given)

    monkeypatch.setattr(model, "forward", seen)
    return rows


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "qwen3", "mixtral"])
def test_a_batch_answers_as_each_prompt_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico.model(kind)
    expected = alone(model, 12)
    rows = counted(model, monkeypatch)
    told: list[tuple[int, int]] = []
    found = answers.answer(
        model, PROMPTS, 12, stops=(), device="cpu", on_progress=lambda done, of: told.append((done, of))
    )
    assert found == expected
    assert rows.count(4) == len(rows) - 1 == 13, "all in one batch, and the shortest alone once"
    assert told[-1] == (4, 4)


def test_an_answer_ends_with_its_stop_token() -> None:
    model = pico.model()
    whole = alone(model, 12)
    stops = {whole[0][3], whole[2][5]}
    found = answers.answer(model, PROMPTS, 12, stops=stops, device="cpu")
    for said, ids in zip(found, whole, strict=True):
        at = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        assert said == ids[: at + 1]
    assert any(len(said) < 12 for said in found)
    assert found == [answers.answer(model, [p], 12, stops=stops, device="cpu")[0] for p in PROMPTS]


def test_a_model_that_takes_no_positions_is_asked_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico.model()
    forward = model.forward

    def strict(input_ids: Any, past_key_values: Any = None, use_cache: bool = True) -> Any:
        return forward(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache)

    monkeypatch.setattr(model, "forward", strict)
    expected = alone(model, 6)
    rows = counted(model, monkeypatch)
    assert answers.answer(model, PROMPTS, 6, stops=(), device="cpu") == expected
    assert set(rows[-24:]) == {1}


def test_a_model_that_reads_padding_is_asked_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one with a recurrent state does: the mask and the positions change nothing."""
    model = pico.model()
    forward = model.forward

    def without_mask(**given: Any) -> Any:
        return forward(**{k: v for k, v in given.items() if k not in ("attention_mask", "position_ids")})

    monkeypatch.setattr(model, "forward", without_mask)
    expected = alone(model, 6)
    rows = counted(model, monkeypatch)
    assert answers.answer(model, PROMPTS, 6, stops=(), device="cpu") == expected
    assert rows == [4, 1] + [1] * 24


def test_nan_is_no_answer() -> None:
    model = pico.model()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(EvaluationError, match="NaN/inf in logits"):
        answers.answer(model, PROMPTS, 2, stops=(), device="cpu")


def test_many_prompts_are_several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large as their padded tokens, with those of the answers, may be."""
    model = pico.model()
    expected = alone(model, 6)
    monkeypatch.setitem(answers.BATCH_TOKENS, "cpu", 2 * (10 + 6))
    rows, told = counted(model, monkeypatch), list[tuple[int, int]]()
    found = answers.answer(
        model, PROMPTS, 6, stops=(), device="cpu", on_progress=lambda done, of: told.append((done, of))
    )
    assert found == expected
    assert max(rows) == 3
    assert told == sorted(told)
    assert told[-1] == (4, 4)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "rwkv"])
def test_a_model_without_keys_and_values_is_asked_too(kind: str) -> None:
    """Its output has another state, or none."""
    model = tiny.model(kind)
    found = answers.answer(model, PROMPTS[:2], 4, stops=(), device="cpu")
    for prompt, said in zip(PROMPTS, found, strict=False):
        ids = list(prompt)
        for token in said:
            with torch.no_grad():
                assert int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)
