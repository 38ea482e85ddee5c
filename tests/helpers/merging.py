"""Names, settings and ledgers that tests of the merge share."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from requant.adapters import peft_directory
from requant.checkpoint.reader import Checkpoint
from requant.merge.plan import MergePlan
from requant.merge.stage import MergeResult

# fp32 throughout: sums of 64 to 128 products in another order, through two blocks.
FP32 = 1e-5


def ledger(plan: MergePlan, result: MergeResult) -> None:
    """Every tensor on both sides is counted exactly once."""
    base, adapter = result.ledger["base"], result.ledger["adapter"]
    assert sum(base.values()) == len(Checkpoint(plan.base.checkpoint.path)) + plan.untied
    (one,) = plan.adapters
    assert adapter["consumed"] == len(load_file(one.path / peft_directory.WEIGHTS)) - one.copies
    used = (
        sum(len(f.tensors) for f in one.folds.values())
        + len(one.replaced)
        + 2 * len(one.expert_pairs)
        + len(one.shared)
    )
    assert used == adapter["consumed"]
    assert result.bytes == sum(s.nbytes for s in plan.slots(torch.float32))


Q = "base_model.model.model.layers.0.self_attn.q_proj"
NAME = "model.layers.0.self_attn.q_proj.weight"
