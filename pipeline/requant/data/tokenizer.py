"""Loads a tokenizer from the files that are shipped, with a fixed date and BOS where needed."""

from __future__ import annotations

import datetime
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from requant.checkpoint.atomic_write import reading, writing
from requant.checkpoint.model_files import ANY_TEXT, tokenizer_files
from requant.checkpoint.reader import file_digest, read_json
from requant.checkpoint.run_directory import key_of
from requant.data import chat_template
from requant.errors import InputError, library_call

NEEDS_BOS = "gemma"
"""Model types that begin so are lost without BOS: perplexity of plain text grows without bound."""


def load(
    base: Path,
    adapter: Path | None = None,
    *,
    date: datetime.date = chat_template.DATE,
    trust_remote_code: bool = False,
) -> Any:
    """The tokenizer of a model directory, with an adapter's files where it brings its own.

    `chat_date` is the date that its chat templates write. `needs_bos`: whether BOS is put before every text although
    the tokenizer does not. `made_from`: digest of all that it is made from. Raises InputError when there are no
    tokenizer files, or transformers cannot load them.
    """
    files = tokenizer_files(base, adapter)
    if not files:
        beside = ", and none beside the adapter" if adapter else ""
        raise InputError(f"{base}: no tokenizer files{beside}")
    where = next((files[n] for n in ("chat_template.jinja", "tokenizer_config.json") if n in files), base)
    tokenizer, digests = _load(base, files, trust_remote_code=trust_remote_code)
    tokenizer = chat_template.freeze_date(tokenizer, date, where=where)
    tokenizer.chat_date = date
    model_type = str(read_json(base / "config.json").get("model_type", ""))
    tokenizer.needs_bos = tokenizer.bos_token_id is not None and model_type.startswith(NEEDS_BOS)
    tokenizer.made_from = key_of(digests, date.isoformat(), trust_remote_code)
    return tokenizer


def _load(base: Path, files: Mapping[str, Path], *, trust_remote_code: bool) -> tuple[Any, dict[str, str]]:
    """(tokenizer made of exactly `files`, their digests); the model's own code too where it is trusted."""
    from transformers import AutoTokenizer

    code = {f.name: f for f in base.glob("*.py")} if trust_remote_code else {}
    digests: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, file in {"config.json": base / "config.json", **code, **files}.items():
            copy = Path(folder) / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            with reading(file) as content, writing(copy), copy.open("wb") as made:  # names the copy, not its source
                shutil.copyfileobj(content, made)
            digests[name] = file_digest(copy)
        where = next((files[n] for n in ("tokenizer.json", "tokenizer.model") if n in files), base)
        try:
            with library_call(f"{where}: transformers cannot load the tokenizer ({', '.join(files)})"):
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
                tokenizer(ANY_TEXT)
                return tokenizer, digests
        except InputError as error:  # the library names its temporary copy
            raise InputError(str(error).replace(folder, str(base))) from error


def notes(tokenizer: Any, *, chat: bool) -> list[str]:
    """What the user should know of the texts that the tokenizer makes. chat: by its template."""
    bos = tokenizer.bos_token
    if chat and chat_template.asks_for_date(tokenizer):
        date = getattr(tokenizer, "chat_date", chat_template.DATE)
        return [f"the chat template asks for today's date and is given {date}, so that texts never change (chat_date)"]
    if chat or bos is None:
        return []
    if getattr(tokenizer, "needs_bos", False) and tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return [f"{bos} (BOS) is put before every text, which this model needs, although its tokenizer does not add it"]
    if not adds_bos(tokenizer) and chat_template.writes_bos(tokenizer):
        return [
            f"plain texts are read without {bos} (BOS), which the chat template writes and the tokenizer does not add: "
            "the model may know texts only with it"
        ]
    return []


def adds_bos(tokenizer: Any) -> bool:
    """Whether texts begin with BOS: the tokenizer adds it by default, or the model needs it (`needs_bos`)."""
    bos = tokenizer.bos_token_id
    return bos is not None and (getattr(tokenizer, "needs_bos", False) or tokenizer("a")["input_ids"][:1] == [bos])
