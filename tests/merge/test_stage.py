"""`requant.merge`: decode, fold, self-test, reload, against PEFT and bitsandbytes in fp32."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from helpers import oracle, pico
from helpers.e2e import edit_json
from helpers.merging import FP32, NAME, Q, ledger
from helpers.ranks import Turns
from safetensors.torch import load_file

from requant import merge
from requant.adapters import peft_directory
from requant.checkpoint.reader import Checkpoint
from requant.errors import InputError, StageError
from requant.merge import stage
from requant.merge.base_weights import Nf4Settings
from requant.merge.plan import MergePlan
from requant.merge.stored_dtype import choose_dtype
from requant.numerics.finite import largest_magnitude
from requant.run import prepare

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def check(tmp: Path, kind: str = "llama", model: dict[str, Any] | None = None, **lora: Any) -> Any:
    """Merge one adapter onto an fp32 base; the reloaded model gives PEFT's unmerged logits."""
    made = pico.model(kind, **(model or {}))
    base = pico.save(made, tmp / "base")
    plain = pico.logits(made)
    live = pico.train(made, tmp / "adapter", **lora)
    expected = pico.logits(live)
    assert pico.relative(plain, expected) > 100 * FP32, "the adapter must matter"
    plan, result, tested = pico.merged(base, tmp / "adapter", tmp / "out")
    assert tested.worst <= 1
    got = pico.reload(tmp / "out")
    assert pico.relative(pico.logits(got), expected) < FP32
    ledger(plan, result)
    return plan, result, got


PLAIN: dict[str, dict[str, Any]] = {
    "lora": {},
    "all linears": {"target_modules": ALL},
    "rslora": {"use_rslora": True, "r": 8},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "rsdora": {"use_dora": True, "use_rslora": True},
    "rank pattern": {
        "target_modules": ALL, "rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\.down_proj": 2},
        "alpha_pattern": {"down_proj": 3},
    },
    "first pattern wins": {
        "rank_pattern": {r".*\.q_proj": 6, "q_proj": 3},
        "alpha_pattern": {r"0\.self_attn\.v_proj": 11, "v_proj": 5},
    },
    "pattern with rslora": {"use_rslora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"v_proj": 5}},
    "layers": {"layers_to_transform": [1]},
    "regex target": {"target_modules": r".*layers\.0.*(q|up)_proj"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved embedding": {"modules_to_save": ["embed_tokens"]},
    "saved both": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "saved norm": {"modules_to_save": ["input_layernorm"]},
    "gaussian": {"init_lora_weights": "gaussian"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("lora", PLAIN.values(), ids=PLAIN.keys())
@pytest.mark.filterwarnings("ignore")
def test_llama(tmp_path: Path, lora: dict[str, Any]) -> None:
    plan, result, _ = check(tmp_path, **lora)
    assert not plan.untied
    assert not result.untrained


TIED: dict[str, tuple[dict[str, Any], bool]] = {
    "lora": ({}, False),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, True),
    "embedding": ({"target_modules": ["embed_tokens", "v_proj"]}, True),
    "saved head": ({"modules_to_save": ["lm_head"]}, True),
    "saved embedding": ({"modules_to_save": ["embed_tokens"]}, True),
    "saved both": ({"modules_to_save": ["lm_head", "embed_tokens"]}, True),
    "tied on purpose": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False),
    "tied lora on purpose": ({"target_modules": ["embed_tokens", "v_proj"], "ensure_weight_tying": True}, False),
}


@pytest.mark.slow
@pytest.mark.parametrize(("lora", "untied"), TIED.values(), ids=TIED.keys())
@pytest.mark.filterwarnings("ignore")
def test_tied_llama(tmp_path: Path, lora: dict[str, Any], untied: bool) -> None:
    """Once the two ends differ, both are written and the config says so; else one tensor."""
    plan, _, got = check(tmp_path, model={"tie_word_embeddings": True}, **lora)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert plan.untied == untied
    assert config["tie_word_embeddings"] != untied
    assert ("lm_head.weight" in Checkpoint(tmp_path / "out")) == untied
    assert torch.equal(got.lm_head.weight, got.model.embed_tokens.weight) != untied


@pytest.mark.filterwarnings("ignore")
def test_a_redundant_copy_of_a_tied_head_follows(tmp_path: Path) -> None:
    """Some repositories store lm_head.weight although it is tied: it must not keep old values."""
    made = pico.model(tie_word_embeddings=True)
    base = pico.save(made, tmp_path / "base")
    pico.edit_tensors(base / "model.safetensors", add={"lm_head.weight": made.lm_head.weight.detach().clone()})
    live = pico.train(made, tmp_path / "adapter")
    plan, _, tested = pico.merged(base, tmp_path / "adapter", tmp_path / "out")
    assert tested.worst <= 1
    assert not plan.untied
    got = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert pico.relative(pico.logits(got), pico.logits(live)) < FP32


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_biases(tmp_path: Path, bias: str, lora_bias: bool) -> None:
    """q, k and v have biases (Qwen2). `lora_bias` is scaled like the delta.

    PEFT merges it unscaled on 4 bits.
    """
    lora: dict[str, Any] = {"bias": "none", "lora_bias": True} if lora_bias else {"bias": bias}
    plan, _, _ = check(tmp_path, "qwen2", r=4, lora_alpha=10, **lora)
    changed = [op.name for op in plan.ops if op.name.endswith(".bias") and op.action != "copied"]
    assert len(changed) == (4 if lora_bias or bias == "lora_only" else 6)


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["c_attn", "c_proj", "c_fc"]},
        {"target_modules": ["c_attn"], "use_dora": True},
        {"target_modules": ["c_attn"], "bias": "lora_only"},
        {"target_modules": ["c_fc"], "lora_bias": True},
        {"target_modules": ["wte"]},
    ],
    ids=["lora", "dora", "bias", "lora_bias", "embedding"],
)
@pytest.mark.filterwarnings("ignore")
def test_gpt2_conv1d(tmp_path: Path, lora: dict[str, Any]) -> None:
    """Conv1D holds [in, out], so the delta is transposed; names lack the model's prefix."""
    check(tmp_path, "gpt2", fan_in_fan_out=lora["target_modules"] != ["wte"], **lora)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("gpt_neox", ["query_key_value", "dense"]),
        ("opt", ["q_proj", "fc1"]),
        ("gemma2", ["q_proj", "up_proj"]),
        ("qwen3", ["q_proj", "down_proj"]),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_other_architectures(tmp_path: Path, kind: str, targets: list[str]) -> None:
    check(tmp_path, kind, target_modules=targets)


