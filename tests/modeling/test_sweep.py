"""Model types by structure alone: a sample of the sweep over all of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from helpers import families
from helpers.sweep import RESULTS, Outcome, sweep

from requant.deploy.engine_classes import SGLANG, VLLM

FP32 = 1e-5
SAMPLE = (
    "gemma3",  # a tower and a projector beside the language part
    "qwen2_5_vl",
    "qwen3_5",  # blocks of two kinds
    "qwen3_5_moe",  # experts in one tensor, and a shared one
    "gpt_oss",  # transposed, interleaved, with biases
    "granitemoe",  # named otherwise in the file
    "deepseek_v3",  # latent attention
    "kimi_linear",  # a convolution in parts
    "kimi_k25",  # q, k and v of the tower in one matrix, with rows in another order
    "minimax_m3_vl",  # gate and up in one Linear of the class, apart in the file
    "molmo2",  # its text's q, k and v in one matrix, gate and up too; an embedding in two tables
    "mllama",  # a block that is skipped on text
    "qwen4_exp",  # delta nets, attention by an index, experts; connections between them that stay in 16 bit
    "granite4_vision",  # a tower whose features go into several layers
    "dots3_note_text",  # blocks of other widths of the heads, experts
)
WITH_TIMM = ("gemma3n", "perception_lm", "fast_vlm")  # towers of the package timm


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SAMPLE)
def test_a_model_type_is_merged_and_quantized_whole(tmp_path: Path, kind: str) -> None:
    outcome = sweep(kind, tmp_path)
    assert not outcome.error
    assert 0 <= outcome.merged < FP32, "every adapted weight is PEFT's"
    assert 0 <= outcome.states < 0.1, "8 bits keep the logits, but for routers that were undecided"
    assert not outcome.fused
    assert outcome.quantized


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WITH_TIMM)
def test_a_tower_of_timm_is_carried(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("timm")
    outcome = sweep(kind, tmp_path)
    assert (outcome.verdict, outcome.error) == ("exact", "")
    assert 0 <= outcome.states < 0.1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["bert", "camembert"])
def test_an_encoders_class_that_decodes_is_quantized(tmp_path: Path, kind: str) -> None:
    """CamemBERT's head comes before its embedding, so that the matrix of both is named after the head."""
    outcome = sweep(kind, tmp_path, is_decoder=True)
    assert (outcome.verdict, outcome.error) == ("exact", "")
    assert 0 <= outcome.states < 0.1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["camembert", "xlm-roberta", "bert"])
def test_encoders_are_refused_as_what_they_are(tmp_path: Path, kind: str) -> None:
    outcome = sweep(kind, tmp_path)
    assert outcome.verdict == "refused"
    assert "it is an encoder, which reads in both directions (config.json: is_decoder is not true)" in outcome.error


def test_every_type_that_is_not_exact_has_a_reason_in_words() -> None:
    """None is refused for want of a tiny config, and what was not tried has no reason of a refusal."""
    outcomes = [Outcome(**row) for row in json.loads(RESULTS.read_text())]
    said = {
        verdict: {families.reason(o) for o in outcomes if o.verdict == verdict} for verdict in ("refused", "not tried")
    }
    assert all(said.values())
    assert not said["refused"] & said["not tried"]


@pytest.mark.parametrize("kind", families.MOST_TUNED)
def test_what_people_tune_most_is_exact_and_served(kind: str) -> None:
    outcome = next(Outcome(**row) for row in json.loads(RESULTS.read_text()) if row["kind"] == kind)
    assert outcome.verdict == "exact"
    made = getattr(transformers, outcome.made)
    serving = [r for r in (VLLM, SGLANG) if r.has(outcome.made, made) != "none" and outcome.made not in r.refuses]
    assert serving


def test_an_outcome_is_told_in_a_line() -> None:
    assert str(Outcome(kind="x", error="merge KeyError: y")) == "x: FAIL merge KeyError: y"
