"""LoRA, rsLoRA and DoRA: W + s * B @ A, and for DoRA its rows scaled to trained norms.

lora     W + s * B @ A, s = alpha / r         arXiv:2106.09685
rslora   the same, s = alpha / sqrt(r)        arXiv:2312.03732
dora     m * V / |V|,  V = W + s * B @ A      arXiv:2402.09353, by rows

LORA is the one peft_type with three parts. With `trainable_token_indices` it also trains rows of embeddings
(`trained_tokens`), with `target_parameters` stacked experts (`stacked_lora`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from requant.adapters import fp64, trained_tokens
from requant.adapters.config import AdapterConfig
from requant.adapters.fold import Fold, product_bound, read
from requant.adapters.module_tensors import ModuleTensors, TensorKey, parameters
from requant.checkpoint.reader import TensorInfo

TENSORS = {
    "lora_A": TensorKey(has_weight=True),
    "lora_B": TensorKey(has_weight=True),
    **parameters("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
    **trained_tokens.TENSORS,
}
SETTINGS = frozenset({
    "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "megatron_config", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora", "qalora_group_size", "runtime_config",
    "lora_bias", "ensure_weight_tying", "trainable_token_indices", "target_parameters",
})  # fmt: skip
NOT_MERGED: Mapping[str, str] = {
    "layer_replication": "its layers are copies that do not exist in the base checkpoint",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only and has no merged form",
    "arrow_config": "Arrow routing depends on the input and has no merged form",
    "use_qalora": "QA-LoRA pools its input; merging it needs the group-wise zero points it was trained with",
    "use_bdlora": "block-diagonal LoRA is not merged yet",
    "kasa_config": "KaSA adapters change the base by its singular values; they are not merged yet",
    "velora_config": "VeLoRA adapters are not merged yet",
    "monteclora_config": "MonteCLoRA samples its weights and has no single merged form",
}
"""Setting that must be unset -> why."""
_RESIDUAL_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq", "mica")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora(Fold):
    """LoRA, rsLoRA or DoRA of one module.

    a, b: [r, in] and [out, r]; of an embedding [r, vocabulary] and [width, r]; of a convolution [r, in, *kernel] and
    [out, r, 1, ...]: as a matrix its weight is [out, in * kernel].
    magnitude: trained row norms (DoRA). bias_delta: the bias of lora_B.
    """

    on_any_device: ClassVar[bool] = True
    a: TensorInfo
    b: TensorInfo
    scaling: float
    magnitude: TensorInfo | None = None
    bias_delta: TensorInfo | None = None
    embedding: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.b.shape[0], self.a.shape[1:]
        return (*columns, rows) if self.embedding else (rows, *columns)

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return tuple(t for t in (self.a, self.b, self.magnitude, self.bias_delta) if t is not None)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(left [rows, r], right [r, columns]) in fp32: the delta is `scaling * left @ right`."""
        a, b = read(self.a).flatten(1), read(self.b).flatten(1)
        return (a.T.contiguous(), b.T.contiguous()) if self.embedding else (b, a)

    def apply(self, weight: Tensor) -> bool:
        left, right = (factor.to(weight.device) for factor in self.factors())
        weight = weight.view(len(weight), -1)
        weight.addmm_(left, right, alpha=self.scaling)
        if self.magnitude is None:
            return bool(left.any()) and bool(right.any())
        magnitude = read(self.magnitude).reshape(-1, 1).to(weight.device)
        weight.mul_(magnitude / torch.linalg.vector_norm(weight, dim=1, keepdim=True))
        return True

    def bound(self, largest: float) -> float:
        if self.magnitude is not None:
            return float(read(self.magnitude).abs().max())
        left, right = self.factors()
        return largest + abs(self.scaling) * product_bound(left, right)

    def exact_rows(self, rows: Tensor, index: list[int]) -> fp64.Exact:
        shape, rows = rows.shape, rows.flatten(1)
        a, b = fp64.read64(self.a).flatten(1), fp64.read64(self.b).flatten(1)
        left, right = (a.T[index], b.T) if self.embedding else (b[index], a)
        out, bound = fp64.add_product(rows, left, right, self.scaling)
        if self.magnitude is None:
            return fp64.Exact(out.view(shape), bound.view(shape))
        scale = fp64.read64(self.magnitude).reshape(-1, 1)[index] / out.norm(dim=1, keepdim=True)
        norms = (out * scale).abs() * (fp64.EPS * 8 + fp64.EPS * out.shape[1] ** 0.5)
        return fp64.Exact((out * scale).view(shape), (bound * scale.abs() + norms).view(shape))

    @property
    def bias(self) -> Literal["needed"] | None:
        return "needed" if self.bias_delta else None

    def changed_bias(self, bias: Tensor) -> Tensor:
        return bias if self.bias_delta is None else bias + self.scaling * read(self.bias_delta)

    def exact_bias(self, value: Tensor, row: int) -> Tensor:
        return value if self.bias_delta is None else value + self.scaling * fp64.read64(self.bias_delta)[row]


