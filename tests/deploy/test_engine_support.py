"""`requant.deploy.engine_support`: verdicts on plans; the table against installed engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import families, pico, tiny
from helpers.e2e import recipe
from helpers.families import FAMILIES, Family

from requant.checkpoint.reader import Checkpoint
from requant.checkpoint.writer import Slot
from requant.deploy import engine_support, engine_targets, plan_traits
from requant.deploy.engine_classes import SGLANG, VLLM
from requant.errors import InputError
from requant.modeling import skeleton
from requant.numerics.grid import Grid
from requant.quantize.plan import Plan, Settings, plan
from requant.run import prepare
from requant.run.prepared import Prepared

LLAMA = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


def planned(kind: str = "llama", settings: Settings | None = None, **changes: Any) -> tuple[Plan, Any]:
    """The plan of a model that exists only as a config, under its checkpoint's names."""
    config = pico.config(kind, **changes)
    model: Any = skeleton.build(config)
    with torch.device("meta"):
        stored = transformers.AutoModelForCausalLM.from_config(config)
    from transformers.core_model_loading import revert_weight_conversion

    tensors = revert_weight_conversion(stored, stored.state_dict())
    slots = {n: Slot(n, torch.bfloat16, tuple(t.shape)) for n, t in tensors.items()}
    return plan(slots, model, settings or Settings(grid=Grid(4, 32)), torch.bfloat16, where=Path("here")), model


def verdict(
    name: engine_targets.Name, kind: str = "llama", settings: Settings | None = None, **changes: Any
) -> engine_support.Verdict:
    return engine_support.judge(*planned(kind, settings, **changes), engine_targets.TARGETS[name])


def test_which_kernel_on_which_hardware() -> None:
    """Machete: groups from 64 on, outputs in units of 128 (as fused); the rest is Marlin's."""
    settings = Settings(grid=Grid(4, 64))
    got = verdict("vllm", "llama", settings, **(LLAMA | {"head_dim": 48}))
    assert got.loads
    # a block: qkv 192 + 2 * 96 outputs, o_proj, gate_up, down; the 384 of qkv are 3 * 128
    assert got.kernels["Hopper"] == {"Machete": 8}
    assert got.kernels["other NVIDIA GPU"] == {"Marlin": 8}
    assert got.kernels["CPU"] == {"CPUWNA16": 8}
    assert str(got).startswith("loads; Hopper: Machete 8; ")
    narrow = verdict("vllm", "llama", settings, **(LLAMA | {"head_dim": 32, "num_key_value_heads": 1}))
    assert narrow.kernels["Hopper"] == {"Machete": 6, "Marlin": 2}, "qkv has 192 outputs"
    odd = verdict("vllm", "llama", settings, **(LLAMA | {"head_dim": 16, "num_key_value_heads": 1}))
    assert odd.kernels["Hopper"] == {"Machete": 6}, "k and v have 16 outputs: q stays in 16 bit with them"
    assert verdict("vllm", "llama", Settings(grid=Grid(4, 32)), **LLAMA).kernels["Hopper"] == {"Marlin": 8}


def test_8_bits_have_no_kernel_on_vllms_cpu() -> None:
    got = verdict("vllm", "llama", Settings(grid=Grid(8, 32)), **LLAMA)
    assert got.loads
    assert got.lacking == {"CPU": "model.layers.0.self_attn.qkv_proj: no 8-bit weights"}
    assert "not on CPU: model.layers.0.self_attn.qkv_proj: no 8-bit weights" in str(got)


@pytest.mark.parametrize(
    ("grid", "says"), [(Grid(3, 32), "no 3-bit weights"), (Grid(4, 32, symmetric=False), "no asymmetric weights")]
)
def test_what_vllm_refuses_and_others_load(grid: Grid, says: str) -> None:
    got = verdict("vllm", "llama", Settings(grid=grid), **LLAMA)
    assert not got.loads
    assert says in str(got)
    assert verdict("transformers", "llama", Settings(grid=grid), **LLAMA).loads
    sglang = verdict("sglang", "llama", Settings(grid=grid), **LLAMA)
    assert not sglang.loads, "its plain GPTQ kernel for GPUs is gone since 0.5.23"
    assert says in str(sglang)


