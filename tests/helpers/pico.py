"""Random two-layer models and adapters on disk, built by the real libraries.

These are transformers, PEFT and bitsandbytes.

Tests build the real thing with the real libraries, run ours on the files, and compare logits with theirs.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from requant import merge
from requant.adapters import peft_directory
from requant.checkpoint.reader import Checkpoint
from requant.checkpoint.writer import CheckpointWriter
from requant.merge import selftest
from requant.merge.base_weights import Nf4Settings
from requant.merge.plan import MergePlan
from requant.merge.stage import MergeResult
from requant.modeling import skeleton
from requant.modeling.model_classes import pretrained
from requant.numerics.grid import Grid, find_scales, round_to_grid
from requant.quantize import gptq_files
from requant.quantize import plan as layout
from requant.run import prepare

VOCABULARY = 96
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_OTHER: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {k: v for k, v in _SMALL.items() if k != "num_key_value_heads"},
    "opt": {
        "vocab_size": VOCABULARY, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "word_embed_proj_dim": 64, "pad_token_id": 0,
    },
    "gemma": _SMALL | {"head_dim": 16},
    "gemma2": _SMALL | {"head_dim": 16, "sliding_window": 8},
    "gemma3_text": _SMALL | {"head_dim": 16, "sliding_window": 8},
    "qwen3": _SMALL | {"head_dim": 16},
    "cohere2": _SMALL | {"head_dim": 16, "sliding_window": 8},
    "mixtral": _SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": _SMALL | _EXPERTS | {"shared_expert_intermediate_size": 64},
    "qwen3_moe": _SMALL | _EXPERTS | {"head_dim": 16},
    "olmoe": _SMALL | _EXPERTS,
}  # fmt: skip


def config(kind: str = "llama", **changes: Any) -> Any:
    """The transformers config of a pico model."""
    return transformers.AutoConfig.for_model(kind, **(_OTHER.get(kind, _SMALL) | changes))


def model(kind: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """A random fp32 causal LM in eval mode; norms and biases are random, so losing one shows."""
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(config(kind, **changes), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embed" not in name and "lm_head" not in name:
                parameter.mul_(2.5)  # at the default 0.02 a block hardly moves the residual stream
    return made


def save(made: Any, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a copy in `dtype`; `made` is rounded to the same values and stays fp32."""
    made.to(dtype).save_pretrained(path)
    made.float()
    return path


def ids(batch: int = 2, length: int = 24, seed: int = 7) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(made: Any, tokens: Tensor | None = None) -> Tensor:
    out: Tensor = made(input_ids=ids() if tokens is None else tokens).logits
    return out.double()


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference as a share of the reference's largest magnitude."""
    return float((a - b).abs().max() / b.abs().max())


def train(
    base: Any, path: Path, *, scale: float = 0.05, config: peft.PeftConfig | None = None, seed: int = 11, **lora: Any
) -> Any:
    """Add a random, 'trained' adapter to `base`, save it to `path`, return the PEFT model.

    A LoRA of these options, or any `config`. alpha != r always: a wrong scaling must show.
    """
    options: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    wrapped = peft.get_peft_model(base, config or peft.LoraConfig(**(options | lora)))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if not parameter.requires_grad:
                continue
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            else:
                parameter.add_(torch.randn_like(parameter) * scale)
    wrapped.save_pretrained(path)
    return wrapped.eval()


def edit_adapter(path: Path, **changes: Any) -> None:
    """Change adapter_config.json; a value of None removes the key."""
    file = path / "adapter_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_tensors(file: Path, **changes: Any) -> None:
    """Rewrite a safetensors file; `drop`, `add` and `change` (name -> function)."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    for name in changes.get("drop", ()):
        del tensors[name]
    tensors |= changes.get("add", {})
    for name, function in changes.get("change", {}).items():
        tensors[name] = function(tensors[name]).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def planned(base: Path, weighted: list[tuple[Path, float]], simulate: Nf4Settings | None = None) -> MergePlan:
    """The plan of a merge. weighted: adapters, each with its weight."""
    adapters = [peft_directory.load(a, weight=w) for a, w in weighted]
    return prepare.plan_merge(base, adapters, simulate, trust_remote_code=False)[0]


def merged(
    base: Path,
    adapter: Path | list[tuple[Path, float]],
    out: Path,
    *,
    dtype: Any = "float32",
    simulate: Nf4Settings | None = None,
) -> tuple[MergePlan, MergeResult, selftest.SelfTest]:
    """Plan, merge and self-test everything, as `requant run` does."""
    plan = planned(base, adapter if isinstance(adapter, list) else [(adapter, 1.0)], simulate)
    out.mkdir(exist_ok=True)
    result = merge.merge(plan, out, dtype=dtype)
    return plan, result, selftest.self_test(plan, out, tensors=1000, rows=4)


def save_tokenizer(path: Path) -> None:
    """A tokenizer of as many words as the models know, for loaders that insist on one."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", eos_token="2").save_pretrained(path)


