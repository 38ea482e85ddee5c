"""Metadata of a GGUF file: sizes, the model's name, the tokenizer, the chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from requant.checkpoint.run_directory import MARKER
from requant.deploy import gguf_families, gguf_tokenizer
from requant.deploy.gguf_families import Family
from requant.deploy.gguf_package import package


def write_metadata(writer: Any, config: Any, family: Family, source: Path, file_type: int) -> None:
    """Everything but tensors: sizes, the tokenizer, the chat template."""
    gguf = package()
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(_name_of(source))
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in gguf_families.metadata(config, family).items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"{family.architecture}.{key}", value)
    if (factor := gguf_families.scaling(config)) is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(factor)
    vocabulary = gguf_tokenizer.read(source, config.vocab_size)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.rule)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    special = gguf.SpecialVocab(source, load_merges=vocabulary.scores is None, n_vocab=config.vocab_size)
    if vocabulary.scores is not None:
        writer.add_token_scores(list(vocabulary.scores))
        writer.add_add_space_prefix(False)
        special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(writer, quiet=True)


def _name_of(source: Path) -> str:
    """The model's name: of a run's checkpoint the run's, else its directory's."""
    path = source.resolve()
    return path.parent.name if (path.parent / MARKER).is_file() else path.name
