"""Answers by steps on tensors that keep their place are those of plain steps."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import pico, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from requant.runtime.cuda_graph import CudaGraph
from requant_eval.errors import EvaluationError
from requant_eval.scoring import answers, fixed_steps
from requant_eval.scoring.canaries import LOOKED_AT

PROMPTS = [(5, 6, 7), (40, 41), (9,), (11, 12, 13, 14, 15, 16, 17, 18, 19, 20)]
TOKENS = 24


class Captures:
    """A capture that runs the step as a graph's warm-ups do, and counts launches after it."""

    def __init__(self) -> None:
        self.captures = self.launches = 0

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        for _ in range(3):
            step()

        def launch() -> None:
            self.launches += 1
            step()

        return launch


def answered(model: Any, *, stops: tuple[int, ...] = (), capture: Any = None, tokens: int = TOKENS) -> list[list[int]]:
    return answers.answer(model, PROMPTS, tokens, stops=stops, device="cpu", capture=capture)


def said(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    return [r.getMessage() for r in caplog.records if "without captured steps" in r.getMessage() and r.levelno == level]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "qwen3", "cohere2", "qwen3_moe"])
def test_fixed_steps_answer_as_plain_ones(kind: str, attention: str) -> None:
    """Prompts and answers are longer than the sliding windows of gemma3_text and cohere2, which are 8."""
    model = pico.model(kind)
    model.set_attn_implementation(attention)
    capture = Captures()
    assert answered(model, capture=capture) == answered(model)
    assert (capture.captures, capture.launches) == (1, TOKENS - 1)


@pytest.mark.parametrize("window", [3, 8, 60])
def test_one_window_of_all_layers(window: int) -> None:
    model, capture = pico.model("mistral", sliding_window=window), Captures()
    assert answered(model, capture=capture) == answered(model)
    assert capture.launches == TOKENS - 1


def test_answers_end_at_their_stop_tokens_and_steps_when_all_have_ended() -> None:
    model = pico.model()
    whole = answered(model, tokens=60)
    stops = tuple({ids[at] for ids, at in zip(whole, (3, 5, 9, 17), strict=True)})
    expected, capture, told = answered(model, stops=stops, tokens=60), Captures(), list[tuple[int, int]]()
    found = answers.answer(
        model, PROMPTS, 60, stops=stops, device="cpu", capture=capture,
        on_progress=lambda done, of: told.append((done, of)),
    )  # fmt: skip
    assert found == expected
    assert len({len(ids) for ids in found}) > 1
    most = max(map(len, found))
    assert most - 1 <= capture.launches < most - 1 + LOOKED_AT < 59, "not all 59"
    assert told == sorted(told)
    assert told[-1] == (4, 4)


@pytest.mark.parametrize("capture", [None, Captures])
def test_answers_that_are_over_end_at_the_next_look(capture: Any) -> None:
    """All that is wanted is there after 5 tokens of three answers and after 20 of the fourth."""
    model = pico.model()
    whole = answered(model, tokens=60)
    wanted = [tuple(ids[:count]) for ids, count in zip(whole, (5, 5, 5, 20), strict=True)]

    def over(ids: list[int]) -> bool:
        return any(tuple(ids[: len(own)]) == own for own in wanted)

    made = capture() if capture else None
    found = answers.answer(model, PROMPTS, 60, stops=(), device="cpu", capture=made, over=over)
    assert [ids[: len(own)] for ids, own in zip(found, map(list, wanted), strict=True)] == [list(own) for own in wanted]
    assert all(ids == own[: len(ids)] for ids, own in zip(found, whole, strict=True))
    assert max(map(len, found)) <= 2 * LOOKED_AT + 1
    if made:
        assert made.launches <= 2 * LOOKED_AT


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("qwen3_next", "its cache is DynamicLayer, LinearAttentionLayer"),
        ("lfm2", "its cache is DynamicLayer, LinearAttentionLayer"),
        ("opt", "counts the tokens of its cache"),
        ("llama4_text", "its layers are chunked_attention, full_attention"),
    ],
)
def test_other_models_answer_by_plain_steps(kind: str, why: str, caplog: pytest.LogCaptureFixture) -> None:
    model = pico.model(kind) if kind == "opt" else tiny.model(kind)
    expected, capture = answered(model, tokens=12), Captures()
    with caplog.at_level(logging.INFO):
        assert answered(model, tokens=12, capture=capture) == expected
    assert capture.launches == 0
    assert [why in text for text in said(caplog)] == [True]


def test_rotary_tables_by_length_are_not_captured(caplog: pytest.LogCaptureFixture) -> None:
    """They are computed anew where a position is longer than all before, which a graph would not see."""
    model = pico.model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with caplog.at_level(logging.INFO):
        assert answered(model, capture=Captures()) == answered(model)
    assert "rotary" in said(caplog)[0]


def test_a_capture_that_fails_is_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = pico.model(), list[int]()
    monkeypatch.setitem(answers.BATCH_TOKENS, "cpu", 2 * (10 + TOKENS))

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        asked.append(1)
        step()
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    with caplog.at_level(logging.INFO):
        assert answered(model, capture=capture) == answered(model)
    assert said(caplog, logging.WARNING) == [
        "answers without captured steps: RuntimeError: operation not permitted when stream is capturing"
    ]
    assert asked == [1], "the second batch does not try again"


