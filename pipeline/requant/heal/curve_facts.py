"""What held-out text says of a healing, for the report."""

from __future__ import annotations

import math
from typing import TypedDict

from requant.data.healing_text import HealingText
from requant.heal.curve import LossCurve


class SourceFacts(TypedDict):
    """One source of the text. reads: how often it was read; None: unknown.

    held: [steps, KL, loss] on its windows that choose. judged: [KL, loss] of the start and of the chosen step on those
    that judge, null where not finite; None without such. worse: whether they say that it became worse.
    """

    name: str
    reads: float | None
    held: list[list[float]]
    judged: list[list[float | None]] | None
    worse: bool


class CurveFacts(TypedDict):
    """What held-out text says of a healing. KL and loss are in nats a token.

    held: [steps done, KL on the windows that choose], every source with the same weight. chosen_step: by these. judged:
    KL of the start and of the chosen step on the windows that judge, null where it is not finite; None without such
    windows. best_step: of the file, 0 for the start. kl_start, kl_best: of the start and of the file, by the windows
    that judge where there are some.
    """

    healed: bool
    best_step: int
    chosen_step: int
    judged: list[float | None] | None
    kl_start: float
    kl_best: float
    held: list[list[float]]
    sources: list[SourceFacts]
    train: list[float]
    stopped: str | None


def curve_facts(text: HealingText, curve: LossCurve) -> CurveFacts:
    """Which step was chosen, and what the curve and the windows that judge say of it."""
    best, healed = curve.best, curve.gained
    start = curve.judged.start if curve.judged else curve.held_out[0]
    chosen = curve.judged.chosen if curve.judged else best
    return {
        "healed": healed,
        "best_step": best.steps if healed else 0,
        "chosen_step": best.steps,
        "judged": None if curve.judged is None else [_number(look.mean_kl) for look in (start, chosen)],
        "kl_start": start.mean_kl,
        "kl_best": chosen.mean_kl if healed else start.mean_kl,
        "held": [[look.steps, look.mean_kl] for look in curve.held_out],
        "sources": _source_facts(text, curve),
        "train": curve.train,
        "stopped": curve.stopped,
    }


class PassFacts(TypedDict):
    """One of several passes. KL of its start and of what it left, in nats a token."""

    mode: str
    tuned: list[str]
    healed: bool
    best_step: int
    kl_start: float
    kl_best: float


def joined(first: CurveFacts, second: CurveFacts, steps: int) -> CurveFacts:
    """The facts of two passes as of one healing; the second one's steps count from `steps` on, the first's number.

    Looks are those of the first pass's start and of the second pass.
    """
    healed, chosen = second["healed"], second["chosen_step"]
    judged = None
    if first["judged"] and second["judged"]:
        judged = [first["judged"][0], second["judged"][1]]
    return {
        "healed": first["healed"] or healed,
        "best_step": steps + second["best_step"] if healed else first["best_step"],
        "chosen_step": steps + chosen if chosen else first["chosen_step"],
        "judged": judged,
        "kl_start": first["kl_start"],
        "kl_best": second["kl_best"] if healed else first["kl_best"],
        "held": _looks(first["held"], second["held"], steps),
        "sources": [_joined_source(a, b, steps) for a, b in zip(first["sources"], second["sources"], strict=True)],
        "train": second["train"],
        "stopped": second["stopped"],
    }


def _joined_source(first: SourceFacts, second: SourceFacts, steps: int) -> SourceFacts:
    judged = None
    if first["judged"] and second["judged"]:
        judged = [first["judged"][0], second["judged"][1]]
    held = _looks(first["held"], second["held"], steps)
    return {**second, "held": held, "judged": judged, "worse": first["worse"] or second["worse"]}


def _looks(first: list[list[float]], second: list[list[float]], steps: int) -> list[list[float]]:
    return [first[0], *([steps + look[0], *look[1:]] for look in second)]


def _source_facts(text: HealingText, curve: LossCurve) -> list[SourceFacts]:
    """What held-out windows of each source say."""
    names = text.names or ("text",)
    judging = sorted(set(text.held_out_sources[text.choosing :])) if curve.judged else []
    facts: list[SourceFacts] = []
    for at, number in enumerate(sorted(set(text.held_out_sources[: text.choosing]))):
        judged = None
        if curve.judged and number in judging:
            j = judging.index(number)
            judged = [
                [_number(look.kl[j]), _number(look.loss[j])] for look in (curve.judged.start, curve.judged.chosen)
            ]
        facts.append({
            "name": names[number],
            "reads": text.reads[number] if text.reads else None,
            "held": [[look.steps, look.kl[at], look.loss[at]] for look in curve.held_out],
            "judged": judged,
            "worse": curve.judged is not None and number in curve.judged.worse,
        })  # fmt: skip
    return facts


def _number(value: float) -> float | None:
    """A value for JSON: null where it is not finite."""
    return value if math.isfinite(value) else None
