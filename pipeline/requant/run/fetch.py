"""Fetch: the local directory of a recipe's base, adapter or original, checked for its kind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from requant.errors import InputError
from requant.outgoing import masked
from requant.recipe.fields import Source
from requant.recipe.source_directories import near_miss, why_no_adapter, why_no_model

_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "spiece.model", "*.tiktoken", "*.txt")
_OF_ADAPTERS = ("*.bin", "README.md")  # pickles are seen, and never loaded; the card names the tool
_NOT_NEEDED = ("pytorch_model*.bin", "optimizer.bin", "*/*.bin", "original/*", "metal/*")  # gpt-oss: twice more


def fetch(
    source: Source,
    directory: Path,
    *,
    trust_remote_code: bool,
    kind: Literal["model", "adapter"] = "model",
    place: str = "",
) -> Path:
    """The local directory of a source.

    A hub id is downloaded to the hub cache (safetensors and small files only). Raises InputError for a path that does
    not exist, or a directory of another kind.
    place: file, line and key of the source, for messages.
    """
    lead = f"{place}: " if place else ""
    if source.is_local(directory):
        path = Path(source.resolve(directory))
        if not os.path.exists(path):
            raise InputError(f"{lead}{path}: no such directory{near_miss(source.path, path)}")
    else:
        path = _download(source, directory, lead, trust_remote_code=trust_remote_code, adapter=kind == "adapter")
    why = why_no_adapter(path) if kind == "adapter" else why_no_model(path)
    if why:
        raise InputError(f"{lead}{path if source.is_local(directory) else source.path}: {why}")
    return path


def _download(source: Source, directory: Path, lead: str, *, trust_remote_code: bool, adapter: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RevisionNotFoundError

    patterns = [*_PATTERNS, *(["*.py"] if trust_remote_code else []), *(_OF_ADAPTERS if adapter else ())]
    try:
        return Path(
            snapshot_download(
                source.path, revision=source.revision, allow_patterns=patterns, ignore_patterns=list(_NOT_NEEDED)
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(masked(str(error)).split())[:300].rstrip(".")
        meant = near_miss(source.path, directory / source.path)
        advice = "Check the name, HF_TOKEN for gated models, or begin a local path with ./"
        if isinstance(error, RevisionNotFoundError):
            advice = f"Remove the revision {source.revision!r}, or write a branch, tag or commit of {source.path}"
        elif meant.startswith(": did you mean"):
            advice = f"D{meant[3:]} {advice}"
        raise InputError(
            f"{lead}{source.path}: no such local directory, and the hub does not give it: {reason}. {advice}"
        ) from error
