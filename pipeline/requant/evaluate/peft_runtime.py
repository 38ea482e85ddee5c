"""The adapters of a merge plan applied to a model by PEFT, unmerged: the merge's reference.

PEFT finds tensors by their keys and silently ignores others. Adapters with other spellings of keys are therefore
written with PEFT's keys to a temporary directory first, and a tensor that PEFT still does not load is an error.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from requant.adapters.ia3 import Ia3
from requant.adapters.keys import PREFIX, adapter_names, clean
from requant.adapters.peft_directory import CONFIG, WEIGHTS, Adapter
from requant.adapters.stacked_lora import in_pefts_order
from requant.adapters.trained_tokens import TrainedTokens
from requant.checkpoint.reader import read_tensor
from requant.errors import StageError, library_call
from requant.merge.adapter_completeness import untargeted, untrained
from requant.merge.plan import MergePlan
from requant.modeling.joined_parts import JoinedEmbedding
from requant.runtime.library_imports import load_training_libraries


def attach(model: Any, plan: MergePlan | Path, *, structure: bool = False) -> Any:
    """The PEFT model of `model` with all adapters of the plan active.

    plan: or the directory of one adapter, loaded as it is. structure: `model` is on the meta device and has the
    vocabulary of the adapter; only the adapters' own parameters get values.

    Raises StageError when PEFT leaves a tensor out.
    """
    load_training_libraries()
    with without_gptqmodel():
        return _attached(model, plan, structure=structure)


def leaves_the_base_alone(plan: MergePlan) -> bool:
    """Whether the attached model with its adapters off is the base, bit for bit: plain LoRA beside its own modules."""
    plain = all(
        adapter.config.get("peft_type") == "LORA"
        and adapter.config.get("bias") in (None, "none")
        and not adapter.replaced
        and not adapter.expert_pairs
        for adapter in plan.adapters
    )
    return plain and plan.vocab_size is None


@contextlib.contextmanager
def without_gptqmodel() -> Iterator[None]:
    """Keep PEFT from importing gptqmodel, which prints a banner, changes the environment and patches libraries.

    PEFT asks for its class of packed linears at each module that an adapter touches; no model of ours holds one. Where
    gptqmodel is imported already, nothing changes.
    """
    from peft.import_utils import is_gptqmodel_available

    if "gptqmodel" in sys.modules:
        yield
        return
    sys.modules["gptqmodel"] = None  # type: ignore[assignment]  # an import of it fails, and no package is found
    is_gptqmodel_available.cache_clear()
    try:
        yield
    finally:
        del sys.modules["gptqmodel"]
        is_gptqmodel_available.cache_clear()


def _attached(model: Any, plan: MergePlan | Path, *, structure: bool) -> Any:
    import peft

    if isinstance(plan, Path):
        return peft.PeftModel.from_pretrained(model, str(plan), low_cpu_mem_usage=structure)
    if plan.vocab_size is not None and not structure:
        model.resize_token_embeddings(plan.vocab_size, mean_resizing=False)
    wrapped: Any = None
    tables = [f"{PREFIX}{n}." for n, m in model.named_modules() if isinstance(m, JoinedEmbedding)]
    names = ["default", *(f"adapter{i}" for i in range(1, len(plan.adapters)))]
    for name, one in zip(names, plan.adapters, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            modules = [n for n, _ in (wrapped.get_base_model() if wrapped else model).named_modules()]
            part = bool(untrained(one, modules) or untargeted(one))
            needs_export = part or _needs_export(one, plan)
            path = str(export(one, plan, Path(folder), only_held=part) if needs_export else one.path)
            options = {"adapter_name": name, "low_cpu_mem_usage": structure}
            with library_call(f"{one.path}: PEFT cannot load it", kind=StageError, passing=(torch.OutOfMemoryError,)):
                if wrapped is None:
                    wrapped = peft.PeftModel.from_pretrained(model, path, **options)
                result = wrapped.load_adapter(path, **options)
        missing = [key for key in (*result.missing_keys, *result.unexpected_keys) if not _of(key, tables)]
        if missing:
            raise StageError(
                f"{one.path}: PEFT {peft.__version__} does not load {len(missing)} tensors, e.g. {missing[0]}: the "
                "variant adapter cannot be measured. The merge does not use PEFT and is not affected"
            )
    if len(names) > 1 or plan.adapter.weight != 1:
        _activate(wrapped, names, plan)
    return wrapped


def _of(key: str, tables: Iterable[str]) -> bool:
    """Whether a key is the whole weight of an embedding in tables: the walk reads these from the adapter's file."""
    return any(key in (f"{table}weight", f"{table}base_layer.weight") for table in tables)


def export(adapter: Adapter, plan: MergePlan, folder: Path, *, only_held: bool = False) -> Path:
    """Write the adapter with the keys, module names and order of experts that PEFT expects on this base.

    Returns `folder`.
    only_held: target all modules that the file holds and no others: PEFT leaves out the ones that the settings do not
    name, and fills those that the file lacks with weights of its own.
    """
    from safetensors.torch import save_file

    names, experts = adapter_names(adapter.tensors), plan.unsloth_experts
    tensors = {}
    for spelled, key in adapter.keys.items():
        name = clean(spelled, names)
        if key is None or name is None:
            continue
        module = plan.renamed_modules.get(key.module, key.module)
        name = f"{PREFIX}{module}.{name.removeprefix(f'{PREFIX}{key.module}.')}" if module != key.module else name
        info = adapter.tensors[spelled]
        tensors[name] = in_pefts_order(read_tensor(info), experts[info]) if info in experts else read_tensor(info)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = dict(adapter.config)
    folds = {plan.renamed_modules.get(m, m): fold for m, fold in adapter.folds.items()}
    if folds and (plan.renamed_modules or only_held):
        rows_only = {m for m, fold in folds.items() if isinstance(fold, TrainedTokens)}
        inputs = sorted(m for m, fold in folds.items() if isinstance(fold, Ia3) and fold.inputs)
        config["target_modules"] = sorted(folds.keys() - rows_only or folds)
        config |= {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
        config |= {"feedforward_modules": inputs} if config.get("feedforward_modules") else {}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def _needs_export(adapter: Adapter, plan: MergePlan) -> bool:
    """Whether PEFT would not find the adapter's tensors by their present files and keys, or would read them wrongly."""
    if adapter.weights.name != WEIGHTS:
        return True
    names, experts = adapter_names(adapter.tensors), plan.unsloth_experts
    if any(info in experts for info in adapter.tensors.values()):
        return True
    return any(clean(key, names) != key for key in adapter.tensors) or any(
        m in plan.renamed_modules for m in adapter.folds
    )


def _activate(wrapped: Any, names: list[str], plan: MergePlan) -> None:
    """Activate all adapters at once, each with its weight; their deltas are added."""
    from peft.tuners.lora.layer import LoraLayer

    wrapped.base_model.set_adapter(names)
    for module in wrapped.modules():
        if isinstance(module, LoraLayer):
            for name, adapter in zip(names, plan.adapters, strict=True):
                module.set_scale(name, adapter.weight)
