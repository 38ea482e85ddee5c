"""Answers side by side: a card a prompt, marked where an answer leaves the reference's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from requant_eval.escaping import one_line, visible
from requant_eval.metrics import answer_checks
from requant_eval.metrics.answer_records import AnsweredPrompt, AnswersSection, CheckCount
from requant_eval.metrics.answers import first_difference
from requant_eval.render.tables import Table

FIRST = 3  # cards on the first screen
LONGEST, SHORT = 700, 360  # characters of a text that are shown, and on the first screen
BEFORE = 120  # of them before the first word that differs
WHO = {
    "adapter": "Fine-tune, unmerged",
    "merged": "Merged, 16 bit",
    "gptq": "Quantized",
    "healed": "Quantized, healed",
    "ends": "Quantized, with its ends",
    "nf4-merge": "Merged into 4 bits by PEFT",
    "nf4-again": "Merged, in bitsandbytes' 4 bits",
    "gptqmodel": "Quantized by gptqmodel",
}
"""Variant -> how a card names it; the variant's name stands beside."""
FAILED = {
    "ended": "cut off after {} tokens",
    "thought_closed": "its thought is not closed",
    "tool_call": "no valid tool call",
    "same_script": "in another script",
    "same_language": "in another language",
    "no_loop": "repeats itself",
}
"""Check -> what is said of an answer that fails it."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """One variant's answer, cut to what is shown. before, word, after: the first word that differs and what is around.

    note: what is said of it. is_same: whether it has the reference's words.
    """

    name: str
    who: str
    before: str
    word: str
    after: str
    note: str
    is_same: bool


@dataclass(frozen=True, kw_only=True)
class Card:
    """One prompt and its answers, the reference's first. own: the row's own answer, "" where it is not known."""

    row: int
    prompt: str
    own: str
    answers: tuple[Said, ...]


@dataclass(frozen=True)
class Cards:
    """Cards in a row, folded under a title where there is one."""

    cards: tuple[Card, ...]
    title: str = ""


def cards(section: AnswersSection, *, longest: int = LONGEST, without: Sequence[str] = ()) -> tuple[Card, ...]:
    """The cards of all prompts. longest: characters of a text, at most. without: variants that are left out."""
    return tuple(_card(item, section, longest, without) for item in section["items"])


def _card(item: AnsweredPrompt, section: AnswersSection, longest: int, without: Sequence[str]) -> Card:
    said = tuple(_said(name, item, section, longest) for name in item["given"] if name not in without)
    prompt = visible(item["prompt"]).strip()
    shown = prompt if len(prompt) <= longest else "… " + prompt[-longest:]
    own = _cut(visible(item.get("own", "")).strip(), longest)
    return Card(row=item["row"], prompt=shown, own=own, answers=said)


def _said(name: str, item: AnsweredPrompt, section: AnswersSection, longest: int) -> Said:
    text, at = visible(item["given"][name]).strip(), item["differs"].get(name)
    if at is not None and section["reference"] in item["given"]:  # counted in the words that are shown
        at = first_difference(text, visible(item["given"][section["reference"]]).strip())
    before, word, after = _parts(text, at, longest)
    notes = [FAILED[check].format(section["new_tokens"]) for check in item["failed"].get(name, ()) if check in FAILED]
    if at is not None and not word:
        notes.insert(0, "ends where the other goes on")
    if not text:
        notes.insert(0, "says nothing")
    is_same = at is None and section["reference"] not in (None, name)
    return Said(
        name=one_line(name), who=WHO.get(name, one_line(name)), before=before, word=word, after=after,
        note="; ".join(notes), is_same=is_same,
    )  # fmt: skip


def _parts(text: str, at: int | None, longest: int) -> tuple[str, str, str]:
    """(before, the word `at`, after), cut to `longest` characters around the word."""
    words = [] if at is None else list(re.finditer(r"\S+", text))
    if at is None or at >= len(words):
        return _cut(text, longest), "", ""
    start, stop = words[at].span()
    before = text[:start] if start <= longest - BEFORE else "… " + text[start - BEFORE : start]
    return before, text[start : min(stop, start + longest)], _cut(text[stop:], longest - len(before))


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[:longest] + " …"


def answers_said(section: AnswersSection) -> list[str]:
    """How many answers differ and what the shipped ones lose, in sentences; why there are none."""
    if not section["items"]:
        why = section["why"] or "every variant ran block by block, where a token takes a pass through all weights"
        return [f"No answers were compared on {section['set']}: {why}."]
    of, limit = len(section["items"]), section["new_tokens"]
    said = [
        f"{of} prompts of {section['set']} were answered greedily, each with at most {limit} tokens. Two answers "
        "differ where a word does."
    ]
    for v in section["variants"]:
        if not v["answered"]:
            said.append(
                f"{v['name']} was not asked: it ran block by block, where a token takes a pass through all weights."
            )
        elif v["differ"] and v["name"] != section["reference"]:
            differ = " and ".join(f"{n} of {of} from {other}'s" for other, n in v["differ"].items())
            said.append(f"{v['name']}: {differ} differ.")
    if section["shipped"] and section["reference"]:
        said.append(_lost(section))
    return said


def _lost(section: AnswersSection) -> str:
    """What the shipped variant's answers fail and the reference's do not."""
    if not section["lost"]:
        return f"No answer of {section['shipped']} fails a check that {section['reference']}'s does not."
    rows: dict[str, list[str]] = {}
    for lost in section["lost"]:
        rows.setdefault(lost["check"], []).append(str(lost["row"]))
    kinds = [f"{answer_checks.CHECKS.get(check, check)} (row {', '.join(of)})" for check, of in rows.items()]
    return (
        f"Checks that an answer of {section['shipped']} fails and {section['reference']}'s does not: the answer "
        f"{'; '.join(kinds)}."
    )


def checks_table(section: AnswersSection) -> Table:
    """Checks by variant: how many answers pass, of those a check applies to."""
    answered = [v for v in section["variants"] if v["answered"]]
    names = [check for check in answer_checks.CHECKS if any(check in v["checks"] for v in answered)]
    rows = tuple((f"the answer {answer_checks.CHECKS[c]}", *(_passed(v["checks"], c) for v in answered)) for c in names)
    note = "; ".join(f"{answer_checks.CHECKS[c]}: {section['rules'].get(c, '')}" for c in names)
    return Table(
        title="Checks without a judge", columns=("check", *(v["name"] for v in answered)), rows=rows, note=f"{note}."
    )


def _passed(checks: Mapping[str, CheckCount], check: str) -> str:
    return f"{found['passed']} of {found['of']}" if (found := checks.get(check)) else "not judged"
