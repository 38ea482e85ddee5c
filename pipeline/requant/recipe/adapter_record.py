"""What an adapter's files record of its base: name, revision, where its config.json is.

Reads adapter_config.json and the base's config.json, and no weights.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from requant.errors import InputError
from requant.recipe.fields import looks_local
from requant.recipe.source_directories import near_miss, why_no_adapter, why_no_model
from requant_eval import strict_json

CONFIG = "adapter_config.json"
BASE_CONFIG = "config.json"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")


@dataclass(frozen=True, kw_only=True)
class BaseRecord:
    """The base that an adapter was trained on, as far as it can be had.

    directory: of its config.json, here or in the hub cache; None: not found. local: `model` is a directory here.
    revision: the recorded one, if it exists. dropped: why the recorded one is left out, for a comment.
    why_no_model: what a directory is that holds no model.
    """

    model: str
    local: bool
    directory: Path | None
    revision: str | None = None
    dropped: str | None = None
    why_no_model: str | None = None


def read_adapter_config(adapter: str) -> tuple[Path, dict[str, Any]]:
    """(file, content) of the adapter's configuration, downloaded if `adapter` is a hub id.

    Raises InputError when there is none, or it is not readable.
    """
    file = _config_file(adapter)
    return file, read_object(file)


def read_object(file: Path, advice: str = "save the file again from PEFT") -> dict[str, Any]:
    """A JSON object; raises InputError with `advice` when the file holds none."""
    try:
        value = strict_json.load(file, constants=True)
    except strict_json.JsonError as error:
        place = f"{file}:{error.line}" if error.line else str(file)
        raise InputError(f"{place}: {error}: {advice}") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error}): {advice}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected a JSON object, got {type(value).__name__}: {advice}")
    return value


def read_base(file: Path, config: dict[str, Any]) -> BaseRecord:
    """The base that the configuration in `file` records; raises InputError when it records none."""
    model = config.get("base_model_name_or_path")
    if not isinstance(model, str) or not model:
        found = "is missing" if model is None else f"is {model!r}"
        raise InputError(
            f"{file}: base_model_name_or_path {found}: expected the hub id or directory of the "
            "model that was fine-tuned: write it there"
        )
    recorded = config.get("revision")
    revision = recorded if isinstance(recorded, str) and recorded else None
    path = Path(os.path.expanduser(model))
    if not os.path.isdir(path) and is_hub_id(model):
        return _on_hub(model, revision)
    dropped = f"the adapter records {_printable(revision)}; left out, since only a hub id has one" if revision else None
    if not os.path.isdir(path):
        return BaseRecord(model=model, local=False, directory=None, dropped=dropped)
    why = why_no_model(path)
    return BaseRecord(model=model, local=True, directory=None if why else path, dropped=dropped, why_no_model=why)


def is_hub_id(text: str) -> bool:
    """Whether the spelling is that of a hub id."""
    return not looks_local(text) and bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", text, re.ASCII))


def lacks_tokenizer(adapter: str, base: BaseRecord) -> bool:
    """Whether neither the adapter nor a base that is here has a vocabulary."""
    folders = (Path(os.path.expanduser(adapter)), Path(os.path.expanduser(base.model)))
    return base.local and folders[0].is_dir() and not any((d / name).exists() for d in folders for name in _VOCABULARY)


def _on_hub(model: str, revision: str | None) -> BaseRecord:
    """A base with a hub's id; asks the hub once whether the recorded revision exists."""
    exists, directory = _ask_hub(model, revision)
    if revision is None:
        return BaseRecord(model=model, local=False, directory=directory)
    if exists or (exists is None and (revision == "main" or _COMMIT.fullmatch(revision))):
        return BaseRecord(model=model, local=False, directory=directory, revision=revision)
    shown = _printable(revision)
    if exists is None:
        why = f"the adapter records {shown}; left out, since the hub could not be asked whether the base has it"
    else:
        why = f"the adapter records {shown}; left out, since the base has no such branch, tag or commit"
        directory = _ask_hub(model, None)[1]
    return BaseRecord(model=model, local=False, directory=directory, dropped=why)


def _printable(revision: str) -> str:
    """A revision in quotes, on one line."""
    return repr("".join(character if character.isprintable() else " " for character in revision))


def _ask_hub(model: str, revision: str | None) -> tuple[bool | None, Path | None]:
    """(whether the revision exists, None if not known; the directory of config.json, if it can be had)."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HTTPError, RevisionNotFoundError  # type: ignore[attr-defined]

    try:
        commit, reached = HfApi().model_info(model, revision=revision, timeout=10).sha, True
    except RevisionNotFoundError:
        return False, None
    except (HTTPError, OSError, ValueError):
        commit, reached = revision, False
    try:
        file = hf_hub_download(model, BASE_CONFIG, revision=commit, local_files_only=not reached)
    except (HTTPError, OSError, ValueError):
        return (True if reached else None), None
    return True, Path(file).parent


def _config_file(adapter: str) -> Path:
    """The adapter's configuration, downloaded if `adapter` is a hub id."""
    directory = Path(os.path.expanduser(adapter))
    if os.path.exists(directory):
        why = why_no_adapter(directory)
        if why:
            raise InputError(f"{adapter}: {why}")
        return directory / CONFIG
    if adapter.startswith((".", "/", "~")) or adapter.count("/") != 1:
        meant = near_miss(adapter, directory.absolute())
        raise InputError(f"{adapter}: no such directory: expected a PEFT directory or a hub id (owner/name){meant}")
    return _download(adapter)


def _download(adapter: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(adapter, CONFIG))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{adapter}: neither a directory here nor an adapter that can be read from the hub ({reason}): "
            "check the name, the network and, for a private repository, HF_TOKEN"
        ) from error
