"""Gemma 3's GGUF file as a transformers checkpoint: weights, config, tokenizer, chat template.

Read with the `gguf` package alone, so the same files come out under any version of transformers. Four things differ:
GGUF's norms hold 1 + weight; its tensors have other names; it lists scores of tokens instead of merges; a base model
has no chat template, so Gemma's turns are written here (`TEMPLATE`).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
"""llama.cpp's types of tokens."""

TURN_END = "<end_of_turn>"
TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Turns must be user and assistant in turn, beginning with user') }}"
    "{%- endif -%}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n' }}"
    "{{ message['content'] | trim }}"
    "{{ '<end_of_turn>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"
)

WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def name_of(tensor: str) -> str:
    """transformers' name of one of GGUF's tensors."""
    stem = tensor.removesuffix(".weight")
    if stem in WHOLE:
        return f"{WHOLE[stem]}.weight"
    _, block, part = stem.split(".")
    return f"model.layers.{block}.{IN_BLOCK[part]}.weight"


def weights(reader: gguf.GGUFReader) -> dict[str, torch.Tensor]:
    """Every tensor, decoded and in bfloat16; the 1 that GGUF adds to norms is taken off in fp32 first."""
    state = {}
    for tensor in reader.tensors:
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if tensor.name.endswith("_norm.weight"):
            value = value - 1
        shape = [int(n) for n in reversed(tensor.shape)]
        state[name_of(tensor.name)] = torch.from_numpy(np.ascontiguousarray(value)).view(shape).to(torch.bfloat16)
    return state


def config(values: dict[str, Any]) -> dict[str, Any]:
    """config.json from the file's metadata; what GGUF does not say is Gemma 3's, as llama.cpp has it built in."""
    own = {key.removeprefix("gemma3."): value for key, value in values.items() if key.startswith("gemma3.")}
    layers, head = own["block_count"], own["attention.key_length"]
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "dtype": "bfloat16",
        "vocab_size": len(values["tokenizer.ggml.tokens"]),
        "hidden_size": own["embedding_length"],
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": layers,
        "num_attention_heads": own["attention.head_count"],
        "num_key_value_heads": own["attention.head_count_kv"],
        "head_dim": head,
        "query_pre_attn_scalar": head,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": round(own["attention.layer_norm_rms_epsilon"], 12),
        "max_position_embeddings": own["context_length"],
        "sliding_window": own["attention.sliding_window"],
        "layer_types": ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(layers)],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "default", "rope_theta": own["rope.freq_base"]},
        },
        "tie_word_embeddings": True,
        "bos_token_id": values["tokenizer.ggml.bos_token_id"],
        "eos_token_id": values["tokenizer.ggml.eos_token_id"],
        "pad_token_id": values["tokenizer.ggml.padding_token_id"],
    }


def merges(pieces: Sequence[str], vocabulary: set[str]) -> list[tuple[str, str]]:
    """The pairs that make `pieces`, in their order: sentencepiece merges to the token of the highest score first."""
    return [
        (piece[:i], piece[i:])
        for piece in pieces
        for i in range(1, len(piece))
        if piece[:i] in vocabulary and piece[i:] in vocabulary
    ]


def tokenizer(values: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json: sentencepiece's BPE with byte fallback, spaces as "▁", BOS in front.

    Runs of spaces, tabs and line ends are tokens of the user in GGUF. They are added tokens, found before BPE.
    """
    kinds, scores = values["tokenizer.ggml.token_type"], values["tokenizer.ggml.scores"]
    # A token of the user is stored with plain spaces; the text that BPE sees has "▁" in their place.
    tokens = [t.replace(" ", "▁") for t in values["tokenizer.ggml.tokens"]]
    bos, unknown = (tokens[values[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "unknown"))
    text = [i for i, kind in enumerate(kinds) if kind in (NORMAL, USER_DEFINED)]
    users = [i for i in text if kinds[i] == USER_DEFINED]
    ordered = users + sorted((i for i in text if kinds[i] == NORMAL), key=lambda i: -scores[i])
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [i for i, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)]
    front = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **plain, "special": kinds[i] == CONTROL} for i in added],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [front, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [front, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges([tokens[i] for i in ordered], {tokens[i] for i in text}),
        },
    }  # fmt: skip


def convert(file: Path, out: Path) -> None:
    """Write the checkpoint of a GGUF file into the directory `out`."""
    reader = gguf.GGUFReader(file)
    values = {key: field.contents() for key, field in reader.fields.items()}
    if values["general.architecture"] != "gemma3" or values["tokenizer.ggml.model"] != "llama":
        raise SystemExit(f"{file}: holds {values['general.architecture']}, expected gemma3 with sentencepiece tokens")
    tokens = values["tokenizer.ggml.tokens"]
    special = {f"{name}_token": tokens[values[f"tokenizer.ggml.{key}_token_id"]] for name, key in (
        ("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))}  # fmt: skip
    settings = {"tokenizer_class": "GemmaTokenizer", "model_max_length": values["gemma3.context_length"],
                "add_bos_token": True, "clean_up_tokenization_spaces": False, **special}  # fmt: skip
    own = config(values)
    ends = [own["eos_token_id"], tokens.index(TURN_END)]
    generation = {"bos_token_id": own["bos_token_id"], "eos_token_id": ends, "pad_token_id": own["pad_token_id"]}
    files = {"config": own, "generation_config": generation, "tokenizer": tokenizer(values)}
    for name, content in (files | {"tokenizer_config": settings}).items():
        (out / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    save_file(weights(reader), out / "model.safetensors", metadata={"format": "pt"})
