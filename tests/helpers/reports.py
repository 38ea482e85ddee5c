"""Scores, facts and whole reports made up for tests of the judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from requant_eval.gate import parse
from requant_eval.metrics import set_metrics
from requant_eval.metrics.answers import AskedPrompt, GivenAnswers, section
from requant_eval.metrics.task_metrics import TaskResult
from requant_eval.report.assemble import build
from requant_eval.scoring.token_scores import TokenScores

# Nats that each variant adds to what the adapter scores: the base loses 0.5, GPTQ a tenth of that.
SHIFT = {"base": 0.5, "adapter": 0.0, "merged": 0.001, "rtn": 0.1, "gptq": 0.05}
OF_ROADS = {"nf4-merge": 0.09, "nf4-again": 0.07, "gptqmodel": 0.045}

FACTS: dict[str, Any] = {
    "name": "pico|w4g64",
    "created": "2026-01-02",
    "recipe": "name: pico\nquantize: {bits: 4}",
    "base": {"name": "org/pico-nf4"},
    "adapter": "my-adapter",
    "merge": {"dtype": "float16", "ledger": {"merged": 14, "copied": 3}},
    "quantize": {
        "settings": {"bits": 4, "group_size": 64},
        "bits_per_weight": np.float64(4.25),
        "modules": [
            {"name": f"layers.{i}.down_proj", "bits": 4, "relative_error": 0.01 * i, "loss": 0.5} for i in range(1, 15)
        ],
    },
    "calibration": {"windows": 128, "overlap": {"in-domain": 0.0, "general": 0.03}},
    "cost": {
        "bytes": {"base": 90_000_000, "adapter": 10_000_000, "merged": 300_000_000, "gptq": 100_000_000},
        "seconds": {"merge": 3.0, "quantize": 83.0},
        "peak_rss": {"quantize": 2_000_000_000},
    },
    "versions": {"torch": "2.13"},
    "hardware": {"gpu": "none"},
    "warnings": ["damp was raised for 1 module"],
}


def scores(shift: float, *, documents: int = 30, reference: bool = False, digest: str = "d" * 64) -> TokenScores:
    common, own = np.random.default_rng(0), np.random.default_rng(int(1000 * shift) + 1)
    document = np.repeat(np.arange(documents, dtype=np.int32), 40)
    nll = common.gamma(2.0, size=len(document)) + shift * (1 + 0.2 * own.normal(size=len(document)))
    kl = np.abs(shift * own.normal(size=len(document))) if reference else None
    agree = own.random(len(document)) > shift if reference else None
    return TokenScores(
        nll=nll, document=document, top1=nll < 1.5, kl=kl, agree=agree, nonfinite=0, digest=digest, seconds=1.5
    )


def result(name: str, variants: tuple[str, ...] = tuple(SHIFT), *, documents: int = 30) -> set_metrics.SetResult:
    shifts = OF_ROADS | SHIFT
    made = {v: scores(shifts[v], documents=documents, reference=v not in ("base", "adapter")) for v in variants}
    return set_metrics.SetResult(
        name=name,
        digest="d" * 64,
        protocol="documents",
        window=2048,
        bos=True,
        n_documents=documents,
        n_scored=documents * 40,
        n_bytes=documents * 160,
        dropped=7,
        scores=made,
    )


GATES = ("ppl_increase in-domain 8%", "ppl_increase general 50% of rtn", "retention in-domain 80%")


def built(facts: dict[str, Any] | None = None, gates: tuple[str, ...] = GATES) -> dict[str, Any]:
    return build(
        sets=[result("general"), result("in-domain")],
        facts=FACTS if facts is None else facts,
        in_domain="in-domain",
        gates=[parse(text) for text in gates],
    )


OLD = Path(__file__).parents[1] / "data" / "report-v1.json"


HOSTILE = "\"'><script>hacked=1</script><img src=x onerror=hacked=1></style></title>{{ 7*7 }}{% raw %}&amp;"


def modules(layers: int) -> list[dict[str, Any]]:
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
    return [
        {"name": f"model.layers.{i}.{kind}", "bits": 4, "group_size": 64, "loss": 0.1 * i, "damp": 0.01,
         "relative_error": 0.01 + 0.0001 * i * (n + 1), "rtn_error": 0.1, "fallback": False}
        for i in range(layers) for n, kind in enumerate(kinds)
    ]  # fmt: skip


def full(layers: int = 30) -> dict[str, Any]:
    """A report with a whole model's modules."""
    return built(FACTS | {"quantize": FACTS["quantize"] | {"modules": modules(layers)}})


