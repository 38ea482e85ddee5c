"""Header check of a GPTQ checkpoint: configs, names, shapes and dtypes; no tensor is read.

Every difference is a `Finding` that names the tensor, or the file and key, and the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from requant.checkpoint import model_files
from requant.checkpoint.reader import INDEX, Checkpoint, read_json
from requant.errors import InputError
from requant.formats import gptq as gptq_format
from requant.formats.gptq import Packing, Rules
from requant.formats.quantized_format import PackError
from requant.modeling import skeleton
from requant.modeling.block_walk import block_linears, block_list

BITS = (2, 3, 4, 8)
SCALES = (torch.float16, torch.bfloat16)
UNQUANTIZED = (torch.float16, torch.bfloat16, torch.float32)
LEFTOVERS = ("load_in_4bit", "load_in_8bit", "llm_int8_skip_modules", "quant_storage")
LOCAL = re.compile(r"~?/[^/\s]+/\S+|[A-Za-z]:\\\S+|file://\S+|~/\S+")
_CONFIGS = ("config.json", "quantize_config.json", "generation_config.json", "tokenizer_config.json", "manifest.json")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong. where: a tensor name, or `file: key`."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(kw_only=True)
class HeaderCheck:
    """Findings about the headers, and what later checks need of them.

    model: skeleton on the meta device. v2: zero points as they are, not minus one.
    packed: stored stem -> its packing, of linears whose four tensors are right.
    transposed: stems whose 16-bit weight is stored [in, out].
    """

    checkpoint: Checkpoint
    model: nn.Module
    v2: bool
    packed: dict[str, Packing] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    expected_bytes: int = 0
    transposed: set[str] = field(default_factory=set)

    def report(self, where: str, reason: str) -> None:
        self.findings.append(Finding(where, reason))


def check(path: Path, *, trust_remote_code: bool = False) -> HeaderCheck:
    """Compare every header and config in `path` with the format.

    Raises:
        InputError: one of them cannot be read.
    """
    checkpoint = Checkpoint(path)
    config = checkpoint.config
    model = skeleton.open_model(path, trust_remote_code=trust_remote_code)
    declared = config.get("quantization_config") or {}
    headers = HeaderCheck(checkpoint=checkpoint, model=model, v2=declared.get("checkpoint_format") == "gptq_v2")
    if not _declared(headers, declared):
        return headers
    _tensors(headers, config, Rules(declared))
    _index(headers, path)
    headers.findings += _small_files(path, config, declared)
    headers.findings += _tokenizer(path, model)
    return headers


def _declared(headers: HeaderCheck, declared: Mapping[str, Any]) -> bool:
    """Whether the quantization config is usable; reports what is wrong in it."""
    where = "config.json: quantization_config"
    method = declared.get("quant_method")
    if method != "gptq":
        headers.report(where, f"quant_method is {method!r}, expected 'gptq': servers would load it as something else")
        return False
    bits, group = declared.get("bits"), declared.get("group_size")
    if bits not in BITS:
        headers.report(where, f"bits is {bits!r}, expected one of {', '.join(map(str, BITS))}")
    if not isinstance(group, int) or (group != -1 and group < 1):
        headers.report(where, f"group_size is {group!r}, expected -1 or a positive number")
    for key in ("sym", "desc_act"):
        if not isinstance(declared.get(key), bool):
            headers.report(where, f"{key} is {declared.get(key)!r}, expected true or false")
    usable = not headers.findings
    layout = declared.get("checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2"):
        headers.report(where, f"checkpoint_format is {layout!r}, expected 'gptq' (or 'gptq_v2')")
    for key in declared:
        if key in LEFTOVERS or key.startswith("bnb_"):
            headers.report(where, f"{key} is a leftover of bitsandbytes: remove it")
    return usable


def _tensors(headers: HeaderCheck, config: Mapping[str, Any], rules: Rules) -> None:
    """Check every tensor of the checkpoint against the model its config describes.

    Compared are names, dtypes and shapes.
    """
    checkpoint = headers.checkpoint
    plain = gptq_format.unquantized_names(checkpoint)
    names = skeleton.tensor_names(headers.model, plain)
    transposed = {f"{module}.weight" for module in skeleton.conv1d_modules(headers.model)}
    prefix, blocks = block_list(headers.model)
    linears = {
        f"{prefix}.{i}.{n}.weight": (n, m) for i, block in enumerate(blocks) for n, m in block_linears(block).items()
    }
    headers.transposed = {names[w].removesuffix(".weight") for w in transposed if w in names}
    used: set[str] = set()
    tied = skeleton.tied_pair(headers.model)
    for parameter, value in headers.model.named_parameters(remove_duplicate=False):
        stored = names.get(parameter)
        packing = None
        if parameter in linears:
            inner, linear = linears[parameter]
            packing = rules.of(parameter.removesuffix(".weight"), inner, linear)
        if packing is not None:
            stem = (stored or parameter).removesuffix(".weight")
            used |= _packed(headers, stem, packing)
        elif stored is None or (stored not in checkpoint and f"{stored[:-6]}qweight" not in checkpoint):
            if not (tied and parameter == tied[1]):
                headers.report(parameter, f"missing: {type(headers.model).__name__} has it")
        elif stored not in checkpoint:
            headers.report(f"{stored[:-6]}qweight", "packed, but the config says that this linear is not quantized")
            used |= {f"{stored[:-6]}{s}" for s in gptq_format.SUFFIXES}
        else:
            used.add(stored)
            shape = tuple(value.shape)
            _unquantized(headers, stored, shape[::-1] if parameter in transposed else shape)
    for name in sorted(set(checkpoint) - used):
        headers.report(name, f"extra: {type(headers.model).__name__} with this config has no place for it")
    if tied and (end := names.get(tied[1])) is not None and end != names.get(tied[0]) and end in checkpoint:
        headers.report(
            end, "stored although tie_word_embeddings is true: servers ignore it or load it over the embedding"
        )


def _packed(headers: HeaderCheck, stem: str, packing: Packing) -> set[str]:
    """Check one quantized linear's tensors; returns the names that belong to it."""
    names = {suffix: f"{stem}.{suffix}" for suffix in gptq_format.SUFFIXES}
    try:
        shapes = gptq_format.shapes(packing.rows, packing.columns, packing.bits, packing.group_size)
    except PackError as error:
        headers.report(names["qweight"], f"the config cannot be meant: {error}")
        return set(names.values())
    before = len(headers.findings)
    if names["qweight"] not in headers.checkpoint and f"{stem}.weight" in headers.checkpoint:
        headers.report(f"{stem}.weight", f"in 16 bit, the config says that this linear is {packing.bits}-bit")
        return {f"{stem}.weight"}
    for suffix, (shape, dtype) in shapes.items():
        headers.expected_bytes += torch.Size(shape).numel() * dtype.itemsize
        info = headers.checkpoint.get(names[suffix])
        if info is None:
            headers.report(names[suffix], f"missing: expected {_dtype_name(dtype)} {list(shape)}")
        elif info.shape != shape:
            headers.report(names[suffix], _wrong_shape(suffix, info.shape, shape, packing))
        elif info.dtype != dtype and not (suffix == "scales" and info.dtype in SCALES):
            headers.report(names[suffix], f"dtype {_dtype_name(info.dtype)}, expected {_dtype_name(dtype)}")
    if len(headers.findings) == before:
        headers.packed[stem] = packing
    return set(names.values())


