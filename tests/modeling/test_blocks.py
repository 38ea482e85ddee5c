"""The blocks of a model: the text decoder's, whatever else it holds."""

from __future__ import annotations

import pytest
from helpers import tiny
from torch import nn

from requant.modeling import skeleton
from requant.modeling.blocks import block_list, kinds, samples, why_not_text


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        ("llama", "model.layers"),
        ("gpt2", "transformer.h"),
        ("gemma3", "model.language_model.layers"),
        ("qwen2_vl", "model.language_model.layers"),
        ("mistral3", "model.language_model.layers"),
        ("jamba", "model.layers"),
        ("nemotron_h", "model.layers"),
        ("qwen3_moe", "model.layers"),
        ("git", "git.encoder.layer"),  # its embedding is inside of a module, and the image's encoder beside that
        ("phi4_multimodal", "model.layers"),  # its sound encoder is larger, and inside of a module beside the embedding
    ],
)
def test_the_list_beside_the_embedding_of_tokens(kind: str, prefix: str) -> None:
    assert block_list(skeleton.build(tiny.config(kind)))[0] == prefix


def test_a_tower_larger_than_the_language_part_is_not_taken_for_it() -> None:
    model = skeleton.build(tiny.config("qwen2_vl", **{"vision_config.depth": 12, "vision_config.embed_dim": 256}))
    sizes = {
        n: sum(p.numel() for p in m.parameters()) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)
    }
    assert sizes["model.visual.blocks"] > sizes["model.language_model.layers"]
    assert block_list(model)[0] == "model.language_model.layers"


def test_kinds_are_told_apart_by_their_parameters() -> None:
    """Two blocks of one kind, three of another: the second is the most frequent one."""
    blocks = [nn.Linear(2, 2), nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(2, 2), nn.Linear(2, 3)]
    assert [block.out_features for block in kinds(blocks)] == [3, 2]
    assert samples([nn.Linear(2, 2)] * 4) == [(2, 4.0)]
    assert samples(blocks) == [(2, 3.0), (3, 2.0)]
    assert samples(blocks, most=1) == [(2, 3.0 + 2 * 6 / 9)], "the rest by their parameters"


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("bert", "reads in both directions"),
        ("electra", "reads in both directions"),
        ("whisper", "attends to the output of an encoder"),
        ("bart", "attends to the output of an encoder"),
        ("prophetnet", "attends to the output of an encoder"),
        ("gpt_neox", None),  # is_decoder is false there too, and means nothing
        ("mllama", None),  # one of three blocks
        ("paligemma", None),
    ],
)
def test_what_text_alone_cannot_calibrate_is_known_from_the_structure(kind: str, why: str | None) -> None:
    found = why_not_text(skeleton.build(tiny.config(kind)))
    assert found is None if why is None else why in str(found)
