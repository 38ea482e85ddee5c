"""The base as training held it, in bitsandbytes' 4 bits or in 16, and PEFT's adapter on it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from requant.checkpoint.reader import Checkpoint
from requant.errors import StageError, library_call
from requant.evaluate import peft_runtime
from requant.evaluate.variant_sources import VariantSources
from requant.merge.base_checkpoint import LIVE, DecodedCheckpoint, open_base_checkpoint
from requant.merge.base_weights import Nf4Settings, finer
from requant.modeling import skeleton
from requant.modeling.model_classes import pretrained
from requant.numerics import nf4
from requant.numerics.dtypes import DTYPES
from requant.runtime.device import free_bytes
from requant.runtime.library_imports import load_training_libraries

KEPT, KEPT_ON = 0.5, ("cuda",)  # of free memory, for decoded weights beside those in 4 bits; types of devices


def trained_base(sources: VariantSources, device: torch.device, dtype: torch.dtype, *, with_adapter: bool) -> Any:
    """The base as training loaded it, computing in `dtype`.

    with_adapter: with the adapter on top through PEFT, unmerged.
    """
    model = loaded(sources, device, dtype)
    compute_in(model, dtype, sources.simulate.blocksize if sources.simulate else None)
    return (peft_runtime.attach(model, sources.plan or sources.adapter) if with_adapter else model).eval()


def loaded(sources: VariantSources, device: torch.device, dtype: torch.dtype) -> Any:
    """The base as transformers loads it with the settings of training, in 4 bits by bitsandbytes or in 16 bit.

    What is encoded on disk is decoded by transformers where it can, or else by us. dtype: of what is not in 4 bits,
    unless training loaded a 16-bit base in another.
    """
    from transformers import BitsAndBytesConfig

    load_training_libraries()
    packed = sources.simulate is None and not sources.sixteen_bit
    base = open_base_checkpoint(sources.base)
    encoded = base if isinstance(base, DecodedCheckpoint) else None
    ours = encoded is not None and encoded.method not in LIVE
    quantized = packed or (encoded is not None and not ours)  # else a quantization_config stops transformers
    config = skeleton.load_config(sources.base, trust_remote_code=sources.trust_remote_code, quantized=quantized)
    options: dict[str, Any] = {}
    if encoded is not None and ours:
        options["state_dict"] = {n: encoded.read(n).to(dtype) if n in encoded.encoded else base.read(n) for n in base}
    elif encoded is not None:
        config.quantization_config = {**Checkpoint(sources.base).quantization, "dequantize": True}
    if sources.simulate is not None:
        s = sources.simulate
        options["dtype"] = DTYPES[s.load_dtype]
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=s.quant_type,
            bnb_4bit_use_double_quant=s.double_quant,
            bnb_4bit_compute_dtype=DTYPES[s.compute_dtype or s.load_dtype],
            llm_int8_skip_modules=skipped(sources.base, s, trust_remote_code=sources.trust_remote_code),
        )
    else:
        options["dtype"] = dtype
    what = f"{sources.base}: transformers cannot load it as training did"
    with library_call(what, kind=StageError, passing=(torch.OutOfMemoryError,)):
        model = pretrained(
            config,
            None if ours else sources.base,
            device_map={"": device},
            trust_remote_code=sources.trust_remote_code,
            **options,
        )
    _unwrap_16_bit(model)
    return model


def skipped(base: Path, simulate: Nf4Settings, *, trust_remote_code: bool) -> list[str] | None:
    """`llm_int8_skip_modules` for transformers 5 that quantizes what training quantized.

    The training's version of transformers may have quantized other modules by itself.
    """
    if simulate.version == 5:
        return list(simulate.skip) or None
    model = skeleton.open_model(base, trust_remote_code=trust_remote_code)
    trained, possible = (skeleton.quantizable(model, skip, version=v) for v, skip in ((4, simulate.skip), (5, ("^$",))))
    if not trained <= possible:
        raise StageError(
            f"{sorted(trained - possible)[0]}: transformers 4 quantized it, transformers 5 cannot: base and adapter "
            "cannot be measured here. The merge is not affected"
        )
    return [f"{re.escape(name)}$" for name in sorted(possible - trained)]


def _unwrap_16_bit(model: nn.Module) -> None:
    """Make Linears of 4-bit layers whose weights are not packed.

    Towers of a base that transformers 4 saved are such: transformers 5 finds no module by the names in its
    `llm_int8_skip_modules`, which lack the outer `model`, and neither runs nor adapts them.
    """
    from bitsandbytes.nn import Linear4bit

    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit) and getattr(module.weight, "quant_state", None) is None:
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            plain.weight, plain.bias = module.weight, module.bias
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, plain)


def compute_in(model: nn.Module, dtype: torch.dtype, blocksize: int | None) -> None:
    """Let 4-bit layers compute in `dtype` with the weights that training saw; check bitsandbytes' decoder.

    The decoder is checked where it may be wrong: bitsandbytes 0.50 decodes wrongly on CPUs with AVX-512 when a row is
    not a whole number of blocks.
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
        coarser = [t for t in (state.dtype, module.compute_dtype) if t is not None and finer(dtype, t)]
        module.forward = _AsTrained(module, tuple(coarser), dtype)
        shape = tuple(state.shape)
        if module.weight.device.type == "cpu" and shape[-1] % state.blocksize and shape not in checked:
            checked.add(shape)
            _check_decoder(name, module.weight, state, bnb)