def answered(prompts: int = 20) -> dict[str, Any]:
    """`full`, with answers: the quantized model says another word to every fourth prompt, and to one goes on forever."""
    asked = [
        AskedPrompt(row=3 * n + 1, shown=f"What is {n} and {n}?\nBe short.", text="?", own="It is it.")
        for n in range(prompts)
    ]
    right = [f"Two times {n}\nis {2 * n}, which is not odd." for n in range(prompts)]
    quantized = [text.replace("Two", "seven") if n % 4 == 1 else text for n, text in enumerate(right)]
    quantized[-1] = "It is " + "and so on " * 20
    given = {
        name: [(text, not text.endswith("and so on ")) for text in texts]
        for name, texts in {"adapter": right, "merged": right, "gptq": quantized}.items()
    }
    made = GivenAnswers(set_name="in-domain", new_tokens=64, prompts=asked, given=given)
    return {**full(), "answers": section(made)}


def everything(layers: int = 30, prompts: int = 20, letters: int = 900) -> dict[str, Any]:
    """A report with tasks, roads and answers of all of them; each answer has `letters` letters."""
    names = (*SHIFT, *OF_ROADS)
    rows = [
        {"name": name, "by": f"the library of {name} 1.2.3", "settings": "4 bits", "bytes": 99 * 10**6,
         "unquantized": 3 * 10**6, "missing": None}
        for name in ("rtn", *OF_ROADS)
    ]  # fmt: skip
    asked = ("adapter", "merged", "gptq", *OF_ROADS)
    said = {
        name: [(f"{name} {n} " + "word and so on " * (letters // 15), True) for n in range(prompts)] for name in asked
    }
    given = [AskedPrompt(row=n, shown="What is it? " * 20, text="?", own="It.") for n in range(prompts)]
    rng = np.random.default_rng(0)
    tasks = []
    for number in range(4):
        values = {name: {"acc": list(map(float, rng.random(500) < 0.6))} for name in asked}
        facts: Any = {
            "name": f"task {number}", "task": "gsm8k", "digest": f"{number}" * 64, "version": "1.0 (lm-eval 0.4.13)",
            "kind": "multiple_choice", "few_shot": 2, "limit": None, "chat": False, "metric": "acc",
            "higher_is_better": True, "n_documents": 500, "missing": {},
        }  # fmt: skip
        tasks.append(TaskResult(facts=facts, values=values, seconds=dict.fromkeys(values, 1.0)))
    facts = FACTS | {"roads": rows, "quantize": FACTS["quantize"] | {"modules": modules(layers)}}
    return build(
        sets=[result("general", names), result("in-domain", names)], facts=facts, in_domain="in-domain",
        gates=[parse(text) for text in GATES], tasks=tasks,
        answers=GivenAnswers(set_name="in-domain", new_tokens=256, prompts=given, given=said),
    )  # fmt: skip


def hostile(named: str = HOSTILE) -> dict[str, Any]:
    """A report in which everything that a user or a file can name is hostile, or another text."""

    def spoil(value: Any, key: str = "") -> Any:
        if key == "options" and isinstance(value, dict):  # named by us
            return value | {"loss": {name + named: loss for name, loss in value["loss"].items()}}
        if isinstance(value, dict):
            return {
                (k + named if key in ("bytes", "versions", "retention") else k): spoil(v, k) for k, v in value.items()
            }
        if isinstance(value, list):
            return [spoil(v, key) for v in value]
        names = (
            "name",
            "set",
            "from",
            "to",
            "reference",
            "recipe",
            "adapter",
            "warnings",
            "gpu",
            "protocol",
            "created",
            "headline",
        )
        return value + named if isinstance(value, str) and key in names else value

    spoilt: dict[str, Any] = spoil(json.loads(json.dumps(full(2))))
    asked = [AskedPrompt(row=1, shown=named, text=named, own="")]
    given = {"adapter": [(f"{named} a", False)], "gptq": [(f"{named} {named}\x1b[31m", False)]}
    answers = GivenAnswers(set_name=named, new_tokens=8, prompts=asked, given=given)
    return spoilt | {"answers": section(answers)}
