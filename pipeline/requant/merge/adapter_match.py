"""Whether an adapter belongs to a base: names, shapes, vocabulary, what the config says.

An adapter of the right shape for the wrong base (instruct for base, another release) merges without an error and
answers badly, so every comparison is reported. What files do not tell is measured by `evaluate.adapter_probe`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

from requant.adapters.peft_directory import Adapter
from requant.checkpoint import model_files
from requant.checkpoint.atomic_write import reading
from requant.checkpoint.digests import DIGESTS
from requant.checkpoint.reader import read_json
from requant.errors import InputError
from requant.merge.plan import MergePlan

_HUB_CACHE = re.compile(r"models--[^/\\]+?--([^/\\]+)[/\\]snapshots[/\\]")
_NO_REVISION = "unsloth"  # what that tool records whatever the base's revision was
_FOUR_BIT = re.compile(r"[-_.](unsloth[-_.])?(bnb[-_.])?(4bit|nf4)([-_.].*)?$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sign:
    """One comparison of an adapter with its base. agrees: None when one side records nothing."""

    what: Literal["names", "shapes", "base name", "revision", "vocabulary", "chat template"]
    agrees: bool | None
    note: str


class SignFacts(TypedDict):
    """A `Sign` as stored."""

    what: str
    agrees: bool | None
    note: str


@dataclass(frozen=True)
class Match:
    """All comparisons of one adapter with its base."""

    signs: tuple[Sign, ...]

    @property
    def score(self) -> tuple[int, int]:
        """(signs that agree, signs that could be compared)."""
        compared = [s.agrees for s in self.signs if s.agrees is not None]
        return sum(compared), len(compared)

    @property
    def warnings(self) -> list[str]:
        return [s.note if s.what == "base name" else f"{s.what}: {s.note}" for s in self.signs if s.agrees is False]

    def __str__(self) -> str:
        """`4 of 5 agree (...); differs: ...; unknown: ...`."""
        right, compared = self.score
        groups = [[s.what for s in self.signs if s.agrees is a] for a in (True, False, None)]
        words = [", ".join(g) for g in groups]
        text = f"{right} of {compared} signs agree ({words[0]})"
        text += f"; different: {words[1]}" if words[1] else ""
        return text + (f"; not known: {words[2]}" if words[2] else "")


def match(adapter: Adapter, plan: MergePlan, bases: Sequence[tuple[str, str | None]]) -> Match:
    """Compare an adapter with the base of a merge plan.

    bases: (name or path, revision) of every base in the recipe.
    """
    base = plan.base.checkpoint.path
    others = sum(m in plan.renamed_modules for m in adapter.folds)
    renamed = f", {others} of them under other outer names" if others else ""
    count = len(adapter.folds) + len(adapter.expert_pairs) + len(adapter.replaced)
    return Match(
        (
            Sign(what="names", agrees=True, note=f"{count} adapted tensors, all found{renamed}"),
            Sign(what="shapes", agrees=True, note="all fit"),
            _name(adapter, bases),
            _revision(adapter, bases),
            _vocabulary(base, adapter.path),
            _template(base, adapter.path),
        )
    )


def _name(adapter: Adapter, bases: Sequence[tuple[str, str | None]]) -> Sign:
    if not adapter.base_name:
        return Sign(what="base name", agrees=None, note="the adapter does not record its base")
    trained, given = _plain(adapter.base_name), [_plain(name) for name, _ in bases]
    note = f"the adapter was trained on {_last(adapter.base_name)}, the recipe's base is {_as_given(bases[0][0])}"
    return Sign(
        what="base name",
        agrees=trained in given,
        note=note if trained in given else f"{note}: make sure they are the same",
    )


def _plain(name: str) -> str:
    """A model's name without its owner, directory and 4-bit suffix."""
    return _FOUR_BIT.sub("", _last(name).lower())


def _as_given(name: str) -> str:
    """A directory as the recipe spells it; of a hub id or a place in its cache the model's name."""
    return name if name.startswith(("./", "../", "/", "~")) and not _HUB_CACHE.search(name) else _last(name)


