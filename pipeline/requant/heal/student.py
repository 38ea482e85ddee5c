"""The student: a GPTQ checkpoint as a model whose scales, codes and norms are trainable.

A weight is rebuilt from its packed codes when its layer runs, and again in the backward pass.
Every value in use can be stored in the file and is what a server computes with: scales exact in fp16 and bf16, norms in
their stored dtype. The gradient passes straight through the rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
from requant.heal.codes import Codes, DequantizedProduct
from requant.heal.latents import OriginalWeights, TrainableCodes, latent_of
from requant.heal.settings import Tune
from requant.heal.trainable import Trainable, TrainableVector
from requant.modeling import skeleton
from requant.numerics.grid import deployable

CPU = torch.device("cpu")


class ScaledLinear(nn.Module):
    """A quantized linear with trainable scales.

    offset: fp32 [out, groups], relative change of each scale. current_scales: [out, groups], the values in use.
    latent: of its codes where these are trained (`latents`).
    """

    latent: Tensor | None

    def __init__(self, codes: Codes, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.codes = codes
        self.in_features, self.out_features = codes.columns, len(codes.scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.offset = nn.Parameter(torch.zeros_like(codes.scale), requires_grad=False)
        self.current_scales = codes.scale.to(dtype)
        self.latent = None

    def forward(self, x: Tensor) -> Tensor:
        if self.codes.order is not None:
            x = x.index_select(-1, self.codes.order)
        apply: Any = DequantizedProduct.apply
        out: Tensor = apply(x, self.offset, self.latent, self.codes, self.current_scales)
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
    trainable: list[Trainable]

    def refresh(self) -> None:
        """Compute all current values from their offsets."""
        for vector in self.trainable:
            vector.refresh()

    def values(self) -> dict[str, Tensor]:
        """Stored tensor name -> current values: fp32 (scales [out, groups]); of codes uint8 [out, in], on the CPU."""
        return {name: value for v in self.trainable for name, value in v.values().items()}


def read_linear(reader: Reader, stem: str, device: torch.device = CPU) -> Codes:
    """One quantized linear by the name that its tensors share, on `device`."""
    bits, _ = reader.bits_and_group_size(f"{stem}.weight")
    return Codes.of(*reader.unpack(f"{stem}.weight", device), bits=bits, where=f"{reader.checkpoint.path}: {stem}")


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
    tune: Collection[Tune],
    *,
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    dtype: torch.dtype,
    original: OriginalWeights | None = None,
) -> list[Trainable]:
    """What `tune` names as trainable values, with units of change: scales and norms as vectors, codes by layer.

    The unit of a group scale is the scale itself, that of a norm's weight the root mean square of the norm's weights.
    original: says where in its cell the latent of a code begins; None: in the middle.
    """
    found: list[Trainable] = [trainable_scales(layers, dtype)] if "scales" in tune and layers else []
    found += _norms(model, prefix, checkpoint, names) if "norms" in tune else []
    if "codes" in tune:
        stems = {stored.removesuffix(".weight"): name for name, stored in names.items()}
        found += [
            train_codes(stem, layer, original.read(stems[stem]) if original else None) for stem, layer in layers.items()
        ]
    return found


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


def train_codes(stem: str, layer: ScaledLinear, weight: Tensor | None) -> TrainableCodes:
    """The codes of one layer as trainable values. weight: as in `latent_of`."""
    codes = TrainableCodes(stem, layer.codes, latent_of(layer.codes, weight))
    layer.latent = codes.offset
    return codes


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
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    tune: Collection[Tune],
    original: Path | None = None,
    start: Mapping[str, Tensor] | None = None,
    trust_remote_code: bool = False,
) -> Student:
    """The whole model of a GPTQ checkpoint as a student. A quantized head is not trained.

    original: the 16-bit model, whose weights say where in its cell the latent of a code begins; None: in the middle.
    start: values, as of `Student.values`, in place of some of the checkpoint's.
    """
    reader = open_quantized(path)
    model: Any = skeleton.open_model(path, trust_remote_code=trust_remote_code)
    names = skeleton.tensor_names(model, reader)
    layers = fill(model, "", reader, names, device=device, dtype=dtype)
    head = model.get_output_embeddings()  # the loss multiplies by its weights itself: they get no gradient
    trained = {stem: layer for stem, layer in layers.items() if layer is not head}
    if not trained:
        raise InputError(f"{path}: no quantized linear found: nothing to heal")
    model.tie_weights()
    skeleton.buffers_to(model, device, reader.checkpoint)
    widen(model)
    _begin_with(start or {}, model, layers, names)
    weights = OriginalWeights(original, trust_remote_code=trust_remote_code) if original and "codes" in tune else None
    vectors = trainable_vectors(
        model, "", trained, tune, checkpoint=reader.checkpoint, names=names, dtype=dtype, original=weights
    )
    return Student(model, vectors)


def _begin_with(
    values: Mapping[str, Tensor], model: nn.Module, layers: Mapping[str, ScaledLinear], names: Mapping[str, str]
) -> None:
    """Give a model values in place of those of its checkpoint, before they are trainable."""
    for stem, layer in layers.items():
        if f"{stem}.qweight" in values:
            layer.codes.put(values[f"{stem}.qweight"], as_stored=True)
        if f"{stem}.scales" in values:
            layer.codes.scale = values[f"{stem}.scales"].to(layer.codes.scale.device)
            layer.current_scales = layer.codes.scale.to(layer.current_scales.dtype)
    for name, parameter in model.named_parameters():
        if names.get(name) in values:
            parameter.data.copy_(values[names[name]])


def widen(model: Any) -> None:
    """Keep the residual stream in fp32: cast the output of 16-bit embeddings."""
    model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.float())
