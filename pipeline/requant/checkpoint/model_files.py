"""Small files of a model: config.json edited as raw JSON, tokenizer copied bytewise.

transformers re-serializes both with changes that break servers; its classes are not used here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from requant.checkpoint.atomic_write import copy_file, write_text
from requant.checkpoint.reader import TEMPLATES, entries_of, read_json
from requant.errors import InputError

ANY_TEXT = "two words: 0 é 字 🙂\n"
"""What every tokenizer has to take: wrong types of its settings show here, and a vocabulary without unknown tokens."""
VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")
_TEMPLATE = ("chat_template.jinja", "chat_template.json")
TOKENIZER = (
    *VOCABULARY, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tekken.json", "normalizer.json", "*.tiktoken", "*.spm", "*.model", "tokenizer.model.*", *_TEMPLATE,
    f"{TEMPLATES}/*.jinja",
)  # fmt: skip
# Of processors (images, audio, video) and of generation; generation_config.json is made consistent, not copied.
PROCESSORS = ("*processor*.json", "*feature_extractor*.json", "custom_generate/*")
_NAMING_CODE = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
KERNELS = re.compile(r"_?(attn|experts)_implementation\w*")
_SAMPLING = {
    "temperature": (None, 1.0),
    "top_p": (None, 1.0),
    "top_k": (None, 50),
    "min_p": (None,),
    "typical_p": (None, 1.0),
}


_RETURNING = ("return_dict", "use_return_dict", "output_attentions", "output_hidden_states", "torchscript")


def edit_config(
    config: Mapping[str, Any], *, dtype: str, untie: bool = False, vocab_size: int | None = None
) -> dict[str, Any]:
    """A copy of config.json for unquantized weights of `dtype`, with what the merge changed.

    Without what is of one process of Python only: how a forward returns its results.
    """
    dropped = {"_pre_quantization_dtype", "_name_or_path", *_RETURNING}
    edited = {k: v for k, v in without_quantization(without_kernels(config)).items() if k not in dropped}
    for section in (edited, edited.get("text_config")):
        if not isinstance(section, dict):
            continue
        key = "torch_dtype" if "torch_dtype" in section and "dtype" not in section else "dtype"
        if section is edited or key in section:
            section[key] = dtype
        if untie and (section is edited or "tie_word_embeddings" in section):
            section["tie_word_embeddings"] = False
        if vocab_size is not None and "vocab_size" in section:
            section["vocab_size"] = vocab_size
    return edited


def without_kernels(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of config.json without the kernels it asks for, also in its sections.

    transformers takes `user/repository` there for code to download and run.
    """
    return {
        key: without_kernels(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not KERNELS.fullmatch(key)
    }


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of config.json without `quantization_config`, also in text_config."""
    copy = {key: value for key, value in config.items() if key not in ("quantization_config", "quantization")}
    if isinstance(text := copy.get("text_config"), dict):
        copy["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
    return copy


def with_eos(config: Mapping[str, Any], eos: int) -> dict[str, Any]:
    """A copy of config.json whose `eos_token_id` is `eos`, also in text_config where that has one."""
    edited = {**config, "eos_token_id": eos}
    text = config.get("text_config")
    if isinstance(text, dict) and "eos_token_id" in text:
        edited["text_config"] = {**text, "eos_token_id": eos}
    return edited


def stored_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype that a config.json declares.

    `dtype` (transformers 5) or `torch_dtype`, at the top or in text_config.
    """
    sections = [config, config.get("text_config") or {}]
    for section in sections:
        value = section.get("dtype") or section.get("torch_dtype")
        if isinstance(value, str):
            return value.removeprefix("torch.")
    return None


def write_json(file: Path, value: Any) -> None:
    """Write JSON with sorted-as-given keys, two spaces, a final newline."""
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def tokenizer_files(base: Path, adapter: Path | None) -> dict[str, Path]:
    """File name -> source.

    An adapter that brings a vocabulary brings the whole tokenizer; else its files override the base's. A file name may
    be one in a folder: additional_chat_templates/NAME.jinja.
    """
    of_base = _matching(base, TOKENIZER)
    if adapter is None:
        return of_base
    of_adapter = _matching(adapter, TOKENIZER)
    if any(n in of_adapter for n in VOCABULARY) or any(n.endswith(".tiktoken") for n in of_adapter):
        return of_adapter
    if _brings_template(of_adapter):  # a template file of the base would be read in place of the adapter's
        of_base = {n: f for n, f in of_base.items() if n not in _TEMPLATE and not n.startswith(f"{TEMPLATES}/")}
    return of_base | of_adapter


def _matching(directory: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    """Name relative to the directory -> file, of the files that match, in the order of the patterns.

    Raises InputError where a file's own name, not a pattern, is that of a directory or of a link to nowhere.
    """
    found = {}
    for pattern in patterns:
        exact = [directory / pattern] if os.path.lexists(directory / pattern) else []
        for file in sorted(directory.glob(pattern)) if "*" in pattern else exact:
            if file.is_file():
                found[file.relative_to(directory).as_posix()] = file
            elif "*" not in pattern:
                other = "a directory" if file.is_dir() else "a link that leads nowhere"
                raise InputError(f"{file}: {other}, expected a file: download it again, or remove it")
    return found


def _brings_template(files: Mapping[str, Path]) -> bool:
    """Whether files of a tokenizer hold a chat template."""
    if any(n in _TEMPLATE or n.startswith(f"{TEMPLATES}/") for n in files):
        return True
    settings = files.get("tokenizer_config.json")
    return settings is not None and bool(_readable(settings).get("chat_template"))


def _readable(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one where the file holds none: whoever needs the file says so."""
    try:
        value = read_json(file)
    except InputError:
        return {}
    return value if isinstance(value, dict) else {}


def vocabulary_size(tokenizer_json: Path) -> int:
    """One more than the largest token id of a tokenizer.json."""
    raw = read_json(tokenizer_json)
    vocabulary = raw.get("model", {}).get("vocab", {})
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    ids += [t["id"] for t in raw.get("added_tokens", [])]
    return max((i for i in ids if isinstance(i, int)), default=-1) + 1


def generation_config(path: Path) -> dict[str, Any] | None:
    """generation_config.json, made consistent.

    transformers refuses to save sampling settings without `do_sample`.
    The author's settings stay and `do_sample` becomes true, which is how servers already read such a file.
    """
    file = path / "generation_config.json"
    if not file.exists():
        return None
    config = read_json(file)
    samples = any(config.get(key) not in neutral for key, neutral in _SAMPLING.items())
    if samples and not config.get("do_sample"):
        config["do_sample"] = True
    return config


def files_of(directory: Path) -> list[Path]:
    """The files of a model directory, also those in the folders that belong to a model, by name."""
    return [entry for entry in entries_of(directory) if entry.is_file()]


def copy_small_files(source: Path, out: Path, *, adapter: Path | None = None) -> list[str]:
    """Copy tokenizer, processors, generation config and, when a config names it (`auto_map`), code.

    Returns the names.
    """
    copied = []
    for name, file in (_matching(source, PROCESSORS) | tokenizer_files(source, adapter)).items():
        copy_file(file, out / name)
        copied.append(name)
    generation = generation_config(source)
    if generation is not None:
        write_json(out / "generation_config.json", generation)
        copied.append("generation_config.json")
    if any(_readable(source / name).get("auto_map") for name in _NAMING_CODE):
        for file in sorted(source.glob("*.py")):
            copy_file(file, out / file.name)
            copied.append(file.name)
    return copied
