"""`requant.adapters.expert_layouts`: LoRA on stacked experts and on single ones.

Adapters of single experts are those of transformers 4.

Stored expert by expert (Mixtral, Qwen3-MoE) or stacked (gpt-oss), the merge must give PEFT's unmerged logits; where PEFT
is wrong, the fp64 formula is the judge.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import old_peft, pico
from helpers.merging import FP32, ledger
from safetensors.torch import load_file, save_file

from requant.adapters import peft_directory
from requant.checkpoint.reader import Checkpoint
from requant.errors import InputError
from requant.run import prepare

pytestmark = pytest.mark.filterwarnings("ignore")
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "intermediate_size": 48},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 40, "head_dim": 16, "decoder_sparse_step": 1},
    "olmoe": {"num_experts": 4, "intermediate_size": 48},
    "gpt_oss": {"num_local_experts": 4, "intermediate_size": 48, "head_dim": 16},
}
"""Sizes that no expert shares with another side of its matrix, so that a transposed layout cannot fit."""


def saved(tmp: Path, kind: str, **changes: Any) -> tuple[Any, Path]:
    made = pico.model(kind, **(KINDS[kind] | changes))
    return made, pico.save(made, tmp / "base")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stacks", [STACKS, STACKS[:1], STACKS[1:]], ids=["both", "gate_up", "down"])
def test_target_parameters(tmp_path: Path, kind: str, stacks: list[str]) -> None:
    made, base = saved(tmp_path, kind)
    plain = pico.logits(made)
    live = pico.train(made, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=stacks)
    expected = pico.logits(live)
    assert pico.relative(plain, expected) > 100 * FP32
    plan, result, tested = pico.merged(base, tmp_path / "adapter", tmp_path / "out")
    assert tested.worst <= 1
    assert pico.relative(pico.logits(pico.reload(tmp_path / "out")), expected) < FP32
    ledger(plan, result)
    stored = sum(len(op.folds) for op in plan.ops) - 2  # q_proj of two layers
    each = 1 if kind == "gpt_oss" else 4
    assert stored == 2 * each * sum(2 if s.endswith("gate_up_proj") and each > 1 else 1 for s in stacks)


def test_rank_and_alpha_patterns_and_rslora(tmp_path: Path) -> None:
    made, base = saved(tmp_path, "mixtral")
    live = pico.train(
        made, tmp_path / "adapter", target_modules=[], target_parameters=STACKS, use_rslora=True,
        rank_pattern={"experts.down_proj": 2}, alpha_pattern={"experts.gate_up_proj": 11},
    )  # fmt: skip
    pico.merged(base, tmp_path / "adapter", tmp_path / "out")
    assert pico.relative(pico.logits(pico.reload(tmp_path / "out")), pico.logits(live)) < FP32


def test_a_router(tmp_path: Path) -> None:
    """A two-dimensional parameter is a plain weight."""
    made, base = saved(tmp_path, "mixtral")
    live = pico.train(
        made, tmp_path / "adapter", target_modules=[], target_parameters=["mlp.gate.weight", STACKS[1]], scale=0.3
    )
    pico.merged(base, tmp_path / "adapter", tmp_path / "out")
    assert pico.relative(pico.logits(pico.reload(tmp_path / "out")), pico.logits(live)) < FP32


def test_stacked_on_disk_too(tmp_path: Path) -> None:
    """A checkpoint that holds the stacks themselves: the whole delta goes to one tensor."""
    made, base = saved(tmp_path, "qwen3_moe")
    weights = {n: p.detach().clone() for n, p in made.named_parameters()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    live = pico.train(made, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=STACKS)
    expected = pico.logits(live)
    pico.merged(base, tmp_path / "adapter", tmp_path / "out")
    assert pico.relative(pico.logits(pico.reload(tmp_path / "out")), expected) < FP32


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_the_layout_of_peft_0_18(tmp_path: Path, kind: str) -> None:
    """Before 0.19 PEFT read every stack as [experts, in, out]: delta[e] = (B_e @ A_e)'.

    Compared with the formula in fp64.
    """
    made, base = saved(tmp_path, kind)
    pico.train(made, tmp_path / "adapter", target_modules=[], target_parameters=STACKS[:1])
    stack = made.get_submodule("model.layers.1.mlp").experts
    count, rows, columns = getattr(stack, "get_base_layer", lambda: stack)().gate_up_proj.shape
    a, b = torch.randn(count * 4, rows) * 0.05, torch.randn(columns, 4 * count) * 0.05
    key = "base_model.model.model.layers.1.mlp.experts"
    save_file({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, tmp_path / "adapter" / peft_directory.WEIGHTS)
    pico.edit_adapter(tmp_path / "adapter", peft_version="0.18.1")
    pico.merged(base, tmp_path / "adapter", tmp_path / "out")
    got, before = (
        pico.reload(p).get_parameter("model.layers.1.mlp.experts.gate_up_proj") for p in (tmp_path / "out", base)
    )
    for e in range(count):
        exact = before[e].double() + 6 / 4 * (b[:, e::count].double() @ a[e * 4 : e * 4 + 4].double()).T
        assert torch.allclose(got[e].double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("folder", sorted(old_peft.DATA.glob("peft-*")), ids=lambda p: p.name)
def test_what_older_pefts_wrote(tmp_path: Path, folder: Path) -> None:
    """Real files of PEFT 0.18.1, 0.19.1 and 0.20.0: the delta that each of them adds.

    Written by tests/helpers/old_peft.py.
    """
    kind = folder.name.rsplit("-", 1)[1]
    base = pico.save(pico.model(kind, **old_peft.KINDS[kind]), tmp_path / "base")
    pico.merged(base, folder, tmp_path / "out")
    before, after = pico.reload(base), pico.reload(tmp_path / "out")
    for leaf, delta in load_file(folder / "delta.safetensors").items():
        name = f"{old_peft.OWNER}.{leaf}"
        got = after.get_parameter(name) - before.get_parameter(name)
        assert float(delta.abs().max()) > 1e-2
        assert torch.allclose(got, delta, rtol=0, atol=1e-6), leaf


# Adapters of single experts, as transformers 4 had them ------------------------------------------------------------


def single_experts(tmp: Path, kind: str, roles: tuple[str, ...], inside: str, **config: Any) -> Path:
    """An adapter on every expert's own linears: PEFT on transformers 4 wrote these keys."""
    sizes = {
        "w1": (48, 64),
        "w3": (48, 64),
        "w2": (64, 48),
        "gate_proj": (40, 64),
        "up_proj": (40, 64),
        "down_proj": (64, 40),
    }
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in (0, 1):
        for expert in range(4):
            for role in roles:
                rows, columns = sizes[role]
                key = f"base_model.model.model.layers.{layer}.{inside}.experts.{expert}.{role}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(3, columns, generator=generator) * 0.05
                tensors[f"{key}.lora_B.weight"] = torch.randn(rows, 3, generator=generator) * 0.05
    options = {"r": 3, "lora_alpha": 5, "target_modules": list(roles), "task_type": "CAUSAL_LM", "inference_mode": True}
    peft.LoraConfig(**(options | config)).save_pretrained(tmp)
    save_file(tensors, tmp / peft_directory.WEIGHTS)
    return tmp


