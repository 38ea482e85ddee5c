"""The adapters of a merge plan, unmerged on a live model through the real PEFT: what the merge is compared with.

PEFT finds tensors by their keys and says nothing of those that it does not find: files in another spelling are written
again in PEFT's own to a temporary directory, and nothing may be left over.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from requant.adapters.keys import PREFIX, adapter_names, clean
from requant.adapters.peft_directory import CONFIG, WEIGHTS, Adapter
from requant.checkpoint.reader import read_tensor
from requant.errors import StageError
from requant.merge.plan import MergePlan


def attach(model: Any, plan: MergePlan | Path, *, structure: bool = False) -> Any:
    """The PEFT model of `model` with all adapters of the plan active; raises StageError when PEFT leaves a tensor out.

    In place of a plan: the adapter in a directory, as it is. structure: `model` has its parameters on the meta device and
    the vocabulary of the adapter; only the adapters' own get values.
    """
    import peft

    if isinstance(plan, Path):
        return peft.PeftModel.from_pretrained(model, str(plan), low_cpu_mem_usage=structure)
    if plan.vocab_size is not None and not structure:
        model.resize_token_embeddings(plan.vocab_size, mean_resizing=False)
    wrapped: Any = None
    names = ["default", *(f"adapter{i}" for i in range(1, len(plan.adapters)))]
    for name, one in zip(names, plan.adapters, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            path = str(export(one, plan, Path(folder)) if _rewritten(one, plan) else one.path)
            if wrapped is None:
                wrapped = peft.PeftModel.from_pretrained(model, path, adapter_name=name, low_cpu_mem_usage=structure)
            result = wrapped.load_adapter(path, adapter_name=name, low_cpu_mem_usage=structure)
        lost = [*result.missing_keys, *result.unexpected_keys]
        if lost:
            raise StageError(
                f"{one.path}: PEFT {peft.__version__} does not load {len(lost)} tensors, e.g. {lost[0]}: the variant adapter "
                "cannot be measured. The merge does not use PEFT and is not affected"
            )
    if len(names) > 1 or plan.adapter.weight != 1:
        _activate(wrapped, names, plan)
    return wrapped


def export(adapter: Adapter, plan: MergePlan, folder: Path) -> Path:
    """Write the adapter with the keys and module names that PEFT looks for on this base; returns `folder`."""
    from safetensors.torch import save_file

    names = adapter_names(adapter.tensors)
    tensors = {}
    for spelled, key in adapter.keys.items():
        wanted = clean(spelled, names)
        if key is None or wanted is None:
            continue
        there = plan.renamed_modules.get(key.module, key.module)
        wanted = f"{PREFIX}{there}.{wanted.removeprefix(f'{PREFIX}{key.module}.')}" if there != key.module else wanted
        tensors[wanted] = read_tensor(adapter.tensors[spelled])
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = dict(adapter.config)
    if plan.renamed_modules and adapter.folds:
        config["target_modules"] = sorted(plan.renamed_modules.get(m, m) for m in adapter.folds)
        config |= {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def _rewritten(adapter: Adapter, plan: MergePlan) -> bool:
    names = adapter_names(adapter.tensors)
    return any(clean(key, names) != key for key in adapter.tensors) or any(
        m in plan.renamed_modules for m in adapter.folds
    )


def _activate(wrapped: Any, names: list[str], plan: MergePlan) -> None:
    """All adapters at once, each with its weight: their deltas add up."""
    from peft.tuners.lora.layer import LoraLayer

    wrapped.base_model.set_adapter(names)
    for module in wrapped.modules():
        if isinstance(module, LoraLayer):
            for name, adapter in zip(names, plan.adapters, strict=True):
                module.set_scale(name, adapter.weight)
