"""Tensors that transformers joins or renames while loading: the skeleton has the file's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import pico, tiny
from helpers.sweep import ids, sweep

from requant.checkpoint.reader import Checkpoint
from requant.errors import InputError
from requant.modeling import skeleton
from requant.modeling.joined_parts import EmbeddingTable, JoinedConvolution, JoinedEmbedding, joined
from requant.modeling.token_ends import EndBits, TokenEnds

N_GRAMS = {"ple_layer_ids": [1], "ple_embed_dim": 32, "eos_token_id": 2, "use_cache": False}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("kind", "joined"),
    [
        ("olmo_hybrid", True),
        ("kimi_linear", True),
        ("bailing_hybrid", True),
        ("deepseek_v4", False),
        ("molmo2", False),  # an embedding in two tables
    ],
)
def test_a_skeleton_filled_from_the_file_is_transformers_model(tmp_path: Path, kind: str, joined: bool) -> None:
    """DeepSeek V4: patterns with backslashes for experts, and one for `norm` that the last norm's name fits too."""
    made = tiny.model(kind)
    stored = Checkpoint(pico.save(made, tmp_path))
    model = skeleton.open_model(tmp_path)
    names = skeleton.tensor_names(model, stored)
    assert names.keys() == {name for name, _ in model.named_parameters()}
    assert any(isinstance(m, JoinedConvolution) for m in model.modules()) == joined
    for parameter, name in names.items():
        skeleton.place(model, {parameter: stored.read(name)})
    skeleton.buffers_to(model, torch.device("cpu"), stored)
    assert pico.relative(pico.logits(model, ids()), pico.logits(made, ids())) < 1e-5


def test_parts_may_have_other_widths() -> None:
    """As queries and values of OLMo hybrids: transformers itself cuts what it saves into equal parts, the hub does not."""
    model = skeleton.build(tiny.config("olmo_hybrid", linear_value_head_dim=32))
    convolution = next(m for m in model.modules() if isinstance(m, JoinedConvolution))
    assert [tuple(part.weight.shape) for part in convolution.parts] == [(64, 1, 4), (64, 1, 4), (128, 1, 4)]


def test_an_embedding_has_the_tables_of_the_file() -> None:
    """Molmo 2: the vocabulary's table, and that of the added tokens; on the hub of other sizes than each other."""
    model = skeleton.build(tiny.config("molmo2", **{"text_config.additional_vocab_size": 48}))
    inner = model.get_input_embeddings()
    assert type(inner) is JoinedEmbedding
    assert not list(inner.parameters())
    assert joined(model) == {
        "model.language_model.embed_tokens": {
            "model.language_model.wte.embedding": range(256),
            "model.language_model.wte.new_embedding": range(256, 304),
        }
    }


def test_an_embedding_in_tables_looks_rows_up_as_the_classs_does() -> None:
    whole = torch.nn.Embedding(10, 4, padding_idx=2)
    tables = [EmbeddingTable(dict(zip(("a", "b"), whole.weight.detach().split([7, 3]), strict=True)))]
    ids = torch.tensor([[0, 6, 7, 9, 2]])
    made = JoinedEmbedding(whole, tables)
    assert torch.equal(made(ids), whole(ids))
    assert (made.num_embeddings, made.embedding_dim, made.padding_idx) == (10, 4, 2)


def test_n_grams_have_the_tables_that_the_config_counts() -> None:
    """Qwen 4: on the hub 512 of them, which hold more than the rest of the model."""
    model = skeleton.build(tiny.config("qwen4_exp_text", **N_GRAMS))
    place = "model.layers.0.ple.ple_embedding.ngram_embedding"
    found = joined(model)[place]
    assert list(found) == [f"{place}.shard_{i}.weight" for i in range(4)]
    assert len({len(rows) for rows in found.values()}) == 1
    assert sum(map(len, found.values())) == model.get_submodule(place).num_embeddings


@pytest.mark.slow
def test_a_model_with_n_grams_is_merged_and_quantized_whole(tmp_path: Path) -> None:
    outcome = sweep("qwen4_exp_text", tmp_path, **N_GRAMS)
    assert (outcome.verdict, outcome.error) == ("exact", "")
    assert 0 <= outcome.states < 0.1


def test_embeddings_in_tables_are_not_quantized() -> None:
    ends = TokenEnds.of(skeleton.build(tiny.config("molmo2")))
    assert ends.tables == 2
    assert ends.grids(EndBits(head=8), 32).keys() == {"lm_head"}
    with pytest.raises(InputError, match=r"hold its token embeddings in 2 tables.*leave quantize.embeddings out"):
        ends.grids(EndBits(embeddings=8), 32)


def test_other_conversions_are_refused_by_name(tmp_path: Path) -> None:
    base = pico.save(tiny.model("step3p7"), tmp_path / "base")
    pico.train(tiny.model("step3p7"), tmp_path / "adapter", target_modules=r".*language_model.*q_proj")
    with pytest.raises(
        InputError, match=r"moe.gate_proj.weight .*transformers makes other tensors of such ones .*\(Concatenate\)"
    ):
        pico.merged(base, tmp_path / "adapter", tmp_path / "merged")