def scaling(config: AdapterConfig, name: str) -> float:
    """The scaling of a module or parameter: alpha / r, or alpha / sqrt(r) with rsLoRA.

    It is multiplied by the adapter's weight.
    """
    rank, alpha = config.rank(name), config.alpha(name, "lora_alpha")
    return config.weight * (alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def why_not_merged(config: Mapping[str, Any]) -> str | None:
    """The setting without an exact merge, and its reason; None: there is no such setting."""
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_RESIDUAL_INITS):
        return (
            f"init_lora_weights is {init!r}: this adapter belongs to a residual base, not to the base it names. "
            "Convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) and use the result"
        )
    return next((f"{key} is set: {why}" for key, why in NOT_MERGED.items() if config.get(key)), None)


def build(tensors: ModuleTensors) -> Fold:
    """The LoRA of one module, or its trained tokens.

    Raises InputError when tensors and config do not agree.
    """
    module, found, config = tensors.module, tensors.found, tensors.config
    if trained_tokens.ROWS in found:
        return trained_tokens.build(tensors, setting="trainable_token_indices")
    embedding = "lora_embedding_A" in found
    a, b = (found.get(f"lora_embedding_{x}" if embedding else f"lora_{x}") for x in "AB")
    if a is None or b is None:
        raise tensors.error(f"{module} has {', '.join(sorted(found))} but not both lora_A and lora_B")
    if len(a.shape) < 2 or len(a.shape) != len(b.shape) or b.shape[1:] != (a.shape[0], *[1] * (len(a.shape) - 2)):
        raise tensors.error(
            f"{module}: lora_A {a.shape} and lora_B {b.shape} do not multiply (linear layers, and convolutions in one "
            "group)"
        )
    rank = config.rank(module)
    if rank != a.shape[0]:
        raise config.error(f"rank of {module} is {rank} there, {a.shape[0]} in {tensors.file.name}")
    return Lora(
        module=module,
        a=a,
        b=b,
        scaling=scaling(config, module),
        magnitude=_magnitude(tensors, b, embedding=embedding),
        bias_delta=found.get("lora_B.bias"),
        embedding=embedding,
    )


def _magnitude(tensors: ModuleTensors, b: TensorInfo, *, embedding: bool) -> TensorInfo | None:
    """DoRA's trained row norms, checked against `use_dora` and lora_B."""
    module, use_dora = tensors.module, tensors.config.get("use_dora")
    magnitude = tensors.found.get("lora_magnitude_vector")
    if bool(use_dora) != (magnitude is not None):
        raise tensors.error(f"use_dora is {use_dora} but {module} has {sorted(tensors.found)}")
    if magnitude is not None and magnitude.nbytes != b.shape[0] * magnitude.dtype.itemsize:
        raise tensors.error(f"{module}: magnitude has shape {magnitude.shape}, lora_B has {b.shape[0]} rows")
    if magnitude is not None and embedding:
        raise tensors.error(f"{module}: DoRA on an embedding is not merged yet")
    return magnitude
