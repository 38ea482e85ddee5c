"""`requant_eval.scoring.batches`: the numbers of windows together and alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import pico, tiny
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from requant_eval.errors import EvaluationError
from requant_eval.scoring import batches
from requant_eval.scoring.batches import BatchSize, padded, padded_up_to, plan
from requant_eval.scoring.score_loop import score
from requant_eval.scoring.windows import Document, EvalSet, make_set

LENGTHS = (31, 9, 22, 9, 30, 14, 24, 3)
WIDE = BatchSize(tokens=96, padding=64)  # three or four of LENGTHS at a time


@given(
    st.lists(st.integers(2, 60), min_size=1, max_size=40),
    st.builds(BatchSize, windows=st.none() | st.integers(1, 9), tokens=st.integers(1, 200), padding=st.integers(0, 40)),
    st.none() | st.integers(0, 60),
)
def test_every_window_is_in_one_batch_within_the_limits(lengths: list[int], size: BatchSize, limit: int | None) -> None:
    made = plan(lengths, size, padded_up_to=limit)
    assert sorted(i for batch in made.batches for i in batch) == list(range(len(lengths)))
    for batch in made.batches:
        inside = [lengths[i] for i in batch]
        assert inside == sorted(inside, reverse=True)
        tokens = len(inside) * inside[0]
        assert len(inside) == 1 or (tokens <= (size.tokens or 0) and len(inside) <= (size.windows or len(inside)))
        assert tokens - sum(inside) <= size.padding
        assert limit is None or inside[0] <= limit or inside[0] == inside[-1]
    assert made.tokens == max(len(b) * lengths[b[0]] for b in made.batches)
    assert (made.widest is None) == all(lengths[b[0]] == lengths[b[-1]] for b in made.batches)


def test_windows_of_one_length_fill_a_batch() -> None:
    made = plan([8] * 7 + [5], BatchSize(tokens=32, padding=0))
    assert [len(batch) for batch in made.batches] == [4, 3, 1]
    assert (made.largest, made.tokens, made.widest, BatchSize(tokens=32).rows(8)) == (4, 32, None, 4)
    half = BatchSize(tokens=32, padding=0).halved(made.largest)
    assert plan([8] * 8, half).largest == 2
    with pytest.raises(EvaluationError, match="batch is 0"):
        BatchSize.of(0)


def test_the_last_token_is_repeated() -> None:
    assert padded([torch.tensor([1, 2, 3]), torch.tensor([4, 5])]).tolist() == [[1, 2, 3], [4, 5, 5]]


def short_documents(vocabulary: int = 96) -> EvalSet:
    rng = np.random.default_rng(1)
    documents = [Document(tuple(rng.integers(3, vocabulary, size=n).tolist())) for n in LENGTHS]
    return make_set("short", documents, window=48, bos_id=None)


def counted(model: Any) -> list[torch.Size]:
    """Shapes of the token ids of every forward from now on."""
    shapes: list[torch.Size] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    return shapes


HYBRID = ("mamba2", "falcon_mamba", "jamba", "falcon_h1", "qwen3_next", "recurrent_gemma", "lfm2")
KINDS = (
    "llama",
    "gpt2",
    "opt",
    "bloom",
    "gemma2",
    "gemma3_text",
    "mistral",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    *HYBRID,
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_short_documents_share_a_forward_with_the_same_numbers(kind: str, tmp_path: Path) -> None:
    """Learned positions, ALiBi, sliding windows, experts, state spaces and hybrids: -ln p and KL of every token."""
    model, text = tiny.model(kind).eval(), short_documents()
    other = tiny.model(kind).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter) * parameter.std().nan_to_num())
    found = []
    for name, size in (("alone", BatchSize(windows=1)), ("together", WIDE)):
        shapes, notes, file = counted(model), list[str](), tmp_path / name
        reference = score(model, text, batch=size, device="cpu", write_reference=file, on_note=notes.append)
        against = score(other, text, batch=size, device="cpu", reference=file)
        assert not notes
        found.append((reference, against, len(shapes)))
    (alone, alone_kl, forwards), (together, together_kl, fewer) = found
    assert forwards == len(LENGTHS) + 1, "one window at a time, and the proof of the head"
    assert fewer == len(plan(LENGTHS, WIDE).batches) + 2 < forwards, "also the most padded window alone"
    np.testing.assert_allclose(together.nll, alone.nll, rtol=1e-5, atol=1e-5)
    assert together_kl.kl is not None
    assert alone_kl.kl is not None
    assert alone_kl.kl.mean() > 1e-6
    np.testing.assert_allclose(together_kl.kl, alone_kl.kl, rtol=2e-3, atol=1e-8)
    assert (together.document == alone.document).all()


@pytest.mark.slow
def test_a_model_that_sees_what_follows_is_scored_length_by_length() -> None:
    """PaliGemma's text attends to all of its prefix: padding would change its scores."""
    model, text, notes = tiny.model("paligemma").eval(), short_documents(), list[str]()
    alone = score(model, text, batch=1, device="cpu")
    together = score(model, text, batch=WIDE, device="cpu", on_note=notes.append)
    assert notes == [batches.APART.format("paligemma")]
    np.testing.assert_allclose(together.nll, alone.nll, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_tables_by_length_are_not_mixed(kind: str) -> None:
    """Windows up to the trained length share a batch, longer ones only with their own length."""
    half = pico.config().hidden_size // pico.config().num_attention_heads // 2
    factors = {"dynamic": {"factor": 4.0}, "longrope": {"short_factor": [1.0] * half, "long_factor": [4.0] * half}}
    tables = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 20, **factors[kind]}
    model = pico.model("phi3" if kind == "longrope" else "llama", rope_parameters=tables,
                       original_max_position_embeddings=20)  # fmt: skip
    assert padded_up_to(model.config) == 20
    assert padded_up_to(LlamaConfig()) is None
    text, notes, shapes = short_documents(), list[str](), counted(model)
    together = score(model, text, batch=WIDE, device="cpu", on_note=notes.append)
    assert not notes
    assert (4, 14) in shapes
    alone = score(model, text, batch=1, device="cpu")
    np.testing.assert_allclose(together.nll, alone.nll, rtol=1e-5, atol=1e-5)


def test_no_window_has_the_rotary_table_of_a_longer_one() -> None:
    """A table of transformers stays until it has to change: each window's scores are those of a model that is new."""

    def new() -> Any:
        tables = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
        return pico.model("llama", rope_parameters=tables, max_position_embeddings=20)

    text = short_documents()
    alone = [score(new(), replace(text, windows=(window,)), batch=1, device="cpu").nll for window in text.windows]
    together = score(new(), text, batch=WIDE, device="cpu").nll
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-5, atol=1e-5)
