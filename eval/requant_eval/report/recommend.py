"""Which way to deploy: requantized checkpoint, merged checkpoint, or base and adapter apart."""

from __future__ import annotations

from collections.abc import Sequence

from requant_eval.gate import METRICS, Gate, make
from requant_eval.metrics.engine_step import speeds
from requant_eval.metrics.facts import Facts, base_and_adapter, is_16_bit_base, known_facts
from requant_eval.metrics.lookup import step_from_reference
from requant_eval.metrics.records import Estimate, EvaluationSet
from requant_eval.report.adapter_gain import in_words, learned
from requant_eval.report.headline import QUANTIZED, final_variant
from requant_eval.report.number_format import format_bytes
from requant_eval.report.records import Choice, Numbers, Option, Recommendation, Status
from requant_eval.report.verdict import judge, verdict

DEFAULT_LIMIT = "5%"
RULE = (
    "Rule: the requantized checkpoint if it keeps every gate; else the merged 16-bit checkpoint if that keeps every "
    "gate; else base and adapter kept apart, which is what training saw and loses nothing by definition. Without gates "
    f"the limit is {DEFAULT_LIMIT} more perplexity on the in-domain set. Who serves many adapters of one base looks at "
    "the number of adapters first: from there on, apart takes less memory."
)
NEEDS = {"requantized": "vLLM or SGLang", "merged": "any engine", "separate": "bitsandbytes, PEFT"}
NEEDS_16_BIT = {**NEEDS, "separate": "an engine that serves LoRA, or PEFT"}
SERVES = {"requantized": "one checkpoint each", "merged": "one checkpoint each", "separate": "one base for all"}


def recommend(report: Numbers, gates: Sequence[Gate]) -> Recommendation:
    """The way to deploy, and the numbers of all three ways.

    Without gates the limit is DEFAULT_LIMIT on the in-domain set. The fields are described in `report.records`.
    """
    applied = list(gates) or _default(report)
    options = [_option(report, name, applied) for name in OPTIONS]
    choice = next((o["name"] for o in options if o["status"] == "pass"), None)
    many = _adapters_from(options, report)
    return {
        "choice": choice,
        "text": _text(known_facts(report["facts"]), options, choice, many, own_gates=bool(gates)) + _doubt(report),
        "rule": RULE,
        "options": options,
        "adapters_from": many,
    }


def _default(report: Numbers) -> list[Gate]:
    home = next((s["name"] for s in report["sets"] if s["in_domain"]), report["sets"][0]["name"])
    return [make("ppl_increase", home, most=DEFAULT_LIMIT, relative_to=None)]


def _option(report: Numbers, name: Choice, gates: Sequence[Gate]) -> Option:
    facts = known_facts(report["facts"])
    variant = {"merged": "merged", "separate": "adapter"}.get(name) or _requantized(report)
    status = None if variant is None else _status(report, gates, variant)
    return {
        "name": name,
        "variant": variant,
        "status": status,
        "bytes": _bytes(facts, name, variant),
        "needs": (NEEDS_16_BIT if is_16_bit_base(facts) else NEEDS)[name],
        "multi_adapter": SERVES[name],
        "loss": {s["name"]: _loss(s, variant) for s in report["sets"]},
        "tokens_per_second": speeds(facts).get(variant or ""),
    }


def _requantized(report: Numbers) -> str | None:
    final = final_variant(report)
    return final if final in QUANTIZED else None


def _status(report: Numbers, gates: Sequence[Gate], variant: str) -> Status | None:
    """The variant's status against the gates; None where it was not scored.

    Gates that compare with the reference do not apply to the reference itself.
    """
    if not any(v["name"] == variant for s in report["sets"] for v in s["variants"]):
        return None
    if all(s["reference"] == variant for s in report["sets"]):
        gates = [gate for gate in gates if METRICS[gate.metric].of == "variant"]
    status = verdict(report, judge(report, gates, variant))["status"]
    return "pass" if status == "none" else status


def _loss(s: EvaluationSet, variant: str | None) -> Estimate | None:
    """loss_percent against the reference: 0 for the reference itself, None where not measured."""
    if variant == s["reference"]:
        return {"value": 0.0, "se": 0.0, "low": 0.0, "high": 0.0}
    step = step_from_reference(s, variant)
    return None if step is None else step["loss_percent"]


def _bytes(facts: Facts, name: str, variant: str | None) -> int | None:
    sizes = (facts.get("cost") or {}).get("bytes") or {}
    if name == "separate":
        base, adapter = sizes.get("base"), sizes.get("adapter")
        return None if base is None or adapter is None else int(base + adapter)
    size = sizes.get(variant or "") or (sizes.get("gptq") if variant in QUANTIZED else None)
    return None if size is None else int(size)


def _adapters_from(options: Sequence[Option], report: Numbers) -> int | None:
    """Smallest n for which base + n adapters take less memory than n requantized checkpoints."""
    sizes = (known_facts(report["facts"]).get("cost") or {}).get("bytes") or {}
    own, base, adapter = options[0]["bytes"], sizes.get("base"), sizes.get("adapter")
    if not own or not base or not adapter or own <= adapter:
        return None
    return int(base // (own - adapter)) + 1


def option_words(facts: Facts, name: Choice) -> str:
    """A way to deploy in words."""
    return f"{base_and_adapter(facts)} apart" if name == "separate" else OPTIONS[name]


def _text(facts: Facts, options: Sequence[Option], choice: Choice | None, many: int | None, *, own_gates: bool) -> str:
    words, apart = {o["name"]: option_words(facts, o["name"]) for o in options}, base_and_adapter(facts)
    if choice is None:
        measured = any(o["status"] for o in options)
        why = f"even {apart} does not keep the gates" if measured else f"nothing was measured against {apart}"
        return f"No recommendation: {why}."
    limit = "the gates" if own_gates else f"the limit of {DEFAULT_LIMIT} in-domain (no gates are set)"
    said = {"fail": f"breaks {limit}", "inconclusive": f"cannot be told from {limit} yet"}
    passed = [
        f"{words[o['name']]} {said[o['status']]}" if o["status"] in said else f"{words[o['name']]} was not scored"
        for o in options[: [o["name"] for o in options].index(choice)]
    ]
    chosen = next(o for o in options if o["name"] == choice)
    size = f" ({format_bytes(chosen['bytes'])})" if chosen["bytes"] else ""
    why = f"it keeps {limit}" if choice != "separate" else "what training saw, without a loss"
    text = (
        f"Deploy the {words[choice]} model{size}: {why}"
        if choice != "separate"
        else f"Keep {words[choice]}{size}: {why}"
    )
    text += f"; {', '.join(passed)}." if passed else "."
    if many is not None and choice != "separate":
        text += f" Where {many} or more adapters of one base are served, one base with all of them takes less memory."
    return text


def _doubt(report: Numbers) -> str:
    """A sentence where the adapter did not surely gain on a text of its own: gates on its loss do not ask for that."""
    for s in report["sets"]:
        step = learned(s)
        if s["in_domain"] and step is not None and not (step["delta"]["high"] or 0.0) < 0:
            return (
                f" First ask whether it is the right adapter and base: on {s['name']} the adapter gained nothing that "
                f"can be told from zero ({in_words(step)})."
            )
    return ""


OPTIONS: dict[Choice, str] = {
    "requantized": "requantized",
    "merged": "merged 16-bit",
    "separate": "base + adapter apart",
}
