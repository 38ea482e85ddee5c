"""`requant.modeling.fused_ops` against transformers' own modules.

In Triton's interpreter where there is no GPU.

Without either, plain torch functions replace the kernels, and the tests show which modules are replaced, how, and for how long.
"""

from __future__ import annotations

import copy
import gc
import os
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma import modeling_gemma
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from requant.modeling import fused_ops
from requant.modeling.fused_ops import FusedOps
from requant.numerics import triton_kernels

CUDA = torch.cuda.is_available()
KERNELS = fused_ops.triton is not None and (CUDA or os.environ.get("TRITON_INTERPRET") == "1")
needs_kernels = pytest.mark.gpu(interpreted=True)
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not CUDA, reason="cut off there"))]


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def plain_turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


@pytest.fixture(autouse=True)
def usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "usable", lambda _: True)
    if not KERNELS:
        monkeypatch.setattr(fused_ops, "triton", object())
        monkeypatch.setattr(fused_ops, "rms_norm", plain_norm)
        monkeypatch.setattr(fused_ops, "rotate", plain_turn)
        monkeypatch.setattr(fused_ops, "silu_times", lambda gate, up: nn.functional.silu(gate) * up)


def drawn(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def block(module: Any, config: Any, dtype: torch.dtype = torch.float16) -> Any:
    """One decoder layer with random norms."""
    settings = {
        "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 32,
        "num_key_value_heads": 2,
    }  # fmt: skip
    config = config(**settings)
    config._attn_implementation = "eager"
    name = next(n for n in vars(module) if n.endswith("DecoderLayer") and n != "GradientCheckpointingLayer")
    torch.manual_seed(0)
    made = getattr(module, name)(config, 0).to(DEVICE, dtype).eval()
    for m in made.modules():
        if "RMSNorm" in type(m).__name__:
            m.weight.data.uniform_(-1, 2)
    return made


def run(layer: Any, dtype: torch.dtype = torch.float16) -> Tensor:
    x, cos, sin = drawn(2, 12, 96, dtype=dtype), drawn(1, 12, 32, dtype=dtype), drawn(1, 12, 32, dtype=dtype) + 1
    with torch.no_grad():
        out = layer(x, position_embeddings=(cos, sin), attention_mask=None)
    return out[0] if isinstance(out, tuple) else out


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ran in one pass."""
    calls: list[str] = []

    def counted(name: str, original: Any, *args: Any) -> Any:
        calls.append(name)
        return original(*args)

    for name in ("rms_norm", "rotate", "silu_times"):
        monkeypatch.setattr(fused_ops, name, partial(counted, name, getattr(fused_ops, name)))
    return calls


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [96, 576, 4096])
def test_a_norm_rounds_as_transformers_does(n: int, dtype: torch.dtype) -> None:
    norm = modeling_llama.LlamaRMSNorm(n, eps=1e-5).to(DEVICE, dtype)
    norm.weight.data.copy_(drawn(n, dtype=dtype))
    x = drawn(3, 37, n, dtype=dtype) * drawn(37, 1, dtype=dtype)
    theirs, ours = norm(x), fused_ops.rms_norm(x, norm.weight, 1e-5)
    assert fused_ops.close(ours, theirs)
    step = torch.finfo(dtype).eps
    assert not fused_ops.close(ours * (1 + 4 * step), theirs)
    worse = ours.clone()
    worse[1, 2, 3] = -theirs[1, 2, 3] - step
    assert not fused_ops.close(worse, theirs)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tables", "heads", "length", "n"), [(1, 9, 7, 64), (2, 8, 16, 96), (2, 1, 1, 128)])
def test_a_turn_is_transformers_own(tables: int, heads: int, length: int, n: int, dtype: torch.dtype) -> None:
    x = drawn(2, length, heads, n, dtype=dtype).transpose(1, 2)
    cos, sin = drawn(tables, length, n, dtype=dtype), drawn(tables, length, n, dtype=dtype) - 1
    theirs = modeling_llama.apply_rotary_pos_emb(x, x, cos, sin)[0]
    ours = fused_ops.rotate(x, cos, sin)
    assert torch.equal(ours, theirs)
    assert ours.stride() == theirs.stride() == x.stride()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (3, 2048), (2, 3, 33)])
def test_a_gate_rounds_as_transformers_does(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = drawn(*shape, dtype=dtype) * 8, drawn(1, *shape, dtype=dtype)[0]
    gate.view(-1)[:3] = torch.tensor([0.0, -300.0, 300.0])
    assert fused_ops.close(fused_ops.silu_times(gate, up), nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("module", "config", "norms"),
    [(modeling_llama, modeling_llama.LlamaConfig, 2), (modeling_qwen3, modeling_qwen3.Qwen3Config, 4)],
)
def test_a_block_computes_the_same(module: Any, config: Any, norms: int, dtype: torch.dtype, taken: list[str]) -> None:
    layer = block(module, config, dtype)
    plain, own = run(layer, dtype), vars(module)[fused_ops.ROTARY]
    with FusedOps([layer], DEVICE, dtype) as passes:
        passes.try_out()
        assert torch.equal(run(layer, dtype), plain)  # not yet
        passes.use()
        taken.clear()
        fused = run(layer, dtype)
        assert sorted(taken) == ["rms_norm"] * norms + ["rotate"] * 2 + ["silu_times"]
    assert vars(module)[fused_ops.ROTARY] is own
    taken.clear()
    assert torch.equal(run(layer, dtype), plain)
    assert taken == []
    assert torch.allclose(fused.float(), plain.float(), rtol=0.02, atol=0.02 * float(plain.abs().mean()))


def test_what_a_copy_computes_is_its_own(taken: list[str]) -> None:
    """The reference block is a copy of a block whose operations are already replaced."""
    layer = block(modeling_llama, modeling_llama.LlamaConfig)
    with FusedOps([layer], DEVICE, torch.float16) as passes:
        passes.try_out()
        passes.use()
        twin = copy.deepcopy(layer)
        for m in layer.modules():
            if isinstance(m, modeling_llama.LlamaRMSNorm):
                m.weight.data.zero_()
        taken.clear()
        assert torch.equal(run(layer), drawn(2, 12, 96))  # nothing but the residual
        assert not torch.equal(run(twin), drawn(2, 12, 96))
        assert taken.count("rms_norm") == 4


def test_a_copy_goes_when_nobody_has_it_any_more() -> None:
    """A dropped copy is freed at once; else block weights stay on the GPU until collected."""
    layer = block(modeling_llama, modeling_llama.LlamaConfig)
    with FusedOps([layer], DEVICE, torch.float16) as passes:
        passes.try_out()
        passes.use()
        passes.use()  # a second time changes nothing
        twin = copy.deepcopy(layer)
        run(twin)
        parts = [weakref.ref(m) for m in twin.modules()]
        gc.disable()
        try:
            del twin
            assert [p() for p in parts] == [None] * len(parts)
        finally:
            gc.enable()
        assert type(layer.mlp) is not modeling_llama.LlamaMLP
        assert isinstance(layer.mlp, modeling_llama.LlamaMLP)
    assert type(layer.mlp) is modeling_llama.LlamaMLP
    assert type(layer.input_layernorm) is modeling_llama.LlamaRMSNorm


def test_another_meaning_of_the_names_is_left_alone(taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's norm multiplies by 1 + weight; some turn neighbours in place of halves."""

    def neighbours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        def turn(x: Tensor) -> Tensor:
            half = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
            return x * cos.unsqueeze(1) + half * sin.unsqueeze(1)

        return turn(q), turn(k)

    monkeypatch.setattr(modeling_gemma, fused_ops.ROTARY, neighbours)
    layer = block(modeling_gemma, modeling_gemma.GemmaConfig)
    plain = run(layer)
    with FusedOps([layer], DEVICE, torch.float16) as passes:
        passes.try_out()
        passes.use()
        taken.clear()
        assert torch.equal(run(layer), plain)
        assert taken == []
        assert vars(modeling_gemma)[fused_ops.ROTARY] is neighbours
    assert list(passes.same.values()) == [False]


class Gate(modeling_llama.LlamaMLP):
    """A gate as transformers has it, but for what a subclass changes."""

    def __init__(self, limit: float = float("inf")) -> None:
        super().__init__(modeling_llama.LlamaConfig(hidden_size=64, intermediate_size=96))
        self.limit = limit
        self.to(DEVICE, torch.float16)


class Limited(Gate):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(self.act_fn(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit))


class Scaled(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 1.5)


class UpFirst(Gate):
    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        return self.down_proj(up * self.act_fn(self.gate_proj(x)))


class Asks(Gate):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x * mask)


