"""The student: a GPTQ checkpoint as a model whose group scales (and norms) are trainable.

Integer codes are frozen. A weight is rebuilt from its packed codes when its layer runs, and again in the backward pass.
Every value in use can be stored in the file and is what a server computes with: scales exact in fp16 and bf16, norms in
their stored dtype. The gradient passes straight through the rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from requant.checkpoint.reader import Checkpoint
from requant.errors import InputError
from requant.formats.quantized_format import Reader
from requant.formats.registry import open_quantized
from requant.heal.settings import Tune
from requant.heal.trainable import TrainableVector
from requant.modeling import skeleton
from requant.numerics.grid import deployable

CPU = torch.device("cpu")


@dataclass(kw_only=True)
class Codes:
    """One quantized linear as stored: W[o, i] = scale[o, g] * (code[o, i] - zero[o, g]).

    packed: uint8 [out, in] for 8 bits; else [out, in/2], columns j and j + in/2 in the low and high half of byte j.
    scale: fp32 [out, groups]. zero: uint8 [out, groups]. order: int64 [in], the columns sorted by group, where the file
    has them in another order (desc_act).
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor
    columns: int
    order: Tensor | None = None

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, zero: Tensor, g_idx: Tensor, *, where: str) -> Codes:
        """Codes from the result of `Reader.unpack`.

        Raises InputError for zero or non-finite scales and groups of unequal size.
        """
        if not bool(torch.isfinite(scale).all()) or bool((scale == 0).any()):
            raise InputError(
                f"{where}.scales: holds zeros, NaN or infinity: the checkpoint is damaged, quantize it again"
            )
        columns, groups = codes.shape[1], scale.shape[1]
        order = torch.argsort(g_idx, stable=True)
        regular = torch.arange(columns, device=g_idx.device) // (columns // groups)
        if columns % groups or not torch.equal(g_idx[order], regular):
            raise InputError(f"{where}.g_idx: its groups are not of equal size: cannot be healed")
        sorted_already = torch.equal(g_idx, regular)
        codes = codes if sorted_already else codes[:, order]
        if int(codes.max()) < 16:
            half = columns // 2
            codes = codes[:, :half] | (codes[:, half:] << 4)
        return cls(
            packed=codes.contiguous(),
            scale=scale,
            zero=zero.to(torch.uint8),
            columns=columns,
            order=None if sorted_already else order,
        )

    def centred(self, dtype: torch.dtype) -> Tensor:
        """code - zero, [out, groups, group_size]; exact in every float dtype."""
        rows, half = len(self.packed), self.columns // 2
        out = torch.empty(rows, self.columns, dtype=dtype, device=self.packed.device)
        if self.packed.shape[1] == self.columns:
            out.copy_(self.packed)
        else:
            torch.bitwise_and(self.packed, 15, out=(low := torch.empty_like(self.packed)))
            out[:, :half] = low
            out[:, half:] = torch.bitwise_right_shift(self.packed, 4, out=low)
        return out.view(rows, self.scale.shape[1], -1).sub_(self.zero[..., None])


