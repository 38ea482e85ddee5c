"""`requant.adapters.expert_order`: PEFT's and unsloth's order of the experts in lora_B.

The oracle of both orders is one einsum in fp64 over the stacked parameter; of PEFT's also PEFT's unmerged forward.
"""

from __future__ import annotations

import os
from pathlib import Path
from threading import Thread
from time import sleep
from typing import Any

import pytest
import torch
from adapters.test_expert_layouts import STACKS, saved
from helpers import pico
from helpers.merging import FP32
from safetensors.torch import load_file
from torch import Tensor

from requant import merge
from requant.adapters import expert_order, peft_directory
from requant.errors import InputError
from requant.evaluate import peft_runtime
from requant.run import prepare

pytestmark = pytest.mark.filterwarnings("ignore")
GROUPED, RANKS = {"lora_B_layout": "grouped_by_expert"}, {"lora_B_layout": "rank_major"}
OPEN = {"auto_mapping": {"unsloth_fixed": True}}
EXPERTS = "base_model.model.model.layers.1.mlp.experts"


def adapter_on(tmp: Path, kind: str = "qwen3_moe", **changes: Any) -> tuple[Any, Path, Path]:
    """(PEFT's model, base, adapter) with LoRA on both stacks, as PEFT orders it."""
    made, base = saved(tmp, kind)
    live = pico.train(made, tmp / "adapter", target_modules=["q_proj"], target_parameters=STACKS)
    pico.edit_adapter(tmp / "adapter", **changes)
    return live, base, tmp / "adapter"


def delta(a: Tensor, b: Tensor, experts: int, order: str, *, transposed: bool) -> Tensor:
    """6 / 4 * B A of every expert in fp64, [experts, out, in] or its transpose."""
    left = b.double().view(len(b), -1, experts) if order == "peft" else b.double().view(len(b), experts, -1)
    right = a.double().view(experts, -1, a.shape[1])
    return (
        6
        / 4
        * torch.einsum(("ore" if order == "peft" else "oer") + ",eri->" + ("eio" if transposed else "eoi"), left, right)
    )


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(
    ("said", "order"),
    [
        ({}, "peft"),
        (RANKS, "peft"),
        (GROUPED, "unsloth"),
        ({"unsloth_fused_expert_lora": {"parameters": {"gate_up_proj": GROUPED, "down_proj": GROUPED}}}, "unsloth"),
    ],
)
def test_the_merge_is_the_einsum_of_the_order(tmp_path: Path, kind: str, said: dict[str, Any], order: str) -> None:
    live, base, adapter = adapter_on(tmp_path, kind, **said)
    _, _, tested = pico.merged(base, adapter, tmp_path / "out")
    assert tested.worst <= 1
    before, after, tensors = (
        pico.reload(base),
        pico.reload(tmp_path / "out"),
        load_file(adapter / peft_directory.WEIGHTS),
    )
    for leaf, inner in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
        a, b = (tensors[f"{EXPERTS}{inner}.lora_{x}.weight"] for x in "AB")
        name = f"model.layers.1.mlp.experts.{leaf}"
        got = after.get_parameter(name).double() - before.get_parameter(name).double()
        right, wrong = (
            delta(a, b, 4, o, transposed=kind == "gpt_oss")
            for o in (order, "peft" if order == "unsloth" else "unsloth")
        )
        assert float((got - right).abs().max() / right.abs().max()) < 1e-5
        assert float((got - wrong).abs().max() / wrong.abs().max()) > 0.1
    if order == "peft":
        assert pico.relative(pico.logits(pico.reload(tmp_path / "out")), pico.logits(live)) < FP32


