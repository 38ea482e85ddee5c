"""Weights of calibration tokens in the Hessians, by the gradient of the end loss.

A layer's own squared error counts every token alike. What the model's outputs lose is, to second order, the error in
their Fisher information. With g_t the gradient at the output of a linear for token t, sum_t g_t^2 x_t x_t' is the
Fisher's block of that linear, averaged over outputs. Source: GuidedQuant (arXiv:2505.07004), YAQA (arXiv:2505.22988).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from requant.errors import StageError
from requant.modeling.linear_groups import Inputs, LinearGroup

Labels = Literal["signs", "sampled", "text"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenWeights:
    """How much each calibration token counts in the Hessian of a linear.

    by_linear: module -> fp32 [windows, length] on any device, mean 1. shared: linears that share an input share one
    Hessian, with the mean of their weights; else each has its own.
    """

    by_linear: Mapping[str, Tensor]
    shared: bool = True

    def groups(self, groups: Iterable[LinearGroup]) -> list[LinearGroup]:
        """The groups of linears with one Hessian, in call order."""
        if self.shared:
            return list(groups)
        return [LinearGroup((name,)) for group in groups for name in group.linears]

    def weigh(self, linears: Sequence[str], share: slice, inputs: Inputs) -> Inputs:
        """The inputs of a group times the root of each token's weight, fp32.

        linears: of the group. share: the windows that `inputs` holds batch by batch.
        """
        roots = torch.stack([self.by_linear[name][share] for name in linears]).mean(0).sqrt()
        at = 0
        for x, unquantized in inputs:
            if x.ndim != 3 or x.shape[1] != roots.shape[1]:
                raise StageError(f"{linears[0]}: its input {tuple(x.shape)} is not one row for each calibration token")
            root = roots[at : at + len(x), :, None].to(x.device)
            at += len(x)
            yield x.float() * root, None if unquantized is None else unquantized.float() * root


def tempered(squares: Mapping[str, Tensor], power: float = 1.0) -> dict[str, Tensor]:
    """Weights of mean 1 from mean squared gradients [windows, length]. power: below 1 evens them out."""
    raised = {name: value.float().pow(power) for name, value in squares.items()}
    return {name: value / value.mean().clamp_min(torch.finfo(torch.float32).tiny) for name, value in raised.items()}


def effective_share(weights: Tensor) -> float:
    """The share of tokens that would say as much with equal weights: (sum w)^2 / (n sum w^2)."""
    w = weights.double()
    return float(w.sum().square() / (w.numel() * w.square().sum()))


def squared_gradients(
    model: Any,
    windows: Tensor,
    linears: Sequence[str],
    *,
    labels: Labels = "signs",
    passes: int = 1,
    batch: int = 4,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The squared gradient of the end loss at every token's output of `linears`, mean over outputs.

    fp32 [windows, length] on the CPU by module. model: resident, of the weights before quantization; it may be in any
    dtype. windows: int64 [n, length]. labels: as in `logit_gradient`. passes: forwards and backwards of each window,
    averaged. The scale of the result means nothing.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    totals = {name: torch.zeros(windows.shape) for name in linears}
    frozen = [p for p in model.parameters() if p.requires_grad]
    handles = [model.get_input_embeddings().register_forward_hook(_leaf)]
    begin = 0

    def keep(name: str) -> Callable[..., None]:
        def on_output(_: nn.Module, __: Any, out: Any) -> None:
            out.register_hook(lambda g: add(name, g))

        return on_output

    def add(name: str, gradient: Tensor) -> None:
        mean = gradient.float().square().mean(-1)
        totals[name][begin : begin + len(mean)] += mean.cpu() / passes

    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        handles += [model.get_submodule(name).register_forward_hook(keep(name)) for name in linears]
        for rows in torch.split(windows, batch):
            for _ in range(passes):
                with torch.enable_grad():
                    logits = model(input_ids=rows.to(device), use_cache=False).logits
                logits.backward(logit_gradient(logits.detach(), rows.to(device), labels, generator))
            begin += len(rows)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)
    return totals


def logit_gradient(logits: Tensor, ids: Tensor, labels: Labels, generator: torch.Generator) -> Tensor:
    """A gradient at logits [..., vocab] whose outer product is in the mean the Fisher information diag(p) - p p'.

    signs: root(p) times random signs, less p times their sum: all of the vocabulary takes part in every draw, so it
    varies least. sampled: of the loss with a label drawn from the model. text: of the loss with the text's own next
    token, zero at the last one: the empirical Fisher, which is not that of a KL divergence.
    """
    p = logits.float().softmax(-1)
    if labels == "signs":
        signs = torch.randint(0, 2, p.shape, generator=generator, device=p.device, dtype=torch.int8)
        probe = p.sqrt().mul_(signs.mul_(2).sub_(1))
        return probe.sub_(p * probe.sum(-1, keepdim=True)).to(logits.dtype)
    if labels == "sampled":
        drawn = torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(ids.shape)
    else:
        drawn = ids.roll(-1, dims=-1)
    gradient = p.scatter_add_(-1, drawn[..., None], torch.full_like(p[..., :1], -1.0))
    if labels == "text":
        gradient[..., -1, :] = 0
    return gradient.to(logits.dtype)


def _leaf(_: nn.Module, __: Any, out: Tensor) -> Tensor:
    """Embeddings through which gradients flow, though no parameter has one."""
    return out.detach().requires_grad_()