@pytest.mark.parametrize(
    ("kind", "roles", "inside"),
    [
        ("mixtral", ("w1", "w2", "w3"), "block_sparse_moe"),
        ("qwen3_moe", ("gate_proj", "up_proj", "down_proj"), "mlp"),
    ],
)
def test_single_experts(tmp_path: Path, kind: str, roles: tuple[str, ...], inside: str) -> None:
    """PEFT turns such an adapter into one of the stacks when it loads it."""
    made, base = saved(tmp_path, kind)
    adapter = single_experts(tmp_path / "adapter", kind, roles, inside)
    pico.merged(base, adapter, tmp_path / "out")
    live = peft.PeftModel.from_pretrained(made, adapter).eval()
    assert pico.relative(pico.logits(pico.reload(tmp_path / "out")), pico.logits(live)) < FP32


def test_rslora_on_single_experts_is_right_where_peft_is_not(tmp_path: Path) -> None:
    """PEFT doubles r and alpha for the stack of w1 and w3: right for alpha / r only.

    alpha / sqrt(r) changes.
    """
    made, base = saved(tmp_path, "mixtral")
    adapter = single_experts(tmp_path / "adapter", "mixtral", ("w1", "w2", "w3"), "block_sparse_moe", use_rslora=True)
    plan, _, _ = pico.merged(base, adapter, tmp_path / "out")
    assert any("sqrt(2)" in w for w in plan.warnings)
    before, after, t = Checkpoint(base), Checkpoint(tmp_path / "out"), load_file(adapter / peft_directory.WEIGHTS)
    module = "model.layers.1.block_sparse_moe.experts.2"
    for role in ("w1", "w2", "w3"):
        a, b = (t[f"base_model.model.{module}.{role}.lora_{x}.weight"].double() for x in "AB")
        exact = before.read(f"{module}.{role}.weight").double() + 5 / math.sqrt(3) * b @ a
        assert torch.allclose(after.read(f"{module}.{role}.weight").double(), exact, rtol=0, atol=1e-6)
    stack = peft.PeftModel.from_pretrained(made, adapter).base_model.model.model.layers[1].mlp.experts.base_layer
    theirs = stack.get_delta_weight("default")[2].double()
    a, b = (t[f"base_model.model.{module}.w1.lora_{x}.weight"].double() for x in "AB")
    ratio = theirs[:48].norm() / (5 / math.sqrt(3) * b @ a).norm()
    assert float(ratio) == pytest.approx(math.sqrt(2), rel=1e-4), "fixed in PEFT? Then the warning can go"


