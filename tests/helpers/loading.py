"""What other runtimes call the tensors of a checkpoint."""

from __future__ import annotations

from torch import Tensor


def runtime_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mixtral's tensors under transformers 5's module names instead of the checkpoint's."""
    known = {".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}

    def renamed(name: str) -> str:
        for old, new in known.items():
            name = name.replace(old, new)
        return name

    return {renamed(name): tensor for name, tensor in tensors.items()}