def _wrong_shape(suffix: str, have: tuple[int, ...], want: tuple[int, ...], packing: Packing) -> str:
    """What the stored shape means, in the words of the config."""
    text = f"shape {list(have)}, expected {list(want)} for {packing.bits} bits and group_size {packing.group_size}"
    if len(have) != 2:
        return text
    if suffix == "qweight" and have[1] == want[1] and 32 * have[0] % packing.columns == 0:
        text += f"; the tensor is {gptq_format.bits_of(have, packing.columns)}-bit"
    if suffix in ("scales", "qzeros") and have[1] == want[1] and have[0] and packing.columns % have[0] == 0:
        text += f"; the tensor has groups of {packing.columns // have[0]}"
    return text


def _unquantized(headers: HeaderCheck, name: str, shape: tuple[int, ...]) -> None:
    """Check one 16-bit tensor."""
    info = headers.checkpoint[name]
    headers.expected_bytes += info.nbytes
    if info.shape != shape:
        headers.report(name, f"shape {list(info.shape)}, expected {list(shape)}")
    elif info.dtype not in UNQUANTIZED:
        headers.report(name, f"dtype {_dtype_name(info.dtype)}, expected a 16-bit float")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _index(headers: HeaderCheck, path: Path) -> None:
    """Report shards that the index does not name, and a total_size that is not the tensors'."""
    files = {info.file.name for info in headers.checkpoint.values()}
    for stray in sorted({f.name for f in path.glob("*.safetensors")} - files):
        headers.report(stray, f"not named by {INDEX}: servers that glob would load it too")
    if (path / INDEX).exists():
        declared = (read_json(path / INDEX).get("metadata") or {}).get("total_size")
        actual = sum(info.nbytes for info in headers.checkpoint.values())
        if declared != actual:
            headers.report(f"{INDEX}: metadata.total_size", f"{declared!r}, the tensors hold {actual} bytes")


def _small_files(path: Path, config: Mapping[str, Any], declared: Mapping[str, Any]) -> Iterator[Finding]:
    """A quantize_config.json that differs, leftovers of training, paths of a local machine."""
    beside = path / "quantize_config.json"
    if beside.exists():
        other = read_json(beside)
        for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "dynamic"):
            if key in other and other[key] != declared.get(key):
                yield Finding(f"quantize_config.json: {key}", f"{other[key]!r}, config.json says {declared.get(key)!r}")
    for key in ("_pre_quantization_dtype",):
        if key in config:
            yield Finding(f"config.json: {key}", "a leftover of the bitsandbytes base: remove it")
    dtype = model_files.stored_dtype(config)
    if dtype not in ("float16", "bfloat16", "float32"):
        yield Finding("config.json: dtype", f"{dtype!r}, expected float16 or bfloat16: servers guess then")
    for name in _CONFIGS:
        if (path / name).exists():
            for key, text in _strings(read_json(path / name)):
                if LOCAL.fullmatch(text):
                    yield Finding(f"{name}: {key}", f"{text!r} is a path of the machine that made it: remove it")


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every string setting in a JSON value.

    Tokens and templates are text, not settings, and are left out.
    """
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            if name not in ("added_tokens_decoder", "chat_template", "dynamic"):
                yield from _strings(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _strings(item, f"{key}[{i}]")


def _tokenizer(path: Path, model: nn.Module) -> Iterator[Finding]:
    """A missing or unreadable vocabulary, or one with more ids than the embedding has rows."""
    names = [n for n in model_files.VOCABULARY if (path / n).exists()]
    if not names:
        yield Finding("tokenizer", f"none of {', '.join(model_files.VOCABULARY)} is here: servers need one")
        return
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if "tokenizer.json" not in names:
        return
    try:
        ids = model_files.vocabulary_size(path / "tokenizer.json")
    except (InputError, KeyError, TypeError, AttributeError) as error:
        yield Finding("tokenizer.json", f"cannot be read ({error})")
        return
    if ids > rows:
        yield Finding("tokenizer.json", f"its largest id is {ids - 1}, the embedding has {rows} rows")
