"""A name -> a model that can be scored. Each is built when asked for and owned by the caller alone.

`base` and `adapter` run through the real bitsandbytes and PEFT; the others are plain models of the given dtype.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from requant import merge, nf4, peft_runtime, skeleton
from requant.checkpoint import Checkpoint
from requant.dequantize import Nf4Settings
from requant.errors import StageError
from requant.grid import Grid, find_scales, nearest
from requant.layout import load_quantized

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Places:
    """Where variants are made from. `original` is a merge plan onto the 16-bit base, when there is one."""

    base: Path
    adapter: Path
    merged: Path
    gptq: Path
    simulate: Nf4Settings | None
    grids: Mapping[str, Grid]
    original: merge.MergePlan | None = None
    trust_remote_code: bool = False
    plan: merge.MergePlan | None = None  # whose adapters make the variant adapter; None: the directory `adapter`
    healed: Path | None = None


@torch.no_grad()
def load(name: str, places: Places, *, device: torch.device, dtype: torch.dtype) -> Any:
    """The model of one variant on `device`, computing in `dtype`, in eval mode."""
    if name in ("base", "adapter"):
        return _quantized_base(places, device, dtype, with_adapter=name == "adapter")
    if name == "merged":
        return _pretrained(places, device, dtype)
    if name == "rtn":
        return _rounded(places, device, dtype)
    if name == "gptq":
        return quantized(places.gptq, places, device, dtype)
    if name == "healed" and places.healed is not None:
        return quantized(places.healed, places, device, dtype)
    if name == "original" and places.original is not None:
        plan = places.original
        tensors = ((op.name, merge.compute(plan, op)[0]) for op in plan.ops)
        return _filled(places.merged, [op.name for op in plan.ops], tensors, places, device, dtype)
    raise ValueError(f"no variant {name!r}")


def teacher(name: str, places: Places, *, device: torch.device, stored: torch.dtype | None) -> Any:
    """What healing imitates, `merged` or `adapter`: fp32 on a CPU, else 16 bit, the merged model as it is `stored`."""
    if device.type == "cpu":
        return load(name, places, device=device, dtype=torch.float32)
    exact = name == "merged" and stored in (torch.float16, torch.bfloat16)
    return load(name, places, device=device, dtype=stored if exact and stored else torch.bfloat16)


def quantized(path: Path, places: Places, device: torch.device, dtype: torch.dtype) -> Any:
    """The model of a GPTQ checkpoint, dequantized by `layout.load_quantized`."""
    checkpoint = Checkpoint(path)
    names = [n.removesuffix("qweight") + "weight" if n.endswith(".qweight") else n for n in checkpoint]
    packed = {n for n in names if n not in checkpoint}
    return _filled(path, names, load_quantized(path), places, device, dtype, packed)


def _pretrained(places: Places, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(places.merged), dtype=dtype, trust_remote_code=places.trust_remote_code
    )
    return model.to(device).eval()


def _filled(
    path: Path,
    names: Iterable[str],
    tensors: Iterable[tuple[str, Tensor]],
    places: Places,
    device: torch.device,
    dtype: torch.dtype,
    oriented: Container[str] = (),
) -> Any:
    """The model of `path`'s config with these tensors, by checkpoint name; `names` are all of theirs.

    oriented: names of matrices that come as [out, in] whatever the 16-bit checkpoint's layout.
    """
    trust = places.trust_remote_code
    model: Any = skeleton.build(skeleton.load_config(path, trust_remote_code=trust), trust_remote_code=trust)
    owners: dict[str, list[str]] = {}
    for parameter, name in skeleton.tensor_names(model, names).items():
        owners.setdefault(name, []).append(parameter)
    pending = {n for n, _ in model.named_parameters()}
    for name, tensor in tensors:
        for parameter in owners.get(name, []):
            skeleton.place(model, {parameter: tensor.to(device, dtype)}, turn=name not in oriented)
            pending.discard(parameter)
    if pending:
        raise StageError(f"{path}: {len(pending)} tensors of the model are missing, e.g. {sorted(pending)[0]}")
    model.tie_weights()
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
    return model


def _rounded(places: Places, device: torch.device, dtype: torch.dtype) -> Any:
    """The control: plain round-to-nearest in fp32, min-max scales, on the same bits and groups."""
    checkpoint = Checkpoint(places.merged)
    trust = places.trust_remote_code
    model = skeleton.build(skeleton.load_config(places.merged, trust_remote_code=trust), trust_remote_code=trust)
    names = skeleton.tensor_names(model, checkpoint)
    grids = {names[f"{module}.weight"]: grid for module, grid in places.grids.items()}
    turned = {names[f"{module}.weight"] for module in skeleton.conv1d_modules(model)}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in checkpoint:
            value = checkpoint.read(name)
            if name in grids:
                value = value.T if name in turned else value
                value = _round(value.to(device).float().contiguous(), grids[name])
            yield name, value

    return _filled(places.merged, checkpoint, tensors(), places, device, dtype, grids)


def _round(weight: Tensor, grid: Grid) -> Tensor:
    plain = Grid(grid.bits, grid.group_size, grid.symmetric, search="minmax")
    scales = find_scales(weight, torch.ones(weight.shape[1], device=weight.device), plain)
    return nearest(weight, scales, plain)


def _quantized_base(places: Places, device: torch.device, dtype: torch.dtype, *, with_adapter: bool) -> Any:
    """The 4-bit base as training loaded it, through bitsandbytes; with the adapter unmerged on top through PEFT."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {}
    if places.simulate is not None:
        s = places.simulate
        options["dtype"] = merge.DTYPES[s.load_dtype]
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=s.quant_type, bnb_4bit_use_double_quant=s.double_quant,
            bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=_skipped(places.base, s, places.trust_remote_code),
        )  # fmt: skip
    else:
        options["dtype"] = dtype
    model = AutoModelForCausalLM.from_pretrained(
        str(places.base), device_map={"": device}, trust_remote_code=places.trust_remote_code, **options
    )
    _compute_in(model, dtype, places.simulate.blocksize if places.simulate else None)
    if with_adapter:
        from peft import PeftModel

        plan = places.plan
        model = peft_runtime.attach(model, plan) if plan else PeftModel.from_pretrained(model, str(places.adapter))
    return model.eval()


