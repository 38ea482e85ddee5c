"""RMS norms, rotary embeddings and gated activations as one Triton kernel each.

transformers writes them as 2 to 12 operations that each read and write the whole tensor: a third of a forward's time.
The kernels here round at the same steps. A kernel replaces an operation only where both gave the same numbers on a
sample: a model that uses one of these names for another operation keeps its own.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from requant.numerics import triton_kernels

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for the CPU comes without it
    triton = None

ROTARY = "apply_rotary_pos_emb"
WIDEST = 16384  # numbers of a row that a program holds
HEADS = 8  # that a program turns at a time
AT_ONCE = 2048  # numbers of a gate that a program takes
MAY_DIFFER = 1e-2  # share of a sample's numbers: sums in another order, other exponentials
Sample = Callable[..., Tensor]
Kind = tuple[Any, ...]  # a class and the numbers and words that its instance holds, a limit for one
Turn = tuple[ModuleType, Callable[..., Any], bool]  # a file, its own function, whether ours does the same


class FusedOps:
    """Replaces operations of blocks by fused kernels; leaving restores them.

    Nothing can be, and no module is looked at, without Triton and a GPU, and where blocks compute in fp32.
    """

    def __init__(self, blocks: Iterable[nn.Module], device: torch.device, dtype: torch.dtype) -> None:
        """dtype: of what the blocks compute. Their weights may be missing."""
        here = triton is not None and dtype.itemsize == 2 and triton_kernels.usable(torch.empty(0, device=device))
        self.device, self.dtype = device, dtype
        self.modules = [m for b in blocks for m in b.modules()] if here else []
        self.tried = self.used = False
        self.same: dict[Kind, bool] = {}
        self.turns: dict[str, Turn] = {}  # by the name of the file
        self.before: dict[type, type] = {}  # class that computes in one pass -> the module's own

    def __enter__(self) -> FusedOps:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if not self.used:
            return  # another thread may still be trying
        for module in self.modules:
            module.__class__ = self.before.get(type(module), type(module))
        for owner, original, _ in self.turns.values():
            setattr(owner, ROTARY, original)

    @torch.no_grad()
    def try_out(self) -> None:
        """Compile the kernels and compare; by any thread. Raises torch.OutOfMemoryError."""
        generator = torch.Generator(self.device).manual_seed(0)

        def sample(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)

        for module in self.modules:
            check = _same_norm if _is_norm(module) else _same_gate if _is_gate(module) else None
            if check is not None and (kind := _kind(module)) not in self.same:
                self.same[kind] = _agrees(check, module, sample)
            owner, size = sys.modules.get(type(module).__module__), getattr(module, "head_dim", None)
            original = getattr(owner, ROTARY, None)
            if owner is not None and callable(original) and isinstance(size, int) and owner.__name__ not in self.turns:
                self.turns[owner.__name__] = (owner, original, _agrees(_same_rotary, original, size, sample))
        self.tried = True

    def use(self) -> None:
        """From now on, in this process. Modules get a subclass of their own class.

        A method bound to a module would tie it to itself: copies of it, such as the reference block of each, would keep
        their weights until Python looks for such rings.
        """
        if not self.tried:  # or memory ran out while it was
            self.try_out()
        self.used = True
        instead: dict[type, type] = {}
        for module in self.modules:
            own = type(module)
            if not self.same.get(_kind(module)):
                continue
            if own not in instead:
                forward = _normed(own.forward) if _is_norm(module) else _gated(own.forward)
                instead[own] = type(own.__name__, (own,), {"forward": forward, "__module__": own.__module__})
                self.before[instead[own]] = own
            module.__class__ = instead[own]
        for owner, original, ours in self.turns.values():
            if ours:
                setattr(owner, ROTARY, partial(_rotated, original))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * round(x / sqrt(mean(x^2) + eps)).

    x [..., n] contiguous, weight [n], both bf16 or fp16; computed in fp32.
    """
    out, n = torch.empty_like(x), x.shape[-1]
    block = triton.next_power_of_2(n)
    if x.numel():
        _rms_norm[(x.numel() // n,)](x, weight, out, n, eps, BLOCK=block, num_warps=min(16, max(1, block // 512)))
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin, each step rounded.

    x: [batch, heads, length, n], where heads lie inside of length in memory.

    cos, sin: [batch or 1, length, n], contiguous.
    """
    out = torch.empty_like(x)  # as x lies
    batch, heads, length, n = x.shape
    if x.numel():
        _rotate[(batch * length,)](
            x, cos, sin, out, length, heads, 0 if len(cos) == 1 else length, HALF=n // 2,
            BLOCK=triton.next_power_of_2(n // 2), HEADS=HEADS, num_warps=4,
            enable_fp_fusion=False,  # a product and a sum in one would round once
        )  # fmt: skip
    return out


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """round(gate * sigmoid(gate)) * up of two contiguous tensors, bf16 or fp16; inside fp32."""
    out = torch.empty_like(gate)
    if gate.numel():
        _silu_times[(triton.cdiv(gate.numel(), AT_ONCE),)](gate, up, out, gate.numel(), AT_ONCE=AT_ONCE, num_warps=4)
    return out


def _kind(module: nn.Module) -> Kind:
    held = tuple((k, v) for k, v in sorted(vars(module).items()) if isinstance(v, int | float | str | None))
    sizes = tuple((name, tuple(p.shape)) for name, p in module._parameters.items() if p is not None)
    return type(module), held, sizes


def _is_norm(module: nn.Module) -> bool:
    """Whether it is called an RMS norm and has one weight, an epsilon and no parts."""
    if "RMSNorm" not in type(module).__name__ or list(module._parameters) != ["weight"] or module._modules:
        return False
    weight = module._parameters["weight"]
    return weight is not None and weight.ndim == 1 and len(weight) <= WIDEST and isinstance(_epsilon(module), float)


def _epsilon(module: Any) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _is_gate(module: nn.Module) -> bool:
    """Whether it is down(silu(gate(x)) * up(x)) by the names of its parts."""
    names = {"gate_proj", "up_proj", "down_proj", "act_fn"}
    return set(module._modules) == names and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation")


def _normed(original: Callable[..., Any]) -> Callable[..., Any]:
    """In place of a norm's forward."""

    def forward(module: Any, *args: Any, **named: Any) -> Any:
        x, weight = args[0] if len(args) == 1 and not named else None, module.weight
        if (
            x is None
            or x.dtype != weight.dtype
            or x.dtype.itemsize != 2
            or x.shape[-1:] != weight.shape
            or not x.is_contiguous()
        ):
            return original(module, *args, **named)
        return rms_norm(x, weight, _epsilon(module))

    return forward


def _gated(original: Callable[..., Any]) -> Callable[..., Any]:
    """In place of a gate's forward."""

    def forward(module: Any, *args: Any, **named: Any) -> Any:
        """A batch may pause before the last linear: no earlier activation may stay alive."""
        if len(args) != 1 or named:
            return original(module, *args, **named)
        return module.down_proj(_product(module.act_fn, module.gate_proj(*args), module.up_proj(*args)))

    return forward


def _product(act_fn: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    if gate.dtype.itemsize != 2 or up.dtype != gate.dtype or not (gate.is_contiguous() and up.is_contiguous()):
        return act_fn(gate) * up
    return silu_times(gate, up)


def _rotated(original: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """In place of apply_rotary_pos_emb(q, k, cos, sin)."""
    if len(args) != 4 or named or not all(_turns(x, *args[2:]) for x in args[:2]):
        return original(*args, **named)
    q, k, cos, sin = args
    return rotate(q, cos, sin), rotate(k, cos, sin)


def _turns(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate` takes them."""
    if cos.shape != sin.shape or cos.ndim != 3 or x.ndim != 4 or x.shape[3] % 2 or len(cos) not in (1, len(x)):
        return False
    alike = all(t.dtype == x.dtype and t.is_contiguous() and t.shape[1:] == x.shape[2:] for t in (cos, sin))
    return alike and x.dtype.itemsize == 2 and x.transpose(1, 2).is_contiguous()


def _agrees(check: Callable[..., bool], *args: Any) -> bool:
    """The result of `check`; False when it raises: the module then needs other arguments."""
    try:
        return check(*args)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001 - theirs may be anything
        return False


def _same_norm(module: Any, sample: Sample) -> bool:
    sampled, n = copy.copy(module), len(module.weight)
    sampled.__dict__["_parameters"] = {"weight": nn.Parameter(sample(n), requires_grad=False)}
    x = sample(64, n) * _sizes(64, sample)
    return close(rms_norm(x, sampled.weight, _epsilon(module)), type(module).forward(sampled, x))


def _same_gate(module: Any, sample: Sample) -> bool:
    """Also the order of its linears: batches pause at the one that is called first."""
    sampled, x, called = copy.copy(module), sample(64, 64) * _sizes(64, sample), list[str]()
    parts = {name: nn.Linear(64, 64, bias=False, device="meta") for name in ("gate_proj", "up_proj")}
    for name, part in parts.items():
        part.weight = nn.Parameter(sample(64, 64) / 8, requires_grad=False)
        part.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    sampled.__dict__["_modules"] = {**module._modules, **parts, "down_proj": nn.Identity()}
    theirs = type(module).forward(sampled, x)
    return called == ["gate_proj", "up_proj"] and close(_gated(type(module).forward)(sampled, x), theirs)


def _same_rotary(original: Callable[..., Any], n: int, sample: Sample) -> bool:
    q, k = (sample(2, 16, heads, n).transpose(1, 2) for heads in (3, 2))
    cos, sin = sample(2, 16, n), sample(2, 16, n)
    theirs, ours = original(q, k, cos, sin), _rotated(original, q, k, cos, sin)
    fits = _turns(q, cos, sin) and isinstance(theirs, tuple) and len(theirs) == len(ours)
    return fits and all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


def _sizes(rows: int, sample: Sample) -> Tensor:
    """From 1/16 to 128, so that a limit shows: [rows, 1]."""
    return torch.logspace(-4, 7, rows, base=2.0, device=sample(1).device).to(sample(1).dtype)[:, None]


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether few numbers differ, none by more than two units in the last place."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    kind, values = torch.finfo(theirs.dtype), theirs.double()
    error = torch.where(ours == theirs, 0.0, (ours.double() - values).abs())
    unit = kind.eps * values.abs().clamp(min=kind.smallest_normal)
    return bool((error <= 2 * unit).all()) and float((error > 0).double().mean()) <= MAY_DIFFER


if triton is not None:

    @triton.jit
    def _rms_norm(x_ptr, weight_ptr, out_ptr, n, eps, BLOCK: tl.constexpr):
        at, j = tl.program_id(0).to(tl.int64) * n, tl.arange(0, BLOCK)
        real = j < n
        x = tl.load(x_ptr + at + j, mask=real, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + j, mask=real, other=0.0).to(tl.float32)
        scaled = x * tl.rsqrt(tl.sum(x * x, axis=0) / n + eps)
        rounded = scaled.to(out_ptr.dtype.element_ty).to(tl.float32)
        tl.store(out_ptr + at + j, (weight * rounded).to(out_ptr.dtype.element_ty), mask=real)

    @triton.jit(do_not_specialize=["length", "heads", "between"])
    def _rotate(
        x_ptr, cos_ptr, sin_ptr, out_ptr, length, heads, between,
        HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
    ):  # fmt: skip
        """between: rows of the tables from one of the batch to the next."""
        where = tl.program_id(0).to(tl.int64)
        j = tl.arange(0, BLOCK)
        row = (where // length * between + where % length) * (2 * HALF) + j
        cos1 = tl.load(cos_ptr + row, mask=j < HALF, other=0.0).to(tl.float32)[None, :]
        cos2 = tl.load(cos_ptr + row + HALF, mask=j < HALF, other=0.0).to(tl.float32)[None, :]
        sin1 = tl.load(sin_ptr + row, mask=j < HALF, other=0.0).to(tl.float32)[None, :]
        sin2 = tl.load(sin_ptr + row + HALF, mask=j < HALF, other=0.0).to(tl.float32)[None, :]
        for first in range(0, heads, HEADS):
            head = first + tl.arange(0, HEADS)
            at = (where * heads + head)[:, None] * (2 * HALF) + j[None, :]
            real = (head < heads)[:, None] & (j < HALF)[None, :]
            x1 = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
            x2 = tl.load(x_ptr + at + HALF, mask=real, other=0.0).to(tl.float32)
            kind: tl.constexpr = out_ptr.dtype.element_ty
            a = (x1 * cos1).to(kind).to(tl.float32) - (x2 * sin1).to(kind).to(tl.float32)
            b = (x2 * cos2).to(kind).to(tl.float32) + (x1 * sin2).to(kind).to(tl.float32)
            tl.store(out_ptr + at, a.to(kind), mask=real)
            tl.store(out_ptr + at + HALF, b.to(kind), mask=real)

    @triton.jit(do_not_specialize=["total"])
    def _silu_times(gate_ptr, up_ptr, out_ptr, total, AT_ONCE: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * AT_ONCE + tl.arange(0, AT_ONCE)
        gate = tl.load(gate_ptr + at, mask=at < total, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + at, mask=at < total, other=0.0).to(tl.float32)
        activated = tl.div_rn(gate, 1 + tl.exp(-gate)).to(out_ptr.dtype.element_ty).to(tl.float32)
        tl.store(out_ptr + at, (activated * up).to(out_ptr.dtype.element_ty), mask=at < total)