class _DequantizedProduct(torch.autograd.Function):
    """x @ W.T with W rebuilt from codes, in the forward and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: Tensor, codes: Codes, current_scales: Tensor) -> Tensor:
        weight = codes.centred(current_scales.dtype).mul_(current_scales[..., None]).view(len(current_scales), -1)
        rounded = x.to(current_scales.dtype)
        ctx.codes, ctx.current_scales, ctx.dtype = codes, current_scales, x.dtype
        ctx.save_for_backward(rounded)
        return rounded @ weight.T

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        output_gradient = outer[0].to(x.dtype)
        centred = ctx.codes.centred(x.dtype)
        rows, groups, _ = centred.shape
        offset_gradient = None
        if ctx.needs_input_grad[1]:  # dL/dW contracted with the codes of each group, times the unit of an offset
            flat = output_gradient.reshape(-1, rows).T @ x.reshape(-1, x.shape[-1])
            offset_gradient = flat.view(rows, groups, -1).mul_(centred).sum(-1, dtype=torch.float32)
            offset_gradient.mul_(ctx.codes.scale)
        input_gradient = None
        if ctx.needs_input_grad[0]:
            weight = centred.mul_(ctx.current_scales[..., None]).view(rows, -1)
            input_gradient = (output_gradient @ weight).to(ctx.dtype)
        return input_gradient, offset_gradient, None, None


class ScaledLinear(nn.Module):
    """A quantized linear with trainable scales.

    offset: fp32 [out, groups], relative change of each scale. current_scales: [out, groups], the values in use.
    """

    def __init__(self, codes: Codes, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.codes = codes
        self.in_features, self.out_features = codes.columns, len(codes.scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.offset = nn.Parameter(torch.zeros_like(codes.scale), requires_grad=False)
        self.current_scales = codes.scale.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.codes.order is not None:
            x = x.index_select(-1, self.codes.order)
        apply: Any = _DequantizedProduct.apply
        out: Tensor = apply(x, self.offset, self.codes, self.current_scales)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class _TrainableNorm(nn.Module):
    """The current weight of a norm; its gradient is accumulated in `offset`."""

    def __init__(self, current: Tensor, unit: Tensor, offset: nn.Parameter) -> None:
        super().__init__()
        self.current, self.unit, self.offset = current, unit, offset

    def forward(self, _: Tensor) -> Tensor:
        return self.current + self.unit * (self.offset - self.offset.detach())


@dataclass
class Student:
    """A causal LM, or a part of it, with its trainable values."""

    model: Any
    trainable: list[TrainableVector]

    def refresh(self) -> None:
        """Compute all current values from their offsets."""
        for vector in self.trainable:
            vector.refresh()

    def values(self) -> dict[str, Tensor]:
        """Stored tensor name -> current values, fp32 (scales [out, groups])."""
        return {name: v.view(v.current, name).float().clone() for v in self.trainable for name in v.parts}


def read_linear(reader: Reader, stem: str, device: torch.device = CPU) -> Codes:
    """One quantized linear by the name that its tensors share, on `device`."""
    return Codes.of(*reader.unpack(f"{stem}.weight", device), where=f"{reader.checkpoint.path}: {stem}")


def fill(
    model: nn.Module,
    prefix: str,
    reader: Reader,
    names: Mapping[str, str],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, ScaledLinear]:
    """Load the parameters of `model` whose names begin with `prefix`.

    Quantized linears are replaced by `ScaledLinear`.
    names: parameter -> stored name. dtype: of products; vectors (norms, biases) stay fp32.
    Returns stored stem -> layer.
    """
    layers: dict[str, ScaledLinear] = {}
    parameters = [n for n, _ in model.named_parameters() if n.startswith(prefix)]
    missing = [n for n in parameters if n not in names]
    if missing:
        raise InputError(
            f"{reader.checkpoint.path}: {len(missing)} of the model's tensors are missing, e.g. {missing[0]}"
        )
    for name in parameters:
        stem = names[name].removesuffix(".weight")
        if names[name] in reader.quantized:
            codes = read_linear(reader, stem, device)
            owner = name.removesuffix(".weight")
            has_bias = getattr(model.get_submodule(owner), "bias", None) is not None
            bias = reader.read(names[f"{owner}.bias"]).to(device).float() if has_bias else None
            layers[stem] = ScaledLinear(codes, bias, dtype)
            model.set_submodule(owner, layers[stem])
    for name, parameter in list(model.named_parameters()):
        if name.startswith(prefix) and parameter.is_meta:
            value = reader.read(names[name])
            skeleton.place(model, {name: value.to(device, torch.float32 if value.ndim == 1 else dtype)})
    return layers


def trainable_vectors(
    model: nn.Module,
    prefix: str,
    layers: Mapping[str, ScaledLinear],
    tune: Iterable[Tune],
    *,
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    dtype: torch.dtype,
) -> list[TrainableVector]:
    """The values named by `tune` as trainable vectors, with units of change.

    The unit of a group scale is the scale itself, that of a norm's weight the root mean square of the norm's weights.
    """
    scales = [trainable_scales(layers, dtype)] if "scales" in tune and layers else []
    return scales + (_norms(model, prefix, checkpoint, names) if "norms" in tune else [])


def trainable_scales(layers: Mapping[str, ScaledLinear], dtype: torch.dtype) -> TrainableVector:
    """The scales of `layers` (stored stem -> layer) as one vector.

    Each layer then holds views into the vector.
    """
    parts = {f"{stem}.scales": (layer.codes.scale, layer.codes.scale) for stem, layer in layers.items()}
    scales = TrainableVector.concatenate(parts, deployable, dtype)
    for stem, layer in layers.items():
        name = f"{stem}.scales"
        layer.offset = scales.parameter(name)
        layer.current_scales = scales.view(scales.current, name)
        layer.codes.scale = scales.view(scales.base, name)
    return scales


def _norms(model: nn.Module, prefix: str, checkpoint: Checkpoint, names: Mapping[str, str]) -> list[TrainableVector]:
    owners = {
        names[f"{name}.weight"]: module
        for name, module in model.named_modules()
        if f"{name}.".startswith(prefix)
        and isinstance(weight := module._parameters.get("weight"), Tensor)
        and weight.ndim == 1
    }
    if not owners:
        return []
    stored = {checkpoint[name].dtype for name in owners}
    if len(stored) > 1:
        raise InputError(f"{checkpoint.path}: norms are stored in {' and '.join(map(str, stored))}: heal scales only")
    dtype = stored.pop()
    parts = {}
    for name, module in owners.items():
        value = module.weight.detach().float()
        parts[name] = (value, value.square().mean().sqrt().clamp_min(1e-3).expand_as(value))
    norms = TrainableVector.concatenate(parts, lambda value: value.to(dtype).float(), torch.float32)
    for name, module in owners.items():
        current = _TrainableNorm(norms.view(norms.current, name), norms.view(norms.unit, name), norms.parameter(name))
        parametrize.register_parametrization(module, "weight", current, unsafe=True)
    return [norms]


def load(
    path: Path, *, device: torch.device, dtype: torch.dtype, tune: Iterable[Tune], trust_remote_code: bool = False
) -> Student:
    """The whole model of a GPTQ checkpoint as a student."""
    reader = open_quantized(path)
    model: Any = skeleton.open_model(path, trust_remote_code=trust_remote_code)
    names = skeleton.tensor_names(model, reader)
    layers = fill(model, "", reader, names, device=device, dtype=dtype)
    if not layers:
        raise InputError(f"{path}: no quantized linear found: nothing to heal")
    model.tie_weights()
    skeleton.buffers_to(model, device, reader.checkpoint)
    widen(model)
    vectors = trainable_vectors(model, "", layers, tune, checkpoint=reader.checkpoint, names=names, dtype=dtype)
    return Student(model, vectors)


def widen(model: Any) -> None:
    """Keep the residual stream in fp32: cast the output of 16-bit embeddings."""
    model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.float())