@pytest.mark.parametrize("kind", ["llama", "lfm2"])
def test_what_was_read_is_released_before_it_is_read_again(kind: str) -> None:
    """Keys and values of the prompts are most of the memory: of llama they have moved, lfm2 keeps other states too."""
    model, read, held = tiny.model(kind), list[weakref.ref[Any]](), list[int]()
    forward = model.forward

    def whole(**given: Any) -> Any:
        if given["input_ids"].shape == (4, 10):
            gc.collect()
            layers = [layer for cache in read if (kept := cache()) is not None for layer in kept.layers]
            held.append(sum(getattr(layer, "keys", None) is not None for layer in layers))
        made = forward(**given)
        if given["input_ids"].shape == (4, 10):
            read.append(weakref.ref(made.past_key_values))
        return made

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        step()
        raise RuntimeError("operation not permitted when stream is capturing")

    model.forward = whole
    answered(model, capture=capture)
    assert held == [0, 0]


def test_steps_that_go_astray_are_found(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a value that a graph keeps from its capture: here every token gets the same position."""
    model, forward = pico.model("qwen3"), pico.model("qwen3").forward
    expected = answered(model)

    def stuck(**given: Any) -> Any:
        if isinstance(getattr(given.get("past_key_values"), "layers", [None])[0], fixed_steps._FixedLayer):
            given["position_ids"] = torch.full_like(given["position_ids"], 3)
        return forward(**given)

    monkeypatch.setattr(model, "forward", stuck)
    with caplog.at_level(logging.WARNING):
        assert answered(model, capture=Captures()) == expected
    assert "do not give what one pass does" in said(caplog, logging.WARNING)[0]


def test_steps_that_come_right_in_the_end_are_found(caplog: pytest.LogCaptureFixture) -> None:
    """GPT Neo's own mask counts its window from the end of the room for keys, which only the last steps reach."""
    model = tiny.model("gpt_neo")
    expected = answered(model)
    with caplog.at_level(logging.WARNING):
        assert answered(model, capture=Captures()) == expected
    assert "do not give what one pass does" in said(caplog, logging.WARNING)[0]


def test_steps_that_go_astray_after_many_tokens_are_found(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shortest prompt does not get that far with its answer."""
    model, forward = pico.model("qwen3"), pico.model("qwen3").forward
    expected = answered(model, tokens=8)

    def stuck(**given: Any) -> Any:
        if isinstance(getattr(given.get("past_key_values"), "layers", [None])[0], fixed_steps._FixedLayer):
            given["position_ids"] = given["position_ids"].clamp(max=9)
        return forward(**given)

    monkeypatch.setattr(model, "forward", stuck)
    with caplog.at_level(logging.WARNING):
        assert answered(model, capture=Captures(), tokens=8) == expected
    assert "do not give what one pass does" in said(caplog, logging.WARNING)[0]


def test_short_answers_are_not_captured() -> None:
    model, capture = pico.model(), Captures()
    assert answered(model, capture=capture, tokens=7) == answered(model, tokens=7)
    assert capture.captures == 0


def test_nan_is_no_answer_but_after_its_end() -> None:
    model = pico.model()
    whole, forward = answered(model), model.forward
    stop = whole[0][4]

    def broken(token: int) -> Callable[..., Any]:
        def call(**given: Any) -> Any:
            made = forward(**given)
            if given["input_ids"].shape[1] == 1:
                made.logits[given["input_ids"][:, 0] == token] = float("nan")
            return made

        return call

    model.forward = broken(stop)
    assert answered(model, stops=(stop,), capture=Captures()) == [
        ids[: ids.index(stop) + 1] if stop in ids else ids for ids in whole
    ]
    with pytest.raises(EvaluationError, match="NaN/inf in logits"):
        answered(model, capture=Captures())


class Waits(TorchDispatchMode):
    """Raises where a value is asked for, for which a program would wait for its device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"{func} in a step")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3", "gpt2"])
def test_no_step_waits_for_its_device(kind: str) -> None:
    steps: list[int] = []

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        def launch() -> None:
            with Waits():
                step()
            steps.append(1)

        return launch

    model = pico.model(kind)
    assert answered(model, capture=capture) == answered(model)
    assert len(steps) == TOKENS - 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "graphs"), [("llama", 1), ("gemma3_text", 1), ("qwen3", 1), ("gpt2", 1), ("qwen3_moe", None)]
)
def test_graphs_answer_as_launched_kernels(kind: str, graphs: int | None) -> None:
    """graphs: how many are captured; None: that is the library's matter, whose experts may ask the host for counts."""
    model, cuda, captured = pico.model(kind).cuda(), torch.device("cuda"), list[CudaGraph]()

    def capture(step: Callable[[], None]) -> CudaGraph:
        captured.append(CudaGraph(step, device=cuda))
        return captured[-1]

    plain = answers.answer(model, PROMPTS, TOKENS, stops=(), device=cuda)
    assert answers.answer(model, PROMPTS, TOKENS, stops=(), device=cuda, capture=capture) == plain
    assert graphs is None or len(captured) == graphs
