"""Matrices that a file holds as one and a class as several: qkv of towers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import pico, tiny
from helpers.merging import FP32, ledger
from safetensors.torch import load_file

from requant.checkpoint.reader import Checkpoint
from requant.errors import InputError
from requant.evaluate import streamed, variant_weights, variants
from requant.merge.base_weights import Nf4Settings
from requant.modeling import cut_linears, joined_parts, skeleton
from requant.numerics import nf4

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = [
    "qianfan_ocr",
    "kimi_k25",
    "mistral_large4",
]  # cut in three; also reordered for the rotary embedding; that alone
CPU = torch.device("cpu")


def saved(kind: str, tmp: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Path]:
    made = tiny.model(kind)
    return made, pico.save(made, tmp / "base", dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_the_skeleton_has_the_files_matrix_and_the_classs_modules(tmp_path: Path, kind: str) -> None:
    made, base = saved(kind, tmp_path)
    model: Any = skeleton.open_model(base)
    stored = Checkpoint(base)
    names = skeleton.tensor_names(model, stored)
    assert {n for n, _ in model.named_parameters()} == names.keys()
    assert set(names.values()) == {n for n in stored if n in names.values()}
    filled = variants.fill(model, stored, CPU, torch.float32)
    cuts = cut_linears.cuts(filled)
    assert cuts
    for name in cuts:
        theirs, ours = made.get_submodule(name), filled.get_submodule(name)
        assert torch.equal(ours.weight, theirs.weight)
        assert (ours.bias is None) == (theirs.bias is None)
        assert ours.bias is None or torch.equal(ours.bias, theirs.bias)
        assert (ours.in_features, ours.out_features) == (theirs.in_features, theirs.out_features)
        x = torch.randn(2, 5, theirs.in_features, generator=torch.Generator().manual_seed(1))
        assert pico.relative(ours(x), theirs(x)) < FP32


def test_the_joined_matrix_is_multiplied_by_once_for_all_its_parts(tmp_path: Path) -> None:
    _, base = saved("qianfan_ocr", tmp_path)
    model = variants.fill(skeleton.open_model(base), Checkpoint(base), CPU, torch.float32)
    joined, *_ = cut_linears.parts(model)
    parts = [model.get_submodule(n) for n, cut in cut_linears.cuts(model).items() if cut.joined == joined]
    calls: list[int] = []
    model.get_submodule(joined).register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(1, 3, parts[0].in_features)
    for part in parts:
        part(x)
    assert len(calls) == 1
    parts[1](x.clone())
    assert len(calls) == 2


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapters_on_a_linear_that_the_file_holds_in_parts(tmp_path: Path, options: dict[str, Any]) -> None:
    """MiniMax M3 multiplies by gate and up at once, its file holds them apart."""
    made, base = saved("minimax_m3_vl", tmp_path)
    model = variants.fill(skeleton.open_model(base), Checkpoint(base), CPU, torch.float32)
    joins = joined_parts.joined(model)
    assert joins
    for name in joins:
        theirs, ours = made.get_submodule(name), model.get_submodule(name)
        assert torch.equal(ours.weight, theirs.weight)
        x = torch.randn(2, theirs.in_features, generator=torch.Generator().manual_seed(1))
        assert pico.relative(ours(x), theirs(x)) < FP32
    pico.train(made, tmp_path / "adapter", target_modules=sorted(joins), **options)
    live = peft.PeftModel.from_pretrained(pico.reload(base), tmp_path / "adapter").merge_and_unload()
    plan, result, tested = pico.merged(base, tmp_path / "adapter", tmp_path / "out")
    assert tested.worst <= 1
    ledger(plan, result)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    merged, before = pico.reload(tmp_path / "out"), pico.reload(base)
    for name in joins:
        got, expected, old = (m.get_submodule(name).weight for m in (merged, live, before))
        assert pico.relative(got, expected) < FP32
        assert pico.relative(got, old) > 10 * FP32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["lora", "dora", "bias"])
def test_adapters_on_the_parts_are_merged_into_the_files_matrix(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    made, base = saved(kind, tmp_path)
    parts = sorted(cut_linears.cuts(skeleton.open_model(base)))
    if options.get("lora_bias") and made.get_submodule(parts[0]).bias is None:
        pytest.skip("no biases there")
    pico.train(made, tmp_path / "adapter", target_modules=parts, **options)
    live = peft.PeftModel.from_pretrained(pico.reload(base), tmp_path / "adapter").merge_and_unload()
    plan, result, tested = pico.merged(base, tmp_path / "adapter", tmp_path / "out")
    assert tested.worst <= 1
    ledger(plan, result)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    merged, before = pico.reload(tmp_path / "out"), pico.reload(base)
    for name in parts:
        for leaf in ("weight", *(["bias"] if options.get("lora_bias") else [])):
            got, expected = (getattr(m.get_submodule(name), leaf) for m in (merged, live))
            assert pico.relative(got, expected) < FP32
            assert pico.relative(got, getattr(before.get_submodule(name), leaf)) > 10 * FP32


@pytest.mark.parametrize("kind", [*KINDS, "minimax_m3_vl"])
def test_training_rounded_what_the_class_holds_as_one(tmp_path: Path, kind: str) -> None:
    """NF4 with nested scales, whose mean is that of all blocks of a weight: of q alone, in its own order of rows."""
    _, base = saved(kind, tmp_path, torch.bfloat16)
    model: Any = skeleton.open_model(base)
    settings = Nf4Settings(quant_type="nf4", double_quant=True)
    held = variant_weights.open_base(Checkpoint(base), model, settings)
    live = pico.reload(base)
    for parameter, name in skeleton.tensor_names(model, held.weights).items():
        if held.weights[name].four_bit:
            skeleton.place(model, {parameter: held.read(name)})
    names = [*cut_linears.cuts(model), *joined_parts.joined(model)]
    assert names
    for name in names:
        whole = live.get_submodule(name).weight.detach().to(torch.bfloat16)
        expected = nf4.round_trip(whole, "nf4", 64, double_quant=True)
        assert torch.equal(model.get_submodule(name).weight, expected)


def test_an_adapter_of_other_widths_is_refused(tmp_path: Path) -> None:
    made, base = saved("qianfan_ocr", tmp_path)
    parts = sorted(cut_linears.cuts(skeleton.open_model(base)))
    pico.train(made, tmp_path / "adapter", target_modules=parts[:1])
    b = next(n for n in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if "lora_B" in n)
    pico.edit_tensors(tmp_path / "adapter" / "adapter_model.safetensors", change={b: lambda t: torch.cat([t, t])})
    with pytest.raises(InputError, match=r"it changes a weight \[128, 64\], the base's part is \[64, 64\]"):
        pico.merged(base, tmp_path / "adapter", tmp_path / "out")


def test_base_and_adapter_run_block_by_block(tmp_path: Path) -> None:
    made, base = saved("kimi_k25", tmp_path)
    parts = sorted(cut_linears.cuts(skeleton.open_model(base)))
    live = pico.train(made, tmp_path / "adapter", target_modules=[*parts, "o_proj"])
    plan, _, _ = pico.merged(base, tmp_path / "adapter", tmp_path / "out")
    sources = variants.VariantSources(
        base=base, adapter=tmp_path / "adapter", merged=tmp_path / "out", gptq=base, plan=plan, sixteen_bit=True
    )
    walk = streamed.walk_of("adapter", sources, device=CPU, dtype=torch.float32)
    ids = pico.ids()
    model = streamed.StreamedModel(walk)
    assert pico.relative(model(input_ids=ids).logits, pico.logits(live, ids)) < FP32
