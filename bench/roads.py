"""What ships against what people would otherwise ship, on a fine-tune of one's own.

    python bench/roads.py RECIPE --out FILE [--roads rtn,nf4-merge,nf4-again,gptqmodel] [--set KEY=VALUE ...]

Runs the recipe with `evaluate.roads`, all others of its keys as they are, and writes what its report says of every road:
loss with its interval and KL by set, multiple of the loss of what ships, exact bytes, who computed it; scores of tasks,
right canaries and passed checks of answers where the recipe asks for them; seconds and peak memory by stage. FILE names
no place of the machine. A run that stopped goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from requant import recipe as recipes
from requant.checkpoint.atomic_write import write_text
from requant.run import run

ALL = "rtn,nf4-merge,nf4-again,gptqmodel"


def behaviour(report: dict[str, Any], name: str) -> dict[str, Any]:
    """Scores of tasks, right canaries and passed checks of one variant, as far as they were measured."""
    found: dict[str, Any] = {}
    for task in report.get("tasks", ()):
        score = next((v["score"] for v in task["variants"] if v["name"] == name), None)
        step = next((s["difference"] for s in task["steps"] if s["to"] == name), None)
        if score:
            found.setdefault("tasks", {})[task["name"]] = {"score": score, "difference": step}
    canaries = report["facts"].get("canaries")
    if canaries and name in canaries["right"]:
        found["canaries"] = {"right": canaries["right"][name], "of": canaries["total"]}
    answering = next((v for v in (report.get("answers") or {}).get("variants", ()) if v["name"] == name), None)
    if answering and answering["answered"]:
        reference = report["answers"]["reference"]
        found["answers"] = {"checks": answering["checks"], "differ": answering["differ"].get(reference)}
    return found


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """What a reader of the bench needs of a report."""
    facts = report["facts"]
    return {
        "headline": report["headline"],
        "base": facts["base"]["name"],
        "adapter": facts["adapter"]["name"],
        "quantize": {key: facts["quantize"]["settings"][key] for key in ("bits", "group_size", "symmetric")},
        "calibration": {key: facts["calibration"][key] for key in ("windows", "length")},
        "sets": {s["name"]: {"documents": s["n_documents"], "tokens": s["n_scored"]} for s in report["sets"]},
        "roads": [one | behaviour(report, one["name"]) for one in report["roads"]],
        "adapter itself": behaviour(report, "adapter"),
        "seconds": facts["cost"]["seconds"],
        "peak_rss": facts["cost"]["peak_rss"],
        "peak_device": facts["cost"]["peak_device"],
        "evaluation": facts["evaluation"]["dtype"],
        "versions": facts["versions"],
        "hardware": facts["hardware"],
        "warnings": report["warnings"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--roads", default=ALL)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    wanted = recipes.load(args.recipe, [*args.set, f"evaluate.roads=[{args.roads}]"])
    report = json.loads((run(wanted).path / "report.json").read_text())
    write_text(args.out, json.dumps(summary(report), indent=1) + "\n")
    for one in report["roads"]:
        losses = ", ".join(f"{name} {loss['value']:+.2f} %" for name, loss in one["loss"].items() if loss)
        print(f"{one['name']}: {losses or one['missing']}, {(one['bytes'] or 0) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