def used(*modules: nn.Module) -> list[bool]:
    """Which of them compute in one pass."""
    with FusedOps(modules, DEVICE, torch.float16) as passes:
        passes.use()
        return [type(m) in passes.before for m in modules]


def test_a_gate_is_taken_only_where_it_means_the_same() -> None:
    """A gate with a limit, or that computes up first, is not replaced.

    Most inputs do not reach a limit, and it differs by layer. Where up comes first, batches would wait at another
    linear.
    """
    assert used(Gate(), Scaled(), UpFirst(), Asks()) == [True, False, False, False]
    assert used(Limited(), Limited(16.0), Limited(100.0)) == [True, False, False]
    gelu = modeling_llama.LlamaMLP(modeling_llama.LlamaConfig(hidden_size=64, intermediate_size=96, hidden_act="gelu"))
    assert used(gelu.to(DEVICE, torch.float16)) == [False]


class PlainRMSNorm(modeling_llama.LlamaRMSNorm):
    def __init__(self, n: int = 96, eps: float = 1e-6) -> None:
        super().__init__(n, eps)
        self.to(DEVICE, torch.float16)


class OlmoRMSNorm(PlainRMSNorm):
    """Rounds once, at the end."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * wide).to(x.dtype)


class WideRMSNorm(PlainRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class LimitedRMSNorm(PlainRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-100, 100))


def test_a_norm_is_taken_only_where_it_means_the_same() -> None:
    assert used(PlainRMSNorm(), OlmoRMSNorm(), WideRMSNorm(), LimitedRMSNorm()) == [True, False, False, False]
    biased, parted, learned = PlainRMSNorm(), PlainRMSNorm(), PlainRMSNorm()
    biased.bias = nn.Parameter(torch.zeros(96))
    parted.inner = nn.Identity()
    learned.variance_epsilon = torch.tensor(1e-6)
    assert used(biased, parted, learned, PlainRMSNorm(fused_ops.WIDEST + 1)) == [False] * 4


def test_what_is_tried_in_vain_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def failing(*_: Tensor) -> None:
        calls.append(1)
        raise TypeError("another signature")

    monkeypatch.setattr(modeling_llama, fused_ops.ROTARY, failing)
    layers = [block(modeling_llama, modeling_llama.LlamaConfig) for _ in range(2)]
    with FusedOps(layers, DEVICE, torch.float16) as passes:
        passes.try_out()
        passes.use()
        assert vars(modeling_llama)[fused_ops.ROTARY] is failing
    assert calls == [1]


def test_leaving_early_looks_at_nothing_that_is_still_being_tried() -> None:
    """The thread that compiles still tries operations when the first block has failed."""

    class Growing(dict[str, Any]):
        def values(self) -> Any:
            raise RuntimeError("dictionary changed size during iteration")

    norm = PlainRMSNorm()
    with FusedOps([norm], DEVICE, torch.float16) as passes:
        passes.turns = Growing()
    assert type(norm) is PlainRMSNorm


def test_memory_that_ran_out_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in the trial decides nothing: the operation is tried again before use.

    A resumed run must compute the same.
    """
    whole = fused_ops.rms_norm

    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(fused_ops, "rms_norm", full)
    norm = PlainRMSNorm()
    with FusedOps([norm], DEVICE, torch.float16) as passes:
        with pytest.raises(torch.OutOfMemoryError):
            passes.try_out()
        monkeypatch.setattr(fused_ops, "rms_norm", whole)
        passes.use()
        assert type(norm) is not PlainRMSNorm
    assert type(norm) is PlainRMSNorm


