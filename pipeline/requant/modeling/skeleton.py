"""A model's structure without weights: the modules transformers builds, on the meta device.

Answers what file names and shapes alone cannot: what bitsandbytes would have quantized, which weights are tied, what
a parameter is called in the checkpoint. Every matrix is a Linear here (`linears.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from requant.checkpoint.reader import Weights, quantization_in, read_json, stored_names
from requant.errors import library_call
from requant.modeling import config_limits, conversions, cut_linears, joined_parts, linears, moe, stored_parameters
from requant.modeling.families import EXPERT
from requant.modeling.model_classes import model_class
from requant.modeling.without_weights import without_weights

log = logging.getLogger(__name__)
_ADVICE = "take the config.json that belongs to the weights, or download the model again"


def open_model(path: Path, *, trust_remote_code: bool = False, split: bool = False) -> nn.Module:
    """`build` of a local model directory; experts that its files hold one by one are split, with `split` all."""
    config = load_config(path, trust_remote_code=trust_remote_code)
    return build(config, trust_remote_code=trust_remote_code, stored=lambda: stored_names(path), split=split)


def load_config(path: Path, *, trust_remote_code: bool = False, quantized: bool = False) -> Any:
    """The transformers config of a local model directory.

    Without the kernels that the file asks for: their names may be repositories whose code transformers would run. And
    without any `quantization_config`, unless `quantized`. Raises InputError for a file that transformers cannot read or
    with sizes that the weights beside it do not explain.
    """
    from transformers import AutoConfig

    file = path / "config.json"
    raw = read_json(file, constants=True)
    config_limits.check(path, raw)
    quantization_in(raw, file)  # else transformers fails on what is no object
    with library_call(f"{file}: transformers cannot read it", _ADVICE):
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        config.return_dict = config.get_text_config().return_dict = True  # else transformers' own forward fails
        config._attn_implementation = config._experts_implementation = None
    for section in (config, config.get_text_config()):
        if hasattr(section, "quantization_config") and not quantized:
            del section.quantization_config
    return config


def check_generation_config(path: Path) -> None:
    """Raise InputError for a generation_config.json that transformers does not load: then it loads no model either."""
    from transformers import GenerationConfig

    file = path / "generation_config.json"
    if file.exists():
        with library_call(f"{file}: transformers cannot read it", "correct or remove it"):
            GenerationConfig.from_pretrained(str(path))


def positions(config: Any) -> int | None:
    """The number of positions that a transformers config declares; None: none."""
    text = config.get_text_config()
    found = (getattr(text, key, None) for key in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((n for n in found if isinstance(n, int)), None)


def build(
    config: Any, *, trust_remote_code: bool = False, stored: Callable[[], Iterable[str]] = tuple, split: bool = False
) -> nn.Module:
    """The language model of `config`, with all its towers: parameters on the meta device, buffers on the CPU.

    Experts become Linears where checkpoints of the family hold them one by one, or this one does. stored: names of its
    tensors, asked for only where that decides. split: whether all do, also those that are read in pieces of one tensor.
    """
    file = Path(getattr(config, "_name_or_path", None) or "") / "config.json"
    with library_call(f"{file}: transformers cannot build a {str(config.model_type)[:80]} of it", _ADVICE):
        made = model_class(config, trust_remote_code=trust_remote_code)
        model = _from_config(made, config, trust_remote_code=trust_remote_code)
        model.tie_weights()  # building on meta parts them
        conversions.of(model)

    @cache
    def single() -> set[str]:
        """Names of the modules whose experts the checkpoint holds one by one, as stored and as the model calls them."""
        found = {match[1] for name in stored() if (match := EXPERT.fullmatch(name))}
        return found | {conversions.renamed(model, f"{name}.0").removesuffix(".0") for name in found}

    def is_single(name: str) -> bool:
        return split or conversions.single(model, name) or any(n in single() for n in spellings(model, name))

    every = conversions.of(model).converters
    stored_parameters.expose(model, every)
    linears.expose(model, is_single)
    joined_parts.expose(model, every)
    if cuts := cut_linears.rules(every):
        held = set(stored()) | {f"{name.rpartition('.')[0]}.weight" for name in stored()}  # of quantized ones too
        cut_linears.expose(model, cuts, [conversions.of(model).current(name) for name in sorted(held)])
    model.eval()
    return model  # type: ignore[no-any-return]


def _from_config(made: Any, config: Any, *, trust_remote_code: bool) -> Any:
    """The model of a class, or of an Auto class where code of the checkpoint's own is run, without weights."""

    def instance() -> Any:
        if hasattr(made, "from_config"):
            return made.from_config(config, trust_remote_code=trust_remote_code)
        return made._from_config(config)

    with without_weights():
        model = instance()
    if not any(buffer.is_meta for buffer in model.buffers()):
        return model
    with without_weights(large_on_meta=False):
        return instance()


