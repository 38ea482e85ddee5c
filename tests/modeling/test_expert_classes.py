"""Experts of classes of their own, one by one: Llama 4, LongCat Flash, Muse Spark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico, tiny
from helpers.sweep import ids

from requant.checkpoint.reader import Checkpoint
from requant.evaluate import variants
from requant.modeling import linears, stacked_experts
from requant.modeling.moe import StackedLayout, calibrate_experts, share_added, split_experts
from requant.modeling.unplaced import Unplaced

pytestmark = pytest.mark.filterwarnings("ignore")
CPU = torch.device("cpu")
FP32 = 1e-5


def split(kind: str, tmp: Path, **changes: Any) -> tuple[Any, Any]:
    """(transformers' model, ours with every expert as Linears, filled from its files)."""
    made = tiny.model(kind, **changes)
    model, tensors = stacked_experts.open_split(pico.save(made, tmp / "base"))
    assert not linears.left_fused(model)
    return made, variants.fill(model, tensors, CPU, torch.float32)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama4_text", {}), ("llama4_text", {"num_experts_per_tok": 2}), ("longcat_flash", {}), ("muse_spark", {})],
)
@torch.no_grad()
def test_split_experts_are_the_classs_and_a_floor_changes_no_output(
    tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    made, ours = split(kind, tmp_path, **changes)
    expected = pico.logits(made, ids())
    assert pico.relative(pico.logits(ours, ids()), expected) < FP32
    calibrate_experts(ours, None, floor=1.0)
    assert pico.relative(pico.logits(ours, ids()), expected) < FP32
    found = dict(split_experts(ours))
    assert found
    assert any(experts.added != [0] * experts.count for experts in found.values()), "the floor was met by none"


@torch.no_grad()
def test_llama_4s_experts_calibrate_on_their_tokens_as_weighted(tmp_path: Path) -> None:
    made, ours = split("llama4_text", tmp_path)
    name, experts = next(iter(split_experts(ours)))
    seen: list[torch.Tensor] = []
    experts.get_submodule("1.gate_proj").register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    hidden = torch.zeros(experts.count, 5, 64)
    hidden[0, :3], hidden[1, 3:] = torch.randn(3, 64), torch.randn(2, 64)
    out = experts(hidden.view(-1, 64))
    assert pico.relative(out, made.get_submodule(name)(hidden.view(-1, 64))) < FP32
    assert torch.equal(seen[0], hidden[1, 3:])
    calibrate_experts(ours, None, floor=2.0)  # each gets twice what it would get if all were chosen alike
    assert pico.relative(experts(hidden.view(-1, 64)), out) < FP32
    least = -(-2 * 5 // experts.count)
    assert len(seen[1]) == least
    assert torch.equal(seen[1][:2], hidden[1, 3:])
    assert all(bool((row == hidden[0, :3]).all(dim=1).any()) for row in seen[1][2:]), "as weighted for where they go"
    assert share_added(ours, f"{name}.1.up_proj") == (least - 2) / least


@torch.no_grad()
def test_longcats_experts_without_weights_return_their_input(tmp_path: Path) -> None:
    """transformers saves weights of theirs that nothing reads; they are copied."""
    made, ours = split("longcat_flash", tmp_path)
    name, experts = next(iter(split_experts(ours)))
    assert (experts.count, experts.identities) == (4, 2)
    hidden, index = torch.randn(3, 64), torch.tensor([[0, 4], [5, 4], [1, 2]])
    weights = torch.tensor([[0.5, 0.25], [1.0, 2.0], [0.1, 0.2]])
    out = experts(hidden, index, weights)
    assert pico.relative(out, made.get_submodule(name)(hidden, index, weights)) < FP32
    assert torch.allclose(out[1], 3 * hidden[1])
    stored = {n: info.shape for n, info in Checkpoint(tmp_path / "base").items()}
    unplaced = Unplaced.of(ours, stored)
    assert not unplaced.unknown
    assert {n for n in stored if ".experts.4." in n or ".experts.5." in n} == set(unplaced.carried)
    without = {n: shape for n, shape in stored.items() if n not in unplaced.carried}
    assert Unplaced.of(ours, without).carried == (), "the original checkpoint has none"


def test_the_layout_of_a_class_that_does_not_say_is_read_off_its_shapes() -> None:
    layouts = {
        kind: StackedLayout.of(next(m for m in tiny.model(kind).modules() if type(m).__name__ == name))
        for kind, name in (("llama4_text", "Llama4TextExperts"), ("longcat_flash", "LongcatFlashExperts"))
    }
    assert [(o.gated, o.interleaved, o.transposed) for o in layouts.values()] == [
        (True, False, True),
        (True, False, False),
    ]
