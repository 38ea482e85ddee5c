"""Comparison of finished runs: losses paired by document, sizes, times, Pareto front.

Needs the reports only: each has the sums over documents of every variant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, TypedDict

import numpy as np

from requant_eval.errors import EvaluationError
from requant_eval.metrics import statistics as st
from requant_eval.metrics.facts import Facts, known_facts
from requant_eval.metrics.lookup import step_from_reference
from requant_eval.metrics.records import Estimate, EvaluationSet
from requant_eval.report.assemble import plain
from requant_eval.report.compare_roads import ComparedRoad, roads_of
from requant_eval.report.compare_tasks import ComparedTask, compared
from requant_eval.report.headline import final_variant
from requant_eval.report.records import Report
from requant_eval.report.verdict import judge, saved_gates, verdict

# The stages that make a variant; the others are used as they came.
STAGES_OF = {
    "merged": ("merge",),
    "original": ("merge",),
    "rtn": ("merge",),
    "gptq": ("merge", "quantize"),
    "healed": ("merge", "quantize", "heal"),
    "ends": ("merge", "quantize"),
    "nf4-again": ("merge",),
    "gptqmodel": ("merge", "gptqmodel"),
}
IDENTITY: tuple[Literal["digest"], Literal["fingerprint"]] = ("digest", "fingerprint")


class RunNumbers(TypedDict):
    """One run on one shared set. loss_percent: against the reference; None where it was not compared with it."""

    ppl: Estimate
    loss_percent: Estimate | None


class ComparedRun(TypedDict):
    """One run of a comparison.

    seconds: of merge, quantize and heal, as far as the variant needs them.
    status: against the gates of its report; "none": no gates, "reference": they are relative to it.
    sets: by name. dominated_by: a better run; None: on the Pareto front of bytes and perplexity on every shared set;
    "unknown": no size.
    """

    name: str
    variant: str
    bytes: int | None
    seconds: float | None
    machine: str | None
    status: str
    sets: dict[str, RunNumbers]
    dominated_by: str | None


class Pair(TypedDict):
    """Two runs on one set, paired by document.

    delta: ln perplexity of b minus a. percent: perplexity. better: a name, None where the interval holds 0.
    """

    a: str
    b: str
    delta: Estimate
    percent: Estimate
    better: str | None


class ComparedSet(TypedDict):
    """A set that all runs share, and every pair of runs on it."""

    name: str
    digest: str
    fingerprint: str
    n_documents: int
    n_scored: int
    pairs: list[Pair]


class Comparison(TypedDict):
    """The comparison as JSON types. left_out: sets and tasks that not all runs have. roads: of runs that have some."""

    runs: list[ComparedRun]
    sets: list[ComparedSet]
    tasks: list[ComparedTask]
    roads: list[ComparedRoad]
    left_out: list[str]
    warnings: list[str]


@dataclass(frozen=True)
class Entrant:
    """One variant of one report, and its name in the comparison."""

    name: str
    report: Report
    variant: str

    @classmethod
    def of(cls, name: str, report: Report, variant: str | None = None) -> Entrant:
        """By default the variant that ships.

        Raises:
            EvaluationError: the report does not have the variant, or none that ships.
        """
        known = list(dict.fromkeys(v["name"] for s in report["sets"] for v in s["variants"]))
        chosen = variant or final_variant(report)
        if chosen is None or chosen not in known:
            wanted = f"no variant {variant!r}" if variant else "no merged or quantized variant"
            raise EvaluationError(f"{name}: {wanted} was scored, only {', '.join(known)}: name one as RUN:VARIANT")
        return cls(name, report, chosen)

    @property
    def run(self) -> str:
        """The run's name, without the variant."""
        return self.name.removesuffix(f":{self.variant}")

    @property
    def sets(self) -> dict[str, EvaluationSet]:
        """The evaluation sets that the variant was scored on, by name."""
        return {s["name"]: s for s in self.report["sets"] if self.variant in s["documents"]}


def compare(entrants: Sequence[Entrant]) -> Comparison:
    """Runs against each other on the sets that all of them have.

    Raises:
        EvaluationError: fewer than two, two of one name, no shared set, or a set of the same name with other tokens.
    """
    names = [e.name for e in entrants]
    if len(names) < 2:
        raise EvaluationError("nothing to compare: name at least two runs")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise EvaluationError(f"{twice} is named twice: name other runs, or other variants as RUN:VARIANT")
    every = list(dict.fromkeys(s["name"] for e in entrants for s in e.report["sets"]))
    shared = [name for name in every if all(name in e.sets for e in entrants)]
    if not shared:
        raise EvaluationError(f"the runs share no evaluation set: {', '.join(every)} each miss in one of them")
    for name in shared:
        _same_tokens(entrants, name)
    rows = [_run(entrant, shared) for entrant in entrants]
    home = next((name for name in shared if entrants[0].sets[name]["in_domain"]), shared[0])
    tasks, other_tasks = compared({e.name: (e.report.get("tasks") or [], e.variant) for e in entrants})
    result: Comparison = {
        "runs": [{**row, "dominated_by": _dominated_by(row, rows, shared)} for row in rows],
        "sets": [_set(entrants, name) for name in shared],
        "tasks": tasks,
        "roads": roads_of({e.run: e.report.get("roads") or [] for e in entrants}, home),
        "left_out": [*(name for name in every if name not in shared), *other_tasks],
        "warnings": _warnings(entrants, shared),
    }
    found: Comparison = plain(result)
    return found


