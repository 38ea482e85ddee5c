"""Verification of a GGUF file: decoded, and compared with the checkpoint it was made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from requant.deploy import check_headers, engine_processes
from requant.deploy.engine_processes import Engine
from requant.deploy.gguf_export import GgufPlan, plan_export
from requant.deploy.gguf_package import open_file, package, stored_bytes_of
from requant.deploy.own_scores import score_checkpoint
from requant.deploy.scored_sample import Sample
from requant.deploy.stage import ask_engine, changed
from requant.deploy.verification import Verification
from requant.errors import InputError
from requant.formats import gguf_blocks
from requant.formats.quantized_format import Finding
from requant.modeling.token_ends import EndBits
from requant.numerics.finite import count_not_finite
from requant.numerics.grid import Grid

_END_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DAMAGED = (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError, RuntimeError)


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` names, itself or the one in its directory; None where it names none.

    Raises InputError for a directory of several, without a config.json.
    """
    if not path.is_dir():
        return path if path.suffix == ".gguf" else None
    found = sorted(path.glob("*.gguf")) if not (path / "config.json").exists() else []
    if len(found) > 1:
        raise InputError(f"{path}: holds {len(found)} GGUF files, {found[0].name} and others: name one")
    return found[0] if found else None


@torch.no_grad()
def verify_gguf(
    file: Path,
    *,
    source: Path | None = None,
    load_in: Sequence[Engine] = (),
    text: str | None = None,
    trust_remote_code: bool = False,
    doing: Callable[[str], None] = lambda _: None,
) -> Verification:
    """Read every tensor of a GGUF file, decode those of the kinds that requant writes, and compare them.

    source: the quantized checkpoint that it was made of. load_in: engines that must load the file and give the scores
    of `source` as we decode it. text: what is scored; default: the run's own documents, else a paragraph.
    Raises InputError when the file is not there, the package gguf or an engine is missing, or `source` could not be
    written as GGUF. What is wrong with the file is a finding.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    for engine in load_in:
        engine_processes.require(engine)
    package()
    done, plan = Verification(path=file), None
    try:
        reader = open_file(file)
        stored = {tensor.name: tensor for tensor in reader.tensors}
    except _DAMAGED as error:
        done.findings.append(Finding(file.name, f"is no whole GGUF file ({str(error)[:200]}): write it again"))
        return done
    done.disk_bytes, done.tensors = file.stat().st_size, len(stored)
    doing(f"values of {len(stored)} tensors")
    _values(done, stored)
    done.findings += _metadata(reader, stored)
    if source is None:
        done.skipped.append("comparison with its source: --against CHECKPOINT names the quantized one")
    else:
        plan = plan_export(source, _ends(stored), trust_remote_code=trust_remote_code)
        doing(f"{len(stored)} tensors, each against its source")
        _compare(done, stored, plan)
    done.findings += changed(file.parent)
    if plan is not None and source is not None and load_in and done.ok:
        ends = plan.conversion.rounded
        _load(done, source, ends, load_in, text=text, trust_remote_code=trust_remote_code, doing=doing)
    return done


def _load(
    done: Verification,
    source: Path,
    ends: Mapping[str, Grid],
    engines: Sequence[Engine],
    *,
    text: str | None,
    trust_remote_code: bool,
    doing: Callable[[str], None],
) -> None:
    """Score a sample with the source's weights as we decode them, and compare each engine's scores of the file.

    ends: token embeddings and head that the source holds in 16 bit and the file does not.
    """
    device = torch.device("cpu")
    headers = check_headers.check_weights(source, trust_remote_code=trust_remote_code)
    doing("perplexity and a few tokens, our decoding of its source")
    sample = Sample.load(source) if text is None else None
    scored = score_checkpoint(
        done, headers, sample=sample, text=text, device=device, trust_remote_code=trust_remote_code, ends=ends
    )
    if scored is None:
        return
    for engine in engines:
        doing(f"loading it in {engine}, which scores the same tokens")
        ask_engine(done, engine, *scored, dtype="int8", device=device, trust_remote_code=trust_remote_code)


def _ends(stored: Mapping[str, Any]) -> EndBits:
    """Bits of the token embeddings and the head of a file."""
    kinds = {name: tensor.tensor_type.name for name, tensor in stored.items()}
    embeddings, head = (_END_BITS.get(kinds.get(name, "")) for name in ("token_embd.weight", "output.weight"))
    return EndBits(embeddings=embeddings, head=head)


def _values(done: Verification, stored: dict[str, Any]) -> None:
    """Decode every tensor, count what is packed and its bits, and report what is not finite."""
    weights, nbytes, others = 0, 0, set[str]()
    for name, tensor in stored.items():
        kind = tensor.tensor_type.name
        if kind in gguf_blocks.BYTES:
            done.linears, weights = done.linears + 1, weights + int(tensor.n_elements)
            nbytes += int(tensor.n_bytes)
        elif kind not in _PLAIN:
            others.add(kind)
            continue
        values = _decoded(tensor, kind)
        if bad := count_not_finite(values):
            done.findings.append(Finding(name, f"{bad} of {values.numel()} values are not finite"))
    if others:
        done.skipped.append(f"values of {', '.join(sorted(others))}: kinds of blocks that requant does not write")
    if weights:
        done.bits_per_weight = 8 * nbytes / weights


def _decoded(tensor: Any, kind: str) -> Tensor:
    """The values of a tensor: fp32 of blocks, others in their dtype."""
    found = stored_bytes_of(tensor)
    return gguf_blocks.unpack(kind, found) if kind in gguf_blocks.BYTES else found.view(_PLAIN[kind])


def _metadata(reader: Any, stored: dict[str, Any]) -> list[Finding]:
    """Sizes that llama.cpp takes from the metadata and that the tensors do not have."""
    value = {name: field.contents() for name, field in reader.fields.items()}
    kind, found = value.get("general.architecture"), []
    if not isinstance(kind, str):
        return [Finding("general.architecture", "is missing: no engine knows what model it is")]
    blocks = {name.split(".")[1] for name in stored if name.startswith("blk.")}
    if value.get(f"{kind}.block_count") != len(blocks):
        said = value.get(f"{kind}.block_count")
        found.append(Finding(f"{kind}.block_count", f"is {said}, the tensors are of {len(blocks)} blocks"))
    embedding, tokens = stored.get("token_embd.weight"), value.get("tokenizer.ggml.tokens") or []
    if embedding is None:
        found.append(Finding("token_embd.weight", "is missing: every model has an embedding"))
    elif len(tokens) != int(embedding.shape[1]):
        rows = int(embedding.shape[1])
        found.append(Finding("tokenizer.ggml.tokens", f"holds {len(tokens)} tokens, the embedding has {rows} rows"))
    return found


def _compare(done: Verification, stored: dict[str, Any], plan: GgufPlan) -> None:
    """Report tensors that are not the source's. Q4_1's minima are rounded to float16, which is no finding."""
    expected = {tensor.name: tensor for tensor in plan.tensors}
    for name in sorted(stored.keys() ^ expected.keys()):
        done.findings.append(Finding(name, "extra: its source has none" if name in stored else "missing"))
    largest = 0.0
    for name in stored.keys() & expected.keys():
        tensor, found = expected[name], stored_bytes_of(stored[name])
        kind = stored[name].tensor_type.name
        if kind != tensor.kind or found.numel() != tensor.nbytes:
            done.findings.append(Finding(name, f"{kind} of {found.numel()} bytes, of its source {tensor.kind}"))
            continue
        rounding = tensor.rounding(found.reshape(tensor.shape))
        if not rounding <= (gguf_blocks.LARGEST_ROUNDING if kind == "Q4_1" else 0):
            done.findings.append(Finding(name, "does not decode to its source"))
        largest = max(largest, rounding)
    done.largest_rounding = largest