def _last(name: str) -> str:
    """The model's name in a hub id, a path of any system, or a path into a cache of downloads."""
    cached = _HUB_CACHE.search(name)
    if cached:
        return cached[1]
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1][:80].replace("___", ".")  # ModelScope's spelling of a dot


def _revision(adapter: Adapter, bases: Sequence[tuple[str, str | None]]) -> Sign:
    trained, given = adapter.config.get("revision"), {r for _, r in bases if r}
    if not trained or not given or trained == _NO_REVISION:
        return Sign(what="revision", agrees=None, note="not recorded on both sides")
    return Sign(
        what="revision",
        agrees=trained in given,
        note=f"trained on {trained}, the recipe's is {', '.join(sorted(given))}",
    )


def _vocabulary(base: Path, adapter: Path) -> Sign:
    files = [d / "tokenizer.json" for d in (base, adapter)]
    if not all(f.exists() for f in files):
        missing = next(f for f in files if not f.exists())
        return Sign(what="vocabulary", agrees=None, note=f"no tokenizer.json in {missing.parent.name}")
    if len(set(DIGESTS.of_all(files))) == 1:
        return Sign(what="vocabulary", agrees=True, note="the same file")
    of_base, of_adapter = (_tokens(f) for f in files)
    changed = [t for t, i in of_base.items() if of_adapter.get(t) != i]
    added = len(of_adapter.keys() - of_base.keys())
    if changed:
        count = f"{len(changed)} of the base's {len(of_base)} tokens"
        note = f"{count} are others in the adapter's tokenizer, e.g. {changed[0]!r}"
        return Sign(what="vocabulary", agrees=False, note=f"{note}: it was trained with another base's tokenizer")
    return Sign(
        what="vocabulary", agrees=True, note=f"the base's, and {added} added tokens" if added else "the same tokens"
    )


def _tokens(file: Path) -> dict[str, int]:
    raw = read_json(file)
    try:
        vocabulary = (raw.get("model") or {}).get("vocab", {})
        found = dict(vocabulary) if isinstance(vocabulary, dict) else {str(v[0]): i for i, v in enumerate(vocabulary)}
        return found | {t["content"]: t["id"] for t in raw.get("added_tokens") or []}
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise InputError(f"{file}: no tokenizer of the tokenizers library ({error!r}): copy the file again") from error


def _template(base: Path, adapter: Path) -> Sign:
    """Whether adapter and base have the same chat template.

    An adapter with a tokenizer has the template that it was trained with.
    """
    if not model_files.tokenizer_files(adapter, None):
        return Sign(what="chat template", agrees=None, note="the adapter brings no tokenizer")
    of_base, of_adapter = _chat_template(base), _chat_template(adapter)
    if of_base == of_adapter:
        return Sign(
            what="chat template", agrees=True if of_base else None, note="the same" if of_base else "neither has one"
        )
    if of_base is None:
        note = "the adapter's tokenizer has one, the base's has none: was it trained on the instruct model?"
    elif of_adapter is None:
        note = (
            "the base has one, the adapter's tokenizer has none: was it trained on the base model without instructions?"
        )
    else:
        note = "the adapter's differs from the base's; the adapter's is shipped"
    return Sign(what="chat template", agrees=False, note=note)


def _chat_template(directory: Path) -> str | None:
    """The chat template of a tokenizer's directory, from any of the files that may contain it."""
    jinja, legacy, config = (
        directory / n for n in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
    )
    if jinja.exists():
        try:
            with reading(jinja) as opened:
                return opened.read().decode().strip()
        except UnicodeDecodeError as error:
            raise InputError(f"{jinja}: cannot be read as text ({error}): copy the file again") from error
    for file in (legacy, config):
        found = read_json(file).get("chat_template") if file.exists() else None
        if found:
            return found.strip() if isinstance(found, str) else json.dumps(found, sort_keys=True)
    return None
