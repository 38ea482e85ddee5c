"""`requant.elementwise` against transformers' own: in Triton's interpreter where there is no GPU."""

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

from requant import elementwise, kernels
from requant.elementwise import OnePass

CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    elementwise.triton is None or not (CUDA or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not CUDA, reason="cut off there"))]


@pytest.fixture(autouse=True)
def usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "usable", lambda _: True)


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
        monkeypatch.setattr(elementwise, name, partial(counted, name, getattr(elementwise, name)))
    return calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [96, 576, 4096])
def test_a_norm_rounds_as_transformers_does(n: int, dtype: torch.dtype) -> None:
    norm = modeling_llama.LlamaRMSNorm(n, eps=1e-5).to(DEVICE, dtype)
    norm.weight.data.copy_(drawn(n, dtype=dtype))
    x = drawn(3, 37, n, dtype=dtype) * drawn(37, 1, dtype=dtype)
    theirs, ours = norm(x), elementwise.rms_norm(x, norm.weight, 1e-5)
    assert elementwise.close(ours, theirs)
    step = torch.finfo(dtype).eps
    assert not elementwise.close(ours * (1 + 4 * step), theirs)
    worse = ours.clone()
    worse[1, 2, 3] = -theirs[1, 2, 3] - step
    assert not elementwise.close(worse, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tables", "heads", "length", "n"), [(1, 9, 7, 64), (2, 8, 16, 96), (2, 1, 1, 128)])
def test_a_turn_is_transformers_own(tables: int, heads: int, length: int, n: int, dtype: torch.dtype) -> None:
    x = drawn(2, length, heads, n, dtype=dtype).transpose(1, 2)
    cos, sin = drawn(tables, length, n, dtype=dtype), drawn(tables, length, n, dtype=dtype) - 1
    theirs = modeling_llama.apply_rotary_pos_emb(x, x, cos, sin)[0]
    ours = elementwise.rotate(x, cos, sin)
    assert torch.equal(ours, theirs)
    assert ours.stride() == theirs.stride() == x.stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (3, 2048), (2, 3, 33)])
def test_a_gate_rounds_as_transformers_does(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = drawn(*shape, dtype=dtype) * 8, drawn(1, *shape, dtype=dtype)[0]
    gate.view(-1)[:3] = torch.tensor([0.0, -300.0, 300.0])
    assert elementwise.close(elementwise.silu_times(gate, up), nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("module", "config", "norms"),
    [(modeling_llama, modeling_llama.LlamaConfig, 2), (modeling_qwen3, modeling_qwen3.Qwen3Config, 4)],
)
def test_a_block_computes_the_same(module: Any, config: Any, norms: int, dtype: torch.dtype, taken: list[str]) -> None:
    layer = block(module, config, dtype)
    plain, own = run(layer, dtype), vars(module)[elementwise.ROTARY]
    with OnePass([layer], DEVICE, dtype) as passes:
        passes.try_out()
        assert torch.equal(run(layer, dtype), plain)  # not yet
        passes.use()
        taken.clear()
        fused = run(layer, dtype)
        assert sorted(taken) == ["rms_norm"] * norms + ["rotate"] * 2 + ["silu_times"]
    assert vars(module)[elementwise.ROTARY] is own
    taken.clear()
    assert torch.equal(run(layer, dtype), plain)
    assert taken == []
    assert torch.allclose(fused.float(), plain.float(), rtol=0.02, atol=0.02 * float(plain.abs().mean()))


def test_what_a_copy_computes_is_its_own(taken: list[str]) -> None:
    """The unquantized twin of a block is a copy of it that has begun already."""
    layer = block(modeling_llama, modeling_llama.LlamaConfig)
    with OnePass([layer], DEVICE, torch.float16) as passes:
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
    """Else the weights of block after block would stay on the GPU until Python collects its garbage."""
    layer = block(modeling_llama, modeling_llama.LlamaConfig)
    with OnePass([layer], DEVICE, torch.float16) as passes:
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

    monkeypatch.setattr(modeling_gemma, elementwise.ROTARY, neighbours)
    layer = block(modeling_gemma, modeling_gemma.GemmaConfig)
    plain = run(layer)
    with OnePass([layer], DEVICE, torch.float16) as passes:
        passes.try_out()
        passes.use()
        taken.clear()
        assert torch.equal(run(layer), plain)
        assert taken == []
        assert vars(modeling_gemma)[elementwise.ROTARY] is neighbours
    assert len(passes.norms) == 1


def test_a_gate_that_scales_is_left_alone(taken: list[str]) -> None:
    class Scaled(modeling_llama.LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 1.5)

    config = modeling_llama.LlamaConfig(hidden_size=64, intermediate_size=96)
    for kind, count in ((modeling_llama.LlamaMLP, 1), (Scaled, 0)):
        made = kind(config).to(DEVICE, torch.float16)
        plain = made(drawn(2, 64))
        with OnePass([made], DEVICE, torch.float16) as passes:
            passes.try_out()
            passes.use()
            taken.clear()
            assert torch.allclose(made(drawn(2, 64)), plain, atol=2e-3)
            assert taken == ["silu_times"] * count


def test_nothing_stays_while_a_batch_waits(taken: list[str]) -> None:
    """At the last linear of a gate only its input and the gate's are left."""
    made = modeling_llama.LlamaMLP(modeling_llama.LlamaConfig(hidden_size=64, intermediate_size=96)).to(
        DEVICE, torch.float16
    )
    outputs: list[weakref.ref[Tensor]] = []
    for linear in (made.gate_proj, made.up_proj):
        linear.register_forward_hook(lambda _, __, out: outputs.append(weakref.ref(out)))
    alive: list[bool] = []
    made.down_proj.register_forward_pre_hook(lambda *_: alive.extend(o() is not None for o in outputs))
    with OnePass([made], DEVICE, torch.float16) as passes, torch.no_grad():
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
    with OnePass([norm], DEVICE, torch.float16) as passes:
        passes.try_out()
        passes.use()
        assert torch.equal(norm(drawn(2, 32), drawn(2, 32)), drawn(2, 32) ** 2)
    assert taken == []


def test_what_does_not_lie_as_expected_takes_the_long_way(taken: list[str]) -> None:
    layer = block(modeling_llama, modeling_llama.LlamaConfig)
    norm, turn = layer.input_layernorm, modeling_llama.apply_rotary_pos_emb
    x, q = drawn(96, 4).T, drawn(2, 4, 12, 32)
    cos, sin = drawn(1, 12, 32), drawn(1, 12, 32)
    plain = norm(x), norm(x.float()), turn(q, q, cos, sin), turn(q, q, cos.float(), sin.float())
    with OnePass([layer], DEVICE, torch.float16) as passes:
        passes.try_out()
        passes.use()
        taken.clear()
        turn = modeling_llama.apply_rotary_pos_emb
        again = norm(x), norm(x.float()), turn(q, q, cos, sin), turn(q, q, cos.float(), sin.float())
        assert turn(q.mT, q.mT, cos.mT, sin.mT, unsqueeze_dim=1)[0].shape == q.mT.shape
        assert taken == []
    for a, b in zip(plain, again, strict=True):
        pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
        assert all(torch.equal(x, y) for x, y in pairs)


def test_fp32_and_a_cpu_keep_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = block(modeling_llama, modeling_llama.LlamaConfig)
    assert OnePass([layer], DEVICE, torch.float32).modules == []
    monkeypatch.setattr(kernels, "usable", lambda t: t.is_cuda)
    assert OnePass([layer], torch.device("cpu"), torch.bfloat16).modules == []
