"""Variants as models: base, adapter, merged, original, rtn, gptq, healed and ends.

`base` and `adapter` run in bitsandbytes and PEFT, on the 4-bit weights in the dtype in which training multiplied by
them; the others are plain models of the given dtype. Every variant computes in that dtype. A base that training did not
quantize is a plain model too, and its `adapter` is it with PEFT.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch

from requant.checkpoint.device_loader import load_onto
from requant.checkpoint.reader import Checkpoint, Weights
from requant.errors import StageError, library_call
from requant.evaluate import variant_weights
from requant.evaluate.trained_base import trained_base
from requant.evaluate.variant_sources import VariantSources
from requant.modeling import skeleton, stacked_experts
from requant.modeling.model_classes import pretrained
from requant.numerics.grid import Grid
from requant.runtime.device import free_memory

__all__ = [
    "PLAIN",
    "RUNTIMES",
    "RUNTIMES_16_BIT",
    "Load",
    "VariantSources",
    "fill",
    "load",
    "plain",
    "quantized",
    "teacher",
]

log = logging.getLogger(__name__)
PLAIN = ("merged", "original", "rtn", "gptq", "healed", "ends", "gptqmodel")
RUNTIMES = {"base": "bitsandbytes", "adapter": "bitsandbytes and PEFT, unmerged"} | dict.fromkeys(PLAIN, "torch")
RUNTIMES |= {"nf4-merge": "bitsandbytes, merged by PEFT", "nf4-again": "bitsandbytes"}
RUNTIMES_16_BIT = RUNTIMES | {"base": "torch", "adapter": "torch and PEFT, unmerged"}


class Load(Protocol):
    """Makes the model of a variant."""

    def __call__(self, name: str, sources: VariantSources, *, device: torch.device, dtype: torch.dtype) -> Any:
        """The model on `device`, computing in `dtype`, in eval mode."""


@torch.no_grad()
def load(name: str, sources: VariantSources, *, device: torch.device, dtype: torch.dtype) -> Any:
    """The model of one variant on `device`, computing in `dtype`, in eval mode."""
    if name in ("base", "adapter"):
        return trained_base(sources, device, dtype, with_adapter=name == "adapter")
    if name == "merged":
        return _pretrained(sources, device, dtype)
    model, stored = plain(name, sources, device)
    return fill(model, stored, device, dtype)


def plain(name: str, sources: VariantSources, device: torch.device) -> tuple[Any, Weights]:
    """(skeleton, weights) of a variant that is a plain model, all but base and adapter."""
    packed = {"gptq": sources.gptq, "healed": sources.healed, "ends": sources.deployed}
    packed |= {"gptqmodel": sources.gptqmodel}
    path = packed.get(name, sources.merged)
    if path is None or name not in PLAIN or (name == "original" and sources.original is None):
        raise ValueError(f"no variant {name!r}")
    trust = sources.trust_remote_code
    if name == "rtn":
        split, checkpoint = stacked_experts.open_split(path, trust_remote_code=trust)
        return split, variant_weights.rounded(checkpoint, split, sources.grids, device)
    model = skeleton.open_model(path, trust_remote_code=trust)
    if name == "original" and sources.original is not None:
        return model, variant_weights.Merged(sources.original, device)
    if name == "merged":
        return model, Checkpoint(path)
    weights = variant_weights.packed(path, model, device)
    return model, variant_weights.with_rounded_ends(weights, model, sources.ends) if name == "ends" else weights


def teacher(name: str, sources: VariantSources, *, device: torch.device, stored: torch.dtype | None) -> Any:
    """The teacher of healing, `merged` or `adapter`.

    fp32 on a CPU, else 16 bit; `merged` in its `stored` dtype.
    """
    if device.type == "cpu":
        return load(name, sources, device=device, dtype=torch.float32)
    if name == "merged" and stored in (torch.float16, torch.bfloat16):
        return load(name, sources, device=device, dtype=stored)
    return load(name, sources, device=device, dtype=torch.bfloat16)


def quantized(
    path: str | Path, *, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False,
    ends: Mapping[str, Grid] = MappingProxyType({}),
) -> Any:  # fmt: skip
    """The model of the quantized checkpoint `path`. ends: of token embeddings and head that are rounded."""
    sources = VariantSources.of_checkpoint(Path(path), trust_remote_code=trust_remote_code)
    sources = replace(sources, ends=ends, deployed=sources.gptq)
    return load("ends" if ends else "gptq", sources, device=device, dtype=dtype)


def _pretrained(sources: VariantSources, device: torch.device, dtype: torch.dtype) -> Any:
    config = skeleton.load_config(sources.merged, trust_remote_code=sources.trust_remote_code)
    load = partial(pretrained, config, sources.merged, dtype=dtype, trust_remote_code=sources.trust_remote_code)
    what = f"{sources.merged}: transformers cannot load it"
    if device.type != "cpu":  # without a copy on the host
        try:
            with library_call(what, kind=StageError, passing=(RuntimeError,)):
                return load(device_map={"": device}).eval()
        except torch.OutOfMemoryError:
            raise
        except (
            RuntimeError
        ) as error:  # transformers hides errors of stacking experts: load on the host, which shows them
            log.debug("loading straight to %s: %s", device, error)
        free_memory(device)
    with library_call(what, kind=StageError, passing=(torch.OutOfMemoryError,)):
        return load().to(device).eval()


@torch.no_grad()
def fill(model: Any, stored: Weights, device: torch.device, dtype: torch.dtype) -> Any:
    """Fill a skeleton with all its weights; raises StageError when some are missing."""
    owners: dict[str, list[str]] = {}
    for parameter, name in skeleton.tensor_names(model, stored).items():
        owners.setdefault(name, []).append(parameter)
    pending = skeleton.unstored(model, {p for many in owners.values() for p in many})
    if pending:
        raise StageError(f"{stored.path}: {len(pending)} tensors of the model are missing, e.g. {min(pending)}")
    for name, parameters in owners.items():
        tensor = load_onto(stored, name, device, dtype)
        skeleton.place(model, dict.fromkeys(parameters, tensor))
    model.tie_weights()
    skeleton.buffers_to(model, device, stored)
    return model