@pytest.mark.filterwarnings("ignore")
def test_resized_vocabulary(tmp_path: Path) -> None:
    """An adapter trained with added tokens brings both ends whole; the config follows."""
    made = pico.model()
    base = pico.save(made, tmp_path / "base")
    made.resize_token_embeddings(pico.VOCABULARY + 8, mean_resizing=False)
    live = pico.train(made, tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"])
    plan, _, _ = pico.merged(base, tmp_path / "adapter", tmp_path / "out")
    tokens = pico.ids() + 8
    assert pico.relative(pico.logits(pico.reload(tmp_path / "out"), tokens), pico.logits(live, tokens)) < FP32
    assert plan.vocab_size == pico.VOCABULARY + 8


# 4-bit bases ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.filterwarnings("ignore")
def test_prequantized_base(tmp_path: Path, quant_type: str, nested: bool, storage: torch.dtype) -> None:
    """The live QLoRA model, computing in fp32, is what the merge must reproduce."""
    made = pico.model()
    source = pico.save(made, tmp_path / "source", torch.bfloat16)
    base = pico.save_4bit(
        source,
        tmp_path / "base",
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_quant_storage=storage,
    )
    pico.train(made, tmp_path / "adapter", target_modules=ALL)
    live = pico.live_4bit(transformers.AutoModelForCausalLM.from_pretrained(base, device_map={"": "cpu"}))
    live = peft.PeftModel.from_pretrained(live, tmp_path / "adapter").eval()
    plan, result, tested = pico.merged(base, tmp_path / "adapter", tmp_path / "out")
    assert pico.relative(pico.logits(pico.reload(tmp_path / "out")), pico.logits(live)) < FP32
    assert plan.base.packed
    assert (tested.tensors, tested.worst <= 1) == (14, True)
    assert result.ledger["base"]["decoded+folded"] == 14
    assert result.ledger["base"]["dropped"] == 14 * (5 if nested else 3)
    assert sum(result.ledger["base"].values()) == len(Checkpoint(base))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config


@pytest.mark.filterwarnings("ignore")
def test_prequantized_dora_and_partial_targets(tmp_path: Path) -> None:
    """Norms are of the dequantized weight; modules without an adapter are decoded too."""
    made = pico.model()
    source = pico.save(made, tmp_path / "source", torch.bfloat16)
    base = pico.save_4bit(source, tmp_path / "base", bnb_4bit_quant_type="nf4")
    pico.train(made, tmp_path / "adapter", use_dora=True, modules_to_save=["lm_head"])
    live = pico.live_4bit(transformers.AutoModelForCausalLM.from_pretrained(base, device_map={"": "cpu"}))
    live = peft.PeftModel.from_pretrained(live, tmp_path / "adapter").eval()
    _, result, _ = pico.merged(base, tmp_path / "adapter", tmp_path / "out")
    assert pico.relative(pico.logits(pico.reload(tmp_path / "out")), pico.logits(live)) < FP32
    assert result.ledger["base"] == {"copied": 6, "decoded": 10, "decoded+folded": 4, "replaced": 1, "dropped": 42}


@pytest.mark.filterwarnings("ignore")
def test_prequantized_gpt2(tmp_path: Path) -> None:
    """4-bit Conv1D weights are [out, in], 16-bit ones [in, out]. Rectangular layers too."""
    made = pico.model("gpt2")
    source = pico.save(made, tmp_path / "source", torch.bfloat16)
    base = pico.save_4bit(source, tmp_path / "base", bnb_4bit_quant_type="nf4")
    pico.train(made, tmp_path / "adapter", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    live = pico.live_4bit(transformers.AutoModelForCausalLM.from_pretrained(base, device_map={"": "cpu"}))
    live = peft.PeftModel.from_pretrained(live, tmp_path / "adapter").eval()
    pico.merged(base, tmp_path / "adapter", tmp_path / "out")
    assert pico.relative(pico.logits(pico.reload(tmp_path / "out")), pico.logits(live)) < FP32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "skip"),
    [
        ("llama", {"bnb_4bit_quant_type": "nf4"}, ()),
        ("llama", {"bnb_4bit_quant_type": "nf4"}, ("lm_head", "down_proj")),
        ("qwen2", {"bnb_4bit_quant_type": "nf4"}, ()),
        ("opt", {"bnb_4bit_quant_type": "nf4"}, ()),
        ("gpt_neox", {"bnb_4bit_quant_type": "nf4"}, ()),
        ("gpt2", {"bnb_4bit_quant_type": "nf4"}, ()),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_base_quantized_on_the_fly(tmp_path: Path, kind: str, options: dict[str, Any], skip: tuple[str, ...]) -> None:
    """A 16-bit base that training saw through load_in_4bit, for every kind of module selection."""
    targets = {"gpt_neox": ["query_key_value"], "gpt2": ["c_attn"]}.get(kind, ["q_proj", "v_proj"])
    made = pico.model(kind)
    base = pico.save(made, tmp_path / "base", torch.bfloat16)
    live = pico.live_4bit(pico.quantize(base, llm_int8_skip_modules=list(skip) or None, **options))
    pico.train(made, tmp_path / "adapter", target_modules=targets, fan_in_fan_out=kind == "gpt2")
    live = peft.PeftModel.from_pretrained(live, tmp_path / "adapter").eval()
    simulate = Nf4Settings(quant_type=options["bnb_4bit_quant_type"], double_quant=False, skip=skip)
    plan, _, _ = pico.merged(base, tmp_path / "adapter", tmp_path / "out", simulate=simulate)
    from bitsandbytes.nn import Linear4bit

    packed = sum(isinstance(m, Linear4bit) for m in live.modules())
    assert sum(w.kind == "simulated" for w in plan.base.weights.values()) == packed
    assert pico.relative(pico.logits(pico.reload(tmp_path / "out")), pico.logits(live)) < FP32


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_fp4_on_the_fly(tmp_path: Path) -> None:
    """As a GPU rounds it: bitsandbytes' CPU code sends halves, of which 16-bit weights have many, another way."""
    made = pico.model()
    base = pico.save(made, tmp_path / "base", torch.bfloat16)
    live = pico.live_4bit(pico.quantize(base, bnb_4bit_quant_type="fp4"))
    pico.train(made, tmp_path / "adapter")
    live = peft.PeftModel.from_pretrained(live, tmp_path / "adapter").eval()
    simulate = Nf4Settings(quant_type="fp4", double_quant=False)
    pico.merged(base, tmp_path / "adapter", tmp_path / "out", simulate=simulate)
    assert pico.relative(pico.logits(pico.reload(tmp_path / "out")), pico.logits(live)) < 0.1


@pytest.mark.filterwarnings("ignore")
def test_double_quantization_on_the_fly(tmp_path: Path) -> None:
    """Nested scales agree except the few that bitsandbytes' CPU kernel rounds wrong (test_nf4).

    One step of the 8-bit map changes a block of 64 weights by about 1 %.
    """
    made = pico.model()
    base = pico.save(made, tmp_path / "base", torch.bfloat16)
    live = pico.live_4bit(pico.quantize(base, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True))
    pico.train(made, tmp_path / "adapter")
    live = peft.PeftModel.from_pretrained(live, tmp_path / "adapter").eval()
    pico.merged(base, tmp_path / "adapter", tmp_path / "out", simulate=Nf4Settings(quant_type="nf4", double_quant=True))
    assert pico.relative(pico.logits(pico.reload(tmp_path / "out")), pico.logits(live)) < 2e-3


# The arithmetic -----------------------------------------------------------------------------------------------


def small(tmp: Path, dtype: torch.dtype = torch.float32, **lora: Any) -> tuple[Path, Path]:
    """(base, adapter) directories of a pico Llama."""
    made = pico.model()
    base = pico.save(made, tmp / "base", dtype)
    pico.train(made, tmp / "adapter", **lora)
    return base, tmp / "adapter"


def plan_of(base: Path, adapter: Path, simulate: Nf4Settings | None = None) -> MergePlan:
    return prepare.plan_merge(base, peft_directory.load(adapter), simulate, trust_remote_code=False)[0]


@pytest.mark.parametrize("dora", [False, True])
def test_fold_is_the_formula(tmp_path: Path, dora: bool) -> None:
    base, adapter = small(tmp_path, use_dora=dora)
    loaded = peft_directory.load(adapter)
    weight = Checkpoint(base).read(NAME)
    t = load_file(adapter / peft_directory.WEIGHTS)
    magnitude = t[f"{Q}.lora_magnitude_vector"] if dora else None
    expected = oracle.fold(weight, t[f"{Q}.lora_A.weight"], t[f"{Q}.lora_B.weight"], 6 / 4, magnitude)
    fold = loaded.folds[NAME.removesuffix(".weight")]
    folded = weight.clone()
    assert fold.apply(folded)
    assert torch.allclose(folded.double(), expected, rtol=1e-5, atol=1e-7)
    assert float(folded.abs().max()) <= fold.bound(float(weight.abs().max()))


def test_a_zero_adapter_changes_no_bit(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    weights = adapter / peft_directory.WEIGHTS
    pico.edit_tensors(weights, change={n: torch.zeros_like for n in load_file(weights) if "lora_B" in n})
    fold = peft_directory.load(adapter).folds[NAME.removesuffix(".weight")]
    weight = Checkpoint(base).read(NAME)
    before = weight.clone()
    assert not fold.apply(weight)
    assert torch.equal(weight.view(torch.int32), before.view(torch.int32))


def test_one_rounding_at_the_end(tmp_path: Path) -> None:
    """fp16 output is the fp64 value rounded once: half a unit in the last place.

    And a little more for fp32 sums.
    """
    base, adapter = small(tmp_path, torch.float16)
    _, result, tested = pico.merged(base, adapter, tmp_path / "out", dtype="auto")
    assert (result.dtype, tested.worst <= 1) == ("float16", True)
    t = load_file(adapter / peft_directory.WEIGHTS)
    exact = oracle.fold(Checkpoint(base).read(NAME), t[f"{Q}.lora_A.weight"], t[f"{Q}.lora_B.weight"], 6 / 4)
    written = Checkpoint(tmp_path / "out").read(NAME).double()
    ulp = torch.maximum(exact.abs(), torch.tensor(2.0**-14)).log2().floor().exp2() * 2.0**-10
    assert bool(((written - exact).abs() <= 0.5001 * ulp + 1e-7).all())


def test_untouched_tensors_are_copied_bit_for_bit(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    plan, _, _ = pico.merged(base, adapter, tmp_path / "out")
    before, after = Checkpoint(base), Checkpoint(tmp_path / "out")
    copied = [op.name for op in plan.ops if op.action == "copied"]
    assert len(copied) == len(before) - 4
    assert all(torch.equal(before.read(n), after.read(n)) for n in copied)


def test_result_does_not_depend_on_shards(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    plan = plan_of(base, adapter)
    for name, size in (("one", 10**9), ("many", 40_000)):
        (tmp_path / name).mkdir()
        merge.merge(plan, tmp_path / name, dtype="bfloat16", max_shard=size)
    one, many = Checkpoint(tmp_path / "one"), Checkpoint(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert set(one) == set(many)
    assert all(torch.equal(one.read(n), many.read(n)) for n in one)


@pytest.mark.parametrize("count", [2, 3, 50])
def test_ranks_write_what_one_process_writes(tmp_path: Path, count: int) -> None:
    """Also more ranks than tensors, and shards that two ranks fill."""
    plan = plan_of(*small(tmp_path))
    alone = merge.merge(plan, tmp_path / "alone", dtype="bfloat16", max_shard=40_000)
    shared = merge.merge(plan, tmp_path / "shared", dtype="bfloat16", max_shard=40_000, ranks=Turns(count))
    files = {f.name: f.read_bytes() for f in (tmp_path / "alone").iterdir()}
    assert len([name for name in files if name.endswith(".safetensors")]) > 1
    assert {f.name: f.read_bytes() for f in (tmp_path / "shared").iterdir()} == files
    assert shared == alone


def test_a_rank_that_does_not_see_the_first_ones_files_says_so(tmp_path: Path) -> None:
    """Another disk under the same path, or a limit on open files: its tensors would be lost."""
    plan, ranks = replace(plan_of(*small(tmp_path)), stored=torch.bfloat16), Turns(2)
    (tmp_path / "out").mkdir()
    ranks.rank = 1
    with pytest.raises(StageError, match="rank 1 cannot open the files of the first rank"):
        stage.write_share(plan, tmp_path / "out", max_shard=40_000, device=torch.device("cpu"), ranks=ranks)


def test_every_tensor_has_one_rank(tmp_path: Path) -> None:
    """Shares are neighbours, and none has much more than its part of the bytes."""
    plan = plan_of(*small(tmp_path))
    size = {slot.name: slot.nbytes for slot in plan.slots(plan.stored)}
    ranks, shares = Turns(3), []
    for ranks.rank in range(3):
        shares.append(stage.own_ops(plan, ranks))
    assert sum(shares, ()) == plan.ops
    total = sum(size.values())
    assert max(sum(size[op.name] for op in share) for share in shares) < total / 3 + max(size.values())


def test_a_rank_that_adds_nothing_does_not_hide_an_untrained_adapter(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    weights = adapter / peft_directory.WEIGHTS
    pico.edit_tensors(weights, change={n: torch.zeros_like for n in load_file(weights) if "lora_B" in n})
    with pytest.raises(StageError, match="every LoRA delta is exactly zero"):
        merge.merge(plan_of(base, adapter), tmp_path / "out", dtype="float32", ranks=Turns(2))


def test_progress_counts_every_tensor(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    plan, seen = plan_of(base, adapter), []
    (tmp_path / "out").mkdir()
    merge.merge(plan, tmp_path / "out", dtype="float16", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, len(plan.ops)) for i in range(len(plan.ops))]


# What must fail ---------------------------------------------------------------------------------------------------


def no_plan(base: Path, adapter: Path, simulate: Nf4Settings | None = None) -> str:
    with pytest.raises(InputError) as caught:
        plan_of(base, adapter, simulate)
    return str(caught.value)


def no_merge(base: Path, adapter: Path, dtype: Any = "float32") -> str:
    plan = plan_of(base, adapter)
    (base.parent / "out").mkdir()
    with pytest.raises(StageError) as caught:
        merge.merge(plan, base.parent / "out", dtype=dtype)
    return str(caught.value)


def test_a_half_matched_adapter_fails(tmp_path: Path) -> None:
    _, adapter = small(tmp_path)
    shallow = pico.save(pico.model(num_hidden_layers=1), tmp_path / "shallow")
    message = no_plan(shallow, adapter)
    assert "2 of 4 adapted tensors do not exist in the base" in message
    assert "model.layers.1.self_attn.q_proj.weight" in message
    assert "model.layers.0" in message
    assert message.endswith("Is this the adapter's base?")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="org/deeper")
    assert no_plan(shallow, adapter).endswith("Is this the adapter's base? adapter_config.json names org/deeper")
    wide = pico.save(pico.model(hidden_size=96, num_attention_heads=6), tmp_path / "wide")
    assert no_plan(wide, adapter).endswith("belongs to another base. adapter_config.json names org/deeper")


def test_wrong_shapes_fail(tmp_path: Path) -> None:
    _, adapter = small(tmp_path)
    wide = pico.save(pico.model(hidden_size=96, num_attention_heads=6), tmp_path / "wide")
    message = no_plan(wide, adapter)
    assert "(64, 64)" in message
    assert "another base" in message


def test_a_replaced_tensor_of_another_shape_fails(tmp_path: Path) -> None:
    base, adapter = small(tmp_path, modules_to_save=["lm_head"])
    name = "base_model.model.lm_head.weight"
    pico.edit_tensors(adapter / peft_directory.WEIGHTS, change={name: lambda t: t[:, :32]})
    assert "lm_head.weight has shape (96, 32), the base's is (96, 64)" in no_plan(base, adapter)


def test_all_zero_b_fails(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    weights = adapter / peft_directory.WEIGHTS
    pico.edit_tensors(weights, change={n: torch.zeros_like for n in load_file(weights) if "lora_B" in n})
    assert "every LoRA delta is exactly zero: this adapter was never trained" in no_merge(base, adapter)


def test_some_zero_b_is_reported(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    pico.edit_tensors(adapter / peft_directory.WEIGHTS, change={f"{Q}.lora_B.weight": torch.zeros_like})
    _, result, _ = pico.merged(base, adapter, tmp_path / "out")
    assert result.untrained == ["model.layers.0.self_attn.q_proj"]


def test_nan_in_the_base_fails(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)

    def spoil(t: torch.Tensor) -> torch.Tensor:
        t[3, 5] = float("nan")
        return t

    pico.edit_tensors(base / "model.safetensors", change={NAME: spoil})
    assert f"{NAME}: NaN or infinity in the adapter or base weights" in no_merge(base, adapter)


def test_nan_in_the_adapter_fails(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    pico.edit_tensors(adapter / peft_directory.WEIGHTS, change={f"{Q}.lora_B.weight": lambda t: t * float("inf")})
    assert f"{NAME}: NaN or infinity" in no_merge(base, adapter, "auto")


def test_fp16_overflow_fails_and_auto_avoids_it(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    pico.edit_tensors(base / "model.safetensors", change={NAME: lambda t: t * 1e6})
    message = no_merge(base, adapter, "float16")
    assert NAME in message
    assert "overflows float16: set merge.dtype to bfloat16 or auto" in message
    edit_json(base / "config.json", dtype="float16")
    chosen, why = choose_dtype(plan_of(base, adapter), "auto")
    assert chosen == "bfloat16"
    assert NAME in why
    assert "65504" in why


def four_bit(tmp: Path, **options: Any) -> tuple[Path, Path]:
    made = pico.model()
    source = pico.save(made, tmp / "source", torch.bfloat16)
    base = pico.save_4bit(source, tmp / "base", bnb_4bit_quant_type="nf4", **options)
    pico.train(made, tmp / "adapter")
    return base, tmp / "adapter"


@pytest.mark.parametrize("part", [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"])
@pytest.mark.filterwarnings("ignore")
def test_a_missing_part_of_a_packed_weight_fails(tmp_path: Path, part: str) -> None:
    base, adapter = four_bit(tmp_path, bnb_4bit_use_double_quant=True)
    pico.edit_tensors(base / "model.safetensors", drop=[NAME + part])
    message = no_plan(base, adapter)
    assert f"{NAME} is 4-bit but {NAME}{part} is missing: the checkpoint is incomplete" in message


@pytest.mark.filterwarnings("ignore")
def test_a_missing_quant_state_fails(tmp_path: Path) -> None:
    base, adapter = four_bit(tmp_path)
    pico.edit_tensors(base / "model.safetensors", drop=[NAME + ".quant_state.bitsandbytes__nf4"])
    assert f"{NAME} is torch.uint8 but has no quant_state: not a bitsandbytes 4-bit weight" in no_plan(base, adapter)


@pytest.mark.filterwarnings("ignore")
def test_too_few_packed_bytes_fail(tmp_path: Path) -> None:
    base, adapter = four_bit(tmp_path)
    pico.edit_tensors(base / "model.safetensors", change={NAME: lambda t: t[:-1]})
    assert "2047 packed bytes, expected 2048" in no_plan(base, adapter)


@pytest.mark.parametrize(
    ("part", "change", "found", "wanted"),
    [
        ("absmax", lambda t: t[:-1], "torch.uint8 [63]", "uint8 [64]"),
        ("absmax", lambda t: t.float(), "torch.float32 [64]", "uint8 [64]"),
        ("quant_map", lambda t: t[None], "torch.float32 [1, 16]", "float32 [16]"),
        ("nested_absmax", lambda t: t[:0], "torch.float32 [0]", "float32 [1]"),
        ("nested_absmax", lambda t: t.int(), "torch.int32 [1]", "float32 [1]"),
        ("nested_absmax", lambda t: t.to(torch.float8_e4m3fn), "torch.float8_e4m3fn [1]", "float32 [1]"),
        ("nested_quant_map", lambda t: t[None], "torch.float32 [1, 256]", "float32 [256]"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_parts_that_contradict_the_quant_state_fail(
    tmp_path: Path, part: str, change: Callable[[torch.Tensor], torch.Tensor], found: str, wanted: str
) -> None:
    """Every part's shape and dtype is seen in the headers: [1, 256] levels were an IndexError while merging."""
    base, adapter = four_bit(tmp_path, bnb_4bit_use_double_quant=True)
    pico.edit_tensors(base / "model.safetensors", change={f"{NAME}.{part}": change})
    message = no_plan(base, adapter)
    assert f"model.safetensors: {NAME}.{part} is {found}, but {NAME}" in message
    assert f"needs {wanted}: " in message


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool])
@pytest.mark.filterwarnings("ignore")
def test_a_quant_state_of_another_dtype_fails(tmp_path: Path, dtype: torch.dtype) -> None:
    """The bytes are the same text: a dtype that numpy lacks was a TypeError."""
    base, adapter = four_bit(tmp_path)
    state = f"{NAME}.quant_state.bitsandbytes__nf4"
    pico.edit_tensors(base / "model.safetensors", change={state: lambda text: text.view(dtype)})
    assert f"model.safetensors: {state} is {dtype}, but a quant_state is text in uint8" in no_plan(base, adapter)


@pytest.mark.filterwarnings("ignore")
def test_a_foreign_code_table_fails(tmp_path: Path) -> None:
    base, adapter = four_bit(tmp_path)
    pico.edit_tensors(base / "model.safetensors", change={NAME + ".quant_map": lambda t: t * 1.01})
    assert "quant_map is not the nf4 table" in no_merge(base, adapter)


@pytest.mark.filterwarnings("ignore")
def test_settings_for_an_already_packed_base_fail(tmp_path: Path) -> None:
    base, adapter = four_bit(tmp_path)
    assert "already 4-bit on disk; remove base.nf4" in no_plan(
        base, adapter, Nf4Settings(quant_type="nf4", double_quant=False)
    )


def test_an_8_bit_base_fails(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    pico.edit_tensors(base / "model.safetensors", add={NAME.removesuffix("weight") + "SCB": torch.ones(64)})
    assert "8-bit bitsandbytes checkpoint" in no_plan(base, adapter)


def test_the_largest_magnitude() -> None:
    assert largest_magnitude(torch.tensor([1.0, -3.0, 2.0])) == 3.0
    assert largest_magnitude(torch.tensor([[1.0, 4.0], [-3.0, 2.0]], dtype=torch.float16)) == 4.0
    assert largest_magnitude(torch.tensor([-2.0])) == 2.0
    assert math.isnan(largest_magnitude(torch.tensor([1.0, math.nan])))
    assert largest_magnitude(torch.tensor([1.0, -math.inf])) == math.inf
