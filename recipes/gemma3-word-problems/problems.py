"""Arithmetic word problems with worked solutions, as chats; no two sides share a problem.

Pure functions, no torch. A problem is a kind and its numbers; names, things and wording are drawn besides. A hash of
kind and numbers says on which side a problem is, so whatever the wording, no held-out one is trained on. A training
chat that shares a run of 13 words with a held-out one is drawn again (`chats`).
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

Row = dict[str, Any]
Numbers = dict[str, int]
Side = Literal["heldout", "train"]

NGRAM = 13
"""Length of the shared word run that counts as a leak (the n of GPT-3's contamination check)."""

SPLIT_SEED = "requant-word-problems-1"
HELDOUT_PERCENT = 20

DRAWS = 60
"""Draws for each chat before giving up: one in five is of the held-out side, and some are drawn before."""

NAMES = (
    *("Ada", "Ben", "Carla", "Dan", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Liam", "Mara", "Noor"),
    *("Oskar", "Priya", "Quinn", "Rosa", "Samir", "Tessa", "Umar", "Vera", "Wanda", "Yusuf", "Zoe"),
)
THINGS = (
    *("apples", "books", "buttons", "cards", "coins", "cookies", "eggs", "flowers", "keys", "lemons", "marbles"),
    *("nails", "pears", "pencils", "photos", "plates", "seeds", "shells", "stamps", "stickers", "stones", "tickets"),
)
SELLERS = ("market", "shop", "fair", "school sale", "museum", "harbour", "bakery", "library", "farm")


@dataclass(frozen=True)
class Kind:
    """One kind of problem: how its numbers are drawn, two wordings, and the solution before the answer `{x}`."""

    draw: Callable[[random.Random], Numbers]
    questions: tuple[str, str]
    solution: str


def _more(r: random.Random) -> Numbers:
    a, b = r.randint(11, 99), r.randint(11, 99)
    return {"a": a, "b": b, "x": a + b}


def _fewer(r: random.Random) -> Numbers:
    a = r.randint(30, 199)
    b = r.randint(11, a - 5)
    return {"a": a, "b": b, "x": a - b}


def _boxes(r: random.Random) -> Numbers:
    a, b = r.randint(3, 19), r.randint(3, 29)
    return {"a": a, "b": b, "x": a * b}


def _share(r: random.Random) -> Numbers:
    b, x = r.randint(3, 15), r.randint(3, 40)
    return {"a": b * x, "b": b, "x": x}


def _boxes_given(r: random.Random) -> Numbers:
    a, b = r.randint(3, 12), r.randint(5, 20)
    c = r.randint(4, a * b - 2)
    return {"a": a, "b": b, "c": c, "d": a * b, "x": a * b - c}


def _boxes_and_loose(r: random.Random) -> Numbers:
    a, b, c = r.randint(3, 12), r.randint(5, 20), r.randint(4, 60)
    return {"a": a, "b": b, "c": c, "d": a * b, "x": a * b + c}


def _change(r: random.Random) -> Numbers:
    a, b = r.randint(2, 9), r.randint(2, 12)
    c = 10 * (a * b // 10 + r.randint(1, 5))
    return {"a": a, "b": b, "c": c, "d": a * b, "x": c - a * b}


def _days(r: random.Random) -> Numbers:
    a, b, c = r.randint(12, 60), r.randint(3, 15), r.randint(3, 9)
    return {"a": a, "b": b, "c": c, "d": b * c, "x": a + b * c}


def _twice(r: random.Random) -> Numbers:
    a, b = r.randint(8, 90), r.randint(2, 7)
    return {"a": a, "b": b, "d": a * b, "x": a + a * b}


def _gain_and_loss(r: random.Random) -> Numbers:
    a, b = r.randint(20, 99), r.randint(11, 60)
    c = r.randint(5, a + b - 5)
    return {"a": a, "b": b, "c": c, "d": a + b, "x": a + b - c}


def _minutes(r: random.Random) -> Numbers:
    a, b = r.randint(1, 9), r.randint(5, 55)
    return {"a": a, "b": b, "d": a * 60, "x": a * 60 + b}


def _speed(r: random.Random) -> Numbers:
    a, b = r.randint(12, 95), r.randint(2, 9)
    return {"a": a, "b": b, "x": a * b}


KINDS: dict[str, Kind] = {
    "more": Kind(
        _more,
        (
            "{name} has {a} {thing} and buys {b} more at the {place}. How many {thing} does {name} have now?",
            "At the {place}, {name} counts {a} {thing} and then finds {b} others. How many {thing} is that?",
        ),
        "{name} starts with {a} {thing} and gets {b} more: {a} + {b} = {x}.",
    ),
    "fewer": Kind(
        _fewer,
        (
            "{name} had {a} {thing} and sold {b} of them at the {place}. How many {thing} are left?",
            "Of {a} {thing} at the {place}, {name} takes {b} away. How many {thing} stay there?",
        ),
        "{b} of {a} {thing} are gone: {a} - {b} = {x}.",
    ),
    "boxes": Kind(
        _boxes,
        (
            "{name} packs {a} boxes for the {place} with {b} {thing} in each. How many {thing} does {name} pack?",
            "The {place} orders {a} bags of {thing}. Each bag holds {b}. How many {thing} does {name} bring?",
        ),
        "There are {a} times {b} {thing}: {a} * {b} = {x}.",
    ),
    "share": Kind(
        _share,
        (
            "{name} shares {a} {thing} equally among {b} people at the {place}. How many does each get?",
            "At the {place}, {a} {thing} go into {b} equal piles. How many {thing} does {name} put in a pile?",
        ),
        "{a} {thing} in {b} equal parts: {a} / {b} = {x}.",
    ),
    "boxes given": Kind(
        _boxes_given,
        (
            "{name} has {a} boxes of {b} {thing} and gives {c} {thing} to the {place}. How many {thing} are left?",
            "The {place} got {a} bags with {b} {thing} each. {name} bought {c} of them. How many {thing} remain?",
        ),
        "All {thing}: {a} * {b} = {d}. Without {c}: {d} - {c} = {x}.",
    ),
    "boxes and loose": Kind(
        _boxes_and_loose,
        (
            "{name} brings {a} boxes of {b} {thing} and {c} loose ones to the {place}. How many {thing} are there?",
            "On the shelf of the {place} are {c} {thing}. {name} adds {a} bags of {b}. How many {thing} is that?",
        ),
        "In boxes: {a} * {b} = {d} {thing}. With {c} others: {d} + {c} = {x}.",
    ),
    "change": Kind(
        _change,
        (
            "At the {place}, {thing} cost {b} euros a pack. {name} buys {a} packs and pays with {c} euros. "
            "How many euros does {name} get back?",
            "{name} takes {c} euros to the {place} and buys {a} packs of {thing} at {b} euros each. "
            "How many euros does {name} still have?",
        ),
        "{a} packs cost {a} * {b} = {d} euros. {name} keeps {c} - {d} = {x} euros.",
    ),
    "days": Kind(
        _days,
        (
            "{name} has {a} {thing}; {b} come every day from the {place}. How many has {name} after {c} days?",
            "The {place} holds {a} {thing}. For {c} days, {name} adds {b} a day. How many {thing} is that then?",
        ),
        "{b} {thing} a day give {c} * {b} = {d}. With the first {a}: {a} + {d} = {x}.",
    ),
    "twice": Kind(
        _twice,
        (
            "{name} has {a} {thing}, the {place} has {b} times as many. How many {thing} have they together?",
            "The {place} sold {a} {thing} on Monday, on Tuesday {b} times that. How many did {name} sell there?",
        ),
        "{b} times {a} {thing} are {b} * {a} = {d}. Together: {a} + {d} = {x}.",
    ),
    "gain and loss": Kind(
        _gain_and_loss,
        (
            "{name} had {a} {thing}, won {b} at the {place} and lost {c}. How many {thing} does {name} have?",
            "From {a} {thing} the {place} grew by {b}; then {name} took {c}. How many {thing} are there now?",
        ),
        "First {a} + {b} = {d} {thing}. Then {d} - {c} = {x}.",
    ),
    "minutes": Kind(
        _minutes,
        (
            "{name} spent {a} hours and {b} minutes at the {place} looking at {thing}. How many minutes did {name} stay?",
            "Counting {thing} at the {place} took {a} h {b} min. How many minutes did {name} count?",
        ),
        "{a} * 60 and {b} minutes: {d} + {b} = {x}.",
    ),
    "speed": Kind(
        _speed,
        (
            "{name} drives {thing} to the {place} at {a} km an hour for {b} hours. How many km does {name} drive?",
            "A machine at the {place} makes {a} {thing} an hour. How many {thing} does {name} have after {b} hours?",
        ),
        "{a} in each of {b} hours: {a} * {b} = {x}.",
    ),
}

_WORD = re.compile(r"\w+|[^\w\s]")


def ngrams(text: str, n: int = NGRAM) -> set[tuple[str, ...]]:
    """All runs of `n` lower-cased words or signs in `text`; empty if it is shorter."""
    found = [match.group(0).lower() for match in _WORD.finditer(text)]
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


def side(kind: str, numbers: Numbers) -> Side:
    """The side of a problem: a hash of its kind and numbers, so no draw decides it."""
    digest = hashlib.sha256(f"{SPLIT_SEED}:{kind}:{sorted(numbers.items())}".encode()).digest()
    return "heldout" if int.from_bytes(digest[:4], "big") % 100 < HELDOUT_PERCENT else "train"


def problem(kind: str, draw: random.Random) -> tuple[Numbers, Row]:
    """(numbers, chat) of one problem; the row keeps kind and answer beside the messages."""
    form = KINDS[kind]
    numbers = form.draw(draw)
    words = {"name": draw.choice(NAMES), "thing": draw.choice(THINGS), "place": draw.choice(SELLERS)}
    question = draw.choice(form.questions).format(**words, **numbers)
    solution = form.solution.format(**words, **numbers) + f"\nThe answer is {numbers['x']}."
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": solution}]
    return numbers, {"messages": turns, "kind": kind, "answer": numbers["x"]}


def text_of(row: Row) -> str:
    """Question and solution of a chat, one below the other."""
    return "\n".join(turn["content"] for turn in row["messages"])


def chats(count: int, wanted: Side, seed: int = 0, banned: Iterable[Row] = ()) -> list[Row]:
    """`count` chats of one side, all problems different; none shares a run of words with one of `banned`.

    Raises ValueError where the kinds have not so many problems.
    """
    draw = random.Random(f"{seed}:{wanted}")
    leaks = set().union(*(ngrams(text_of(row)) for row in banned))
    rows: list[Row] = []
    seen: set[tuple[Any, ...]] = set()
    kinds = list(KINDS)
    for _ in range(DRAWS * count):
        if len(rows) == count:
            break
        kind = kinds[len(rows) % len(kinds)]
        numbers, row = problem(kind, draw)
        key = (kind, *sorted(numbers.items()))
        if side(kind, numbers) == wanted and key not in seen and leaks.isdisjoint(ngrams(text_of(row))):
            seen.add(key)
            rows.append(row)
    if len(rows) < count:
        raise ValueError(f"{DRAWS * count} draws gave {len(rows)} {wanted} chats, {count} were asked for")
    draw.shuffle(rows)
    return rows
