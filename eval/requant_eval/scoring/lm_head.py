"""The LM head of a causal LM: extracted, checked against the model's logits, used in fp32.

Every variant's logits are computed here. So two variants never differ only because a 16-bit kernel rounded their logits
(bf16 logits near 16 are multiples of 1/8), and the reference's logits can be recomputed from its hidden states alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from requant_eval.errors import EvaluationError

VOCAB_SLICE = 16384
PROOF_POSITIONS = 32
# Root-mean-square error relative to the model's own logits. The model rounds them to its dtype, we don't; a
# LoRA or quantized head rounds in between as well. The bounds are about ten times the rounding of one dtype.
PROOF_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-3, torch.bfloat16: 1e-2, torch.float64: 1e-5}
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_scaling",)
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class Head:
    """logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap).

    softcap: None leaves the tanh out. weight: [vocab, hidden], in the model's dtype where that is exact. bias: [vocab]
    or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    def equals(self, other: Head) -> bool:
        """Whether another head computes the same logits, bit for bit: it has the same values."""
        if (self.scale, self.softcap) != (other.scale, other.softcap) or (self.bias is None) != (other.bias is None):
            return False
        pairs = [(self.weight, other.weight), *([] if self.bias is None else [(self.bias, other.bias)])]
        return all(b is not None and a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[n, hidden] in any float dtype -> fp32 [n, vocab].

        out: fp32 [at least n, vocab], which it may be written to.

        On a GPU two 16-bit factors of one dtype are multiplied on tensor cores: each product is exact in fp32, in which
        they are summed. Elsewhere 16-bit weights are converted to fp32 a slice of the vocabulary at a time.
        """
        if hidden.is_cuda and hidden.dtype == self.weight.dtype and hidden.dtype.itemsize == 2:
            return self._post(torch.mm(hidden, self.weight.T, out_dtype=torch.float32))
        hidden = hidden.float()
        if self.weight.dtype == torch.float32:
            return self._post(torch.mm(hidden, self.weight.T, out=None if out is None else out[: len(hidden)]))
        out = torch.empty(len(hidden), self.vocab, dtype=torch.float32, device=hidden.device)
        for start in range(0, self.vocab, VOCAB_SLICE):
            rows = self.weight[start : start + VOCAB_SLICE].float()
            out[:, start : start + VOCAB_SLICE] = hidden @ rows.T
        return self._post(out)

    def _post(self, out: Tensor) -> Tensor:
        """Bias, scale and softcap, in place."""
        if self.bias is not None:
            out += self.bias.float()
        if self.scale != 1.0:
            out *= self.scale
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out

    def to(self, device: torch.device) -> Head:
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias)


class HeadTap:
    """Hook on the model's head: returns its input and passes only a few positions on to it.

    The model never allocates [batch, length, vocab]. Works with PEFT wrappers too: the hook is on the module that
    `get_output_embeddings` returns.
    """

    def __init__(self, model: Any) -> None:
        module = model.get_output_embeddings()
        if module is None:
            raise EvaluationError(f"{model_type(model)}: no output embedding found: not a causal language model")
        self.module: nn.Module = module

    def run(self, model: Any, ids: Tensor, keep: int = 1) -> tuple[Tensor, Tensor]:
        """ids int64 [batch, length] -> (hidden states, the model's logits).

        hidden states: [batch, length, hidden]. logits: [batch, keep, vocab].
        """
        seen: list[Tensor] = []

        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            seen.append(args[0])
            return (args[0][:, :keep], *args[1:])

        handle = self.module.register_forward_pre_hook(hook)
        try:
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
        finally:
            handle.remove()
        hidden = seen[0] if len(seen) == 1 else None
        if hidden is None or hidden.shape[:2] != ids.shape:
            raise EvaluationError(
                f"{model_type(model)}: the output embedding was not called once with a row per token"
                f" (calls: {[tuple(h.shape) for h in seen]}): this architecture can't be scored"
            )
        return hidden, logits


def prove_head(model: Any, tap: HeadTap, ids: Tensor) -> Head:
    """The model's head, checked against the model's own logits on the first positions of `ids`.

    ids: int64 [1, length]. Scale, softcap and whether `logits_scaling` divides (Granite) or multiplies (HyperCLOVA-X)
    are decided by that comparison, not by a list of model types.

    Raises:
        EvaluationError: no reading of the config reproduces the logits, or they are not finite.
    """
    keep = min(PROOF_POSITIONS, ids.shape[1])
    hidden, own = tap.run(model, ids, keep)
    rows, own = hidden[0, :keep], own[0].float()
    if not bool(torch.isfinite(own).all()):
        raise EvaluationError(
            f"{model_type(model)}: NaN/inf in logits of the first window: the weights are damaged or "
            f"overflow in {hidden.dtype}; check them, or score in bfloat16 or float32"
        )
    linear = extract(tap.module, rows)
    errors: dict[str, float] = {}
    for scale, softcap in _post_processing(model.config.get_text_config()):
        head = replace(linear, scale=scale, softcap=softcap)
        errors[f"scale {scale:g}, softcap {softcap}"] = error = _relative_error(head.logits(rows), own)
        if error <= PROOF_TOLERANCE[hidden.dtype]:
            return head
    raise EvaluationError(
        f"{model_type(model)}: hidden states times the output embedding don't give the model's logits "
        f"(relative error by reading of the config: {errors}): its logit post-processing is not supported"
    )


def extract(module: nn.Module, like: Tensor) -> Head:
    """The linear map of a head module: Linear, LoRA, ModulesToSaveWrapper, quantized, offloaded.

    The weight of a plain Linear is read. Any other module is applied to the identity (rows of I -> columns of W) and to
    zero (bias), in the dtype and on the device of `like` [n, hidden]. The columns are exact: each is a product with 1.
    """
    if type(module) is nn.Linear and not module.weight.is_meta:
        return Head(module.weight.detach(), None if module.bias is None else module.bias.detach())
    size = like.shape[-1]
    zero = torch.zeros(1, 1, size, dtype=like.dtype, device=like.device)
    bias = module(zero)[0, 0].detach()
    has_bias = bool(bias.any())
    dtype = torch.float32 if has_bias else bias.dtype
    weight = torch.empty(bias.shape[0], size, dtype=dtype, device=like.device)
    step = 256
    for start in range(0, size, step):
        stop = min(start + step, size)
        rows = torch.zeros(1, stop - start, size, dtype=like.dtype, device=like.device)
        rows[0, :, start:stop].fill_diagonal_(1.0)
        columns = module(rows)[0]
        weight[:, start:stop] = (columns.float() - bias.float() if has_bias else columns).T
    return Head(weight, bias if has_bias else None)


def model_type(model: Any) -> str:
    """`config.model_type`, for messages."""
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def _post_processing(config: Any) -> Iterator[tuple[float, float | None]]:
    scales = [float(s) for name in MULTIPLIERS if (s := getattr(config, name, None))]
    for name in DIVISORS:
        if value := getattr(config, name, None):
            scales += [1.0 / float(value), float(value)]
    caps = [float(c) for name in SOFTCAPS if (c := getattr(config, name, None))]
    for scale in dict.fromkeys([*scales, 1.0]):
        for cap in [*caps, None]:
            yield scale, cap


def _relative_error(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape:
        return math.inf
    return float((got - expected).double().norm() / expected.double().norm().clamp_min(1e-30))
