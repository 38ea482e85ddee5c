"""Tensors of a base that are no parameter of its class: dropped, carried, loaded, refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico
from helpers.e2e import edit_json, edit_tensors
from safetensors.torch import load_file
from torch import Tensor

from requant.adapters import peft_directory
from requant.checkpoint.reader import Checkpoint, read_json
from requant.deploy import check_headers, check_tensors, verify
from requant.errors import InputError
from requant.formats.registry import recognised
from requant.heal import stage as heal_stage
from requant.merge.base_weights import Nf4Settings
from requant.modeling import skeleton
from requant.modeling.unplaced import Unplaced
from requant.numerics.grid import Grid
from requant.run import prepare

WEIGHTS = "model.safetensors"
GRID = Grid(4, 32)


def carried(hidden: int = 64) -> dict[str, Tensor]:
    """A prediction head, and a layer past the last."""
    torch.manual_seed(5)
    return {
        "mtp.fc.weight": torch.randn(hidden, 2 * hidden).bfloat16(),
        "mtp.layers.0.self_attn.q_proj.weight": torch.randn(hidden, hidden).bfloat16(),
        "model.layers.2.eh_proj.weight": torch.randn(hidden, 2 * hidden).bfloat16(),
        "model.layers.2.input_layernorm.weight": torch.randn(hidden).bfloat16(),
    }


def buffers(dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    return {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(8, dtype=dtype) for i in range(3)}


def gpt2_buffers() -> dict[str, Tensor]:
    mask = torch.full((1, 1, 64, 64), -torch.inf, dtype=torch.float16)
    return {f"transformer.h.{i}.attn.bias": mask.clone() for i in range(2)} | {
        f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)
    }


def gpt_neox_buffers() -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for i in range(2):
        prefix = f"gpt_neox.layers.{i}.attention."
        found[f"{prefix}bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
        found[f"{prefix}masked_bias"] = torch.tensor([-1e9])
        found[f"{prefix}rotary_emb.inv_freq"] = torch.rand(2)
    return found


def saved(tmp: Path, kind: str, extra: dict[str, Tensor], *, shard: str = "5GB", **changes: Any) -> tuple[Path, Any]:
    """A bfloat16 base with more tensors than its class has parameters, and the fp32 model behind it."""
    pico.model(kind, **changes).to(torch.bfloat16).save_pretrained(tmp / "base", max_shard_size=shard)
    made = pico.reload(tmp / "base")
    file = next(iter(sorted((tmp / "base").glob("*.safetensors"))))
    edit_tensors(file, lambda t: t | extra)
    index = tmp / "base" / "model.safetensors.index.json"
    if index.exists():
        edit_json(index, weight_map=read_json(index)["weight_map"] | dict.fromkeys(extra, file.name))
    return tmp / "base", made


DROPPED: dict[str, tuple[str, dict[str, Tensor], str]] = {
    "llama": ("llama", buffers(), "q_proj"),
    "gpt2": ("gpt2", gpt2_buffers(), "c_attn"),
    "gpt2 without its prefix": (
        "gpt2", {n.removeprefix("transformer."): t for n, t in gpt2_buffers().items()}, "c_attn",
    ),
    "gpt_neox": ("gpt_neox", gpt_neox_buffers(), "query_key_value"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "extra", "target"), DROPPED.values(), ids=DROPPED.keys())
def test_recomputed_buffers_are_dropped_and_counted(
    tmp_path: Path, kind: str, extra: dict[str, Tensor], target: str
) -> None:
    """Also a mask of -inf in float16, which no dtype of weights would let pass."""
    base, made = saved(tmp_path, kind, extra)
    live = pico.train(made, tmp_path / "adapter", target_modules=[target])
    plan, result, tested = pico.merged(base, tmp_path / "adapter", tmp_path / "out")
    assert tested.worst <= 1
    assert result.ledger["base"]["recomputed buffers dropped"] == len(extra)
    assert not extra.keys() & Checkpoint(tmp_path / "out").keys()
    assert not plan.carried
    assert pico.relative(pico.logits(pico.reload(tmp_path / "out")), pico.logits(live)) < 1e-5
    written = {n: info.shape for n, info in Checkpoint(tmp_path / "out").items()}
    assert Unplaced.of(skeleton.open_model(tmp_path / "out"), written) == Unplaced()


def recheck(merged: Path, out: Path) -> check_headers.HeaderCheck:
    """The headers of a quantized checkpoint made of a merged one."""
    pico.save_tokenizer(merged)
    pico.packed(merged, out, GRID, dtype=torch.bfloat16)
    return check_headers.check(out)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shard", ["5GB", "100KB"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_servers_run_is_a_copy_in_every_checkpoint(tmp_path: Path, shard: str, tied: bool, dtype: str) -> None:
    """One file or many, tied or not: 16-bit tensors keep their bytes from the base to the healed model."""
    extra = carried()
    base, made = saved(tmp_path, "llama", extra | buffers(), shard=shard, tie_word_embeddings=tied)
    assert (len(list(base.glob("*.safetensors"))) > 1) == (shard != "5GB")
    pico.train(made, tmp_path / "adapter")
    plan, result, _ = pico.merged(base, tmp_path / "adapter", tmp_path / "merged", dtype=dtype)
    assert result.ledger["base"]["carried for servers"] == len(extra)
    assert result.carried == plan.carried == {"mtp": 2, "model.layers.2": 2}
    assert not recheck(tmp_path / "merged", tmp_path / "gptq").findings
    (tmp_path / "healed").mkdir()
    template = Path("additional_chat_templates", "tool_use.jinja")
    (tmp_path / "gptq" / template).parent.mkdir()
    (tmp_path / "gptq" / template).write_text("A")
    heal_stage.write(tmp_path / "gptq", tmp_path / "healed", {}, {})
    assert (tmp_path / "healed" / template).read_text() == "A"
    for name in ("merged", "gptq", "healed"):
        written = Checkpoint(tmp_path / name)
        for tensor, value in extra.items():
            assert written[tensor].dtype == torch.bfloat16
            assert torch.equal(written.read(tensor), value), (name, tensor)
    with_source = verify(tmp_path / "gptq", source=tmp_path / "merged", text="2 3 4 5 6")
    assert with_source.ok, with_source.message()
    assert with_source.carried == {"mtp": 2, "model.layers.2": 2}
    assert not any("accepted by their names" in line for line in with_source.skipped)


@pytest.mark.filterwarnings("ignore")
def test_verify_compares_copies_with_the_source_and_says_when_there_is_none(tmp_path: Path) -> None:
    base, _ = saved(tmp_path, "llama", carried())
    pico.save_tokenizer(base)
    pico.packed(base, tmp_path / "gptq", GRID, dtype=torch.bfloat16)
    alone = verify(tmp_path / "gptq", text="2 3 4 5 6")
    assert alone.ok, alone.message()
    assert any("accepted by their names, no source: model.layers.2 (2 tensors), mtp" in line for line in alone.skipped)
    name = "mtp.fc.weight"
    edit_tensors(tmp_path / "gptq" / WEIGHTS, lambda t: t | {name: t[name] + 0.01})
    done = verify(tmp_path / "gptq", source=base, text="2 3 4 5 6")
    assert [str(f) for f in done.findings] == [f"{name}: is not the source's: it should be a copy"]
    edit_tensors(base / WEIGHTS, lambda t: {n: v for n, v in t.items() if n != name})
    done = verify(tmp_path / "gptq", source=base, text="2 3 4 5 6")
    assert "the source has no such tensor" in str(done.findings[0])


@pytest.mark.filterwarnings("ignore")
def test_engines_are_told_that_carried_modules_are_not_quantized(tmp_path: Path) -> None:
    base, _ = saved(tmp_path, "llama", carried())
    pico.save_tokenizer(base)
    planned = pico.packed(base, tmp_path / "gptq", GRID, dtype=torch.bfloat16)
    assert planned.carried == ("model.layers.2", "mtp")
    config = Checkpoint(tmp_path / "gptq").config["quantization_config"]
    assert config["dynamic"] == {r"-:^mtp(\.|$)": {}, r"-:^model\.layers\.2(\.|$)": {}}
    layout = recognised(config)
    assert layout is not None
    rules, linear = layout.rules(config), torch.nn.Linear(64, 64)
    for fused in ("mtp.layers.0.self_attn.qkv_proj", "model.layers.2.mlp.gate_up_proj"):
        assert rules.of(fused, fused, linear) is None
    assert rules.of("model.layers.1.self_attn.q_proj", "self_attn.q_proj", linear) is not None


@pytest.mark.filterwarnings("ignore")
def test_a_4_bit_base_packs_its_prediction_head_too(tmp_path: Path) -> None:
    """Packed tensors that the class has no place for are decoded, and proven like the others."""
    made = pico.model(num_hidden_layers=3)
    source = pico.save(made, tmp_path / "source", torch.bfloat16)
    base = pico.save_4bit(source, tmp_path / "base", bnb_4bit_quant_type="nf4")
    edit_json(base / "config.json", num_hidden_layers=2)
    pico.train(pico.model(), tmp_path / "adapter")
    plan, result, tested = pico.merged(base, tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")
    name = "model.layers.2.mlp.up_proj.weight"
    assert plan.base.weights[name].kind == "packed"
    assert result.carried == {"model.layers.2": 9}
    assert tested.worst <= 1
    written = Checkpoint(tmp_path / "out")
    assert torch.equal(written.read(name), plan.base.read(name).bfloat16())
    assert "model.layers.2.mlp.up_proj.weight.absmax" not in written


@pytest.mark.filterwarnings("ignore")
def test_a_simulated_base_copies_what_training_did_not_load(tmp_path: Path) -> None:
    """base.nf4 casts what the model loads; what it does not load stays as it is in the file."""
    value = torch.randn(64, 128)
    base, made = saved(tmp_path, "llama", {"mtp.fc.weight": value, "mtp.norm.weight": torch.ones(64).half()})
    pico.train(made, tmp_path / "adapter")
    simulate = Nf4Settings(quant_type="nf4", double_quant=False, load_dtype="bfloat16")
    pico.merged(base, tmp_path / "adapter", tmp_path / "out", dtype="float32", simulate=simulate)
    written = Checkpoint(tmp_path / "out")
    assert torch.equal(written.read("mtp.fc.weight"), value)
    assert written["mtp.norm.weight"].dtype == torch.float16


REFUSED: dict[str, dict[str, Tensor]] = {
    "a task head": {"score.weight": torch.zeros(2, 64)},
    "a value head": {"v_head.summary.bias": torch.zeros(1)},
    "a bias that is no mask": {"model.layers.0.self_attn.bias": torch.zeros(64)},
    "a matrix called like a vector": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8, 8)},
    "a projection that the config has not": {"model.layers.0.self_attn.q_norm.weight": torch.zeros(16)},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("extra", REFUSED.values(), ids=REFUSED.keys())
def test_anything_else_is_refused_by_name(tmp_path: Path, extra: dict[str, Tensor]) -> None:
    base, made = saved(tmp_path, "llama", {n: t.bfloat16() for n, t in extra.items()})
    pico.train(made, tmp_path / "adapter")
    with pytest.raises(InputError) as caught:
        prepare.plan_merge(base, peft_directory.load(tmp_path / "adapter"), None, trust_remote_code=False)
    (name,) = extra
    assert name in str(caught.value)
    assert "1 of its tensors have no place in LlamaForCausalLM" in str(caught.value)
    assert "take the config.json that belongs to these weights" in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_a_layer_that_the_config_does_not_count_is_refused(tmp_path: Path) -> None:
    """Folding it would change tensors that nothing here runs or measures."""
    made = pico.model(num_hidden_layers=3)
    base = pico.save(made, tmp_path / "base", torch.bfloat16)
    edit_json(base / "config.json", num_hidden_layers=2)
    pico.train(made, tmp_path / "adapter")
    with pytest.raises(InputError, match=r"changes 2 tensors .* does not train, e\.g\. model\.layers\.2\.self_attn"):
        prepare.plan_merge(base, peft_directory.load(tmp_path / "adapter"), None, trust_remote_code=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_buffers_that_a_checkpoint_holds_are_loaded_and_kept(tmp_path: Path) -> None:
    """Gemma 4: `layer_scalar` is a buffer with a trained value: written as it is, and used by every forward of ours."""
    kind = {"head_dim": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    made = pico.model("gemma4_text", **(pico._SMALL | kind))
    with torch.no_grad():
        for index, layer in enumerate(made.model.layers):
            layer.layer_scalar.fill_(0.5 + index)
    base = pico.save(made, tmp_path / "base", torch.bfloat16)
    live = pico.train(pico.reload(base), tmp_path / "adapter")
    plan, _, _ = pico.merged(base, tmp_path / "adapter", tmp_path / "out")
    assert set(plan.unplaced.state) == {f"model.layers.{i}.layer_scalar" for i in range(2)}
    assert pico.relative(pico.logits(pico.reload(tmp_path / "out")), pico.logits(live)) < 1e-5
    from requant.evaluate import variants

    assert not recheck(tmp_path / "out", tmp_path / "gptq").findings
    sources = variants.VariantSources.of_checkpoint(tmp_path / "out", gptq=tmp_path / "gptq")
    for name in ("merged", "gptq"):
        model = variants.load(name, sources, device=torch.device("cpu"), dtype=torch.float32)
        assert [float(layer.layer_scalar) for layer in model.model.layers] == [0.5, 1.5], name


def names(*found: str, shape: tuple[int, ...] = (64, 64)) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(found, shape)


NAMES: dict[str, tuple[Callable[[], Any], dict[str, tuple[int, ...]], tuple[str, ...]]] = {
    "layers past the last, without the prefix": (
        lambda: pico.config("llama"), names("layers.2.mlp.experts.0.up_proj.weight"), ("layers.2",),
    ),
    "MiMo": (lambda: pico.config("llama"), names("model.mtp_layers.0.input_proj.weight"), ("model.mtp_layers",)),
    "ERNIE": (
        lambda: pico.config("llama"), names("model.mtp_emb_norm.0.weight", "model.mtp_block.0.mlp.up_proj.weight"),
        ("model.mtp_emb_norm", "model.mtp_block"),
    ),
    "nextn": (lambda: pico.config("llama"), names("model.nextn_predict.0.eh_proj.weight"), ("model.nextn_predict",)),
    "Qwen3-Next": (lambda: pico.config("llama"), names("mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight"), ("mtp",)),
    "a number without a module": (lambda: pico.config("llama"), names("mtp"), ("mtp",)),
}  # fmt: skip


@pytest.mark.parametrize(("config", "extra", "roots"), NAMES.values(), ids=NAMES.keys())
def test_names_of_what_servers_run(
    config: Callable[[], Any], extra: dict[str, tuple[int, ...]], roots: tuple[str, ...]
) -> None:
    model = skeleton.build(config())
    bare = any(n.startswith("layers.") for n in extra)
    stored = {n.removeprefix("model.") if bare else n: tuple(p.shape) for n, p in model.named_parameters()}
    found = Unplaced.of(model, stored | extra)
    assert found.carried == tuple(extra)
    assert found.roots == roots
    assert (found.unknown, found.recomputed, found.state) == ((), (), ())


def test_values_of_a_copy_are_not_judged_twice(tmp_path: Path) -> None:
    """With a source a carried tensor is right when it is the same, whatever it holds."""
    base, _ = saved(tmp_path, "llama", {"mtp.norm.weight": torch.full((64,), torch.inf).bfloat16()})
    pico.save_tokenizer(base)
    pico.packed(base, tmp_path / "gptq", GRID, dtype=torch.bfloat16)
    headers = check_headers.check(tmp_path / "gptq")
    assert not check_tensors.check(headers, Checkpoint(base)).findings
    assert "not finite" in str(check_tensors.check(headers).findings[0])
    assert torch.isinf(load_file(tmp_path / "gptq" / WEIGHTS)["mtp.norm.weight"]).all()


COMPUTED: dict[str, tuple[int, ...]] = {
    "transformer.h.1.attn.attention.bias": (1, 1, 32, 32),
    "transformer.h.1.attn.causal_mask": (1, 1, 32, 32),
    "model.layers.0.self_attn.rotary_emb.cos_cached": (1, 1, 32, 8),
    "transformer.rotary_pos_emb.inv_freq": (8,),
    "transformer.h.0.self_attention.maybe_rotary.inv_freq": (8,),
    "model.layers.7.self_attn.rotary_emb.inv_freq": (8,),
    "position_ids": (1, 64),
    "decoder.version": (1,),
    "rope.freqs": (8,),
}


def test_names_of_what_every_loader_computes() -> None:
    """Also in a layer past the last; the same names with the shape of a weight are not taken for buffers."""
    model = skeleton.build(pico.config("llama"))
    stored = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert Unplaced.of(model, stored | COMPUTED).recomputed == tuple(COMPUTED)
    others = {n: (64, 32) if len(shape) == 1 else (64,) for n, shape in COMPUTED.items() if "layers.7" not in n}
    del others["position_ids"]
    found = Unplaced.of(model, stored | others)
    assert (found.recomputed, found.unknown) == ((), tuple(others))