def test_parameters_of_different_orders(tmp_path: Path) -> None:
    """What unsloth records of each parameter counts more than what it records of the file."""
    mixed = {"gate_up_proj": GROUPED, "experts.down_proj": RANKS}
    _, base, adapter = adapter_on(tmp_path, unsloth_fused_expert_lora={"parameters": mixed}, lora_B_layout="mixed")
    loaded = peft_directory.load(adapter)
    assert expert_order.order_of(loaded, "model.layers.0.mlp.experts.gate_up_proj") == "unsloth"
    assert expert_order.order_of(loaded, "model.layers.0.mlp.experts.down_proj") == "peft"
    pico.merged(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("whole", [{}, {"lora_B_layout": "mixed"}])
def test_a_parameter_that_the_record_lacks_is_refused(tmp_path: Path, whole: dict[str, Any]) -> None:
    """PEFT's order would be a guess; the recipe can say it, and where the orders are the same there is no question."""
    record = {"unsloth_fused_expert_lora": {"parameters": {"gate_up_proj": GROUPED}}} | whole
    _, base, adapter = adapter_on(tmp_path, **record)
    with pytest.raises(InputError, match="records the order of experts of gate_up_proj, and none of down_proj"):
        prepare.plan_merge(base, peft_directory.load(adapter))
    prepare.plan_merge(base, peft_directory.load(adapter, expert_order="unsloth"))
    made, base = saved(tmp_path / "one", "qwen3_moe")
    pico.train(made, tmp_path / "one" / "adapter", target_modules=[], target_parameters=STACKS, r=1)
    pico.edit_adapter(tmp_path / "one" / "adapter", **record)
    prepare.plan_merge(base, peft_directory.load(tmp_path / "one" / "adapter"))


@pytest.mark.parametrize("order", ["peft", "unsloth"])
def test_peft_runs_the_adapter_in_the_order_of_the_merge(tmp_path: Path, order: Any) -> None:
    """The variant `adapter`, and with it the teacher of healing: unmerged logits are the merged model's."""
    _, base, adapter = adapter_on(tmp_path, **OPEN)
    plan, _ = prepare.plan_merge(base, peft_directory.load(adapter, expert_order=order))
    (tmp_path / "out").mkdir()
    merge.merge(plan, tmp_path / "out", dtype="float32")
    live = peft_runtime.attach(pico.reload(base), plan).eval()
    assert pico.relative(pico.logits(pico.reload(tmp_path / "out")), pico.logits(live)) < FP32


@pytest.mark.parametrize(
    ("changes", "mark"),
    [
        (OPEN, "auto_mapping.unsloth_fixed"),
        ({"unsloth_version": "2026.3.1"}, "unsloth_version"),
        ({"base_model_name_or_path": "unsloth/Qwen3-30B-A3B"}, "base_model_name_or_path"),
        ({"card": "---\nlibrary_name: peft\ntags:\n- unsloth\n---\n# Model"}, "README.md"),
    ],
)
def test_an_order_that_no_file_says(tmp_path: Path, changes: dict[str, Any], mark: str) -> None:
    """Planned, so that it can be measured; a merge that is not told the order is refused."""
    card = changes.pop("card", None)
    _, base, adapter = adapter_on(tmp_path, **changes)
    if card:
        (adapter / "README.md").write_text(card)
    loaded = peft_directory.load(adapter)
    assert expert_order.is_open(loaded)
    plan, _ = prepare.plan_merge(base, loaded)
    assert any(
        w.startswith(f"adapter: {mark} names unsloth") and "measured before the merge" in w for w in plan.warnings
    )
    with pytest.raises(InputError, match=r"whether lora_B of its experts is in PEFT's order or unsloth's is not known"):
        merge.merge(plan, tmp_path / "out", dtype="float32")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [{}, RANKS | OPEN, GROUPED | OPEN, {"r": 1} | OPEN, {"card": "---\nlibrary_name: peft\n---\nNot by unsloth."}],
)
def test_an_order_that_needs_no_measuring(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Written by others, recorded, or of rank 1, where both orders are the same."""
    made, _ = saved(tmp_path, "qwen3_moe")
    changes = dict(changes)
    card, rank = changes.pop("card", None), changes.pop("r", 4)
    pico.train(made, tmp_path / "adapter", target_modules=[], target_parameters=STACKS, r=rank)
    pico.edit_adapter(tmp_path / "adapter", **changes)
    (tmp_path / "adapter" / "README.md").write_text(card or "---\nlibrary_name: peft\n---\n")
    assert not expert_order.is_open(peft_directory.load(tmp_path / "adapter"))


def test_an_adapter_of_unsloth_without_stacked_experts(tmp_path: Path) -> None:
    made, _ = saved(tmp_path, "qwen3_moe")
    pico.train(made, tmp_path / "adapter")
    pico.edit_adapter(tmp_path / "adapter", **OPEN)
    loaded = peft_directory.load(tmp_path / "adapter")
    assert not expert_order.is_open(loaded)
    assert expert_order.said(loaded) is None
    assert "has no effect" in str(expert_order.said(peft_directory.load(tmp_path / "adapter", expert_order="unsloth")))


def test_an_unknown_record(tmp_path: Path) -> None:
    _, base, adapter = adapter_on(tmp_path, lora_B_layout="zigzag")
    with pytest.raises(InputError, match="lora_B_layout is zigzag, expected rank_major or grouped_by_expert"):
        prepare.plan_merge(base, peft_directory.load(adapter))
    plan, _ = prepare.plan_merge(base, peft_directory.load(adapter, expert_order="peft"))
    assert "is read in PEFT's order, as the recipe says" in plan.warnings[0]


@pytest.mark.parametrize("layers", [(GROUPED, RANKS), (RANKS, GROUPED)])
def test_layers_of_different_orders_are_refused(tmp_path: Path, layers: Any) -> None:
    parameters = {f"model.layers.{i}.mlp.experts.gate_up_proj": own for i, own in enumerate(layers)}
    parameters["model.layers.0.mlp.experts.down_proj"] = GROUPED
    _, base, adapter = adapter_on(tmp_path, unsloth_fused_expert_lora={"parameters": parameters}, lora_B_layout="mixed")
    with pytest.raises(InputError, match="lora_B_layout is mixed, expected rank_major or grouped_by_expert"):
        prepare.plan_merge(base, peft_directory.load(adapter))


def test_a_model_card_that_is_a_pipe_is_not_read(tmp_path: Path) -> None:
    """Opening it without a writer would wait for ever: a writer is kept here, so that the old code fails in time."""
    _, _, adapter = adapter_on(tmp_path)
    (adapter / "README.md").unlink(missing_ok=True)
    os.mkfifo(adapter / "README.md")
    writer = os.open(adapter / "README.md", os.O_RDWR)
    os.write(writer, b"---\ntags: [unsloth]\n---\n" + b"x" * 2**15)
    Thread(target=lambda: (sleep(1), os.close(writer)), daemon=True).start()
    assert not expert_order.is_open(peft_directory.load(adapter))


def test_the_recipe_counts_more_than_a_record(tmp_path: Path) -> None:
    _, _, adapter = adapter_on(tmp_path, **RANKS)
    loaded = peft_directory.load(adapter, expert_order="unsloth")
    assert expert_order.order_of(loaded, "experts.down_proj") == "unsloth"
    assert "although lora_B_layout says rank_major" in str(expert_order.said(loaded))