def _skipped(base: Path, simulate: Nf4Settings, trust_remote_code: bool) -> list[str] | None:
    """`llm_int8_skip_modules` with which transformers 5 quantizes what the training's version did."""
    if simulate.version == 5:
        return list(simulate.skip) or None
    model = skeleton.build(
        skeleton.load_config(base, trust_remote_code=trust_remote_code), trust_remote_code=trust_remote_code
    )
    wanted, now = (skeleton.quantizable(model, skip, version=v) for v, skip in ((4, simulate.skip), (5, ("^$",))))
    if not wanted <= now:
        raise StageError(
            f"{sorted(wanted - now)[0]}: transformers 4 quantized it, transformers 5 cannot: base and adapter cannot be "
            "measured here. Quantize the base once with transformers 4, save it, and use that as base.model"
        )
    return [f"{re.escape(name)}$" for name in sorted(now - wanted)]


def _compute_in(model: nn.Module, dtype: torch.dtype, blocksize: int | None) -> None:
    """Let 4-bit layers decode to and multiply in `dtype`; check bitsandbytes' decoder where it is known to be wrong.

    bitsandbytes 0.50 decodes wrongly on CPUs with AVX-512 when a row is not a whole number of blocks.
    """
    import bitsandbytes.functional as bnb
    from bitsandbytes.nn import Linear4bit

    checked: set[tuple[int, ...]] = set()
    for name, module in model.named_modules():
        if not isinstance(module, Linear4bit):
            if any(p.dtype.is_floating_point for p in module._parameters.values() if p is not None):
                _cast_own(module, dtype)
            continue
        state = module.weight.quant_state
        if blocksize not in (None, state.blocksize):
            raise StageError(
                f"{name}: bitsandbytes quantizes in blocks of {state.blocksize}, base.nf4.blocksize is {blocksize}: "
                "base and adapter cannot be measured as trained; quantize the base once with that block size and use it"
            )
        module.compute_dtype = dtype
        if dtype == torch.float32:
            module.support_avx512bf16_for_cpu = False  # else its first forward repacks the scales to bfloat16
        state.dtype = dtype
        shape = tuple(state.shape)
        if module.weight.device.type == "cpu" and shape[-1] % state.blocksize and shape not in checked:
            checked.add(shape)
            _check_decoder(name, module.weight, state, bnb)


def _cast_own(module: nn.Module, dtype: torch.dtype) -> None:
    for parameter in module._parameters.values():
        if parameter is not None and parameter.dtype.is_floating_point:
            parameter.data = parameter.data.to(dtype)


def _check_decoder(name: str, weight: Any, state: Any, bnb: Any) -> None:
    """Raise StageError when bitsandbytes decodes this layer differently from its own stored bytes."""
    absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    ours = nf4.decode(
        weight.data,
        absmax.float(),
        nf4.QuantState(state.quant_type, state.blocksize, tuple(state.shape), "float32"),
    )
    theirs = bnb.dequantize_4bit(weight.data, state).float()
    error = float((ours - theirs).norm() / ours.norm())
    if error > 0.01:
        raise StageError(
            f"{name}: bitsandbytes decodes {tuple(state.shape)} wrongly on this CPU (off by {error:.0%}), so base and adapter "
            "cannot be measured here: use a GPU. The merge does not use it and is not affected"
        )
