"""RMS norms, rotary embeddings and gates of a model's blocks in one pass over memory each, as Triton kernels, on a GPU.

transformers writes them as 2 to 12 operations that each read and write the whole tensor: a third of a forward's time. What
stands here rounds where those do. It is put in their place only where it gave the same numbers on a sample, so a model that
means something else by these names keeps its own.
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

from requant import kernels

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for the CPU comes without it
    triton = None

ROTARY = "apply_rotary_pos_emb"
WIDEST = 16384  # numbers of a row that a program holds
HEADS = 8  # that a program turns at a time
AT_ONCE = 2048  # numbers of a gate that a program takes
APART = 1e-2  # share of numbers that may round otherwise: sums in another order, other exponentials


class OnePass:
    """What of some blocks can be done in one pass: `try_out` finds it, `use` puts it there, leaving takes it away again."""

    def __init__(self, blocks: Iterable[nn.Module], device: torch.device, dtype: torch.dtype) -> None:
        """dtype: of what the blocks compute; fp32 is left alone. Weights may be missing."""
        here = triton is not None and dtype.itemsize == 2 and kernels.usable(torch.empty(0, device=device))
        self.device, self.dtype = device, dtype
        self.modules = [m for b in blocks for m in b.modules()] if here else []
        self.norms: dict[tuple[type, int, float], bool] = {}
        self.gates: dict[type, bool] = {}
        self.before: dict[type, type] = {}  # class that computes in one pass -> the module's own
        self.turned: dict[str, tuple[ModuleType, Callable[..., Any], Callable[..., Any]]] = {}

    def __enter__(self) -> OnePass:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for module in self.modules:
            module.__class__ = self.before.get(type(module), type(module))
        for owner, original, _ in self.turned.values():
            setattr(owner, ROTARY, original)

    @torch.no_grad()
    def try_out(self) -> None:
        """Compile the kernels and compare; by any thread."""
        generator = torch.Generator(self.device).manual_seed(0)

        def sample(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)

        for module in self.modules:
            kind = _norm(module)
            if kind is not None and kind not in self.norms:
                self.norms[kind] = _same_norm(module, kind[1], kind[2], sample)
            if _gate(module) and type(module) not in self.gates:
                self.gates[type(module)] = _same_gate(module, sample)
            owner: Any = sys.modules[type(module).__module__]
            original, size = getattr(owner, ROTARY, None), getattr(module, "head_dim", None)
            if callable(original) and isinstance(size, int) and owner.__name__ not in self.turned:
                ours = partial(_rotated, original)
                if _same_rotary(original, ours, size, sample):
                    self.turned[owner.__name__] = (owner, original, ours)

    def use(self) -> None:
        """From now on, in this process; what was not tried out stays as it is.

        Modules get a subclass of their own class. A method bound to one would tie it to itself: copies of it, such as the
        unquantized twin of each block, would keep their weights until Python looks for such rings.
        """
        others: dict[type, type] = {}
        for module in self.modules:
            kind, own = _norm(module), type(module)
            instead = (
                _normed if kind and self.norms.get(kind) else _gated if _gate(module) and self.gates.get(own) else None
            )
            if instead is not None and own not in self.before:
                if own not in others:
                    others[own] = type(
                        own.__name__, (own,), {"forward": instead(own.forward), "__module__": own.__module__}
                    )
                    self.before[others[own]] = own
                module.__class__ = others[own]
        for owner, _, ours in self.turned.values():
            setattr(owner, ROTARY, ours)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * round(x / sqrt(mean(x^2) + eps)): x [..., n] contiguous, weight [n], both bf16 or fp16; inside fp32."""
    out, n = torch.empty_like(x), x.shape[-1]
    block = triton.next_power_of_2(n)
    if x.numel():
        _rms_norm[(x.numel() // n,)](x, weight, out, n, eps, BLOCK=block, num_warps=min(16, max(1, block // 512)))
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin, each step rounded: x [batch, heads, length, n], of which heads lie inside of length.

    cos, sin: [batch or 1, length, n], contiguous.
    """
    out = torch.empty_like(x)  # as x lies
    batch, heads, length, n = x.shape
    if x.numel():
        _rotate[(batch * length,)](
            x, cos, sin, out, length, heads, 0 if len(cos) == 1 else length, HALF=n // 2, BLOCK=triton.next_power_of_2(n // 2),
            HEADS=HEADS, num_warps=4, enable_fp_fusion=False,  # a product and a sum in one would round once
        )  # fmt: skip
    return out


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """round(gate * sigmoid(gate)) * up of two contiguous tensors, bf16 or fp16; inside fp32."""
    out = torch.empty_like(gate)
    if gate.numel():
        _silu_times[(triton.cdiv(gate.numel(), AT_ONCE),)](gate, up, out, gate.numel(), AT_ONCE=AT_ONCE, num_warps=4)
    return out


def _norm(module: nn.Module) -> tuple[type, int, float] | None:
    """(class, width, epsilon) of what is called an RMS norm and has a weight and nothing else."""
    if "RMSNorm" not in type(module).__name__ or list(module._parameters) != ["weight"] or module._modules:
        return None
    weight, eps = module._parameters["weight"], _epsilon(module)
    if weight is None or weight.ndim != 1 or len(weight) > WIDEST or not isinstance(eps, float):
        return None
    return type(module), len(weight), eps


def _epsilon(module: Any) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _normed(original: Callable[..., Any]) -> Callable[..., Any]:
    """In place of a norm's forward."""

    def forward(module: Any, x: Tensor, *others: Any, **named: Any) -> Any:
        weight = module.weight
        if others or named or x.dtype != weight.dtype or x.dtype.itemsize != 2 or not x.is_contiguous():
            return original(module, x, *others, **named)
        return rms_norm(x, weight, _epsilon(module))

    return forward


def _gate(module: nn.Module) -> bool:
    """Whether it is down(silu(gate(x)) * up(x)) by the names of its parts."""
    names = {"gate_proj", "up_proj", "down_proj", "act_fn"}
    return set(module._modules) == names and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation")


def _gated(_: Callable[..., Any]) -> Callable[..., Any]:
    """In place of a gate's forward."""

    def forward(module: Any, x: Tensor) -> Any:
        """A batch may wait before the last linear: nothing of what comes before it may stay till then."""
        return module.down_proj(_product(module.act_fn, module.gate_proj(x), module.up_proj(x)))

    return forward


def _product(act_fn: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    if gate.dtype.itemsize != 2 or up.dtype != gate.dtype or not (gate.is_contiguous() and up.is_contiguous()):
        return act_fn(gate) * up
    return silu_times(gate, up)


def _rotated(
    original: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **named: Any
) -> Any:
    """In place of apply_rotary_pos_emb."""
    if others or named or not all(_turns(x, cos, sin) for x in (q, k)):
        return original(q, k, cos, sin, *others, **named)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def _turns(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate` takes them."""
    tables = all(
        t.ndim == 3
        and t.dtype == x.dtype
        and t.is_contiguous()
        and t.shape[1:] == x.shape[2:]
        and len(t) in (1, len(x))
        for t in (cos, sin)
    )
    return (
        tables and x.ndim == 4 and x.dtype.itemsize == 2 and x.shape[3] % 2 == 0 and x.transpose(1, 2).is_contiguous()
    )


def _same_norm(module: Any, n: int, eps: float, sample: Callable[..., Tensor]) -> bool:
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = {"weight": nn.Parameter(sample(n), requires_grad=False)}
    x = sample(64, n) * sample(64, 1)
    try:
        theirs = type(module).forward(twin, x)
    except Exception:  # noqa: BLE001 - whatever it wants, it is another kind of norm
        return False
    ours = rms_norm(x, twin.weight, eps)
    return isinstance(theirs, Tensor) and theirs.shape == x.shape and close(ours, theirs)


def _same_gate(module: Any, sample: Callable[..., Tensor]) -> bool:
    twin, x = copy.copy(module), sample(32, 64)
    parts = {name: nn.Linear(64, 64, bias=False, device="meta") for name in ("gate_proj", "up_proj")}
    for part in parts.values():
        part.weight = nn.Parameter(sample(64, 64) / 8, requires_grad=False)
    twin.__dict__["_modules"] = {**module._modules, **parts, "down_proj": nn.Identity()}
    try:
        theirs = type(module).forward(twin, x)
    except Exception:  # noqa: BLE001 - whatever it wants, it is another kind of gate
        return False
    return (
        isinstance(theirs, Tensor) and theirs.shape == x.shape and close(_gated(type(module).forward)(twin, x), theirs)
    )


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether their types are the same, few numbers differ, and none by more than a rounding of its first and its second step."""
    if ours.dtype != theirs.dtype:
        return False
    kind, values = torch.finfo(theirs.dtype), theirs.double()
    error = (ours.double() - values).abs()
    steps = 2 * kind.eps * values.abs().clamp(min=kind.smallest_normal)
    return bool((error <= steps).all()) and float((error > 0).double().mean()) <= APART


def _same_rotary(original: Callable[..., Any], ours: Callable[..., Any], n: int, sample: Callable[..., Tensor]) -> bool:
    q, k = (sample(2, 16, heads, n).transpose(1, 2) for heads in (3, 2))
    cos, sin = sample(2, 16, n), sample(2, 16, n)
    if not _turns(q, cos, sin):
        return False
    try:
        theirs = original(q, k, cos, sin)
    except Exception:  # noqa: BLE001 - whatever it wants, it is another kind of embedding
        return False
    return isinstance(theirs, tuple) and all(
        torch.equal(a, b) for a, b in zip(theirs, ours(q, k, cos, sin), strict=True)
    )


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

    @triton.jit(do_not_specialize=["length", "heads", "apart"])
    def _rotate(
        x_ptr, cos_ptr, sin_ptr, out_ptr, length, heads, apart,
        HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
    ):  # fmt: skip
        """apart: rows of the tables from one of the batch to the next."""
        where = tl.program_id(0).to(tl.int64)
        j = tl.arange(0, BLOCK)
        row = (where // length * apart + where % length) * (2 * HALF) + j
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
        activated = (gate / (1 + tl.exp(-gate))).to(out_ptr.dtype.element_ty).to(tl.float32)
        tl.store(out_ptr + at, (activated * up).to(out_ptr.dtype.element_ty), mask=at < total)