def _same_tokens(entrants: Sequence[Entrant], name: str) -> None:
    first = entrants[0]
    for other in entrants[1:]:
        ours, theirs = first.sets[name], other.sets[name]
        differ = next((key for key in IDENTITY if ours[key] != theirs[key]), None)
        if differ or ours["documents"][first.variant]["n"] != theirs["documents"][other.variant]["n"]:
            key = differ or "documents"
            shown = f" ({ours[differ][:12]} and {theirs[differ][:12]})" if differ else ""
            raise EvaluationError(
                f"set '{name}': {first.name} and {other.name} were scored on other tokens, {key} differs{shown}: "
                "numbers of different tokens are never compared; evaluate both with the same texts, tokenizer, window "
                "and protocol"
            )


def _set(entrants: Sequence[Entrant], name: str) -> ComparedSet:
    first = entrants[0].sets[name]
    return {
        "name": name,
        "digest": first["digest"],
        "fingerprint": first["fingerprint"],
        "n_documents": first["n_documents"],
        "n_scored": first["n_scored"],
        "pairs": [_pair(a, b, name) for a, b in combinations(entrants, 2)],
    }


def _pair(a: Entrant, b: Entrant, name: str) -> Pair:
    pair = st.paired(_sums(b, name), _sums(a, name))
    better = b.name if pair.delta.high < 0 else a.name if pair.delta.low > 0 else None
    percent = pair.loss_percent.record()
    return {"a": a.name, "b": b.name, "delta": pair.delta.record(), "percent": percent, "better": better}


def _sums(entrant: Entrant, name: str) -> st.Sums:
    sums = entrant.sets[name]["documents"][entrant.variant]
    return st.Sums(np.asarray(sums["nll"], np.float64), np.asarray(sums["n"], np.float64))


def _run(entrant: Entrant, shared: Sequence[str]) -> ComparedRun:
    facts = known_facts(entrant.report["facts"])
    cost = facts.get("cost") or {}
    times = cost.get("seconds") or {}
    stages = STAGES_OF.get(entrant.variant, ())
    stages += ("heal",) if entrant.variant == "ends" and facts.get("heal") else ()
    seconds = [times.get(stage) for stage in stages]
    return {
        "name": entrant.name,
        "variant": entrant.variant,
        "bytes": _bytes(cost.get("bytes") or {}, entrant.variant),
        "seconds": None if None in seconds else float(sum(s for s in seconds if s is not None)),
        "machine": _machine(facts),
        "status": _status(entrant),
        "sets": {name: _numbers(entrant.sets[name], entrant.variant) for name in shared},
        "dominated_by": None,
    }


def _status(entrant: Entrant) -> str:
    report = entrant.report
    if any(s["reference"] == entrant.variant for s in report["sets"]):
        return "reference"
    return str(verdict(report, judge(report, saved_gates(report), entrant.variant))["status"])


def _bytes(sizes: Mapping[str, int | None], variant: str) -> int | None:
    if variant == "adapter":
        base, adapter = sizes.get("base"), sizes.get("adapter")
        return None if base is None or adapter is None else int(base + adapter)
    size = sizes.get(variant) or (sizes.get("gptq") if variant in ("healed", "rtn", "ends") else None)
    return None if size is None else int(size)


def _numbers(s: EvaluationSet, variant: str) -> RunNumbers:
    edge = step_from_reference(s, variant)
    ppl = next(v["ppl"] for v in s["variants"] if v["name"] == variant)
    return {"ppl": ppl, "loss_percent": edge["loss_percent"] if edge else None}


def _dominated_by(row: ComparedRun, rows: Sequence[ComparedRun], shared: Sequence[str]) -> str | None:
    """The first other run that is nowhere worse and somewhere better, by the values alone."""
    own = _position(row, shared)
    if own is None:
        return "unknown"
    for other in rows:
        theirs = None if other is row else _position(other, shared)
        if theirs is not None and theirs != own and all(x <= y for x, y in zip(theirs, own, strict=True)):
            return other["name"]
    return None


def _position(row: ComparedRun, shared: Sequence[str]) -> list[float] | None:
    """Size and perplexities, infinite where too large for a float; None without a size."""
    values = [row["sets"][name]["ppl"]["value"] for name in shared]
    return None if row["bytes"] is None else [row["bytes"], *(math.inf if v is None else v for v in values)]


def _machine(facts: Facts) -> str | None:
    hardware = facts.get("hardware") or {}
    return hardware.get("gpu") or hardware.get("processor") or hardware.get("device")


def _warnings(entrants: Sequence[Entrant], shared: Sequence[str]) -> list[str]:
    found = []
    machines = {str(_machine(known_facts(e.report["facts"]))) for e in entrants}
    if len(machines) > 1:
        found.append(f"times come from different machines: {', '.join(sorted(machines))}")
    for name in shared:
        references = [_reference(e, name) for e in entrants]
        if any(not np.array_equal(references[0], other) for other in references[1:]):
            found.append(
                f"{name}: the runs have different references (another adapter, base or machine): compare perplexities, "
                "not losses against the reference"
            )
    return found


def _reference(entrant: Entrant, name: str) -> list[float]:
    s = entrant.sets[name]
    return [] if s["reference"] is None else s["documents"][s["reference"]]["nll"]
