"""`requant.checkpoint.model_files`: config edited as raw JSON, tokenizer byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from requant.checkpoint import model_files
from requant.errors import InputError


def test_config_loses_the_quantization_and_keeps_the_rest() -> None:
    config = {
        "architectures": ["X"], "torch_dtype": "bfloat16", "quantization_config": {"a": 1},
        "_pre_quantization_dtype": "bf16",
        "unknown_to_us": [1, {"b": None}], "tie_word_embeddings": True, "vocab_size": 10,
    }  # fmt: skip
    before = json.dumps(config)
    edited = model_files.edit_config(config, dtype="float16")
    assert edited == {
        "architectures": ["X"], "torch_dtype": "float16", "unknown_to_us": [1, {"b": None}],
        "tie_word_embeddings": True, "vocab_size": 10,
    }  # fmt: skip
    assert json.dumps(config) == before, "the given config is not changed"


def test_untied_and_resized_at_both_levels() -> None:
    config = {
        "dtype": "bfloat16",
        "text_config": {"tie_word_embeddings": True, "vocab_size": 10, "dtype": "bfloat16"},
        "vision_config": {"dtype": "float32"},
    }
    edited = model_files.edit_config(config, dtype="float16", untie=True, vocab_size=18)
    assert edited["tie_word_embeddings"] is False
    assert edited["text_config"] == {"tie_word_embeddings": False, "vocab_size": 18, "dtype": "float16"}
    assert edited["vision_config"] == {"dtype": "float32"}
    assert "vocab_size" not in edited
    assert config["text_config"]["vocab_size"] == 10  # type: ignore[index]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "bfloat16"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"text_config": {"dtype": "float16"}}, "float16"),
        ({}, None),
        ({"dtype": None, "text_config": None}, None),
    ],
)
def test_stored_dtype(config: dict[str, Any], expected: str | None) -> None:
    assert model_files.stored_dtype(config) == expected


def directory(path: Path, **files: str) -> Path:
    path.mkdir()
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def test_tokenizer_files_are_copied_byte_for_byte(tmp_path: Path) -> None:
    odd = '{"b":1,\r\n "a":  "é"}'
    base = directory(tmp_path / "base", tokenizer__json=odd, merges__txt="x", config__json="{}", notes__txt="n")
    out = directory(tmp_path / "out")
    assert sorted(model_files.copy_small_files(base, out)) == ["merges.txt", "tokenizer.json"]
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_the_adapters_tokenizer_wins(tmp_path: Path) -> None:
    """With a vocabulary it replaces the base's whole; a lone template only overrides one file."""
    base = directory(
        tmp_path / "base", tokenizer__json="B", merges__txt="B", chat_template__jinja="B", config__json="{}"
    )
    lone = directory(tmp_path / "lone", chat_template__jinja="A")
    whole = directory(tmp_path / "whole", tokenizer__json="A", tokenizer_config__json="A")
    sources = {n: f.read_text() for n, f in model_files.tokenizer_files(base, lone).items()}
    assert sources == {"tokenizer.json": "B", "merges.txt": "B", "chat_template.jinja": "A"}
    sources = {n: f.read_text() for n, f in model_files.tokenizer_files(base, whole).items()}
    assert sources == {"tokenizer.json": "A", "tokenizer_config.json": "A"}
    assert set(model_files.tokenizer_files(base, None)) == {"tokenizer.json", "merges.txt", "chat_template.jinja"}


def test_model_code_is_copied_only_when_the_config_names_it(tmp_path: Path) -> None:
    base = directory(tmp_path / "base", modeling__py="code", config__json="{}")
    assert model_files.copy_small_files(base, directory(tmp_path / "a")) == []
    (base / "config.json").write_text('{"auto_map": {"AutoModel": "modeling.X"}}')
    assert model_files.copy_small_files(base, directory(tmp_path / "b")) == ["modeling.py"]
    (base / "config.json").write_text("{}")
    (base / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["modeling.T", null]}}')
    assert "modeling.py" in model_files.copy_small_files(base, directory(tmp_path / "c"))


@pytest.mark.parametrize(
    ("given", "samples"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, True),
        ({"temperature": 0.6, "do_sample": False}, True),
        ({"temperature": 1.0, "top_k": 50}, None),
        ({"eos_token_id": 2}, None),
        ({"top_k": 20, "do_sample": True}, True),
    ],
)
def test_generation_config_becomes_one_that_transformers_saves(
    tmp_path: Path, given: dict[str, Any], samples: bool | None
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    config = model_files.generation_config(tmp_path)
    assert config is not None
    assert config.get("do_sample") == samples
    assert given.items() - {"do_sample": given.get("do_sample")}.items() <= config.items()
    transformers.GenerationConfig(**config).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "generation_config.json").exists()


