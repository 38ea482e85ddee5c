"""Answers of variants to the same prompts: which checks they pass, and where they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from requant_eval.metrics import answer_checks
from requant_eval.metrics.answer_records import AnsweredPrompt, AnsweringVariant, AnswersSection, CheckCount, LostCheck
from requant_eval.metrics.lookup import ROADS

REFERENCES = ("adapter", "merged")  # the first that answered is what others are compared with


@dataclass(frozen=True, kw_only=True)
class AskedPrompt:
    """A prompt as it was asked.

    row: in the set's file, from 1. shown: its last message. text: what the model read. own: the row's own answer.
    tools: of the row, as OpenAI writes them. calls: whether the row's own answer makes a call.
    plain: the beginning of a plain text, whose answer need not end.
    """

    row: int
    shown: str
    text: str
    own: str
    tools: Sequence[Any] = ()
    calls: bool = False
    plain: bool = False


@dataclass(frozen=True, kw_only=True)
class GivenAnswers:
    """What variants answered to each prompt: (text, whether a stop token ended it); [] of a variant that was not asked.

    why: why there are no prompts, or "". new_tokens: of an answer, at most.
    """

    set_name: str
    new_tokens: int
    why: str = ""
    prompts: Sequence[AskedPrompt] = ()
    given: Mapping[str, Sequence[tuple[str, bool]]] = field(default_factory=dict)


def section(answers: GivenAnswers) -> AnswersSection:
    """The report's section of these answers."""
    given = {name: list(texts) for name, texts in answers.given.items()}
    answered = [name for name, texts in given.items() if texts]
    reference = next((name for name in REFERENCES if name in answered), None)
    shipped = next((name for name in reversed(given) if name not in (*REFERENCES, *ROADS)), None)
    verdicts = {
        name: [checked(p, text, ended=ended) for p, (text, ended) in zip(answers.prompts, given[name], strict=True)]
        for name in answered
    }
    said = {name: [text for text, _ in given[name]] for name in answered}
    items = [_item(p, i, said, verdicts, reference) for i, p in enumerate(answers.prompts)]
    return {
        "set": answers.set_name,
        "why": answers.why,
        "new_tokens": answers.new_tokens,
        "reference": reference,
        "shipped": shipped,
        "variants": [_variant(name, said, verdicts) for name in given],
        "lost": lost_checks(items, reference, shipped),
        "items": items if answered else [],
        "rules": dict(answer_checks.RULES),
    }


def lost_checks(items: Sequence[AnsweredPrompt], reference: str | None, variant: str | None) -> list[LostCheck]:
    """The checks that a variant's answers fail and the reference's do not."""
    if reference is None or variant is None:
        return []
    return [
        {"row": item["row"], "check": check}
        for item in items
        for check in item["failed"].get(variant, ())
        if check not in item["failed"].get(reference, ())
    ]


def lost_rows(section: AnswersSection, variant: str | None) -> set[int] | None:
    """The rows whose answer by a variant fails a check that the reference's does not; None where one was not asked."""
    if section["reference"] is None or not any(v["name"] == variant and v["answered"] for v in section["variants"]):
        return None
    return {lost["row"] for lost in lost_checks(section["items"], section["reference"], variant)}


def checked(prompt: AskedPrompt, said: str, *, ended: bool) -> dict[str, bool | None]:
    """Check -> whether an answer passes it; None where it does not apply. ended: by a stop token."""
    return {
        "ended": None if prompt.plain else ended,
        "thought_closed": answer_checks.thought_closed(said, prompt.text),
        "tool_call": answer_checks.tool_call(
            answer_checks.after_thought(said, prompt.text), prompt.tools, expected=prompt.calls
        ),
        "same_script": answer_checks.same_script(said, prompt.shown, prompt.own),
        "same_language": answer_checks.same_language(said, prompt.shown, prompt.own),
        "no_loop": answer_checks.no_loop(said),
    }


def first_difference(text: str, reference: str) -> int | None:
    """The first word, from 0, that another stands for or that one of the texts lacks; None where all are the same."""
    ours, theirs = text.split(), reference.split()
    if ours == theirs:
        return None
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))


def _item(
    prompt: AskedPrompt,
    index: int,
    said: Mapping[str, Sequence[str]],
    verdicts: Mapping[str, Sequence[Mapping[str, bool | None]]],
    reference: str | None,
) -> AnsweredPrompt:
    given = {name: texts[index] for name, texts in said.items()}
    differs = {
        name: at
        for name, text in given.items()
        if reference is not None and (at := first_difference(text, given[reference])) is not None
    }
    failed = {
        name: [check for check, passes in many[index].items() if passes is False] for name, many in verdicts.items()
    }
    return {
        "row": prompt.row, "prompt": prompt.shown, "own": prompt.own, "given": given, "failed": failed,
        "differs": differs,
    }  # fmt: skip


def _variant(
    name: str, said: Mapping[str, Sequence[str]], verdicts: Mapping[str, Sequence[Mapping[str, bool | None]]]
) -> AnsweringVariant:
    own, many = said.get(name, ()), verdicts.get(name, ())
    checks: dict[str, CheckCount] = {}
    for check in answer_checks.CHECKS:
        found = [v[check] for v in many if v[check] is not None]
        if found:
            checks[check] = {"passed": sum(map(bool, found)), "of": len(found)}
    differ = {
        other: sum(first_difference(a, b) is not None for a, b in zip(own, texts, strict=True))
        for other, texts in said.items()
        if other != name and own
    }
    return {"name": name, "answered": len(own), "checks": checks, "differ": differ}
