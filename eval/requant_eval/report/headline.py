"""The report in one sentence: retention, loss by set, size; no verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from requant_eval.metrics.facts import base_and_adapter, is_16_bit_base, known_facts
from requant_eval.metrics.records import scaled
from requant_eval.report.adapter_gain import gained_nothing, in_words, learned
from requant_eval.report.number_format import format_bytes, format_estimate, format_value
from requant_eval.report.records import Numbers

# What ships, best first.
FINAL = ("ends", "healed", "gptq", "rtn", "merged")
QUANTIZED = ("ends", "healed", "gptq")
REFERENCE_NAMES = {"adapter": "base+adapter", "merged": "the merged model"}


def final_variant(report: Numbers) -> str | None:
    """The variant that ships: the first of `FINAL` that was scored."""
    names = {v["name"] for s in report["sets"] for v in s["variants"]}
    return next((name for name in FINAL if name in names), None)


def reference_name(report: Numbers, variant: str) -> str:
    """The reference's name in a sentence."""
    facts = report["facts"]
    return base_and_adapter(facts) if variant == "adapter" and is_16_bit_base(facts) else REFERENCE_NAMES[variant]


def headline(report: Numbers) -> str:
    """One sentence; clauses whose numbers are missing are left out."""
    final = final_variant(report)
    if final is None:
        return "No merged or quantized variant was scored: there is no loss to report."
    clauses = [_retention(report, final), _losses(report, final), _tasks(report, final), _size(report, final)]
    said = [clause for clause in clauses if clause]
    if not said:
        return f"{method(report, final)} was scored alone: there is no loss to report."
    first = said[0] if said[0] is clauses[0] else f": {said[0]}"
    return method(report, final) + "; ".join([first, *said[1:]]) + "."


def method(report: Numbers, variant: str) -> str:
    """ "GPTQ 4-bit g64", as the quantizer's settings say."""
    if variant == "merged":
        return "The merged model"
    settings = (known_facts(report["facts"]).get("quantize") or {}).get("settings") or {}
    words = ["RTN" if variant == "rtn" else "GPTQ"]
    if settings.get("bits"):
        words.append(f"{settings['bits']}-bit")
    if group := settings.get("group_size"):
        words.append("per row" if group == -1 else f"g{group}")
    healed = variant == "healed" or (variant == "ends" and known_facts(report["facts"]).get("heal"))
    return " ".join(words) + (" + heal" if healed else "") + (_ends(settings) if variant == "ends" else "")


def _ends(settings: Mapping[str, Any]) -> str:
    """ " with 8-bit embeddings and head", as the quantizer's settings say."""
    asked = [f"{settings[end]}-bit {end}" for end in ("embeddings", "head") if settings.get(end)]
    return f" with {' and '.join(asked)}" if asked else ""


def _retention(report: Numbers, final: str) -> str:
    for s in report["sets"]:
        if final not in s["retention"]:
            continue
        kept = s["retention"][final]
        if kept is None:
            step = learned(s)
            gains = "gained nothing" if step is not None and gained_nothing(step) else "gained nothing measurable"
            return f": retention is not defined, since the adapter {gains} on {s['name']}" + (
                f" ({in_words(step)})" if step is not None else ""
            )
        value = format_estimate(kept, factor=100, unit=" %", interval=False)
        if kept["low"] is None:
            return f" keeps {value} of what the adapter learned"
        percent = scaled(kept, 100)
        low, high = (format_value(percent[end], percent["se"]) for end in ("low", "high"))
        return f" keeps {value} (95 % CI {low} to {high}) of what the adapter learned"
    return ""


def _losses(report: Numbers, final: str) -> str:
    parts: list[str] = []
    against = ""
    for s in sorted(report["sets"], key=lambda s: not s["in_domain"]):
        for edge in s["edges"]:
            if edge["from"] == s["reference"] and edge["to"] == final:
                word = "" if parts else " perplexity"
                loss = format_estimate(edge["loss_percent"], signed=True, unit=" %")
                parts.append(f"{s['name']}{word} {loss}")
                against = reference_name(report, s["reference"])
    return f"{', '.join(parts)} against {against}" if parts else ""


def _tasks(report: Numbers, final: str) -> str:
    """Score and difference of each task, as far as it was compared."""
    parts = []
    for task in report.get("tasks") or []:
        step = next((t for t in task["steps"] if t["to"] == final), None)
        score = next((v["score"] for v in task["variants"] if v["name"] == final), None)
        if step is not None and score is not None:
            change = format_estimate(step["difference"], factor=task["scale"], signed=True)
            value = format_estimate(score, factor=task["scale"], interval=False)
            parts.append(f"{task['name']} {value} ({change} points)")
    return f"task{'s' if len(parts) > 1 else ''} {', '.join(parts)}" if parts else ""


def _size(report: Numbers, final: str) -> str:
    sizes = (known_facts(report["facts"]).get("cost") or {}).get("bytes") or {}
    size = sizes.get(final) or (sizes.get("gptq") if final in QUANTIZED else None)
    if not size or final in ("merged", "rtn"):
        return ""
    text = f"checkpoint {format_bytes(size)}"
    if (merged := sizes.get("merged")) and merged >= 1.05 * size:
        text += f", {merged / size:.1f} times smaller than the merged one"
    return text
