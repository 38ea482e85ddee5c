"""`requant.adapters`: every merged kind against PEFT's unmerged forward in fp32; refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import pico
from helpers.merging import FP32, ledger
from safetensors.torch import load_file

from requant.adapters import peft_directory
from requant.checkpoint.reader import Checkpoint
from requant.errors import InputError
from requant.run import prepare

pytestmark = pytest.mark.filterwarnings("ignore")
ATTENTION, MLP = ["q_proj", "v_proj"], ["gate_proj", "down_proj"]


def parity(tmp: Path, config: peft.PeftConfig, kind: str = "llama", model: dict[str, Any] | None = None) -> Any:
    """Merge onto an fp32 base; the reloaded model gives the logits of PEFT's unmerged forward."""
    made = pico.model(kind, **(model or {}))
    base, plain = pico.save(made, tmp / "base"), pico.logits(made)
    live = pico.train(made, tmp / "adapter", config=config)
    expected = pico.logits(live)
    assert pico.relative(plain, expected) > 100 * FP32, "the adapter must matter"
    plan, result, tested = pico.merged(base, tmp / "adapter", tmp / "out")
    assert tested.worst <= 1
    assert pico.relative(pico.logits(pico.reload(tmp / "out")), expected) < FP32
    ledger(plan, result)
    return plan


CONFIGS: dict[str, peft.PeftConfig] = {
    "loha": peft.LoHaConfig(r=4, alpha=6, target_modules=ATTENTION, init_weights=False),
    "loha pattern": peft.LoHaConfig(
        r=4, alpha=6, target_modules=[*ATTENTION, *MLP], rank_pattern={"q_proj": 3}, alpha_pattern={"down_proj": 9},
        init_weights=False,
    ),
    "lokr": peft.LoKrConfig(r=4, alpha=6, target_modules=ATTENTION, init_weights=False),
    "lokr both": peft.LoKrConfig(
        r=2, alpha=3, target_modules=[*ATTENTION, *MLP], decompose_both=True, decompose_factor=8, init_weights=False
    ),
    "lokr whole": peft.LoKrConfig(r=16, alpha=3, target_modules=MLP, decompose_factor=4, init_weights=False),
    "vera": peft.VeraConfig(r=8, target_modules=[*ATTENTION, *MLP], d_initial=0.7),
    "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "oft": peft.OFTConfig(oft_block_size=8, target_modules=[*ATTENTION, "down_proj"], use_cayley_neumann=True),
    "oft exact": peft.OFTConfig(oft_block_size=16, target_modules=MLP, use_cayley_neumann=False),
    "oft 2 terms": peft.OFTConfig(oft_block_size=8, target_modules=MLP, num_cayley_neumann_terms=2, use_cayley_neumann=True),
    "oft 3 terms": peft.OFTConfig(oft_block_size=8, target_modules=MLP, num_cayley_neumann_terms=3, use_cayley_neumann=True),
    "oft 4 terms": peft.OFTConfig(oft_block_size=8, target_modules=MLP, num_cayley_neumann_terms=4, use_cayley_neumann=True),
    "oft shared": peft.OFTConfig(oft_block_size=8, target_modules=ATTENTION, block_share=True, use_cayley_neumann=True),
    "tokens": peft.TrainableTokensConfig(token_indices=[3, 50, 7], target_modules=["embed_tokens"]),
    "lora and tokens": peft.LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION, trainable_token_indices=[5, 90, 4]),
    "tokens of both ends": peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=ATTENTION, trainable_token_indices={"embed_tokens": [5, 90], "lm_head": [9, 4, 5]}
    ),
    "excluded": peft.LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION, exclude_modules=[r"model.layers.0.self_attn.q_proj"]),
    "all-linear": peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"),
    "layers pattern": peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=MLP, layers_to_transform=[0], layers_pattern="layers", rank_pattern={"^gate_proj": 2}
    ),
    "orthogonal": peft.LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION, init_lora_weights="orthogonal"),
    "saved with lora": peft.LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION, modules_to_save=["mlp", "norm"]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_llama(tmp_path: Path, config: peft.PeftConfig) -> None:
    parity(tmp_path, config)


BIASED: dict[str, peft.PeftConfig] = {
    "ia3": peft.IA3Config(target_modules=["q_proj", "v_proj", "o_proj"], feedforward_modules=["o_proj"]),
    "oft": peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"], bias="oft_only", use_cayley_neumann=True),
    "vera": peft.VeraConfig(r=8, target_modules=["q_proj"], bias="all", d_initial=0.7),
}


@pytest.mark.parametrize("config", BIASED.values(), ids=BIASED.keys())
def test_biases(tmp_path: Path, config: peft.PeftConfig) -> None:
    """Biases of q, k and v (Qwen2): IA3 scales those of scaled outputs; others may train them."""
    plan = parity(tmp_path, config, "qwen2")
    assert any(op.name.endswith("bias") and op.action != "copied" for op in plan.ops)


