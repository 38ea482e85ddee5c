"""Inputs of `bench/whole.py`: base, adapter, short and long texts, recipe.

    python bench/whole_inputs.py smollm2 FOLDER [--work recipes/smollm2-pydocs/work] [sizes]
    python bench/whole_inputs.py random FOLDER [--shape llama-3-8b] [--layers 32] [sizes]

smollm2: the demo's base, adapter and texts; without --work's files its prepare.py makes them from packages.
random: an NF4 base of random weights (bitsandbytes, nested scales), a random LoRA on every linear, random tokens: the
work does not depend on them.
sizes: --documents 200 short ones of about --short 150 tokens, as chats (random: as text); --long 16 of --window tokens
(smollm2: the held-out texts in windows of that length); --samples windows of calibration of --length tokens
(smollm2: 68 of 1024, as many as the demo's texts hold).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "recipes" / "smollm2-pydocs"
CHARACTERS = 3.6  # a token, of the demo's texts
TEMPLATE_TOKENS = 30  # of a chat's template
SEED = 11
SHARES = {"train": 0.8, "general-calibration": 0.2}  # of 68 x 1024 tokens: as much as the demo's texts hold


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, make in (("smollm2", smollm2), ("random", random)):
        one = kinds.add_parser(kind)
        one.set_defaults(make=make)
        one.add_argument("folder", type=Path)
        one.add_argument("--documents", type=int, default=200)
        one.add_argument("--short", type=int, default=150)
        one.add_argument("--long", type=int, default=16)
        one.add_argument("--window", type=int, default=1024 if kind == "smollm2" else 2048)
        one.add_argument("--samples", type=int, default=68 if kind == "smollm2" else 128)
        one.add_argument("--length", type=int, default=1024 if kind == "smollm2" else 2048)
        if kind == "smollm2":
            one.add_argument("--work", type=Path, default=DEMO / "work")
        else:
            one.add_argument("--shape", default="llama-3-8b")
            one.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    args.make(args)


def smollm2(args: argparse.Namespace) -> None:
    work = args.work.resolve()
    if not (work / "texts").exists() or not (work / "base-nf4").exists():
        subprocess.run([sys.executable, DEMO / "prepare.py", "--out", work], check=True)
    texts = {name: list(_texts(work / "texts" / f"{name}.jsonl")) for name in ("heldout", "general")}
    wanted = round((args.short - TEMPLATE_TOKENS) * CHARACTERS)
    chats = list(_chats([*texts["heldout"], *texts["general"]], wanted))[: args.documents]
    _write(args.folder / "short.jsonl", chats)
    _write(args.folder / "long.jsonl", ({"text": text} for text in texts["heldout"][: args.long]))
    mix = [{"data": {"path": str(work / "texts" / f"{n}.jsonl")}, "share": share} for n, share in SHARES.items()]
    _recipe(args, base=work / "base-nf4", adapter=DEMO / "adapter", group=64, calibration={"mix": mix})


def random(args: argparse.Namespace) -> None:
    import torch
    from random_models import SHAPES
    from stream import nf4_base

    base, adapter = nf4_base(args, args.folder)
    drawn = torch.Generator().manual_seed(SEED)

    def texts(count: int, least: int, most: int) -> Iterator[dict[str, str]]:
        """Random texts of least to most tokens."""
        for length in torch.randint(least, most + 1, (count,), generator=drawn).tolist():
            ids = torch.randint(3, SHAPES[args.shape].vocabulary, (length,), generator=drawn).tolist()
            yield {"text": " ".join(f"t{i}" for i in ids)}

    spread = args.short // 3
    _write(args.folder / "short.jsonl", texts(args.documents, args.short - spread, args.short + spread))
    _write(args.folder / "long.jsonl", texts(args.long, args.window, args.window))
    _write(args.folder / "train.jsonl", texts(args.samples * 5 // 4, args.length, args.length))
    calibration = {"data": {"path": "./train.jsonl"}}
    _recipe(args, base=base.resolve(), adapter=adapter.resolve(), group=128, calibration=calibration)


def _texts(file: Path) -> Iterator[str]:
    for line in file.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)["text"]


def _chats(texts: Iterable[str], characters: int) -> Iterator[dict[str, Any]]:
    """Conversations of one question and one answer of different lengths, about `characters` long."""
    count = 0
    for text in texts:
        at = 0
        while at < len(text):
            length = round(characters * (0.7 + 0.6 * (count * 0.618 % 1)))  # evenly from 70 to 130 %
            part = text[at : at + length]
            at, count = at + length, count + 1
            if len(part) >= characters // 2:
                question, answer = part[: len(part) // 4], part[len(part) // 4 :]
                yield {"messages": [{"role": "user", "content": f"Go on: {question}"},
                                    {"role": "assistant", "content": answer}]}  # fmt: skip


def _write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _recipe(args: argparse.Namespace, *, base: Path, adapter: Path, group: int, calibration: dict[str, Any]) -> None:
    """Write FOLDER/recipe.yaml; JSON is YAML."""
    sets = [{"name": name, "data": {"path": f"./{name}.jsonl"}} for name in ("short", "long")]
    document = {
        "name": "whole",
        "base": {"model": str(base)},
        "adapter": str(adapter),
        "quantize": {"bits": 4, "group_size": group},
        "calibration": {**calibration, "samples": args.samples, "length": args.length},
        "evaluate": {"window": args.window, "sets": sets},
        "output": {"dir": "./runs"},
    }
    (args.folder / "recipe.yaml").write_text(json.dumps(document, indent=1) + "\n")
    print(args.folder / "recipe.yaml")


if __name__ == "__main__":
    main()
