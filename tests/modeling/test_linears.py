"""`requant.modeling.linears`: every matrix is a Linear, and no output of a model changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico, tiny
from torch import Tensor

from requant.checkpoint.reader import Checkpoint, read_json
from requant.modeling import linears, sequential, skeleton
from requant.modeling.moe import ROLES, calibrate_experts, share_added, split_experts
from requant.numerics.grid import Grid
from requant.quantize import block_quantizer
from requant.quantize.plan import Settings
from requant.quantize.stage import quantize

SPLIT = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def exposed(tmp: Path, kind: str) -> tuple[Any, Any]:
    """(transformers' model, the same with every matrix a Linear)."""
    made = pico.model(kind)
    checkpoint = Checkpoint(pico.save(made, tmp / "model"))
    built = skeleton.open_model(tmp / "model")
    names = skeleton.tensor_names(built, checkpoint)
    skeleton.place(built, {p: checkpoint.read(n) for p, n in names.items()})
    built.tie_weights()
    return made, built


@pytest.mark.parametrize("kind", [*SPLIT, "gpt2", "falcon"])
def test_the_exposed_model_is_the_model(tmp_path: Path, kind: str) -> None:
    made, built = exposed(tmp_path, kind)
    assert pico.relative(pico.logits(built), pico.logits(made)) < 1e-5
    assert all(m.weight.ndim == 2 for m in built.modules() if linears.is_linear(m))
    assert not linears.left_fused(built)


def test_gate_and_up_are_told_apart_by_the_conversion(tmp_path: Path) -> None:
    """Mixtral's w1 and w3: the order in which transformers fuses them says which is gate."""
    made, _ = exposed(tmp_path, "mixtral")
    checkpoint = Checkpoint(tmp_path / "model")
    names = skeleton.tensor_names(skeleton.build(made.config), checkpoint)
    stem = "model.layers.1.block_sparse_moe.experts.2"
    found = {role: names[f"model.layers.1.mlp.experts.2.{role}.weight"] for role in ROLES}
    assert found == {"gate_proj": f"{stem}.w1.weight", "up_proj": f"{stem}.w3.weight", "down_proj": f"{stem}.w2.weight"}
    fused = made.model.layers[1].mlp.experts
    assert torch.equal(fused.gate_up_proj[2], torch.cat([checkpoint.read(f"{stem}.w{i}.weight") for i in (1, 3)]))


def test_layouts_that_are_not_split_are_named() -> None:
    """gpt-oss interleaves gate and up, has biases and transposed weights: it stays stacked.

    The plan says so.
    """
    config = pico.config("gpt_oss", head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
    built = skeleton.build(config)
    assert linears.left_fused(built) == [
        f"model.layers.{i}.mlp.experts.{leaf}" for i in (0, 1) for leaf in ("gate_up_proj", "down_proj")
    ]
    assert not list(split_experts(built))


def test_experts_in_matrices_of_a_class_of_their_own_are_named_too() -> None:
    """DBRX holds the rows of all experts in one matrix."""
    built = skeleton.build(tiny.config("dbrx"), split=True)
    assert {name.rpartition("blocks.0.")[2] for name in linears.left_fused(built) if ".blocks.0." in name} == {
        f"ffn.experts.mlp.{leaf}" for leaf in ("w1", "v1", "w2")
    }


def moe(tmp: Path) -> Any:
    """The experts of a pico Mixtral's first layer: 4, of which every token takes 2."""
    _, built = exposed(tmp, "mixtral")
    return built.model.layers[0].mlp.experts


def seen(experts: Any) -> dict[int, Tensor]:
    """What each expert's gate receives in the calls to come."""
    inputs: dict[int, Tensor] = {}
    for index in range(experts.count):
        gate = experts.get_submodule(str(index)).gate_proj
        gate.register_forward_pre_hook(lambda _m, args, index=index: inputs.update({index: args[0].clone()}))
    return inputs


def routed(tokens: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, indices, weights: none uses expert 3, tokens 0 to 3 use 2 instead of 1."""
    hidden = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1))
    index = torch.tensor([[0, 2 if t < 4 else 1] for t in range(tokens)])
    return hidden, index, torch.full((tokens, 2), 0.5)


def test_experts_see_their_own_rows_and_all_are_called(tmp_path: Path) -> None:
    experts = moe(tmp_path)
    inputs = seen(experts)
    hidden, index, weights = routed()
    experts(hidden, index, weights)
    assert torch.equal(inputs[0], hidden)
    assert torch.equal(inputs[1], hidden[4:])
    assert torch.equal(inputs[2], hidden[:4])
    assert inputs[3].shape == (0, 64)


def test_a_floor_adds_rows_and_changes_no_output(tmp_path: Path) -> None:
    """16 tokens with 2 of 4 experts: 8 rows each on average, so the floor of 3/4 is 6."""
    experts = moe(tmp_path)
    plain = experts(*routed())
    calibrate_experts(_holder(experts), None, 0.75)
    inputs = seen(experts)
    hidden, index, weights = routed()
    assert torch.allclose(experts(hidden, index, weights), plain, atol=1e-6)
    assert [len(inputs[i]) for i in range(4)] == [16, 12, 6, 6]
    assert torch.equal(inputs[2][:4], hidden[:4]), "its own come first"
    assert torch.equal(inputs[2][4:], hidden[[4, 10]]), "the others are spread over the batch"
    assert experts.added == [0, 0, 2, 6]
    shares = [share_added(_holder(experts), f"experts.{i}.up_proj") for i in range(4)]
    assert shares == [0, 0, 2 / 6, 1]


def test_a_twin_sees_the_same_tokens_first(tmp_path: Path) -> None:
    """The reference experts route otherwise; rows to compare come first, outputs stay."""
    experts = moe(tmp_path)
    twin = copy.deepcopy(experts)
    hidden, index, weights = routed()
    other = hidden + 1
    turned = index.flip(0)
    expected = twin(other, turned, weights)
    calibrate_experts(_holder(experts), _holder(twin), 0.75)
    ours, theirs = seen(experts), seen(twin)
    experts(hidden, index, weights)
    assert torch.allclose(twin(other, turned, weights), expected, atol=1e-6)
    for i in range(4):
        assert torch.equal(theirs[i][: len(ours[i])], ours[i] + 1), i
    assert len(theirs[2]) > len(ours[2])


def _holder(experts: Any) -> torch.nn.Module:
    holder = torch.nn.Module()
    holder.experts = experts
    return holder


def test_experts_that_the_text_hardly_uses_are_counted(tmp_path: Path) -> None:
    """One token repeated: two experts of each layer get all of it, the floor fills the others."""
    source = pico.save(pico.model("mixtral"), tmp_path / "merged", torch.float16)
    (tmp_path / "out").mkdir()
    _, results = quantize(
        source, tmp_path / "out", torch.full((8, 32), 5), Settings(grid=Grid(4, 32), correct=0.5), dtype=torch.float16,
        device=torch.device("cpu"), batch=2,
    )  # fmt: skip
    shares = {r.name: r.added for r in results}
    for layer in (0, 1):
        by_expert = [shares[f"model.layers.{layer}.mlp.experts.{e}.gate_proj"] for e in range(4)]
        assert sorted(by_expert) == [0, 0, 1, 1]
    assert shares["model.layers.0.self_attn.q_proj"] == 0
    assert not any(r.fallback for r in results)


def test_rules_for_experts_under_every_name_that_engines_ask_for(tmp_path: Path) -> None:
    """A server sees a layer's experts as one module; Mixtral's have other names there."""
    source = pico.save(pico.model("mixtral"), tmp_path / "merged", torch.float16)
    (tmp_path / "out").mkdir()
    overrides = (("*.0.mlp.experts.*", None), ("*.1.mlp.experts.2.up_proj", {"bits": 8}))
    quantize(
        source, tmp_path / "out", pico.ids(4, 16), Settings(grid=Grid(4, 32), overrides=overrides), dtype=torch.float16,
        device=torch.device("cpu"),
    )  # fmt: skip
    rules = read_json(tmp_path / "out" / "config.json")["quantization_config"]["dynamic"]
    for stem in (r"model\.layers\.0\.mlp", r"model\.layers\.0\.block_sparse_moe"):
        assert rules[rf"-:^{stem}\.experts$"] == {}
    assert rules[r"-:^model\.layers\.0\.block_sparse_moe\.experts\.3\.w2$"] == {}
    assert rules[r"+:^model\.layers\.1\.mlp\.experts\.2\.up_proj$"]["bits"] == 8
    assert rules[r"+:^model\.layers\.1\.block_sparse_moe\.experts\.2\.w3$"]["bits"] == 8
    assert not any(r"\.1\." in rule and rule.endswith(r"experts$") for rule in rules), "its experts differ"


@pytest.mark.slow
def test_running_blocks_again_gives_experts_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where batches cannot wait, each group reruns the block: same tokens, same codes."""
    source = pico.save(pico.model("mixtral"), tmp_path / "merged", torch.float16)
    for name, hold in (("held", True), ("again", False)):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(
            block_quantizer,
            "run_block",
            lambda *args, paused, forced=hold, **options: sequential.run_block(*args, paused=forced, **options),
        )
        quantize(
            source, tmp_path / name, pico.ids(4, 16), Settings(grid=Grid(4, 32), correct=0.5), dtype=torch.float16,
            device=torch.device("cpu"), batch=2,
        )  # fmt: skip
    held, again = Checkpoint(tmp_path / "held"), Checkpoint(tmp_path / "again")
    names = [n for n in held if n.endswith("qweight")]
    assert len(names) == 2 * (4 + 4 * 3)
    assert all(torch.equal(held.read(n), again.read(n)) for n in names)
