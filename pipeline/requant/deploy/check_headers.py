"""Header check of a quantized checkpoint: configs, names, shapes, dtypes.

No tensor is read. Every difference is a `Finding` that names the tensor, or the file and key, and the reason.
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
from requant.checkpoint.reader import INDEX, Checkpoint, read_json, read_weight_map
from requant.errors import InputError
from requant.formats.quantized_format import Finding, PackError, Packing, Rules, StoredFormat
from requant.formats.registry import not_recognised, recognised, unquantized_names
from requant.modeling import skeleton
from requant.modeling.blocks import block_linears, block_list
from requant.modeling.token_ends import TokenEnds
from requant.modeling.unplaced import Unplaced

UNQUANTIZED = (torch.float16, torch.bfloat16, torch.float32)
LEFTOVERS = ("load_in_4bit", "load_in_8bit", "llm_int8_skip_modules", "quant_storage")
LOCAL = re.compile(r"~?/[^/\s]+/\S+|[A-Za-z]:\\\S+|file://\S+|~/\S+")
_CONFIGS = ("config.json", "quantize_config.json", "generation_config.json", "tokenizer_config.json", "manifest.json")


@dataclass(kw_only=True)
class HeaderCheck:
    """Findings about the headers, and what later checks need of them.

    model: skeleton on the meta device. declared: the `quantization_config`. layout: the format that it describes; None:
    unknown. usable: whether the config says enough to check the tensors. packed: stored stem -> its packing, of linears
    whose stored tensors have the right headers. transposed: stems whose 16-bit weight is stored [in, out]. unplaced:
    tensors that are no parameter of the model.
    """

    checkpoint: Checkpoint
    model: nn.Module
    declared: Mapping[str, Any]
    layout: StoredFormat | None
    usable: bool = False
    packed: dict[str, Packing] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    expected_bytes: int = 0
    transposed: set[str] = field(default_factory=set)
    unplaced: Unplaced = field(default_factory=Unplaced)

    def report(self, where: str, reason: str) -> None:
        self.findings.append(Finding(where, reason))

    @property
    def packed_names(self) -> list[str]:
        """Names of the stored tensors of `packed`."""
        if self.layout is None:
            return []
        return [f"{stem}.{suffix}" for stem, own in self.packed.items() for suffix in stored_shapes(self.layout, own)]


def stored_shapes(layout: StoredFormat, packing: Packing) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
    """Suffix -> shape and dtype of one linear's tensors. Raises PackError when the config cannot be meant."""
    return layout.shapes(packing.rows, packing.columns, packing.bits, packing.group_size, symmetric=packing.symmetric)


def check(path: Path, *, trust_remote_code: bool = False) -> HeaderCheck:
    """Compare every header and config in `path` with the format.

    Raises:
        InputError: one of them cannot be read.
    """
    headers = check_weights(path, trust_remote_code=trust_remote_code)
    if headers.usable:
        headers.findings += _small_files(path, headers.checkpoint.config)
        headers.findings += _tokenizer(path, headers.model)
        skeleton.check_generation_config(path)
    return headers


def check_weights(path: Path, *, trust_remote_code: bool = False) -> HeaderCheck:
    """`check` of the weights alone: their headers, the index and the quantization config."""
    checkpoint = Checkpoint(path)
    model = skeleton.open_model(path, trust_remote_code=trust_remote_code)
    declared = checkpoint.quantization
    layout = recognised(declared)
    headers = HeaderCheck(checkpoint=checkpoint, model=model, declared=declared, layout=layout)
    if layout is None:
        reason = f"{not_recognised(declared)}: servers would load it as something else"
        headers.report(checkpoint.quantization_place, reason)
        return headers
    headers.usable = _config_is_usable(headers, layout)
    if headers.usable:
        _tensors(headers, layout, layout.rules(declared))
        _index(headers, path)
        headers.findings += layout.checks.files(path, declared)
    return headers