def test_sglang_does_not_pad() -> None:
    got = verdict("sglang", "llama", Settings(grid=Grid(4, 64)), **(LLAMA | {"hidden_size": 192, "head_dim": 64}))
    assert got.lacking == {
        "NVIDIA GPU from Ampere on": "model.layers.0.self_attn.qkv_proj: its 192 inputs are no multiple of 128"
    }


def test_overrides() -> None:
    """Servers read them, transformers does not; parts that are fused must agree."""
    one = Settings(grid=Grid(4, 32), overrides=(("*.down_proj", {"bits": 8}),))
    assert verdict("vllm", "llama", one, **LLAMA).loads
    assert verdict("gptqmodel", "llama", one, **LLAMA).loads
    assert "ignores settings of single modules (model.layers.0.mlp.down_proj)" in str(
        verdict("transformers", "llama", one, **LLAMA)
    )
    uneven = Settings(grid=Grid(4, 32), overrides=(("*.k_proj", {"bits": 8}),))
    says = "the parts of model.layers.0.self_attn.qkv_proj differ in their settings"
    assert says in str(verdict("vllm", "llama", uneven, **LLAMA))
    assert says in str(verdict("sglang", "llama", uneven, **LLAMA))
    skipped = Settings(grid=Grid(4, 32), overrides=(("*.0.mlp.up_proj", None),))
    assert "the parts of model.layers.0.mlp.gate_up_proj differ" in str(verdict("vllm", "llama", skipped, **LLAMA))
    assert "mlp.up_proj stays in 16 bit in some blocks only" in str(verdict("transformers", "llama", skipped, **LLAMA))
    whole = Settings(grid=Grid(4, 32), overrides=(("*.o_proj", None),))
    assert verdict("transformers", "llama", whole, **LLAMA).loads


LLAMA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_key_value_heads": 40}
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}


def test_on_how_many_gpus_at_once() -> None:
    """down_proj is cut by its inputs: 13824 / 8 = 13.5 groups of 128, but 27 of 64."""
    g128, g64 = (Settings(grid=Grid(4, g)) for g in (128, 64))
    assert str(verdict("vllm", "llama", g128, **LLAMA_70B)).endswith("; tensor parallel 1, 2, 4, 8")
    got = verdict("vllm", "llama", g128, **LLAMA_13B)
    assert got.parallel[4] is None
    assert str(got).endswith(
        "; tensor parallel 1, 2, 4, not 8 (model.layers.0.mlp.down_proj: 1728 inputs each would cut a group of 128)"
    )
    assert str(verdict("vllm", "llama", g64, **LLAMA_13B)).endswith("; tensor parallel 1, 2, 4, 8")
    row = verdict("vllm", "llama", Settings(grid=Grid(4, -1)), **LLAMA_13B)
    assert row.parallel == {2: None, 4: None, 8: None}, "one scale a row: every GPU has it"
    assert verdict("transformers", "llama", g128, **LLAMA_13B).parallel == {}