CONV1D: dict[str, peft.PeftConfig] = {
    "ia3": peft.IA3Config(target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"], fan_in_fan_out=True),
    "vera": peft.VeraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True, d_initial=0.7),
    "lora square": peft.LoraConfig(r=4, lora_alpha=6, target_modules=[r"attn.c_proj"], fan_in_fan_out=True),
    "dora square": peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=[r"attn.c_proj"], fan_in_fan_out=True, use_dora=True
    ),
    "flag not set": peft.LoraConfig(r=4, lora_alpha=6, target_modules=["attn.c_proj", "c_fc"]),
}


@pytest.mark.parametrize("config", CONV1D.values(), ids=CONV1D.keys())
def test_gpt2_conv1d(tmp_path: Path, config: peft.PeftConfig) -> None:
    """The module decides how a weight is transposed, not the flag.

    Square weights would hide a mistake.
    """
    parity(tmp_path, config, "gpt2")


def test_a_linear_with_the_flag_of_conv1d(tmp_path: Path) -> None:
    parity(tmp_path, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], fan_in_fan_out=True))


@pytest.mark.parametrize("end", ["tokens", "lora and tokens"])
def test_trained_tokens_stay_tied(tmp_path: Path, end: str) -> None:
    """PEFT gives the tied head the same rows: one tensor is enough."""
    plan = parity(tmp_path, CONFIGS[end], model={"tie_word_embeddings": True})
    assert not plan.untied
    assert "lm_head.weight" not in Checkpoint(tmp_path / "out")