def _config_is_usable(headers: HeaderCheck, layout: StoredFormat) -> bool:
    """Whether the tensors can be checked by the quantization config; reports what is wrong in it."""
    where, usable = headers.checkpoint.quantization_place, True
    for reason, readable in layout.checks.config(headers.declared):
        headers.report(where, reason)
        usable = usable and readable
    for key in headers.declared:
        if key in LEFTOVERS or key.startswith("bnb_"):
            headers.report(where, f"{key} is a leftover of bitsandbytes: remove it")
    return usable


def _tensors(headers: HeaderCheck, layout: StoredFormat, rules: Rules) -> None:
    """Check every tensor of the checkpoint against the model its config describes.

    Compared are names, dtypes and shapes.
    """
    checkpoint = headers.checkpoint
    plain = unquantized_names(checkpoint, layout)
    names = skeleton.tensor_names(headers.model, plain)
    transposed = {f"{module}.weight" for module in skeleton.conv1d_modules(headers.model)}
    prefix, blocks = block_list(headers.model)
    linears = {
        f"{prefix}.{i}.{n}.weight": (n, m) for i, block in enumerate(blocks) for n, m in block_linears(block).items()
    }
    headers.transposed = {names[w].removesuffix(".weight") for w in transposed if w in names}
    used: set[str] = set()
    tied = skeleton.tied_pair(headers.model)
    ends = {f"{module}.weight": module for module in TokenEnds.of(headers.model).matrices}
    for parameter, value in headers.model.named_parameters(remove_duplicate=False):
        stored = names.get(parameter)
        packing = None
        if parameter in linears:
            inner, linear = linears[parameter]
            packing = rules.of(parameter.removesuffix(".weight"), inner, linear)
        elif parameter in ends:
            packing = _of_end(headers, layout, rules, ends[parameter], stored)
        if packing is not None:
            stem = (stored or parameter).removesuffix(".weight")
            used |= _packed(headers, layout, stem, packing)
        elif stored is None or (stored not in checkpoint and stored[:-6] + layout.codes not in checkpoint):
            if not (tied and parameter == tied[1]):
                headers.report(parameter, f"missing: {type(headers.model).__name__} has it")
        elif stored not in checkpoint:
            headers.report(stored[:-6] + layout.codes, "packed, but the config says that this linear is not quantized")
            used |= {f"{stored[:-6]}{s}" for s in layout.suffixes}
        else:
            used.add(stored)
            shape = tuple(value.shape)
            _unquantized(headers, stored, shape[::-1] if parameter in transposed else shape)
    _unplaced(headers, {n: i.shape for n, i in checkpoint.items()}, used)
    if tied and (end := names.get(tied[1])) is not None and end != names.get(tied[0]) and end in checkpoint:
        headers.report(
            end, "stored although tie_word_embeddings is true: servers ignore it or load it over the embedding"
        )


def _of_end(
    headers: HeaderCheck, layout: StoredFormat, rules: Rules, module: str, stored: str | None
) -> Packing | None:
    """Packing of the token embeddings or the head as the config says, None: in 16 bit."""
    stem = (stored or f"{module}.weight").removesuffix("weight")
    packed = any(f"{stem}{suffix}" in headers.checkpoint for suffix in layout.suffixes if suffix != "weight")
    return rules.end(module, headers.model.get_submodule(module), stored=packed)


def _unplaced(headers: HeaderCheck, shapes: Mapping[str, tuple[int, ...]], used: set[str]) -> None:
    """Record the tensors that are no parameter of the model; report those that no server has a use for.

    used: stored names of parameters.
    """
    found = headers.unplaced = Unplaced.of(headers.model, shapes, used)
    name = type(headers.model).__name__
    for extra in sorted(found.unknown):
        headers.report(extra, f"extra: {name} with this config has no place for it")
    for extra in sorted(found.recomputed):
        headers.report(extra, f"extra: a buffer that {name} computes itself: remove it")
    headers.expected_bytes += sum(headers.checkpoint[n].nbytes for n in (*found.state, *found.carried))