# What is not proven is refused ---------------------------------------------------------------------------------------


def refused(tmp: Path, *, kind: str = "mixtral", model: dict[str, Any] | None = None, **changes: Any) -> str:
    made, base = saved(tmp, kind, **(model or {}))
    pico.train(made, tmp / "adapter", target_modules=[], target_parameters=STACKS)
    tensors = changes.pop("tensors", None)
    pico.edit_adapter(tmp / "adapter", **changes)
    if tensors:
        pico.edit_tensors(tmp / "adapter" / peft_directory.WEIGHTS, **tensors)
    with pytest.raises(InputError) as caught:
        prepare.plan_merge(base, peft_directory.load(tmp / "adapter"), None, trust_remote_code=False)
    return str(caught.value)


E = "base_model.model.model.layers.0.mlp.experts"


@pytest.mark.parametrize("version", [None, "0.17.1", "0.22.0", "1.0", "main"])
def test_an_unknown_peft_version(tmp_path: Path, version: str | None) -> None:
    message = refused(tmp_path, peft_version=version)
    assert "its layout is known for 0.18 to 0.21 only" in message
    assert (version or "not recorded") in message


def test_a_version_whose_layout_the_shapes_contradict(tmp_path: Path) -> None:
    message = refused(tmp_path, peft_version="0.18.0")
    assert "fits none of the base's target_parameters as PEFT 0.18.0 lays them out" in message
    assert "its layout is not proven" in message


def test_half_a_pair(tmp_path: Path) -> None:
    assert "has lora_A; expected lora_A and lora_B alone" in refused(
        tmp_path, tensors={"drop": [f"{E}.base_layer.lora_B.weight"]}
    )


def test_a_pair_that_does_not_multiply(tmp_path: Path) -> None:
    message = refused(tmp_path, tensors={"change": {f"{E}.lora_B.weight": lambda t: t[:, :3]}})
    assert "model.layers.0.mlp.experts: lora_A (16, 48) and lora_B (64, 3) do not multiply" in message


def test_two_pairs_for_one_parameter(tmp_path: Path) -> None:
    """Two pairs of one shape at both nestings: the file does not say which is the stack's."""
    made, base = saved(tmp_path, "mixtral")
    pico.train(made, tmp_path / "adapter", target_modules=[], target_parameters=STACKS[1:])
    file = tmp_path / "adapter" / peft_directory.WEIGHTS
    copies = {k.replace("experts.", "experts.base_layer."): v.clone() for k, v in load_file(file).items()}
    pico.edit_tensors(file, add=copies)
    with pytest.raises(
        InputError, match=r"two pairs of model\.layers\.0\.mlp\.experts fit .*down_proj: which is which"
    ):
        prepare.plan_merge(base, peft_directory.load(tmp_path / "adapter"), None, trust_remote_code=False)


def test_another_number_of_experts(tmp_path: Path) -> None:
    made, _ = saved(tmp_path, "mixtral")
    pico.train(made, tmp_path / "adapter", target_modules=[], target_parameters=STACKS)
    _, other = saved(tmp_path / "other", "mixtral", num_local_experts=8)
    with pytest.raises(InputError, match=r"fits none of the base's target_parameters.*\(8, 96, 64\)"):
        prepare.plan_merge(other, peft_directory.load(tmp_path / "adapter"), None, trust_remote_code=False)


def test_a_base_without_experts(tmp_path: Path) -> None:
    made, _ = saved(tmp_path, "mixtral")
    pico.train(made, tmp_path / "adapter", target_modules=[], target_parameters=STACKS)
    dense = pico.save(pico.model(), tmp_path / "dense")
    with pytest.raises(InputError, match="no stacked parameter of that module"):
        prepare.plan_merge(dense, peft_directory.load(tmp_path / "adapter"), None, trust_remote_code=False)


def test_a_second_wrapper_without_target_parameters(tmp_path: Path) -> None:
    pico.train(pico.model(), tmp_path / "adapter")
    key = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.lora_A.weight"
    pico.edit_tensors(tmp_path / "adapter" / peft_directory.WEIGHTS, add={key: torch.ones(4, 64)})
    with pytest.raises(InputError, match="is wrapped twice, but target_parameters is not set"):
        peft_directory.load(tmp_path / "adapter")
