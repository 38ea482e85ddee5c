"""Heads for multi-token prediction, as each family names them, survive to the last file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import pico, tiny
from helpers.e2e import edit_tensors
from torch import Tensor

from requant.checkpoint.reader import Checkpoint
from requant.deploy import verify
from requant.modeling import skeleton
from requant.modeling.blocks import block_list
from requant.numerics.grid import Grid

pytestmark = pytest.mark.filterwarnings("ignore")
GLM = (  # a layer past the last, as DeepSeek V3's report describes it
    "{past}.eh_proj.weight", "{past}.enorm.weight", "{past}.shared_head.head.weight", "{past}.embed_tokens.weight",
    "{past}.self_attn.q_a_proj.weight", "{past}.mlp.experts.0.gate_proj.weight", "{past}.mlp.gate.e_score_correction_bias",
)  # fmt: skip
QWEN = ("mtp.fc.weight", "mtp.norm.weight", "mtp.pre_fc_norm_hidden.weight", "mtp.layers.0.self_attn.q_proj.weight")
HEADS = {
    "deepseek_v3": GLM,
    "deepseek_v32": GLM,
    "glm4_moe": GLM,
    "glm4_moe_lite": GLM,
    "glm4v_moe": GLM,
    "glm_moe_dsa": GLM,
    "hy_v3": GLM,
    "qwen3_5": QWEN,
    "qwen3_5_text": (*QWEN, "model.visual.blocks.0.attn.qkv.weight"),  # a tower that the class of the text leaves out
    "qwen3_next": (*QWEN, "mtp.layers.0.mlp.experts.3.up_proj.weight"),
    "qwen3_5_moe": (*QWEN, "mtp.layers.0.mlp.experts.gate_up_proj", "mtp.layers.0.mlp.experts.down_proj"),
    "deepseek_v4": ("mtp.0.e_proj.weight", "mtp.0.attn.wq_a.weight", "mtp.0.ffn.experts.0.w1.weight", "mtp.0.norm.weight"),
    "ernie4_5_moe": ("model.mtp_block.0.mlp.up_proj.weight", "model.mtp_emb_norm.0.weight", "model.mtp_linear_proj.0.weight"),
    "mimo_v2_flash": ("model.mtp.layers.0.eh_proj.weight", "model.mtp.layers.0.self_attn.q_proj.weight"),
    "nemotron_h": ("mtp.layers.0.eh_proj.weight", "mtp.layers.1.mixer.experts.0.up_proj.weight"),
    "exaone_moe": ("mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight"),
    "olmo_hybrid": ("mtp.layers.0.linear_attn.q_conv1d.weight",),
    "hy_v4": ("model.mtp_layers.0.eh_proj.weight", "model.mtp_layers.0.self_attn.indexer.wk.weight"),
}  # fmt: skip


def head(names: tuple[str, ...], past: str) -> dict[str, Tensor]:
    """Random tensors of these names: vectors in fp32, experts in one tensor, matrices in bfloat16."""
    torch.manual_seed(3)
    shapes: dict[str, tuple[int, ...]] = {"bias": (4,), "gate_up_proj": (4, 128, 64), "down_proj": (4, 64, 64)}
    found = {}
    for name in names:
        leaf = name.rpartition(".")[2]
        shape = shapes.get(leaf, (64,) if "norm" in name or leaf.endswith("bias") else (64, 64))
        found[name.format(past=past)] = torch.randn(shape, dtype=torch.float32 if len(shape) == 1 else torch.bfloat16)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", HEADS)
def test_a_prediction_head_is_in_every_checkpoint(tmp_path: Path, kind: str) -> None:
    made = tiny.model(kind)
    base = pico.save(made, tmp_path / "base", torch.bfloat16)
    prefix, blocks = block_list(skeleton.open_model(base))
    extra = head(HEADS[kind], f"{prefix}.{len(blocks)}")
    edit_tensors(base / "model.safetensors", lambda tensors: tensors | extra)
    pico.save_tokenizer(base)
    pico.train(made, tmp_path / "adapter", target_modules=["o_proj", "down_proj", "o_b_proj"])
    plan, result, _ = pico.merged(base, tmp_path / "adapter", tmp_path / "merged", dtype="bfloat16")
    assert sum(plan.carried.values()) == len(extra)
    assert result.ledger["base"]["carried for servers"] == len(extra)
    planned = pico.packed(tmp_path / "merged", tmp_path / "gptq", Grid(4, 32), dtype=torch.bfloat16)
    done = verify(tmp_path / "gptq", source=tmp_path / "merged", text="2 3 4 5 6")
    assert done.ok, done.message()
    assert sum(done.carried.values()) == len(extra)
    for folder in ("merged", "gptq"):
        written = Checkpoint(tmp_path / folder)
        for name, value in extra.items():
            stored = written.read(name)
            assert torch.equal(stored, value.to(stored.dtype)), (folder, name)
            assert value.dtype != torch.bfloat16 or stored.dtype == torch.bfloat16
    assert set(planned.carried) == set(plan.carried)