def _packed(headers: HeaderCheck, layout: StoredFormat, stem: str, packing: Packing) -> set[str]:
    """Check one quantized linear's tensors; returns the names that belong to it."""
    names = {suffix: f"{stem}.{suffix}" for suffix in layout.suffixes}
    try:
        shapes = stored_shapes(layout, packing)
    except PackError as error:
        headers.report(names[layout.codes], f"the config cannot be meant: {error}")
        return set(names.values())
    if names[layout.codes] not in headers.checkpoint and f"{stem}.weight" in headers.checkpoint:
        headers.report(f"{stem}.weight", f"in 16 bit, the config says that this linear is {packing.bits}-bit")
        return {f"{stem}.weight"}
    before = len(headers.findings)
    for suffix, (shape, dtype) in shapes.items():
        headers.expected_bytes += torch.Size(shape).numel() * dtype.itemsize
        reason = layout.checks.header(suffix, headers.checkpoint.get(names[suffix]), packing)
        if reason is not None:
            headers.report(names[suffix], reason)
    if "weight" not in names and f"{stem}.weight" in headers.checkpoint:
        headers.report(f"{stem}.weight", "in 16 bit beside its packed tensors: loaders differ in which they take")
    if len(headers.findings) == before:
        headers.packed[stem] = packing
    return {names[suffix] for suffix in shapes}


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
        listed = read_weight_map(path / INDEX)
        for name in sorted(headers.checkpoint.keys() - listed.keys()):
            headers.report(f"{INDEX}: weight_map", f"does not list {name} of {headers.checkpoint[name].file.name}")
        metadata = read_json(path / INDEX).get("metadata")
        declared = metadata.get("total_size") if isinstance(metadata, dict) else None
        actual = sum(info.nbytes for info in headers.checkpoint.values())
        if declared != actual:
            headers.report(f"{INDEX}: metadata.total_size", f"{declared!r}, the tensors hold {actual} bytes")


def _small_files(path: Path, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Leftovers of training, paths of a local machine."""
    for key in ("_pre_quantization_dtype",):
        if key in config:
            yield Finding(f"config.json: {key}", "a leftover of the bitsandbytes base: remove it")
    dtype = model_files.stored_dtype(config)
    if dtype not in ("float16", "bfloat16", "float32"):
        yield Finding("config.json: dtype", f"{dtype!r}, expected float16 or bfloat16: servers guess then")
    for name in _CONFIGS:
        if (path / name).exists():
            for key, text in _strings(read_json(path / name, constants=name == "config.json")):
                if model_files.KERNELS.fullmatch(key.rpartition(".")[2]) and "/" in text:
                    yield Finding(f"{name}: {key}", f"{text!r} is code that servers would download and run: remove it")
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
    """A missing or unreadable vocabulary; tokens that servers use themselves and the embedding has no row for.

    A vocabulary may be longer than the embedding, as that of official Gemma 3 text models, while no text uses its end.
    """
    names = [n for n in model_files.VOCABULARY if (path / n).exists()]
    if not names:
        yield Finding("tokenizer", f"none of {', '.join(model_files.VOCABULARY)} is here: servers need one")
        return
    if "tokenizer.json" not in names:
        return
    try:
        model_files.vocabulary_size(path / "tokenizer.json")
        added = read_json(path / "tokenizer.json").get("added_tokens", [])
        ids = {str(t["content"]): int(t["id"]) for t in added}
        beside = path / "tokenizer_config.json"
        settings = read_json(beside) if beside.exists() else {}
    except (InputError, KeyError, TypeError, ValueError, AttributeError) as error:
        yield Finding("tokenizer.json", f"cannot be read ({error})")
        return
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    for key in ("bos_token", "eos_token"):
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(token, str):
            yield Finding("tokenizer_config.json", f"{key} is {token!r:.80}, expected text")
        elif token is not None and ids.get(token, 0) >= rows:
            yield Finding("tokenizer.json", f"{key} {token!r} has id {ids[token]}, the embedding has {rows} rows")
