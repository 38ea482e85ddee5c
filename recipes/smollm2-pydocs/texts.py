"""The demo's four text files: Python's own help topics (in-domain) and small talk (general).

Every function here is pure and needs neither torch nor a model; `prepare.py` writes the rows to disk.

Many help topics quote each other (`compound` holds the whole of `for`), so a split by topic name alone
leaks. The rule: a topic listed as held out keeps its text, and every paragraph of the training side that
shares a 13-gram with it is dropped. So the overlap left is zero for any Python version; `largest_overlap`
measures it.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

NGRAM = 13
"""Length of the shared word run that counts as a leak (the n of GPT-3's contamination check)."""

SPLIT_SEED = "requant-pydocs-1"
HELDOUT_PERCENT = 35
COMPOSITE = frozenset({"compound", "specialnames", "types", "typesseq"})
"""Chapters made of other topics: always training, and scrubbed last, so the small topics stay whole."""

MIN_CHARS = 150
"""A topic with less text than this after scrubbing is dropped."""

CALIBRATION_FILES = (
    *("ai", "botprofile", "coding", "computers", "food", "gossip"),
    *("money", "psychology", "tech_support"),
)
EVALUATION_FILES = (
    *("conversations", "emotion", "greetings", "health", "history", "humor", "literature", "movies"),
    *("politics", "science", "sports", "trivia"),
)
DOCUMENT_CHARS = 800
"""A general document is closed once it holds this many characters."""

Row = dict[str, str]
Grams = set[tuple[str, ...]]
Conversation = tuple[str, ...]

_WORD = re.compile(r"\w+|([^\w\s])\1*")


def words(text: str) -> list[str]:
    """Lower-cased words and punctuation runs (a heading's underline is one word, not forty)."""
    return [match.group(0).lower() for match in _WORD.finditer(text)]


def ngrams(text: str, n: int = NGRAM) -> Grams:
    """All runs of `n` words in `text`; empty if it is shorter."""
    found = words(text)
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


def largest_overlap(documents: Iterable[str], others: Iterable[str], n: int = NGRAM) -> float:
    """The share of a document's distinct `n`-grams that occur in any of `others`: the largest, 0 to 1."""
    seen: Grams = set().union(*(ngrams(other, n) for other in others))
    owned = [own for document in documents if (own := ngrams(document, n))]
    return max((len(own & seen) / len(own) for own in owned), default=0.0)


def side(topic: str) -> Literal["heldout", "train"]:
    """The side a topic was drawn for: a hash of its name, so neither order nor Python version matters."""
    digest = hashlib.sha256(f"{SPLIT_SEED}:{topic}".encode()).digest()
    drawn = int.from_bytes(digest[:4], "big") % 100
    return "heldout" if drawn < HELDOUT_PERCENT and topic not in COMPOSITE else "train"


def scrub(text: str, banned: Grams, n: int = NGRAM) -> str:
    """Drop every paragraph of `text` touched by an `n`-gram in `banned`, until none is left."""
    paragraphs = text.strip().split("\n\n")
    while True:
        located = [(word, at) for at, paragraph in enumerate(paragraphs) for word in words(paragraph)]
        touched: set[int] = set()
        for i in range(len(located) - n + 1):
            window = located[i : i + n]
            if tuple(word for word, _ in window) in banned:
                touched |= {at for _, at in window}
        if not touched:
            return "\n\n".join(paragraphs).strip()
        paragraphs = [paragraph for at, paragraph in enumerate(paragraphs) if at not in touched]


def load_split(path: Path) -> dict[str, list[str]]:
    """The committed `topics.json`: which topic names are held out, and which were known to be training."""
    split: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
    return split


def pydoc_rows(topics: Mapping[str, str], heldout: Iterable[str]) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows) of `{"text", "topic"}`; no word 13-gram occurs in two rows.

    A held-out name this Python doesn't have is skipped; a topic named nowhere is training.
    """
    names = set(heldout)
    banned: Grams = set()

    def rows(chosen: Iterable[str]) -> list[Row]:
        made: list[Row] = []
        for topic in chosen:
            text = scrub(topics[topic], banned)
            if len(text) >= MIN_CHARS:
                banned.update(ngrams(text))
                made.append({"text": text, "topic": topic})
        return made

    held = rows(sorted(names & topics.keys()))
    train = rows(sorted(topics.keys() - names, key=lambda topic: (topic in COMPOSITE, topic)))
    return train, held


def read_conversations(path: Path) -> list[Conversation]:
    """The distinct conversations of one chatterbot-corpus YAML file, in file order, as strings."""
    from ruamel.yaml import YAML

    parsed: dict[str, Any] = YAML(typ="base").load(path)  # base: `1963` and `no` stay strings
    return list(dict.fromkeys(tuple(turn.strip() for turn in talk) for talk in parsed["conversations"]))


def documents(files: Mapping[str, list[Conversation]], size: int = DOCUMENT_CHARS) -> list[Row]:
    """Consecutive conversations joined to rows of `{"text", "source"}` of about `size` characters.

    A row ends with its file unless it would hold less than half of `size`: then it goes on in the next.
    """
    made: list[Row] = []
    text, sources = "", list[str]()

    def close() -> None:
        nonlocal text, sources
        if text:
            made.append({"text": text, "source": "+".join(sources)})
        text, sources = "", []

    for name, conversations in files.items():
        for conversation in conversations:
            sources = sources if name in sources else [*sources, name]
            text = f"{text}\n\n" * bool(text) + "\n".join(conversation)
            if len(text) >= size:
                close()
        if len(text) >= size // 2:
            close()
    close()
    return made


def general_rows(folder: Path) -> tuple[list[Row], list[Row]]:
    """(calibration rows, evaluation rows) from the English YAML files in `folder`; disjoint files.

    A conversation of the evaluation side that shares a 13-gram with the calibration side is dropped.
    """
    calibration = {name: read_conversations(folder / f"{name}.yml") for name in CALIBRATION_FILES}
    banned: Grams = set()
    for conversations in calibration.values():
        banned.update(*(ngrams("\n".join(talk)) for talk in conversations))
    evaluation = {
        name: [talk for talk in talks if banned.isdisjoint(ngrams("\n".join(talk)))]
        for name in EVALUATION_FILES
        for talks in [read_conversations(folder / f"{name}.yml")]
    }
    return documents(calibration), documents(evaluation)