def quantizable(model: nn.Module, skip: Iterable[str], *, version: int = 5) -> set[str]:
    """Module names that transformers + bitsandbytes would hold in 4 bits.

    nn.Linear exactly, or Conv1D, except `_keep_in_fp32_modules` and the names in `skip` (what was given as
    `llm_int8_skip_modules`); with an empty `skip`, transformers' own list instead: the output embedding, tied
    weights and the last module. Source: transformers quantizers/base.py `get_modules_to_not_convert`,
    integrations/bitsandbytes.py `replace_with_bnb_linear`. version: of transformers. 4 held experts and routers as
    Linears, and took subclasses of Linear too; 5 keeps experts fused and does not quantize them.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = [*(skip or _kept_by_transformers(model)), *(getattr(model, "_keep_in_fp32_modules", None) or [])]
    expert = {f"{name}.{n}" for name, m in moe.split_experts(model) for n, _ in m.named_modules()}
    return {
        name
        for name, module in model.named_modules()
        if (
            _version_4_linear(module, name) and not _kept_in_version_4(name, kept)
            if version == 4
            else type(module) in (nn.Linear, linears.TransposedLinear)
            and name not in expert
            and should_convert_module(name, kept)
        )
    }


def loaded_in_fp32(model: Any, dtype: torch.dtype) -> set[str]:
    """Parameters that transformers loads in fp32 although `dtype` is asked for, by the class's own list."""
    from transformers.core_model_loading import build_glob_alternation

    listed = list(model._get_dtype_plan(dtype)) if hasattr(model, "_get_dtype_plan") else []
    pattern = build_glob_alternation(listed)[0] if listed else None
    return {name for name, _ in model.named_parameters() if pattern and pattern.search(name)}


def _kept_by_transformers(model: Any) -> list[str]:
    """What transformers leaves in 16 bit by itself: tied weights, the head, the module of the last parameter.

    While it decides, tied weights are still parameters of their own, so that the last one is most often the head's.
    """
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    last = [name for name, _ in model.named_parameters(remove_duplicate=False)][-1]
    head = model.get_output_embeddings()
    heads = [name for name, module in model.named_modules() if head is not None and module is head]
    return sorted({name.removesuffix(".weight") for name in (*ties, *ties.values(), last, *heads)})


def _version_4_linear(module: nn.Module, name: str) -> bool:
    """A Linear of transformers 4: also the routers of mixtures of experts."""
    return linears.is_linear(module) or type(module).__name__.endswith("TopKRouter")


def _kept_in_version_4(name: str, kept: Iterable[str]) -> bool:
    """Whether transformers 4 left a module in 16 bit: `kept` has its last name, its full one or that of one around it.

    The latter anywhere in the name, as wrappers called towers with fewer outer names then.
    """
    return any(key in (name, name.rpartition(".")[2]) or f"{key}." in name for key in kept)


def conv1d_modules(model: nn.Module) -> set[str]:
    """Names of GPT-2 style Conv1D modules: their 16-bit weight is stored [in, out]."""
    return {name for name, module in model.named_modules() if type(module) is linears.TransposedLinear}


def tensor_names(model: nn.Module, stored: Iterable[str]) -> dict[str, str]:
    """Parameter name of the model -> name in the checkpoint.

    They differ by the base model's prefix, or by the renamings that transformers applies when it loads this model.
    """
    return found_names(model, (n for n, _ in model.named_parameters(remove_duplicate=False)), stored)


def unstored(model: nn.Module, names: Container[str]) -> list[str]:
    """Parameters of the model that are under no name of theirs among `names`: tied ones have several."""
    held = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in names}
    return [name for name, p in model.named_parameters() if id(p) not in held]


def found_names(model: nn.Module, names: Iterable[str], stored: Iterable[str]) -> dict[str, str]:
    """Those of the model's `names` that are stored -> their names in the checkpoint.

    A stored name that no renaming was meant for, but one matches, counts as it is: so transformers does.
    """
    every = sorted(stored)  # renamings that go together are decided by the first of their names
    have = {name: name for name in every} | {conversions.renamed(model, name): name for name in every}
    found = {}
    for name in names:
        spelled = next((n for n in spellings(model, name) if n in have), None)
        if spelled is not None:
            found[name] = have[spelled]
    return found


def spellings(model: nn.Module, name: str) -> tuple[str, str, str]:
    """A name as it is, without the base model's prefix, and with it: a checkpoint may use any of them."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    return name, name.removeprefix(prefix), prefix + name


def load_buffers(model: nn.Module, weights: Weights) -> None:
    """Give every buffer that a checkpoint of this class holds its stored value, where one is stored."""
    owners = {
        f"{prefix}.{leaf}" if prefix else leaf: (module, leaf)
        for prefix, module in model.named_modules()
        for leaf, buffer in module._buffers.items()
        if buffer is not None and leaf not in module._non_persistent_buffers_set
    }
    if not owners:
        return
    for name, stored in found_names(model, owners, weights).items():
        module, leaf = owners[name]
        module._buffers[leaf] = weights.read(stored).clone()


def buffers_to(model: nn.Module, device: torch.device, weights: Weights | None = None) -> None:
    """Move every buffer of a model, such as a rotary table, to `device`; parameters stay.

    Those that a checkpoint of this class holds are read from `weights` first.
    """
    if weights is not None:
        load_buffers(model, weights)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def tied_pair(model: nn.Module) -> tuple[str, str] | None:
    """(input embedding, output embedding) parameter names when the class ties them, else None.

    A wrapper and its text config may disagree on `tie_word_embeddings`: what counts is whether `tie_weights` made them
    one parameter.
    """
    names = {id(module): name for name, module in model.named_modules()}
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    if ends[1] is None or ends[0].weight is not ends[1].weight:
        return None
    return f"{names[id(ends[0])]}.weight", f"{names[id(ends[1])]}.weight"


def place(model: nn.Module, tensors: Mapping[str, torch.Tensor], *, transpose: bool = True) -> None:
    """Put real tensors where the model has meta parameters, by parameter name.

    transpose: Conv1D weights are [in, out], as in a 16-bit checkpoint; False: they are [out, in], as dequantized ones
    are.
    """
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if transpose and leaf == "weight" and type(module) is linears.TransposedLinear:
            tensor = tensor.T.contiguous()
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