def test_nothing_stays_while_a_batch_waits(taken: list[str]) -> None:
    """At the last linear only its input and the gate's input are kept."""
    made = modeling_llama.LlamaMLP(modeling_llama.LlamaConfig(hidden_size=64, intermediate_size=96)).to(
        DEVICE, torch.float16
    )
    outputs: list[weakref.ref[Tensor]] = []
    for linear in (made.gate_proj, made.up_proj):
        linear.register_forward_hook(lambda _, __, out: outputs.append(weakref.ref(out)))
    alive: list[bool] = []
    made.down_proj.register_forward_pre_hook(lambda *_: alive.extend(o() is not None for o in outputs))
    with FusedOps([made], DEVICE, torch.float16) as passes, torch.no_grad():
        passes.try_out()
        passes.use()
        taken.clear()
        made(drawn(2, 64))
    assert taken == ["silu_times"]
    assert alive == [False, False]


def test_one_that_wants_more_than_an_input_is_left_alone(taken: list[str]) -> None:
    class GatedRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(32, device=DEVICE, dtype=torch.float16)), 1e-6

        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return x * gate * self.weight

    norm = GatedRMSNorm()
    with FusedOps([norm], DEVICE, torch.float16) as passes:
        passes.try_out()
        passes.use()
        taken.clear()
        assert torch.equal(norm(drawn(2, 32), drawn(2, 32)), drawn(2, 32) ** 2)
    assert taken == []