def test_no_generation_config(tmp_path: Path) -> None:
    assert model_files.generation_config(tmp_path) is None


def test_vocabulary_size(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 7}}, "added_tokens": [{"id": 9}]}))
    assert model_files.vocabulary_size(file) == 10
    file.write_text(json.dumps({"model": {"vocab": [["a", 0.0], ["b", -1.0]]}}))
    assert model_files.vocabulary_size(file) == 2


def test_templates_processors_and_generation_code_are_copied_with_their_folders(tmp_path: Path) -> None:
    names = (
        "tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "preprocessor_config.json",
        "processor_config.json", "video_preprocessor_config.json", "image_processor_config.json", "tekken.json",
        "feature_extractor_config.json", "custom_generate/generate.py", "custom_generate/requirements.txt",
        "qwen.tiktoken",
    )  # fmt: skip
    base, out = directory(tmp_path / "base", config__json="{}"), directory(tmp_path / "out")
    for name in (*names, "trainer_state.json", "checkpoint-5/tokenizer.json", "additional_chat_templates/notes.md"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    assert sorted(model_files.copy_small_files(base, out)) == sorted(names)
    assert all((out / name).read_text() == name for name in names)
    again = directory(tmp_path / "again")
    (out / "config.json").write_text("{}")
    assert sorted(model_files.copy_small_files(out, again)) == sorted(names), "the quantized checkpoint's too"


TEMPLATES: dict[str, tuple[dict[str, str], set[str]]] = {
    "none": ({"tokenizer_config.json": "{}"}, {"chat_template.jinja", "additional_chat_templates/tool_use.jinja"}),
    "in its settings": ({"tokenizer_config.json": '{"chat_template": "A"}'}, set()),
    "a file": ({"chat_template.jinja": "A"}, {"chat_template.jinja"}),
    "a legacy file": ({"chat_template.json": "{}"}, {"chat_template.json"}),
    "settings that cannot be read": (
        {"tokenizer_config.json": "no JSON"}, {"chat_template.jinja", "additional_chat_templates/tool_use.jinja"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("of_adapter", "kept"), TEMPLATES.values(), ids=TEMPLATES.keys())
def test_no_template_of_the_base_is_read_in_place_of_the_adapters(
    tmp_path: Path, of_adapter: dict[str, str], kept: set[str]
) -> None:
    base = directory(tmp_path / "base", tokenizer__json="B", chat_template__jinja="B")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("B")
    adapter = directory(tmp_path / "adapter")
    for name, text in of_adapter.items():
        (adapter / name).write_text(text)
    found = model_files.tokenizer_files(base, adapter)
    assert {n for n in found if "template" in n} == kept
    assert found["tokenizer.json"].parent == base


def test_the_end_of_a_turn_at_both_levels() -> None:
    config = {"eos_token_id": 1, "text_config": {"eos_token_id": [1], "x": 2}, "vision_config": {"eos_token_id": 3}}
    assert model_files.with_eos(config, 7) == {
        "eos_token_id": 7, "text_config": {"eos_token_id": 7, "x": 2}, "vision_config": {"eos_token_id": 3},
    }  # fmt: skip
    assert model_files.with_eos({"text_config": {}}, 7) == {"text_config": {}, "eos_token_id": 7}


def test_how_a_forward_returns_its_results_is_not_copied() -> None:
    """transformers cannot use a model whose config says `return_dict: false`, and no server reads it."""
    config = {"model_type": "llama", "return_dict": False, "output_attentions": True, "hidden_size": 8}
    assert model_files.edit_config(config, dtype="float16") == {
        "model_type": "llama", "hidden_size": 8, "dtype": "float16",
    }  # fmt: skip


@pytest.mark.parametrize("make", [Path.mkdir, lambda p: p.symlink_to("nowhere")])
def test_a_tokenizer_that_is_no_file_is_not_left_out_silently(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer.json: a .*, expected a file: download it again, or remove it"):
        model_files.tokenizer_files(tmp_path, None)


def test_a_folder_that_matches_a_pattern_only_is_none_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model.old").mkdir()
    (tmp_path / "vocab.json").write_text("{}")
    assert list(model_files.tokenizer_files(tmp_path, None)) == ["vocab.json"]