class _AsTrained:
    """A `Linear4bit`'s forward in the dtype of x, its weight decoded by bitsandbytes and cast as in training.

    casts: dtypes coarser than x's, one after the other. bitsandbytes computes in the dtype of the weight alone. kept:
    the weight of `dtype` as it is decoded, in memory for a while.
    """

    def __init__(self, module: Any, casts: tuple[torch.dtype, ...], dtype: torch.dtype) -> None:
        self.module, self.casts, self.dtype = module, casts, dtype
        self.kept: Tensor | None = None

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight for x of `dtype`."""
        import bitsandbytes.functional as bnb

        packed = self.module.weight
        state = packed.quant_state
        before, state.dtype = state.dtype, self.casts[0] if self.casts else dtype
        try:
            weight: Tensor = bnb.dequantize_4bit(packed.data, state)
        finally:
            state.dtype = before
        for cast in self.casts[1:]:
            weight = weight.to(cast)
        return weight.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.kept if self.kept is not None and self.kept.dtype == x.dtype else self.weight(x.dtype)
        bias = self.module.bias
        return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


@contextmanager
def decoded_once(model: Any, device: torch.device, *, wanted: bool = True) -> Iterator[bool]:
    """Context in which 4-bit layers of a GPU keep their decoded weights, where these fit; whether they do.

    The numbers are the same. A forward of few tokens takes less than decoding its weights, and launches fewer kernels.
    On a CPU it takes longer, and memory is what the whole machine has.
    """
    found = [m.forward for m in model.modules()] if isinstance(model, nn.Module) else []
    layers = [layer for layer in found if isinstance(layer, _AsTrained)]
    need = sum(math.prod(layer.module.weight.quant_state.shape) * layer.dtype.itemsize for layer in layers)
    fits = wanted and device.type in KEPT_ON and may_be_kept(need, device) and _all_kept(layers)
    try:
        yield fits
    finally:
        for layer in layers:
            layer.kept = None


@torch.no_grad()
def _all_kept(layers: Sequence[_AsTrained]) -> bool:
    """Decode all weights; False, and none is kept, where memory runs out."""
    try:
        for layer in layers:
            layer.kept = layer.weight(layer.dtype)
    except torch.OutOfMemoryError:
        for layer in layers:
            layer.kept = None
        return False
    return True


def may_be_kept(nbytes: int, device: torch.device) -> bool:
    """Whether decoded weights of so many bytes leave memory for keys, values and activations."""
    return nbytes <= KEPT * free_bytes(device)


def _cast_own(module: nn.Module, dtype: torch.dtype) -> None:
    for parameter in module._parameters.values():
        if parameter is not None and parameter.dtype.is_floating_point:
            parameter.data = parameter.data.to(dtype)


def _check_decoder(name: str, weight: Any, state: Any, bnb: Any) -> None:
    """Raise StageError when bitsandbytes decodes this layer differently from our decoder.

    Both decode the same stored bytes.
    """
    absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    expected = nf4.decode(
        weight.data,
        absmax.float(),
        nf4.QuantState(
            quant_type=state.quant_type, blocksize=state.blocksize, shape=tuple(state.shape), dtype="float32"
        ),
    )
    decoded = bnb.dequantize_4bit(weight.data, state).float()
    error = float((expected - decoded).norm() / expected.norm())
    if error > 0.01:
        raise StageError(
            f"{name}: bitsandbytes decodes {tuple(state.shape)} wrongly on this CPU (off by {error:.0%}), so base and "
            "adapter cannot be measured here: use a GPU. The merge does not use it and is not affected"
        )
