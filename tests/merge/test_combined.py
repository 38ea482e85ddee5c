"""Several adapters with weights: the sum of their deltas, against PEFT with all active."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import oracle, pico
from helpers.merging import FP32, NAME, Q
from safetensors.torch import load_file, save_file

from requant.adapters import peft_directory
from requant.checkpoint.reader import Checkpoint
from requant.errors import InputError
from requant.evaluate import peft_runtime
from requant.merge.deltas import deltas
from requant.merge.no_change import refuse_no_change
from requant.run import prepare

pytestmark = pytest.mark.filterwarnings("ignore")


def two(tmp: Path, one: dict[str, Any] | None = None, other: dict[str, Any] | None = None) -> tuple[Path, list[Path]]:
    """A base and two adapters on it, of other ranks, alphas and targets."""
    base = pico.save(pico.model(), tmp / "base")
    options = [
        {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]} | (one or {}),
        {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "use_rslora": True} | (other or {}),
    ]
    for i, lora in enumerate(options):
        pico.train(pico.model(), tmp / f"a{i}", seed=11 + i, **lora)
    return base, [tmp / "a0", tmp / "a1"]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4), (1.0, 2.5)])
def test_the_sum_of_the_deltas(tmp_path: Path, weights: tuple[float, float]) -> None:
    """As PEFT's unmerged forward with both active, each scaled.

    Its add_weighted_adapter would mix A of one with B of another.
    """
    base, paths = two(tmp_path)
    plan, result, tested = pico.merged(base, list(zip(paths, weights, strict=True)), tmp_path / "out")
    live = peft_runtime.attach(pico.model(), plan).eval()
    expected = pico.logits(live)
    assert tested.worst <= 1
    assert pico.relative(pico.logits(pico.reload(tmp_path / "out")), expected) < FP32
    assert result.ledger["adapter"]["consumed"] == sum(len(load_file(p / peft_directory.WEIGHTS)) for p in paths)
    with live.disable_adapter():
        assert pico.relative(pico.logits(live), pico.logits(pico.model())) < FP32


def test_the_formula(tmp_path: Path) -> None:
    base, paths = two(tmp_path)
    plan, _, _ = pico.merged(base, [(paths[0], 0.5), (paths[1], 3.0)], tmp_path / "out")
    one, other = (load_file(p / peft_directory.WEIGHTS) for p in paths)
    exact = oracle.fold(Checkpoint(base).read(NAME), one[f"{Q}.lora_A.weight"], one[f"{Q}.lora_B.weight"], 0.5 * 6 / 4)
    exact = oracle.fold(exact, other[f"{Q}.lora_A.weight"], other[f"{Q}.lora_B.weight"], 3.0 * 5 / 2**0.5)
    assert torch.allclose(Checkpoint(tmp_path / "out").read(NAME).double(), exact, rtol=0, atol=1e-6)
    delta = deltas(plan)(NAME)
    assert delta is not None
    whole = delta.left.double() @ delta.right.double() if delta.right is not None else delta.left.double()
    assert torch.allclose(whole, exact - Checkpoint(base).read(NAME).double(), rtol=0, atol=1e-6)


def test_one_adapter_with_a_weight(tmp_path: Path) -> None:
    """Half an adapter is PEFT's with half its scale."""
    base, paths = two(tmp_path)
    plan, _, _ = pico.merged(base, [(paths[0], 0.5)], tmp_path / "out")
    live = peft.PeftModel.from_pretrained(pico.model(), paths[0]).eval()
    for module in live.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("default", 0.5)
    assert pico.relative(pico.logits(pico.reload(tmp_path / "out")), pico.logits(live)) < FP32
    attached = pico.logits(peft_runtime.attach(pico.model(), plan).eval())
    assert pico.relative(attached, pico.logits(live)) < 1e-6


def test_cancelling_weights_leave_the_base(tmp_path: Path) -> None:
    """w and -w of the same adapter: the base again, up to fp32 sums."""
    base, paths = two(tmp_path)
    pico.merged(base, [(paths[0], 1.0), (paths[0], -1.0)], tmp_path / "out")
    assert pico.relative(pico.logits(pico.reload(tmp_path / "out")), pico.logits(pico.model())) < FP32


@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.3, -0.1, -0.2), (1e-3, -1e-3)], ids=str)
def test_deltas_that_cancel_each_other_out_are_refused(tmp_path: Path, weights: tuple[float, ...]) -> None:
    """Also where the weights' sum is no exact zero in fp64."""
    base, paths = two(tmp_path)
    plan = pico.planned(base, [(paths[0], w) for w in weights])
    assert all(deltas(plan)(op.name) is None for op in plan.ops)
    with pytest.raises(InputError, match=r"together these adapters change nothing: .* cancel each other out") as caught:
        refuse_no_change(plan)
    assert str(paths[0]) in str(caught.value)


def test_a_small_difference_is_a_delta(tmp_path: Path) -> None:
    """A hundred thousandth of the parts is kept, with its own norm."""
    base, paths = two(tmp_path)
    plan = pico.planned(base, [(paths[0], 1.0), (paths[0], -1.0 + 1e-5)])
    refuse_no_change(plan)
    alone, both = (deltas(p)(NAME) for p in (pico.planned(base, [(paths[0], 1e-5)]), plan))
    assert alone is not None
    assert both is not None
    assert float(both.dense().norm() / alone.dense().norm()) == pytest.approx(1, abs=0.05)


def test_only_the_modules_that_cancel_have_no_delta(tmp_path: Path) -> None:
    """The second adapter has one module of the first, negated."""
    base, paths = two(tmp_path)
    twin = tmp_path / "twin"
    shutil.copytree(paths[0], twin)
    tensors = load_file(twin / peft_directory.WEIGHTS)
    changed = {
        n: -v if "lora_B" in n and Q in n else torch.zeros_like(v) if "lora_B" in n else v for n, v in tensors.items()
    }
    save_file(changed, twin / peft_directory.WEIGHTS)
    plan = pico.planned(base, [(paths[0], 1.0), (twin, 1.0)])
    refuse_no_change(plan)
    of = deltas(plan)
    assert of(NAME) is None
    assert sum(of(op.name) is not None for op in plan.ops) == len({n.rpartition(".lora_")[0] for n in tensors}) - 1


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"use_dora": True, "target_modules": ["q_proj"]}, "is DoRA: its norms depend on the other adapters"),
        ({"modules_to_save": ["lm_head"]}, "replaces lm_head.weight of the base"),
        ({"target_modules": ["v_proj"], "trainable_token_indices": [1]}, "has trained tokens, which replace rows"),
    ],
)
@pytest.mark.parametrize("alone", [False, True])
def test_what_does_not_add_up(tmp_path: Path, other: dict[str, Any], says: str, alone: bool) -> None:
    base, paths = two(tmp_path, other=other)
    chosen = [(paths[1], 0.5)] if alone else [(paths[0], 1.0), (paths[1], 1.0)]
    with pytest.raises(InputError) as caught:
        pico.merged(base, chosen, tmp_path / "out")
    assert says in str(caught.value)
    assert str(paths[1]) in str(caught.value)
    assert "only plain LoRA can be weighted or added to another" in str(caught.value)


def test_another_kind_does_not_add_up(tmp_path: Path) -> None:
    base, paths = two(tmp_path)
    pico.train(pico.model(), tmp_path / "ia3", config=peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    loaded = [peft_directory.load(paths[0]), peft_directory.load(tmp_path / "ia3")]
    with pytest.raises(InputError, match="this adapter is IA3; only plain LoRA"):
        prepare.plan_merge(base, loaded, None, trust_remote_code=False)
