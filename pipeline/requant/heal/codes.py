"""Codes of one quantized linear in memory, its product, and gradients through the rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from requant.errors import InputError
from requant.numerics import code_kernels, triton_kernels


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
    bits: int
    order: Tensor | None = None

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, zero: Tensor, g_idx: Tensor, *, bits: int, where: str) -> Codes:
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
        return cls(
            packed=_in_halves(codes, bits).contiguous(),
            scale=scale.contiguous(),
            zero=zero.to(torch.uint8).contiguous(),
            columns=columns,
            bits=bits,
            order=None if sorted_already else order,
        )

    def put(self, codes: Tensor, *, as_stored: bool = False) -> None:
        """Other codes in place of these: whole numbers [out, in] of any dtype, in the order of `packed`.

        as_stored: in the order of the file, on any device.
        """
        if as_stored:
            codes = codes.to(self.packed.device)
            codes = codes if self.order is None else codes[:, self.order]
        self.packed.copy_(_in_halves(codes.to(torch.uint8), self.bits))

    def round_from(self, latent: Tensor, margin: float) -> None:
        """Use the nearest codes of a latent, fp32 [out, in].

        In place, it is kept at most `margin` outside the range of the codes.
        """
        low, high = -margin, 2**self.bits - 1 + margin
        if triton_kernels.usable(latent):
            code_kernels.round_latent(latent, self.packed, low, high)
        else:
            self.put(latent.clamp_(low, high).round())

    def integers(self) -> Tensor:
        """The codes in the order of the file, uint8 [out, in]."""
        return integers(self.packed, self.columns, self.order)

    def weight(self, scales: Tensor) -> Tensor:
        """scale * (code - zero) for scales [out, groups]: [out, in] in their dtype.

        Its columns are in the order of `packed`.
        """
        if triton_kernels.usable(self.packed):
            return code_kernels.rebuild(self.packed, scales, self.zero, self.columns)
        return self.centred(scales.dtype).mul_(scales[..., None]).view(len(scales), -1)

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


def integers(packed: Tensor, columns: int, order: Tensor | None) -> Tensor:
    """Codes in the order of the file, uint8 [out, in], from those in memory. packed, columns, order: as of `Codes`."""
    codes = packed
    if codes.shape[1] != columns:
        codes = torch.cat((codes & 15, codes >> 4), dim=1)
    if order is None:
        return codes.clone()
    return torch.empty_like(codes).index_copy_(1, order, codes)


def _in_halves(codes: Tensor, bits: int) -> Tensor:
    """Codes of up to 4 bits, uint8 [out, in], two a byte [out, in/2]; those of 8 bits as they are."""
    half = codes.shape[1] // 2
    return codes if bits == 8 else codes[:, :half] | (codes[:, half:] << 4)


class DequantizedProduct(torch.autograd.Function):
    """x @ W.T with W rebuilt from codes, in the forward and again in the backward pass.

    offset: as in `ScaledLinear`. latent: fp32 [out, in] in units of codes, of which the codes are the rounded values;
    None where they are fixed. Its gradient is that of the code: straight through the rounding.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, offset: Tensor, latent: Tensor | None, codes: Codes, current_scales: Tensor
    ) -> Tensor:
        rounded = x.to(current_scales.dtype)
        ctx.codes, ctx.current_scales, ctx.dtype = codes, current_scales, x.dtype
        ctx.trained = offset, latent
        ctx.save_for_backward(rounded)
        return rounded @ codes.weight(current_scales).T

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        output_gradient = outer[0].to(x.dtype)
        flat = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            flat = output_gradient.reshape(-1, output_gradient.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        through = _added if triton_kernels.usable(x) else _returned
        weight, offset_gradient, latent_gradient = through(ctx, flat)
        input_gradient = (output_gradient @ weight).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return input_gradient, offset_gradient, latent_gradient, None, None


def _returned(ctx: Any, flat: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The weight, and the gradients of offset and latent.

    flat: the gradient of the weight [out, in], overwritten.
    """
    centred = ctx.codes.centred(ctx.current_scales.dtype)
    rows, groups, _ = centred.shape
    offset_gradient = latent_gradient = None
    if flat is not None:
        flat = flat.view(rows, groups, -1)
        if ctx.needs_input_grad[2]:
            latent_gradient = (flat.float() * ctx.current_scales[..., None].float()).view(rows, -1)
        if ctx.needs_input_grad[1]:  # dL/dW contracted with the codes of each group, times the unit of an offset
            offset_gradient = flat.mul_(centred).sum(-1, dtype=torch.float32)
            offset_gradient.mul_(ctx.codes.scale)
    return centred.mul_(ctx.current_scales[..., None]).view(rows, -1), offset_gradient, latent_gradient


def _added(ctx: Any, flat: Tensor | None) -> tuple[Tensor, None, None]:
    """As `_returned` in one kernel, which adds to the gradients that the leaves have."""
    codes: Codes = ctx.codes
    if flat is None:
        return codes.weight(ctx.current_scales), None, None
    offset, latent = (
        _gradient_of(value) if needed else None
        for value, needed in zip(ctx.trained, ctx.needs_input_grad[1:3], strict=True)
    )
    code_kernels.add_gradients(
        flat, codes.packed, ctx.current_scales, codes.zero, latent=latent, offset=offset, unit=codes.scale
    )
    return flat, None, None


def _gradient_of(value: Tensor) -> Tensor:
    """The gradient that a leaf has, zeros where it has none yet."""
    if value.grad is None:
        value.grad = torch.zeros_like(value)
    return value.grad