def test_heads_are_not_cut() -> None:
    nine = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    got = verdict("vllm", "llama", Settings(grid=Grid(4, 64)), **nine)
    assert str(got).endswith("; tensor parallel 1, not 2 (9 attention heads)")
    odd = {"hidden_size": 768, "intermediate_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 3}
    assert verdict("vllm", "llama", Settings(grid=Grid(4, 64)), **odd).parallel[2] == "3 key heads"
    # Two key heads on four GPUs: each has one of them, and its own queries.
    shared = verdict("vllm", "llama", Settings(grid=Grid(4, 64)), **(LLAMA | {"num_attention_heads": 4}))
    assert shared.parallel[4] is None
    fused = verdict("vllm", "phi3", Settings(grid=Grid(4, 64)), **(LLAMA | {"num_attention_heads": 4}))
    assert fused.parallel[4] is None


def test_a_part_is_too_small_for_a_kernel() -> None:
    """SGLang's Marlin does not pad."""
    settings = Settings(grid=Grid(4, 64))
    got = verdict("sglang", "llama", settings, **LLAMA)
    assert got.parallel[4] == "model.layers.0.self_attn.o_proj: its 64 inputs are no multiple of 128"
    assert got.parallel[8] == "4 attention heads"
    alone = Settings(grid=Grid(4, 128))
    assert verdict("vllm", "llama", alone, **LLAMA).parallel[4] == (
        "model.layers.0.self_attn.o_proj: 64 inputs each would cut a group of 128"
    )


def test_experts_are_cut_inside() -> None:
    """vLLM halves groups of experts down to 32 before it gives up."""
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    sizes |= {"moe_intermediate_size": 256}
    got = verdict("vllm", "qwen3_moe", Settings(grid=Grid(4, 64)), **sizes)
    assert got.parallel == {2: None, 4: None, 8: None}
    narrow = verdict("vllm", "qwen3_moe", Settings(grid=Grid(4, 32)), **(sizes | {"moe_intermediate_size": 96}))
    assert narrow.parallel[2] == "model.layers.0.mlp.experts.0.down_proj: 48 inputs each would cut a group of 32"


def test_experts() -> None:
    """A server fuses a layer's experts; Marlin needs the model's width in units of 128."""
    wide = {"hidden_size": 256, "num_attention_heads": 4, "moe_intermediate_size": 64}
    got = verdict("vllm", "qwen3_moe", **wide)
    assert got.kernels["Hopper"] == {"Marlin": 4, "Marlin MoE": 2}
    assert got.kernels["CPU"] == {"CPUWNA16": 4, "CPU MoE (needs AMX)": 2}
    narrow = verdict("vllm", "qwen3_moe")
    assert narrow.kernels["Hopper"] == {"Marlin": 4, "MoeWNA16": 2}
    uneven = Settings(grid=Grid(4, 32), overrides=(("*.experts.3.*", {"bits": 8}),))
    assert "model.layers.0.mlp.experts differ in their settings" in str(verdict("vllm", "qwen3_moe", uneven))
    assert "keeps experts fused" in str(verdict("transformers", "qwen3_moe"))
    assert verdict("gptqmodel", "qwen3_moe").loads
    assert (
        "looks for model.layers.0.mlp.gate.weight, which the original checkpoint, and so ours, calls otherwise"
        in str(verdict("gptqmodel", "mixtral"))
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.kind)
def test_the_verdict_agrees_with_what_the_loading_tests_find(family: Family) -> None:
    """`test_families` loads each family with what its entry names: the table must say the same."""
    for name in ("transformers", "gptqmodel"):
        got = verdict(name, family.kind, **family.changes)
        assert got.loads == (name in family.loads), f"{name}: {got}"


def test_the_documented_table_is_current() -> None:
    assert families.DOCUMENT.read_text() == families.document(), "run: python tests/families.py"


@pytest.mark.slow
def test_deploy_turns_a_warning_into_an_error(project: Path) -> None:
    def prepared(**changes: Any) -> Prepared:
        return prepare.prepare(recipe(project, Path("runs"), changes))

    asymmetric = {"quantize.symmetric": False}
    assert any(w.startswith("vllm does not load this: ") for w in prepared(**asymmetric).warnings)
    assert not any("does not load" in w for w in prepared().warnings)
    with pytest.raises(InputError) as caught:
        prepared(**asymmetric, deploy=["transformers", "vllm"])
    message = str(caught.value)
    assert "deploy: vllm does not load this: model.layers.0.self_attn.qkv_proj: no asymmetric weights" in message
    assert "(vLLM 0.33.0" in message
    assert "deploy: transformers" not in message
    assert message.endswith("change quantize or output.formats, or do not ask for the engine there")
    other = "it loads compressed-tensors: set output.formats: [gptq, compressed-tensors]"
    assert other in message
    assert prepared(**asymmetric, deploy=["vllm"], **{"output.formats": ["gptq", "compressed-tensors"]})
    assert not any(
        other in w for w in prepared(**asymmetric, **{"output.formats": ["gptq", "compressed-tensors"]}).warnings
    )
    assert not any("does not load" in w for w in prepared(**asymmetric, deploy=["transformers"]).warnings)


def test_the_table_is_gptqmodels_own() -> None:
    """bits, groups and symmetry of each kernel as the installed gptqmodel states them."""
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.marlin import MarlinLinear
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_aten_kernel import TorchAtenLinear
    from gptqmodel.nn_modules.qlinear.tritonv2 import TritonV2Linear

    theirs = {"Marlin": MarlinLinear, "Torch": TorchLinear, "TorchAten": TorchAtenLinear, "Triton": TritonV2Linear}
    for kernels in engine_targets.TARGETS["gptqmodel"].formats["gptq"].hardware.values():
        for kernel in kernels:
            own: Any = theirs[kernel.name]
            assert set(kernel.bits) <= set(own.SUPPORTS_BITS)
            assert set(kernel.groups) <= set(own.SUPPORTS_GROUP_SIZE)
            assert ([True] if kernel.symmetric else [True, False]) == own.SUPPORTS_SYM


def test_where_optimum_looks_for_blocks() -> None:
    pytest.importorskip("optimum")
    from optimum.gptq.constants import BLOCK_PATTERNS

    assert set(plan_traits._BLOCKS) <= set(BLOCK_PATTERNS)
    assert "does not look for blocks in transformer.blocks" in str(verdict("transformers", "mpt", **MPT))


MPT = {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 96}


def test_negative_scales_only_where_a_kernel_was_seen_to_read_them() -> None:
    """Proven by tests on the CPU and by bench/kernel_table.py on an H100.

    On the CPU: gptqmodel's torch kernels and vLLM's kernel.

    vLLM's and SGLang's Marlin is not gptqmodel's: only the latter was seen.
    """
    signed = engine_targets.Matrix("m", 128, 128, Grid(4, 64, signed=True))
    plain = engine_targets.Matrix("m", 128, 128, Grid(4, 64))
    offered = [
        (t.name, k)
        for t in engine_targets.TARGETS.values()
        for loader in t.formats.values()
        for kernels in loader.hardware.values()
        for k in kernels
    ]
    gptqmodel = {
        (name, kernel)
        for name in ("transformers", "gptqmodel")
        for kernel in ("Torch", "TorchAten", "Triton", "Marlin")
    }
    assert {(n, k.name) for n, k in offered if k.why_not(signed) is None} == gptqmodel | {
        ("vllm", "CPUWNA16"),
        ("transformers", "decoded when loaded"),
        ("mlx", "quantized_matmul"),
        ("llama.cpp", "Q4_0"),
        ("llama.cpp", "Q4_1"),
    }
    unproven = [k for _, k in offered if k.why_not(plain) is None and not k.signed]
    assert unproven
    assert all(k.why_not(signed) == f"negative scales are not proven in {k.name}" for k in unproven)


def test_what_an_engine_has_of_a_class() -> None:
    mpt = verdict("vllm", "mpt", **MPT)
    assert not mpt.loads
    assert "vLLM 0.33.0 has no MptForCausalLM" in str(mpt)
    assert "SGLang 0.5.23 has no MptForCausalLM" in str(verdict("sglang", "mpt", **MPT))
    assert verdict("vllm", "llama", **LLAMA).remarks == ()
    generic = verdict("vllm", "smollm3", **LLAMA)
    assert generic.loads
    assert str(generic).startswith(
        "loads, SmolLM3ForCausalLM by transformers' code, as vLLM 0.33.0 has no such class; "
    )
    assert verdict("transformers", "smollm3", **LLAMA).remarks == ()


@pytest.mark.parametrize(
    ("made", "vllm", "sglang"),
    [
        ("Qwen4ExpForConditionalGeneration", "own", "own"),
        ("Qwen4ExpForCausalLM", "own", "none"),
        ("Gemma3nForConditionalGeneration", "own", "own"),
        ("Gemma3nForCausalLM", "own", "own"),
        ("Granite4VisionForConditionalGeneration", "own", "generic"),
        ("DeepseekOcr2ForConditionalGeneration", "generic", "generic"),
        ("HunYuanVLForConditionalGeneration", "generic", "generic"),
        ("Molmo2ForConditionalGeneration", "own", "generic"),
    ],
)
def test_the_classes_that_became_exact_last(made: str, vllm: str, sglang: str) -> None:
    """As docs/families.md says of them."""
    kind = getattr(transformers, made)
    assert [registry.has(made, kind) for registry in (VLLM, SGLANG)] == [vllm, sglang]
    assert made not in VLLM.refuses.keys() | SGLANG.refuses.keys()


def test_classes_have_the_names_of_remote_code_too() -> None:
    assert "DeepseekOCR2ForCausalLM" in VLLM.own
    assert not {n for n in SGLANG.own if "OCR2" in n.upper()}


def test_experts_in_16_bit_are_told() -> None:
    whole = Settings(grid=Grid(4, 32), overrides=(("*.experts.*", None),))
    assert str(verdict("vllm", "qwen3_moe", whole, hidden_size=128)).startswith("loads, experts in 16 bit; ")
    assert verdict("vllm", "granitemoe", num_local_experts=4).remarks == ("experts in 16 bit",)
    assert verdict("vllm", "qwen3_moe").remarks == ()


def test_experts_in_16_bit_that_engines_take_for_quantized() -> None:
    """vLLM asks whether its Marlin kernel fits before it looks at the rules, SGLang never looks at them."""
    whole = Settings(grid=Grid(4, 32), overrides=(("*.experts.*", None),))
    narrow = verdict("vllm", "qwen3_moe", whole)
    assert not narrow.loads
    assert "it takes model.layers.0.mlp.experts [32, 64] for quantized, whatever the rules say" in str(narrow)
    assert verdict("vllm", "qwen3_moe", hidden_size=128).loads
    for kind, changes in (("qwen3_moe", {"hidden_size": 128}), ("granitemoe", {"num_local_experts": 4})):
        got = verdict("sglang", kind, whole, **changes)
        assert not got.loads
        assert "for quantized, whatever the rules say" in str(got)


@pytest.mark.filterwarnings("ignore")
def test_latent_attention_in_sglang() -> None:
    """Its loader dequantizes kv_b_proj as AWQ's, and joins q_a_proj and kv_a_proj_with_mqa as AWQ stores them."""
    config = tiny.config("deepseek_v3", hidden_size=128)
    model: Any = skeleton.build(config, split=True)
    slots = {n: Slot(n, torch.bfloat16, tuple(p.shape)) for n, p in model.named_parameters()}

    def judged(name: Any, settings: Settings) -> engine_support.Verdict:
        made = plan(slots, model, settings, torch.bfloat16, where=Path("base"))
        return engine_support.judge(made, model, engine_targets.TARGETS[name])

    every = Settings(grid=Grid(4, 32))
    apart = Settings(grid=Grid(4, 32), overrides=(("*_a_proj*", None), ("*.kv_b_proj", None)))
    assert [p for p in judged("sglang", every).problems if "as AWQ stores it" in p]
    assert not [p for p in judged("sglang", apart).problems if "AWQ" in p]
    assert not [p for p in judged("vllm", every).problems if "AWQ" in p]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["gptq", "compressed-tensors", "auto-round"])
