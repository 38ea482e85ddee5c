"""`requant.evaluate.expert_order_probe`: losses in both orders are those of PEFT's forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters.test_expert_layouts import KINDS, STACKS
from helpers import pico, tiny

from requant.adapters import peft_directory
from requant.evaluate import expert_order_probe
from requant.evaluate.adapter_probe import ProbeRow
from requant.evaluate.planned_merge import Device
from requant.evaluate.variants import VariantSources
from requant.run import prepare

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = {"one": tuple(pico.ids(3, 20, seed=1)), "two": (*pico.ids(2, 20, seed=2), *pico.ids(2, 31, seed=3))}
CPU = Device(torch.device("cpu"), torch.float32, 2)
RANK = 4


@torch.no_grad()
def loss(model: Any, source: str) -> float:
    sums = [float(model(input_ids=row[None], labels=row[None]).loss) * (len(row) - 1) for row in ROWS[source]]
    return sum(sums) / sum(len(row) - 1 for row in ROWS[source])


def whole(samples: Mapping[str, Sequence[torch.Tensor]]) -> dict[str, list[ProbeRow]]:
    return {name: [ProbeRow.whole(ids) for ids in rows] for name, rows in samples.items()}


def made(kind: str) -> Any:
    return pico.model(kind, **KINDS[kind]) if kind in KINDS else tiny.model(kind)


def adapters(tmp: Path, kind: str, **options: Any) -> tuple[Path, dict[str, Path]]:
    """(base, order -> an adapter that PEFT reads as the one in tmp/adapter is read in that order)."""
    model = made(kind)
    base = pico.save(model, tmp / "base")
    pico.train(model, tmp / "adapter", target_modules=["q_proj"], target_parameters=STACKS, scale=0.2, **options)
    pico.train(made(kind), tmp / "other", target_modules=["q_proj"], target_parameters=STACKS, scale=0.2, **options)

    def in_pefts_order(b: torch.Tensor) -> torch.Tensor:
        return b.reshape(len(b), -1, RANK).transpose(1, 2).reshape(b.shape)

    file = tmp / "other" / peft_directory.WEIGHTS
    names = [n for n in peft_directory.load(tmp / "other").tensors if "experts" in n and "lora_B" in n]
    pico.edit_tensors(file, change=dict.fromkeys(names, in_pefts_order))
    return base, {"peft": tmp / "adapter", "unsloth": tmp / "other"}


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "qwen3_5_moe_text", "qwen3_5_moe"])
def test_losses(tmp_path: Path, kind: str) -> None:
    base, folders = adapters(tmp_path, kind)
    plans: Any = {
        order: prepare.plan_merge(base, peft_directory.load(tmp_path / "adapter", expert_order=order))[0]
        for order in ("peft", "unsloth")
    }
    sources = VariantSources(
        base=base, adapter=tmp_path / "adapter", merged=base, gptq=base, plan=plans["peft"], sixteen_bit=True
    )
    facts = expert_order_probe.measure(plans, sources, whole(ROWS), CPU)
    assert [f["source"] for f in facts] == ["one", "two"]
    for found in facts:
        assert found["rows"] == len(ROWS[found["source"]])
        assert found["without"] == pytest.approx(loss(pico.reload(base), found["source"]), rel=1e-5)
        for order, folder in folders.items():
            live = peft.PeftModel.from_pretrained(pico.reload(base), folder).eval()
            expected = loss(live, found["source"])
            assert found["losses"][order] == pytest.approx(expected, rel=1e-5)  # type: ignore[index]
            assert found["without"] != pytest.approx(expected, rel=1e-5)
        apart = found["losses"]["unsloth"] - found["losses"]["peft"]
        assert found["difference"] == pytest.approx(apart, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("rows", "trained"), [(96, ["lm_head"]), (104, ["embed_tokens", "lm_head"])])
def test_a_head_that_is_untied_and_a_larger_vocabulary(tmp_path: Path, rows: int, trained: list[str]) -> None:
    """The merged model is built with them; the base has zeros for tokens that it lacks."""
    model = pico.model("qwen3_moe", **KINDS["qwen3_moe"], tie_word_embeddings=rows == 96)
    base = pico.save(model, tmp_path / "base")
    if rows != pico.VOCABULARY:
        model.resize_token_embeddings(rows, mean_resizing=False)
    live = pico.train(
        model, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=STACKS, modules_to_save=trained
    )
    loaded = {o: peft_directory.load(tmp_path / "adapter", expert_order=o) for o in ("peft", "unsloth")}  # type: ignore[arg-type]
    plans: Any = {order: prepare.plan_merge(base, adapter)[0] for order, adapter in loaded.items()}
    assert (plans["peft"].untied, plans["peft"].vocab_size) == ((True, None) if rows == 96 else (False, rows))
    sources = VariantSources(base=base, adapter=tmp_path / "adapter", merged=base, gptq=base, plan=plans["peft"])
    samples = {"new": (torch.tensor([5, 7, rows - 1, 9, rows - 2, 11, 3]),)}
    (found,) = expert_order_probe.measure(plans, sources, whole(samples), CPU)
    with torch.no_grad():
        expected = float(live(input_ids=samples["new"][0][None], labels=samples["new"][0][None]).loss)
    assert found["losses"]["peft"] == pytest.approx(expected, rel=1e-5)
    assert found["losses"]["unsloth"] != pytest.approx(expected, rel=1e-5)
