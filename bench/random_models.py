"""Random bf16 checkpoints at the shapes of big models, for benches that need no trained one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a Llama, or with experts of a Qwen 3 MoE; `layers` of the whole model.

    intermediate: of one expert, where there are any. head: hidden / heads, unless said.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    layers: int
    head: int = 0
    experts: int = 0
    experts_a_token: int = 0

    @property
    def head_dim(self) -> int:
        return self.head or self.hidden // self.heads

    def import_model(self) -> None:
        """Import the class's modules, which takes a second or two that are not what a bench measures."""
        kind = "qwen3_moe" if self.experts else "llama"
        import_module(f"transformers.models.{kind}.modeling_{kind}")

    def config(self, layers: int) -> Any:
        """The configuration of transformers, with `layers` blocks."""
        from transformers import LlamaConfig, Qwen3MoeConfig

        common: dict[str, Any] = {
            "hidden_size": self.hidden, "num_hidden_layers": layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim, "vocab_size": self.vocabulary,
            "tie_word_embeddings": False, "dtype": "bfloat16", "max_position_embeddings": 8192,
        }  # fmt: skip
        if not self.experts:
            about = {"rope_theta": 500000.0, "architectures": ["LlamaForCausalLM"]}
            return LlamaConfig(intermediate_size=self.intermediate, **common, **about)
        return Qwen3MoeConfig(
            moe_intermediate_size=self.intermediate, num_experts=self.experts, norm_topk_prob=True,
            num_experts_per_tok=self.experts_a_token, architectures=["Qwen3MoeForCausalLM"], **common,
        )  # fmt: skip

    def tensors(self, layers: int) -> dict[str, tuple[int, ...]]:
        """Name on disk -> shape, in the order of the file: experts one by one, as the checkpoints of Qwen have them."""
        wide = (self.vocabulary, self.hidden)
        ends: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": wide, "lm_head.weight": wide, "model.norm.weight": (self.hidden,)
        }  # fmt: skip
        blocks = {f"model.layers.{i}.{n}.weight": s for i in range(layers) for n, s in self._block()}
        return ends | blocks

    def _block(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Modules of one block and the shapes of their weights."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "self_attn.q_proj", (queries, self.hidden)
        yield "self_attn.k_proj", (keys, self.hidden)
        yield "self_attn.v_proj", (keys, self.hidden)
        yield "self_attn.o_proj", (self.hidden, queries)
        if self.experts:
            yield "self_attn.q_norm", (self.head_dim,)
            yield "self_attn.k_norm", (self.head_dim,)
            yield "mlp.gate", (self.experts, self.hidden)
        for mlp in [f"mlp.experts.{e}" for e in range(self.experts)] or ["mlp"]:
            yield f"{mlp}.gate_proj", (self.intermediate, self.hidden)
            yield f"{mlp}.up_proj", (self.intermediate, self.hidden)
            yield f"{mlp}.down_proj", (self.hidden, self.intermediate)
        yield "input_layernorm", (self.hidden,)
        yield "post_attention_layernorm", (self.hidden,)


def _llama(hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int, layers: int) -> Shape:
    return Shape(
        hidden=hidden, intermediate=intermediate, heads=heads, kv_heads=kv_heads, vocabulary=vocabulary, layers=layers
    )


SHAPES = {
    "llama-3-8b": _llama(4096, 14336, 32, 8, 128256, 32),
    "llama-3-70b": _llama(8192, 28672, 64, 8, 128256, 80),
    "smollm2-135m": _llama(576, 1536, 9, 3, 49152, 30),  # one that a CPU can do
    "pico": _llama(256, 512, 4, 2, 512, 2),
    "qwen3-30b-a3b": Shape(
        hidden=2048, intermediate=768, heads=32, kv_heads=4, head=128, vocabulary=151936, layers=48,
        experts=128, experts_a_token=8,
    ),
    "pico-moe": Shape(
        hidden=256, intermediate=128, heads=4, kv_heads=2, head=128, vocabulary=512, layers=2,
        experts=8, experts_a_token=2,
    ),
}  # fmt: skip


def build(folder: Path, shape: str, layers: int) -> None:
    """Write a checkpoint of random bf16 weights and a tokenizer; the model is never whole in memory."""
    import torch
    from tokenizers import Tokenizer, models  # gptqmodel does not load a model without one

    from requant.checkpoint.writer import CheckpointWriter, Slot

    sizes = SHAPES[shape]
    folder.mkdir(parents=True)
    sizes.config(layers).save_pretrained(folder)
    words = {f"t{i}": i for i in range(sizes.vocabulary)}
    Tokenizer(models.WordLevel(words, "t0")).save(str(folder / "tokenizer.json"))
    text = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t1", "pad_token": "t2", "unk_token": "t0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(text))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    tensors = sizes.tensors(layers)
    with CheckpointWriter(folder, [Slot(n, torch.bfloat16, s) for n, s in tensors.items()], max_bytes=10**9) as writer:
        for name, size in tensors.items():
            tensor = torch.empty(size, dtype=torch.bfloat16, device=device)
            writer.write(name, tensor.fill_(1) if len(size) == 1 else tensor.normal_(0, 0.02, generator=generator))
        writer.close()
