"""Outside readers: what a server, or a format's own library, makes of files called good."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from campaigns import verdicts
from campaigns.workshop import Workshop

log = logging.getLogger(__name__)


def library_refusal(folder: Path, pattern: str = "*.safetensors") -> str:
    """Why the safetensors library refuses a file of the folder; "" when it reads every tensor."""
    for file in sorted(folder.glob(pattern)):
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - no dict
                    opened.get_tensor(name)
        except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            log.info("%s: %s", file, error)
            return f"safetensors refuses {file.name}"
    return ""


def tensors_of(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def values_differ(file: Path, original: Path) -> str:
    """Whether a file holds other tensors than the original; "" when they are the same, bit by bit."""
    mine, theirs = tensors_of(file), tensors_of(original)
    if mine.keys() != theirs.keys():
        return "other tensors"
    same = (torch.equal(mine[n].reshape(-1).view(torch.uint8), theirs[n].reshape(-1).view(torch.uint8)) for n in mine)
    return "" if all(same) else "other values"


def not_finite(folder: Path) -> str:
    """The first tensor with a value that is no number; "" when there is none."""
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in tensors_of(file).items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
                return f"{name} is not finite"
    return ""


def load_model(folder: str) -> None:
    """Load a 16-bit model and its tokenizer with transformers, as a server does; raises when anything is off."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, told = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    bad = {k: list(v)[:2] for k, v in told.items() if v and k in ("missing_keys", "mismatched_keys", "unexpected_keys")}
    if bad:
        raise ValueError(f"transformers: {bad}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("two words", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        model(input_ids=ids)


def load_configs(folder: str) -> None:
    """Read a checkpoint's config and tokenizer with transformers; raises as a server would."""
    from transformers import AutoConfig, AutoTokenizer

    AutoConfig.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)("two words")


def outside(shop: Workshop, function: str, folder: Path) -> str:
    """Run a function of this file on a folder in a process of its own: why it failed, "" when it did not."""
    end = shop.requant.run([f"campaigns.judges:{function}", folder], cpu=30)
    return "" if end.code == 0 else f"{function}: {verdicts.fault_of(end) or end.code}"


def strict_json_lines(file: Path) -> str:
    """Why a file of JSON rows is none, by Python's own reader; "" when every line is read."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (UnicodeDecodeError, OSError) as error:
        return str(error)[:80]
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                json.loads(line)
        except (ValueError, RecursionError) as error:
            return f"line {number}: {str(error)[:60]}"
    return ""
