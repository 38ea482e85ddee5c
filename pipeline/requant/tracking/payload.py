"""What a tracker gets of a report: numbers by variant, curves, settings; nothing else.

A report has no secrets and no paths of this machine. Names are `set/variant/metric`, as trackers group them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

STAGES = ("base", "adapter", "merged", "original", "rtn", "gptq", "healed", "ends")
"""The order of the variants on the axis of a tracker's charts."""
_OF_STEP = ("loss_percent", "agreement", "right_to_wrong")
_SETTINGS = ("bits", "group_size", "symmetric", "engine", "order", "sweeps", "correct")


def payload(report: Mapping[str, Any]) -> dict[str, Any]:
    """Name, settings, final numbers, numbers by stage and curves of a report, as JSON types.

    stages: [step, numbers] of each variant. curves: name -> [[step, value], ...].
    """
    numbers = dict(_numbers(report))
    return {
        "name": str(report.get("name") or "requant"),
        "settings": _settings(report),
        "numbers": numbers,
        "stages": list(_stages(report)),
        "curves": _curves(report["facts"]),
    }


def _numbers(report: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, value) of all that was measured."""
    for s in report["sets"]:
        for v in s["variants"]:
            yield from _value(f"{s['name']}/{v['name']}/perplexity", v["ppl"])
        for e in s["edges"]:
            if e["from"] == s["reference"]:
                for key in _OF_STEP:
                    yield from _value(f"{s['name']}/{e['to']}/{key}", e[key])
                yield from _value(f"{s['name']}/{e['to']}/kl", (e["kl"] or {}).get("mean"))
        for name, kept in s["retention"].items():
            yield from _value(f"{s['name']}/{name}/retention", kept)
    for task in report.get("tasks") or []:
        for v in task["variants"]:
            yield from _value(f"{task['name']}/{v['name']}/score", v["score"])
        for step in task["steps"]:
            yield from _value(f"{task['name']}/{step['to']}/difference", step["difference"])
    cost = report["facts"].get("cost") or {}
    for kind in ("bytes", "seconds", "peak_rss", "peak_device"):
        for name, number in (cost.get(kind) or {}).items():
            if isinstance(number, int | float):
                yield f"{kind}/{name}", float(number)


def _value(name: str, estimate: Mapping[str, Any] | None) -> Iterator[tuple[str, float]]:
    """The value of an estimate and the ends of its interval, as far as they are known.

    No name is another's with a slash behind: mlflow keeps them as files in folders.
    """
    for part, suffix in (("value", ""), ("low", "_low"), ("high", "_high")):
        number = (estimate or {}).get(part)
        if isinstance(number, int | float):
            yield name + suffix, float(number)


def _stages(report: Mapping[str, Any]) -> Iterator[list[Any]]:
    """[step, numbers] of each variant in the order of the stages: one line a set over the steps."""
    for number, variant in enumerate(STAGES):
        found: dict[str, float] = {}
        for s in report["sets"]:
            ppl = next((v["ppl"]["value"] for v in s["variants"] if v["name"] == variant), None)
            found |= {} if ppl is None else {f"stages/{s['name']}/perplexity": ppl}
        for task in report.get("tasks") or []:
            score = next((v["score"]["value"] for v in task["variants"] if v["name"] == variant), None)
            found |= {} if score is None else {f"stages/{task['name']}/score": score}
        if found:
            yield [number, found]


def _curves(facts: Mapping[str, Any]) -> dict[str, list[list[float]]]:
    """KL of the healing on the windows that choose its step."""
    held: Sequence[Sequence[Any]] = (facts.get("heal") or {}).get("held") or ()
    points = [[float(p[0]), float(p[1])] for p in held if all(isinstance(x, int | float) for x in p[:2])]
    return {"heal/kl": points} if points else {}


def _settings(report: Mapping[str, Any]) -> dict[str, str]:
    """Settings and results that are words."""
    facts = report["facts"]
    quantize = (facts.get("quantize") or {}).get("settings") or {}
    found = {key: str(quantize[key]) for key in _SETTINGS if key in quantize}
    for name in ("base", "adapter"):
        own = facts.get(name)
        found[name] = str(own.get("name") if isinstance(own, Mapping) else own)
    found |= {f"version/{name}": str(v) for name, v in (facts.get("versions") or {}).items()}
    found |= {"verdict": report["verdict"]["status"], "recommendation": str(report["recommendation"]["choice"])}
    return found | {f"gate/{g['metric']}/{g['set']}": g["status"] for g in report["gates"]}