def test_what_transformers_would_cut_while_it_loads(tmp_path: Path, layout: str) -> None:
    """Molmo 2: q, k and v are one matrix in the file and in vLLM; transformers cuts rows, which packed ones have not."""
    base = pico.save(tiny.model("molmo2"), tmp_path)
    model: Any = skeleton.open_model(base)
    slots = {n: Slot(n, torch.bfloat16, i.shape) for n, i in Checkpoint(base).items()}
    made = plan(slots, model, Settings(grid=Grid(4, 32), format=layout), torch.bfloat16, where=base)
    got = {
        name: engine_support.judge(made, model, engine_targets.TARGETS[name], layout)
        for name in ("vllm", "transformers")
    }
    assert any("cuts model.transformer.blocks.0." in problem for problem in got["transformers"].problems)
    assert got["vllm"].loads


def test_the_class_is_the_one_that_config_json_names() -> None:
    """Servers look it up there; transformers' own class may be called otherwise."""
    made, model = planned("llama", **LLAMA)
    model.config.architectures = ["KimiK25ForConditionalGeneration"]
    assert engine_support.judge(made, model, engine_targets.TARGETS["vllm"]).remarks == ()
    model.config.architectures = ["UnheardForCausalLM"]
    got = engine_support.judge(made, model, engine_targets.TARGETS["vllm"])
    assert [*got.problems, *got.remarks] != []


