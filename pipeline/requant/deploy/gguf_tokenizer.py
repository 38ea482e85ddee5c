"""A tokenizer as llama.cpp reads it: tokens, types, and the rule that cuts text before BPE.

llama.cpp knows such rules by names. Here a rule is recognised by what it is in tokenizer.json, and refused otherwise: a
name that cuts text in another way would give the model other tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from requant.checkpoint.reader import read_json
from requant.errors import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's types of tokens
_LETTERS = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"""
_REST = r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
_BY_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
RULES: Mapping[str, tuple[Any, ...]] = {
    "gpt-2": (_BY_BYTES,),
    "smollm": ({"type": "Digits", "individual_digits": True}, _BY_BYTES),
    "llama-bpe": (rf"{_LETTERS}|\p{{N}}{{1,3}}{_REST}",),
    "qwen2": (rf"{_LETTERS}|\p{{N}}{_REST}",),
}
"""llama.cpp's name of a rule -> its parts. A pattern that splits text is followed by bytes, which cut no more."""
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}  # what Gemma does to text, and no more
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_WHOLE_WORDS = {"llama-bpe": True}  # whether a word that is a token is taken before any merge (`ignore_merges`)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Tokens by their ids, their types, and the name of the rule.

    model: llama.cpp's name of the algorithm. scores: of tokens, the highest is merged first; None: merges are listed.
    """

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    rule: str
    model: str = "gpt2"
    scores: tuple[float, ...] | None = None


def read(path: Path, count: int) -> Vocabulary:
    """The vocabulary of tokenizer.json in a checkpoint, filled up to `count` tokens, the rows of its embedding.

    Raises InputError for a tokenizer that is neither byte-level BPE nor sentencepiece's as Gemma has it, with a rule
    that llama.cpp has no name for, or with more tokens than rows.
    """
    file = path / "tokenizer.json"
    raw = read_json(file)
    model = raw.get("model") or {}
    if model.get("type") == "BPE" and model.get("byte_fallback") and raw.get("normalizer") == _SPACES:
        return _pieces(raw, file, count)
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict) or model.get("byte_fallback"):
        kind = "byte fallback" if model.get("byte_fallback") else str(model.get("type"))[:40]
        raise InputError(f"{file}: a tokenizer of {kind} is not written as GGUF yet: only byte-level BPE is")
    rule = _rule(raw)
    if rule is None or bool(model.get("ignore_merges")) != _WHOLE_WORDS.get(rule, False):
        raise InputError(
            f"{file}: llama.cpp has no name for how it cuts text before BPE (pre_tokenizer), as far as requant knows: "
            f"known are {', '.join(RULES)}"
        )
    tokens = {i: (token, NORMAL) for token, i in model["vocab"].items()}
    for added in raw.get("added_tokens") or []:
        special = added.get("special") or (added["content"].startswith("<|") and added["content"].endswith("|>"))
        tokens[added["id"]] = (added["content"], CONTROL if special else USER_DEFINED)
    if max(tokens, default=-1) >= count:
        raise InputError(f"{file}: holds token {max(tokens)}, the model has {count} embeddings")
    every = [tokens.get(i, (f"[PAD{i}]", UNUSED)) for i in range(count)]
    return Vocabulary(tokens=tuple(t for t, _ in every), types=tuple(kind for _, kind in every), rule=rule)


def _pieces(raw: Mapping[str, Any], file: Path, count: int) -> Vocabulary:
    """The vocabulary of sentencepiece's BPE in the form of tokenizer.json, with the scores that give the same merges.

    llama.cpp merges neighbours to any token, the highest score first; tokenizer.json lists the pairs. Both are the same
    where every pair whose two parts and whole are tokens is listed, and those of one token follow each other.
    Tokens beyond `count`, as official Gemma 3 text models have one, are left out: the model has no row for them.
    """
    model = raw["model"]
    vocabulary: dict[str, int] = model["vocab"]
    added = {token["content"]: token for token in raw.get("added_tokens") or []}
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model.get("merges") or []]
    ranks, last = dict[str, int](), ""
    for left, right in pairs:
        whole = left + right
        if whole in ranks and whole != last:
            raise InputError(f"{file}: its merges are not sentencepiece's: those to {whole[:40]!r} are in two places")
        ranks.setdefault(whole, len(ranks))
        last = whole
    listed = set(pairs)
    for token in vocabulary.keys() - added.keys():
        for i in range(1, len(token)):
            pair = (token[:i], token[i:])
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in listed and not _BYTE.fullmatch(token):
                raise InputError(f"{file}: its merges are not sentencepiece's: {pair} is not among them")
    tokens = {i: (token, NORMAL, -float(ranks.get(token, len(ranks)))) for token, i in vocabulary.items()}
    tokens |= {i: (token, BYTE, 0.0) for token, i in vocabulary.items() if _BYTE.fullmatch(token)}
    if (unknown := model.get("unk_token")) in vocabulary:
        tokens[vocabulary[unknown]] = (unknown, UNKNOWN, 0.0)
    for text, token in added.items():
        kind = CONTROL if token.get("special") else USER_DEFINED
        tokens[token["id"]] = (text.replace("▁", " ") if kind == USER_DEFINED else text, kind, 0.0)
    every = [tokens.get(i, (f"[PAD{i}]", UNUSED, 0.0)) for i in range(count)]
    texts, types, scores = zip(*every, strict=True)
    return Vocabulary(tokens=texts, types=types, rule="default", model="llama", scores=scores)


def _rule(raw: Mapping[str, Any]) -> str | None:
    """The name of a tokenizer's rule; None: none of `RULES`, or text is changed before it."""
    normalizer = raw.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        return None
    before = raw.get("pre_tokenizer") or {}
    parts = before.get("pretokenizers") if before.get("type") == "Sequence" else [before]
    found = tuple(_part(part) for part in parts or [])
    if found and found[-1] == {**_BY_BYTES, "use_regex": False}:
        found = found[:-1]
    return next((name for name, rule in RULES.items() if rule == found), None)


def _part(part: Mapping[str, Any]) -> Any:
    """One part of a rule without what does not change where text is cut: a splitting pattern alone, or its settings."""
    if part.get("type") == "Split":
        isolated = part.get("behavior") == "Isolated" and not part.get("invert")
        return (part.get("pattern") or {}).get("Regex") if isolated else None
    return {key: value for key, value in part.items() if key != "trim_offsets"}
