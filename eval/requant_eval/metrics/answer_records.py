"""The section `answers` of `report.json`; docstrings are descriptions of its schema."""

from __future__ import annotations

from typing import NotRequired

from typing_extensions import TypedDict


class CheckCount(TypedDict):
    """Answers that pass a check, of those it applies to."""

    passed: int
    of: int


class AnsweringVariant(TypedDict):
    """One variant's answers. differ: from each other variant's, how many have other words; answered: 0 if not asked."""

    name: str
    answered: int
    checks: dict[str, CheckCount]
    differ: dict[str, int]


class AnsweredPrompt(TypedDict):
    """One prompt and its answers by variant. row: in the set's file, from 1.

    failed: names of checks that an answer fails. differs: the word, from 0, at which an answer leaves the reference's.
    own: the row's own answer; absent in older reports.
    """

    row: int
    prompt: str
    own: NotRequired[str]
    given: dict[str, str]
    failed: dict[str, list[str]]
    differs: dict[str, int]


class LostCheck(TypedDict):
    """A check that the shipped answer to a row fails and the reference's does not."""

    row: int
    check: str


class AnswersSection(TypedDict):
    """Greedy answers to prompts of held-out rows, and checks of them that need no judge.

    why: why there are no prompts, or "". new_tokens: of an answer, at most. reference: the variant that others are
    compared with. shipped: the one that is deployed. rules: what exactly passes each check.
    """

    set: str
    why: str
    new_tokens: int
    reference: str | None
    shipped: str | None
    variants: list[AnsweringVariant]
    lost: list[LostCheck]
    items: list[AnsweredPrompt]
    rules: dict[str, str]