def test_classes_that_an_engine_refuses() -> None:
    target = engine_targets.TARGETS["vllm"]
    assert target.classes is not None
    strict = replace(target.classes, refuses_experts={"Qwen3MoeForCausalLM": "no"})
    planned_moe, model = planned("qwen3_moe")
    got = engine_support.judge(planned_moe, model, replace(target, classes=strict))
    assert got.problems == ("Qwen3MoeForCausalLM: no: leave them in 16 bit (quantize.experts)",)
    refused = replace(target.classes, refuses={"LlamaForCausalLM": "not at all"})
    got = engine_support.judge(*planned("llama", **LLAMA), replace(target, classes=refused))
    assert got.problems == ("LlamaForCausalLM: not at all",)
    refused = replace(target.classes, refuses_gptq={"LlamaForCausalLM": "not so"})
    got = engine_support.judge(*planned("llama", **LLAMA), replace(target, classes=refused))
    assert got.problems == ("LlamaForCausalLM: not so: serve it in compressed-tensors (output.formats)",)
    other = planned("llama", Settings(grid=Grid(4, 32), format="compressed-tensors"), **LLAMA)
    assert engine_support.judge(*other, replace(target, classes=refused)).problems == ()


@pytest.mark.filterwarnings("ignore")
def test_experts_without_a_gate_are_judged_too() -> None:
    """Nemotron H's experts are up_proj and down_proj."""
    config = tiny.config("nemotron_h")
    model: Any = skeleton.build(config, split=True)
    slots = {n: Slot(n, torch.bfloat16, tuple(p.shape)) for n, p in model.named_parameters()}
    plan_of_it = plan(slots, model, Settings(grid=Grid(4, 32)), torch.bfloat16, where=Path("here"))
    got = engine_support.judge(plan_of_it, model, engine_targets.TARGETS["vllm"])
    assert got.kernels["Hopper"]["MoeWNA16"] == 1, "64 inputs"