def test_what_does_not_lie_as_expected_takes_the_long_way(taken: list[str]) -> None:
    layer = block(modeling_llama, modeling_llama.LlamaConfig)
    norm, original = layer.input_layernorm, modeling_llama.apply_rotary_pos_emb
    x, q, other = drawn(96, 4).T, drawn(2, 12, 4, 32).transpose(1, 2), drawn(2, 4, 12, 32)
    cos, sin = drawn(2, 12, 32), drawn(2, 12, 32) + 1
    turns = [
        ((other, other, cos, sin), {}),  # heads lie outside
        ((q, q, cos.float(), sin.float()), {}),
        ((q, q, cos.mT.contiguous().mT, sin), {}),
        ((q, q, cos[:1], sin), {}),
        ((q, q, cos), {"sin": sin}),
        ((q, q, cos, sin), {"unsqueeze_dim": 1}),
    ]
    plain = [norm(x), norm(hidden_states=drawn(4, 96)), norm(drawn(4, 96).float())]
    turned = [original(*args, **named) for args, named in turns]
    with FusedOps([layer], DEVICE, torch.float16) as passes:
        passes.use()
        assert modeling_llama.apply_rotary_pos_emb is not original
        taken.clear()
        again = [norm(x), norm(hidden_states=drawn(4, 96)), norm(drawn(4, 96).float())]
        after = [modeling_llama.apply_rotary_pos_emb(*args, **named) for args, named in turns]
        with pytest.raises(RuntimeError, match="size"):
            norm(drawn(4, 95))
        with pytest.raises(RuntimeError, match="size"):
            modeling_llama.apply_rotary_pos_emb(q, q, drawn(3, 12, 32), drawn(3, 12, 32))
        assert taken == []
        modeling_llama.apply_rotary_pos_emb(q, q, cos, sin)
        assert taken == ["rotate"] * 2
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert all(torch.equal(a, b) for pair in zip(turned, after, strict=True) for a, b in zip(*pair, strict=True))


def test_a_function_may_be_called_with_less_than_four(monkeypatch: pytest.MonkeyPatch, taken: list[str]) -> None:
    original = modeling_llama.apply_rotary_pos_emb

    def either(q: Tensor, k: Tensor | None = None, cos: Any = None, sin: Any = None) -> Any:
        return original(q, q if k is None else k, cos, sin)[: 1 if k is None else 2]

    monkeypatch.setattr(modeling_llama, fused_ops.ROTARY, either)
    q, cos = drawn(2, 12, 4, 32).transpose(1, 2), drawn(2, 12, 32)
    with FusedOps([block(modeling_llama, modeling_llama.LlamaConfig)], DEVICE, torch.float16) as passes:
        passes.use()
        assert modeling_llama.apply_rotary_pos_emb is not either
        taken.clear()
        assert torch.equal(modeling_llama.apply_rotary_pos_emb(q, cos=cos, sin=cos)[0], either(q, cos=cos, sin=cos)[0])
        assert taken == []


@pytest.mark.parametrize("way", ["named", "not contiguous", "fp32"])
def test_a_gate_too_may_take_the_long_way(way: str, taken: list[str]) -> None:
    made = Gate()
    x = drawn(96, 64).T if way == "not contiguous" else drawn(2, 64)
    if way == "not contiguous":
        made.gate_proj = made.up_proj = nn.Identity()
        made.down_proj = nn.Identity()
        x = drawn(8, 64).T
    if way == "fp32":
        made.up_proj.float()
        made.up_proj.register_forward_pre_hook(lambda _, args: (args[0].float(),))
        made.down_proj.float()
    plain = made(x)
    with FusedOps([made], DEVICE, torch.float16) as passes:
        passes.use()
        assert type(made) is not Gate
        taken.clear()
        assert torch.equal(made(x=x) if way == "named" else made(x), plain)
        assert taken == []


def test_fp32_and_a_cpu_keep_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = block(modeling_llama, modeling_llama.LlamaConfig)
    assert FusedOps([layer], DEVICE, torch.float32).modules == []
    monkeypatch.setattr(triton_kernels, "usable", lambda t: t.is_cuda)
    assert FusedOps([layer], torch.device("cpu"), torch.bfloat16).modules == []
