"""What a directory is that was given as an adapter or a model, where it is neither.

Looks at names of files and at adapter_config.json, reads no weights.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from requant_eval import strict_json

ADAPTER = "adapter_config.json"
MODEL = "config.json"
_SHOWN = 5  # directories in a message
_CHECKPOINT = re.compile(r"(?:checkpoint|global_step|step|epoch|iter)[-_]?(\d+)", re.IGNORECASE)
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\|[^/]*\\[^/]*$")
_TOOLS = {
    "adapters.safetensors": "mlx-lm",
    "adapters.npz": "mlx-lm",
    "adapter_0.pt": "torchtune",
    "lit_model.pth.lora": "LitGPT",
    "pytorch_lora_weights.safetensors": "diffusers",
}
"""File -> the tool that writes an adapter so, in a layout that is not PEFT's."""
MLX = (
    "an mlx-lm adapter, not PEFT's: its matrices are stored the other way round and its scale has another meaning. "
    "Make a PEFT directory of it (lora_A = lora_a transposed, lora_B = lora_b transposed, lora_alpha = scale * rank), "
    "trained on a bitsandbytes or 16-bit base and not on mlx's 4 bits"
)


def why_no_adapter(path: Path) -> str | None:
    """Why a path that exists is no PEFT adapter directory, and what to write instead; None: it may be one."""
    if not path.is_dir():
        return _adapter_file(path)
    if (path / ADAPTER).is_file():
        config = _json(path / ADAPTER)
        mlx = "peft_type" not in config and ("fine_tune_type" in config or "lora_parameters" in config)
        return MLX if mlx else None
    inside = [d for d in _folders(path) if (d / ADAPTER).is_file()]
    if inside:
        return (
            f"no {ADAPTER} here, but in {_listed(inside)}: give one of these directories, "
            f"such as {path / inside[0].name}"
        )
    gguf = next(iter(sorted(path.glob("*.gguf"))), None)
    if gguf:
        return _gguf_adapter(gguf.name)
    tool = next((f"{name} is {tool}'s" for name, tool in _TOOLS.items() if (path / name).is_file()), None)
    if tool:
        return MLX if "mlx" in tool else f"no {ADAPTER}: {tool} layout: convert it to PEFT's first"
    if (path / MODEL).is_file():
        return (
            f"a full model ({MODEL}, no {ADAPTER}), not an adapter: what is merged already, or was trained as a "
            "whole, has nothing to merge. Give the directory that PEFT's save_pretrained wrote"
        )
    models = [d for d in _folders(path) if (d / MODEL).is_file()]
    if models:
        return f"no {ADAPTER} here; {_listed(models)} hold full models, not adapters"
    if any(path.glob("adapter_model*")):
        return f"no {ADAPTER} beside the adapter's weights: copy it from where PEFT's save_pretrained wrote it"
    return f"no {ADAPTER}; expected a directory written by PEFT's save_pretrained{_contents(path)}"


def why_no_model(path: Path) -> str | None:
    """Why a path that exists is no model directory, and what to write instead; None: it may be one."""
    if path.suffix == ".gguf":
        return (
            "a GGUF file: no adapter was trained on these numbers. Use the bitsandbytes 4-bit or 16-bit "
            "checkpoint (safetensors) that the adapter's base_model_name_or_path names"
        )
    if not path.is_dir():
        return f"a file: expected the directory that holds {MODEL} and the safetensors"
    weights = any(not f.name.startswith("adapter") for f in path.glob("*.safetensors"))
    if (path / ADAPTER).is_file() and not weights:
        trained_on = _json(path / ADAPTER).get("base_model_name_or_path")
        named = f", {trained_on}" if isinstance(trained_on, str) and trained_on else ""
        return f"an adapter's directory ({ADAPTER}, no model's weights): write the model it was trained on{named}"
    if (path / MODEL).is_file() and (path / ADAPTER).is_file():
        return (
            f"a model and an adapter in one directory ({MODEL} and {ADAPTER}): transformers would load the adapter "
            "with the model. Move the adapter to a directory of its own"
        )
    if (path / MODEL).is_file():
        return None
    inside = [d for d in (*_folders(path), *_folders(path / "snapshots")) if (d / MODEL).is_file()]
    if inside:
        return f"no {MODEL} here, but in {_listed(inside)}: give one of these directories, such as {inside[0]}"
    if (path / "params.json").is_file():
        return (
            f"no {MODEL}, but params.json: the model in its maker's own layout: use its transformers release "
            "(often with -hf in its name)"
        )
    if any(path.glob("*.gguf")):
        return "only GGUF weights: no adapter was trained on these. Use the model that the adapter names as its base"
    return f"{MODEL} is missing: expected a model's directory, with {MODEL} and safetensors{_contents(path)}"