def test_trained_tokens_reach_a_tied_head_with_lora(tmp_path: Path) -> None:
    """The head is the embedding with its trained rows, and its own LoRA on top."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "lm_head"], trainable_token_indices=[5, 90])
    plan = parity(tmp_path, config, model={"tie_word_embeddings": True})
    assert plan.untied


def test_trained_tokens_of_a_resized_vocabulary(tmp_path: Path) -> None:
    made = pico.model()
    base = pico.save(made, tmp_path / "base")
    made.config._name_or_path = str(base)
    made.resize_token_embeddings(pico.VOCABULARY + 8, mean_resizing=False)
    new = [pico.VOCABULARY + 1, pico.VOCABULARY + 6]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=ATTENTION, modules_to_save=["lm_head"], trainable_token_indices=new
    )
    live = peft.get_peft_model(made, config)
    with torch.no_grad():
        for p in (p for p in live.parameters() if p.requires_grad):
            p.add_(torch.randn_like(p) * 0.05)
    live.eval().save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    plan, _, _ = pico.merged(base, tmp_path / "adapter", tmp_path / "out")
    tokens = pico.ids() + 7
    assert plan.vocab_size == pico.VOCABULARY + 8
    assert pico.relative(pico.logits(pico.reload(tmp_path / "out"), tokens), pico.logits(live, tokens)) < FP32


# The formulas of the self-test ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["loha", "lokr both", "vera", "oft", "oft exact", "tokens"])
def test_the_self_test_sees_a_wrong_value(tmp_path: Path, name: str) -> None:
    """10 times the bound in any row is found: the bounds are narrow enough to prove a merge."""
    made = pico.model()
    base = pico.save(made, tmp_path / "base")
    pico.train(made, tmp_path / "adapter", config=CONFIGS[name])
    plan, _ = prepare.plan_merge(base, peft_directory.load(tmp_path / "adapter"), None, trust_remote_code=False)
    op = next(op for op in plan.ops if op.folds)
    weight = Checkpoint(base).read(op.name).double()
    rows = [0, op.shape[0] // 2, op.shape[0] - 1]
    exact, bound = op.folds[0].exact_rows(weight[rows], rows)
    folded = weight.float()
    op.folds[0].apply(folded)
    assert bool(((folded[rows].double() - exact).abs() <= bound).all())
    assert float(bound.max()) < 1e-4 * float(exact.abs().max())


# Refusals ---------------------------------------------------------------------------------------------------------


def refused(tmp: Path, config: peft.PeftConfig, **changes: Any) -> str:
    """The message when a saved adapter is loaded and planned.

    `changes` edit its config, `tensors` its file.
    """
    tensors = changes.pop("tensors", None)
    made = pico.model()
    base = pico.save(made, tmp / "base")
    pico.train(made, tmp / "adapter", config=config)
    pico.edit_adapter(tmp / "adapter", **changes)
    if tensors:
        pico.edit_tensors(tmp / "adapter" / peft_directory.WEIGHTS, **tensors)
    with pytest.raises(InputError) as caught:
        prepare.plan_merge(base, peft_directory.load(tmp / "adapter"), None, trust_remote_code=False)
    return str(caught.value)


P = "base_model.model.model.layers.0.self_attn.q_proj"


def test_vera_without_its_projections(tmp_path: Path) -> None:
    config = peft.VeraConfig(r=8, target_modules=["q_proj"], save_projection=False)
    message = refused(tmp_path, config)
    assert "save_projection was false" in message
    assert "Load the adapter where it was trained" in message


def test_vera_with_too_small_projections(tmp_path: Path) -> None:
    small = {"change": {"base_model.vera_A": lambda t: t[:, :8]}}
    assert "vera_A is for 8 inputs at most, the base has 64" in refused(
        tmp_path, peft.VeraConfig(r=8, target_modules=["q_proj"]), tensors=small
    )
    small = {"change": {"base_model.vera_B": lambda t: t[:8]}}
    assert "are smaller than" in refused(tmp_path / "b", peft.VeraConfig(r=8, target_modules=["q_proj"]), tensors=small)


def test_oft_that_is_not_merged(tmp_path: Path) -> None:
    config = peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"], use_cayley_neumann=True)
    assert "coft is set: PEFT projects the rotations anew" in refused(tmp_path / "a", config, coft=True)
    assert "an older PEFT wrote this" in refused(tmp_path / "b", config, use_cayley_neumann=None)
    odd = {"change": {f"{P}.oft_R.weight": lambda t: t[:, :-1]}}
    assert "not blocks of upper triangles" in refused(tmp_path / "c", config, tensors=odd)
    fewer = {"change": {f"{P}.oft_R.weight": lambda t: t[:-1]}}
    assert "another base" in refused(tmp_path / "d", config, tensors=fewer)


def test_parts_that_are_missing_or_too_many(tmp_path: Path) -> None:
    loha = CONFIGS["loha"]
    assert "expected hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b" in refused(
        tmp_path / "a", loha, tensors={"drop": [f"{P}.hada_w2_b"]}
    )
    assert "LoHa on convolutions" in refused(tmp_path / "b", loha, tensors={"add": {f"{P}.hada_t1": torch.ones(4, 4)}})
    assert "do not multiply to one shape" in refused(
        tmp_path / "c", loha, tensors={"change": {f"{P}.hada_w2_b": lambda t: t[:, :9]}}
    )
    assert "LoKr on convolutions" in refused(
        tmp_path / "d", CONFIGS["lokr"], tensors={"add": {f"{P}.lokr_t2": torch.ones(4, 4)}}
    )
    assert "do not multiply" in refused(
        tmp_path / "e", CONFIGS["lokr both"], tensors={"change": {f"{P}.lokr_w2_b": lambda t: t[:1]}}
    )
    ia3 = CONFIGS["ia3"]
    key = P.replace("q_proj", "k_proj") + ".ia3_l"
    assert "expected (1, in) or (out, 1)" in refused(
        tmp_path / "f", ia3, tensors={"change": {key: lambda t: t.flatten()}}
    )
    assert "another base" in refused(tmp_path / "g", ia3, tensors={"change": {key: lambda t: t[:8]}})


def test_tokens_that_the_config_does_not_explain(tmp_path: Path) -> None:
    config = CONFIGS["lora and tokens"]
    assert "lists 2 tokens for model.embed_tokens" in refused(tmp_path / "a", config, trainable_token_indices=[1, 2])
    assert "has no list of token ids for model.embed_tokens" in refused(
        tmp_path / "b", config, trainable_token_indices={"lm_head": [1, 2, 3]}
    )
    assert "lists 3 tokens" in refused(tmp_path / "c", config, trainable_token_indices=[1, 2, 2])
    assert "token 96 is trained, the embedding has 96 rows" in refused(
        tmp_path / "d", config, trainable_token_indices=[1, 2, 96]
    )


def test_dora_on_an_embedding_is_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["embed_tokens"], use_dora=True)
    assert "DoRA on an embedding is not merged yet" in refused(tmp_path, config)


def test_a_lora_key_in_a_tokens_adapter(tmp_path: Path) -> None:
    key = "base_model.model.model.norm.lora_A.weight"
    assert "expected trainable_tokens_delta alone" in refused(
        tmp_path, CONFIGS["tokens"], tensors={"add": {key: torch.ones(4, 4)}}
    )


def test_the_tensors_of_peft_are_all_known(tmp_path: Path) -> None:
    """Each kind's file, as PEFT writes it, is read back to the last tensor."""
    for name in ("loha", "lokr", "vera", "ia3", "oft", "tokens"):
        pico.train(pico.model(), tmp_path / name, config=CONFIGS[name])
        loaded = peft_directory.load(tmp_path / name)
        used = sum(len(f.tensors) for f in loaded.folds.values()) + len(loaded.shared)
        assert used == len(load_file(tmp_path / name / peft_directory.WEIGHTS)), name