@pytest.mark.parametrize(
    ("name", "grid", "kernels", "lacking"),
    [
        ("vllm", Grid(4, 64), {"Hopper": "Machete", "CPU": "CPUWNA16"}, set()),
        ("vllm", Grid(4, 32, symmetric=False), {"Hopper": "Marlin", "CPU": "CPUWNA16"}, set()),
        ("vllm", Grid(8, 64, symmetric=False), {"other NVIDIA GPU": "Humming (where installed)"}, {"CPU"}),
        ("vllm", Grid(3, 64), {"Hopper": "Humming (where installed)"}, {"CPU"}),
        ("sglang", Grid(4, 64, symmetric=False), {"NVIDIA GPU from Ampere on": "Marlin"}, set()),
        ("transformers", Grid(2, 32, symmetric=False), {"any device": "decoded when loaded"}, set()),
    ],
)
def test_compressed_tensors_carries_what_gptq_does_not(
    name: engine_targets.Name, grid: Grid, kernels: dict[str, str], lacking: set[str]
) -> None:
    got = verdict(name, "llama", Settings(grid=grid, format="compressed-tensors"), **LLAMA)
    assert got.loads, got.problems
    assert {where: next(iter(got.kernels[where])) for where in kernels} == kernels
    assert set(got.lacking) == lacking


def test_what_engines_refuse_of_compressed_tensors() -> None:
    grids = (("*.down_proj", {"bits": 8}),)
    three = Settings(grid=Grid(3, 64), format="compressed-tensors")
    assert verdict("sglang", "llama", three, **LLAMA).problems[0].endswith("no 3-bit weights")
    mixed = Settings(grid=Grid(4, 64), overrides=grids, format="compressed-tensors")
    assert verdict("transformers", "llama", mixed, **LLAMA).loads
    with_zeros = replace(mixed, grid=Grid(4, 64, symmetric=False))
    assert "takes the first settings for every module" in str(verdict("transformers", "llama", with_zeros, **LLAMA))
    assert verdict("gptqmodel", "llama", mixed, **LLAMA).problems == ("it reads gptq, not compressed-tensors",)


def test_what_engines_load_of_auto_round() -> None:
    grids = (("*.down_proj", {"bits": 2, "symmetric": False}),)
    for bits, kernel in ((4, "Marlin"), (3, "Humming (where installed)")):
        got = verdict("vllm", "llama", Settings(grid=Grid(bits, 64), format="auto-round"), **LLAMA)
        assert next(iter(got.kernels["NVIDIA GPU"])) == kernel
        assert ("CPU" in got.kernels) == (bits == 4)
    with_zeros = Settings(grid=Grid(4, 64), overrides=grids, format="auto-round")
    for name in ("vllm", "sglang"):
        assert not verdict(name, "llama", with_zeros, **LLAMA).loads
    assert verdict("transformers", "llama", with_zeros, **LLAMA).loads
    assert verdict("sglang", "llama", Settings(grid=Grid(8, 64), format="auto-round"), **LLAMA).loads