def reload(path: Path) -> Any:
    """transformers' model of a directory in fp32; warnings about weights are errors."""
    config = transformers.AutoConfig.from_pretrained(path)
    loaded, info = pretrained(config, path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["unexpected_keys"], info["unexpected_keys"]
    assert not info["mismatched_keys"], info["mismatched_keys"]
    return loaded.eval()


def save_4bit(source: Path, out: Path, **options: Any) -> Path:
    """Quantize a saved 16-bit model with transformers and bitsandbytes and save it as a base."""
    quantize(source, **options).save_pretrained(out)
    return out


def quantize(source: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **options)
    of = transformers.AutoConfig.from_pretrained(source)
    return pretrained(of, source, quantization_config=config, dtype=dtype, device_map={"": "cpu"})


def reload_4bit(path: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model of a base that bitsandbytes saved, as training loads it."""
    return pretrained(transformers.AutoConfig.from_pretrained(path), path, dtype=dtype, device_map={"": "cpu"})


def live_4bit(made: Any) -> Any:
    """Let a bitsandbytes model compute in fp32, on its weights in the dtypes that training casts them to."""
    import bitsandbytes.functional as bnb
    from bitsandbytes.nn import Linear4bit

    packed = set()
    for module in made.modules():
        if isinstance(module, Linear4bit):
            seen = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state).to(module.compute_dtype).float()
            module.forward = partial(_linear, module, seen)
            packed.add(id(module.weight))
    for parameter in made.parameters():
        if id(parameter) not in packed and parameter.dtype.is_floating_point:
            parameter.data = parameter.data.float()
    return made.eval()


def _linear(module: Any, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, weight, module.bias)


def linears(made: nn.Module) -> list[str]:
    return [name for name, module in made.named_modules() if type(module) is nn.Linear]


def packed(source: Path, out: Path, grid: Grid, *, dtype: torch.dtype = torch.float16, **options: Any) -> layout.Plan:
    """A GPTQ checkpoint, or one of another `format`, of a saved model, rounded to nearest: without calibration."""
    checkpoint = Checkpoint(source)
    made = skeleton.open_model(source)
    settings = layout.Settings(grid=grid, overrides=options.pop("overrides", ()), format=options.pop("format", "gptq"))
    planned = layout.plan(checkpoint, made, settings, dtype, where=source)
    names, transposed = skeleton.tensor_names(made, checkpoint), skeleton.conv1d_modules(made)
    out.mkdir(exist_ok=True)
    with CheckpointWriter(out, planned.slots, **options) as writer:
        slots = {s.name: s for s in planned.slots}
        for module, own in planned.grids.items():
            stored = names[f"{module}.weight"]
            weight = checkpoint.read(stored).float()
            weight = weight.T.contiguous() if module in transposed else weight
            scales = find_scales(weight, torch.ones(weight.shape[1]), own)
            codes = round_to_grid(weight, scales, own)
            parts = planned.format.pack(codes, scales.scale, scales.zero, own.bits, symmetric=own.symmetric)
            for suffix, tensor in parts.items():
                writer.write(f"{stored.removesuffix('weight')}{suffix}", tensor)
        for name in set(slots) & set(checkpoint):
            writer.write(name, checkpoint.read(name).to(slots[name].dtype))
        writer.close()
    gptq_files.write_small_files(source, out, planned, settings, dtype=dtype, damp=0.01, meta={"tool": "requant"})
    return planned
