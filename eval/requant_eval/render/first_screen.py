"""The report's first screen, in plain words: sentences, answers, size, what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from requant_eval.metrics.facts import known_facts
from requant_eval.metrics.lookup import ROADS, step_from_reference
from requant_eval.metrics.records import Edge, Estimate, EvaluationSet
from requant_eval.render.answer_cards import FIRST, SHORT, Cards, cards
from requant_eval.report.headline import QUANTIZED, final_variant
from requant_eval.report.number_format import format_bytes
from requant_eval.report.records import Report

NEXT = {
    "pass": "It keeps the limits that you set.",
    "fail": "Do not deploy the quantized model as it is: it breaks a limit that you set. More bits, smaller groups, "
    "healing or calibration on text more like yours lose less.",
    "inconclusive": "Measure on more held-out rows before you decide: on these the loss cannot be told from the "
    "limit. Until then:",
    "none": "Say how much loss is acceptable: without gates in the recipe there is no verdict.",
}
"""Status of the verdict -> what it means for the next step."""


@dataclass(frozen=True, kw_only=True)
class FirstScreen:
    """What the page begins with, after the verdict.

    plain: sentences. answers: three side by side. sizes: (what, value). then: what to do next.
    """

    plain: tuple[str, ...]
    answers: Cards
    sizes: tuple[tuple[str, str], ...]
    then: tuple[str, ...]


def first_screen(report: Report) -> FirstScreen:
    """The first screen of a report; a sentence whose number was not measured is left out."""
    section = report.get("answers")
    return FirstScreen(
        plain=tuple(_plain(report)),
        answers=Cards(cards(section, longest=SHORT, without=ROADS)[:FIRST] if section else ()),
        sizes=tuple(_sizes(report)),
        then=(NEXT[report["verdict"]["status"]], report["recommendation"]["text"]),
    )


def _plain(report: Report) -> Iterator[str]:
    """How often the next word changes, how many answers differ, what is kept of the fine-tune."""
    final, home = final_variant(report), next((s for s in report["sets"] if s["in_domain"]), report["sets"][0])
    measured = final if final in QUANTIZED else None  # what ships; else the page's size would be another's
    step = step_from_reference(home, measured) if measured else None
    if step and (changed := _changed(step)):
        yield changed
    section = report.get("answers")
    if section and section["items"] and section["reference"]:
        shipped = next((v for v in section["variants"] if v["name"] == section["shipped"]), None)
        if shipped and shipped["answered"]:
            n, of = shipped["differ"].get(section["reference"], 0), len(section["items"])
            lost = len({lost["row"] for lost in section["lost"]})
            whose = "the fine-tune's" if section["reference"] == "adapter" else "the merged model's"
            fails = f"{lost} fail{'s' if lost == 1 else ''} a check" if lost else "none fails a check"
            yield (
                f"{n} of {of} answers to your own prompts have other words than {whose}; {fails} that {whose} does not."
            )
    elif section and section["why"]:
        yield f"No answers were compared: {section['why']}."
    if measured and (kept := _kept(home, measured)):
        yield kept


def _changed(step: Edge) -> str:
    """How often the most likely next word is another one, from the agreement of the most likely tokens."""
    agreement = step["agreement"]
    if agreement is None or agreement["value"] is None:
        return ""
    share = 100 * (1 - agreement["value"])
    often = "in no place that was looked at" if share == 0 else f"in {_digits(share)} of 100 places"
    return f"On text like yours the most likely next word, or part of one, is another than the fine-tune's {often}."


def _digits(share: float) -> str:
    return f"{share:.0f}" if share >= 10 else f"{share:.1g}" if share < 1 else f"{share:.1f}".removesuffix(".0")


def _kept(home: EvaluationSet, final: str) -> str:
    """What is left of the fine-tune's gain over the base."""
    if final not in home["retention"]:
        return ""
    kept: Estimate | None = home["retention"][final]
    if kept is None:
        return "How much of the fine-tune is kept cannot be said: on this text it is not surely better than the base."
    if kept["value"] is None:
        return ""
    if kept["value"] <= 0:
        return "Nothing of what the fine-tune learned is kept: on this text it is no better than the base."
    share = 100 * kept["value"]  # rounded, 99.7 % would be all of it
    return f"Of what the fine-tune learned, {min(share, 100):.{1 if 99 <= share < 99.95 else 0}f} % is kept."


def _sizes(report: Report) -> Iterator[tuple[str, str]]:
    """Size and speed of what ships, as far as they are known."""
    options = report["recommendation"]["options"]
    own = next((o for o in options if o["name"] == "requantized"), None)
    sizes = (known_facts(report["facts"]).get("cost") or {}).get("bytes") or {}
    merged = sizes.get("merged")
    if own and own["bytes"]:
        smaller = ""
        if merged and merged >= 1.05 * own["bytes"]:
            smaller = f", {merged / own['bytes']:.1f} times smaller than the merged model's {format_bytes(merged)}"
        elif merged:
            smaller = f"; the merged model has {format_bytes(merged)}"
        yield "Size", f"{format_bytes(own['bytes'])}{smaller}"
    speed = own["tokens_per_second"] if own else None
    said = ", ".join(f"{rate:.4g} tokens a second in {engine}" for engine, rate in (speed or {}).items())
    yield "Speed", said or "not measured; `requant verify RUN --with vllm` measures it where vLLM is installed"
