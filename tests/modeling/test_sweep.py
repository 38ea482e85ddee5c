"""Model types by structure alone: a sample of the sweep over all of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.sweep import Outcome, sweep

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


def test_an_outcome_is_told_in_a_line() -> None:
    assert str(Outcome(kind="x", error="merge KeyError: y")) == "x: FAIL merge KeyError: y"