def near_miss(spelled: str, path: Path) -> str:
    """`: did you mean ...?` for a path that does not exist, of what lies in its directory; else an empty text.

    spelled: the path as the user wrote it. path: the same, absolute.
    """
    if os.name == "posix" and _WINDOWS.match(spelled.removeprefix("./")):
        return ": a path of Windows: write where the directory is on this machine"
    missing = path
    while not os.path.exists(missing.parent) and missing.parent != missing.parent.parent:
        missing = missing.parent
    names = {f.name.lower(): f.name for f in _folders(missing.parent)}
    close = difflib.get_close_matches(missing.name.lower(), list(names), n=1)
    if close:
        found = str(missing.parent / names[close[0]])
        shown = str(Path(spelled).parent / names[close[0]]) if missing == path else found
        local = spelled.startswith("./") or "/" not in spelled
        return f": did you mean {'./' if local and missing == path else ''}{shown}?"
    if missing != path:
        return f": {missing} does not exist"
    every = sorted(names.values(), key=lambda name: (_kind(missing.parent / name), name))
    more = f" and {len(every) - _SHOWN} others" if len(every) > _SHOWN else ""
    return f": the directories there are {', '.join(every[:_SHOWN])}{more}" if every else ""


def _kind(path: Path) -> int:
    """What to name first: adapters, models, other directories."""
    return next((i for i, file in enumerate((ADAPTER, MODEL)) if (path / file).is_file()), 2)


def _folders(path: Path) -> list[Path]:
    """Directories in `path`: those with a number in their names first, the highest at the top."""
    try:
        found = [d for d in path.iterdir() if d.is_dir() and not d.name.startswith(".")]
    except OSError:
        return []

    def order(folder: Path) -> tuple[int, str]:
        match = _CHECKPOINT.fullmatch(folder.name)
        return (-int(match[1]) if match else 1, folder.name)

    return sorted(found, key=order)


def _listed(folders: Sequence[Path]) -> str:
    """Names of directories, the first marked as the latest where it is a checkpoint of several."""
    names = [f.name for f in folders]
    if len(names) > 1 and _CHECKPOINT.fullmatch(names[0]):
        names[0] += " (the latest)"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _adapter_file(path: Path) -> str:
    if path.suffix == ".gguf":
        return _gguf_adapter(path.name)
    return f"a file: expected the directory that holds {ADAPTER}"


def _gguf_adapter(name: str) -> str:
    return (
        f"{name} is a LoRA in GGUF, made for llama.cpp: use the PEFT directory that it was converted from "
        f"({ADAPTER} and adapter_model.safetensors)"
    )


def _contents(path: Path) -> str:
    names = sorted(f.name for f in path.iterdir())
    return f"; it holds {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}" if names else "; it is empty"


def _json(file: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where it is not one: what is wrong with it is said by who reads it."""
    try:
        value = strict_json.load(file, constants=True)
    except (OSError, strict_json.JsonError):
        return {}
    return value if isinstance(value, dict) else {}
