"""Tables of the adapter: its delta against the quantization error, suggested bits, canaries."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from requant_eval.metrics.facts import CanaryFacts, Facts, ModuleFacts, SuggestionFacts
from requant_eval.render.tables import WORST_MODULES, Table
from requant_eval.report.number_format import format_bytes, format_estimate

_PLACE = re.compile(r"^(?:.*?\.)?(\d+)\.(.+)$")
_EXPERT = re.compile(r"\bexperts\.\d+\.")
SHOWN = 60  # characters of a prompt or an answer in a table


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One kind of module in one layer, the experts of a layer as one; None where not measured.

    signal_to_noise: tr(dW H dW') / tr(E H E'). relative_error: sqrt(tr(E H E') / tr(W H W')). retention: of the delta's
    output.
    """

    layer: int
    module: str
    signal_to_noise: float | None
    relative_error: float | None
    retention: float | None


def cells(facts: Facts) -> list[Cell]:
    """Every quantized module of the report, by layer; modules outside the layers are left out."""
    found: dict[tuple[int, str], list[ModuleFacts]] = {}
    for m in _modules(facts):
        place = _PLACE.match(str(m.get("name")))
        if place:
            found.setdefault((int(place[1]), _EXPERT.sub("experts.*.", place[2])), []).append(m)
    return [_cell(layer, module, many) for (layer, module), many in sorted(found.items(), key=lambda x: x[0][0])]


def _cell(layer: int, module: str, many: Sequence[ModuleFacts]) -> Cell:
    loss = sum(m["loss"] for m in many)
    whole = sum(m["loss"] / error**2 for m in many if (error := m.get("relative_error")))
    adapted = [m for m in many if m.get("signal") is not None]
    signal = sum(m["signal"] or 0.0 for m in adapted)
    noise = sum(m["loss"] for m in adapted)
    kept = sum((m["signal"] or 0.0) * part for m in adapted if (part := m.get("output_retention")) is not None)
    return Cell(
        layer=layer,
        module=module,
        signal_to_noise=signal / noise if adapted and noise > 0 else None,
        relative_error=(loss / whole) ** 0.5 if whole > 0 else None,
        retention=kept / signal if signal > 0 else None,
    )


def signal_to_noise_table(facts: Facts) -> Table:
    """Layer x module: the adapter's signal to noise; no rows where the run did not measure it."""
    known = [c for c in cells(facts) if c.signal_to_noise is not None]
    modules = list(dict.fromkeys(c.module for c in known))
    worst = {id(c) for c in sorted(known, key=lambda c: c.signal_to_noise or 0)[:WORST_MODULES]}
    by_place = {(c.layer, c.module): _ratio(c.signal_to_noise) + (" *" if id(c) in worst else "") for c in known}
    rows = tuple(
        (str(layer), *(by_place.get((layer, m), "") for m in modules))
        for layer in dict.fromkeys(c.layer for c in known)
    )
    short = tuple(m.rpartition(".")[2] if _unique(m, modules) else m for m in modules)
    note = (
        "Output power of what the adapter added over that of the quantization error, tr(dW H dW') / tr(E H E'), on the "
        "calibration text; * marks the ten lowest. Below 1 the error is the louder one, as it often is for a small "
        "delta: the adapter is lost only where its own output is not kept (next table)."
    )
    return Table(
        title="Adapter retention: signal to noise by layer and module", columns=("layer", *short), rows=rows, note=note
    )


def worst_modules_table(facts: Facts) -> Table:
    """The modules with the lowest signal to noise of the adapter, worst first."""
    known = [(m, float(ratio)) for m in _modules(facts) if (ratio := m.get("signal_to_noise")) is not None]
    worst = sorted(known, key=lambda found: found[1])[:WORST_MODULES]
    rows = tuple(
        (
            str(m["name"]),
            _percent(m.get("output_retention")),
            _percent(m.get("retention")),
            _ratio(ratio),
            _percent(m["relative_error"]),
            str(m["bits"]),
        )
        for m, ratio in worst
    )
    columns = ("module", "its output kept", "delta kept", "signal to noise", "relative error", "bits")
    note = (
        "Kept: the part of the stored weight's change from the base that is the adapter's, <Q - D, dW> / <dW, dW>, and "
        "the same of its output. 100 % with a low signal to noise: all there, under noise."
    )
    return Table(
        title=f"The {len(rows)} modules where least of the adapter is left", columns=columns, rows=rows, note=note
    )


def delta_lines(facts: Facts) -> list[str]:
    """The adapter's signal to noise and retention, measured and predicted, in sentences.

    [] when neither is known.
    """
    ratios = [float(ratio) for m in _modules(facts) if (ratio := m.get("signal_to_noise")) is not None]
    lines = []
    if ratios:
        lines.append(
            f"{len(ratios)} modules carry the adapter. Its output has {median(ratios):.3g} times the power of the "
            f"quantization error's in the median, {min(ratios):.3g} times in the worst; "
            f"{sum(r < 1 for r in ratios)} are below 1."
        )
    if (measured := delta_retention(facts)) is not None:
        lines.append(f"Of the adapter's delta, {_percent(measured)} is in the quantized weights (projection on it).")
    predicted = (facts.get("quantize") or {}).get("resonance")
    if predicted:
        lines.append(
            f"Predicted from weights alone, by rounding to nearest on the same grid: "
            f"{format_estimate(predicted['retention'], factor=100, unit=' %')}, over {predicted['modules']} modules of "
            f"layers {', '.join(predicted['blocks'])}; "
            f"the delta is {_percent(predicted['relative_delta'])} of the weights."
        )
    return lines


def delta_retention(facts: Facts) -> float | None:
    """<Q - D, dW> / <dW, dW> over all adapted modules together; None when no run measured it."""
    known = [
        (part, size**2)
        for m in _modules(facts)
        if (part := m.get("retention")) is not None and (size := m.get("delta_norm")) is not None
    ]
    whole = sum(square for _, square in known)
    return sum(part * square for part, square in known) / whole if whole > 0 else None


def suggestion_table(suggestion: SuggestionFacts) -> Table:
    """Gain and cost of more bits, by candidate."""
    lost = suggestion["before"]["kl"]["value"]
    rows = tuple(
        (
            u["pattern"],
            f"{u['from_bits']} -> {u['bits']}",
            _ratio(u["signal_to_noise"]) or "no adapter",
            _percent(u["relative_error"]),
            format_estimate(u["gain"]["kl"], signed=True),
            _percent(gain / lost) if lost and (gain := u["gain"]["kl"]["value"]) is not None else "",
            format_bytes(u["bytes"]),
            "yes" if u["helps"] else "no",
        )
        for u in suggestion["units"]
    )
    columns = (
        "modules",
        "bits",
        "signal to noise",
        "relative error",
        "gain",
        "of the loss",
        "larger by",
        "in the patch",
    )
    note = (
        f"Gain: KL(merged || quantized) in nats a token that goes away when only these modules get their merged "
        f"weights back, on {suggestion['sample']['tokens']} tokens of the calibration text, where the whole checkpoint "
        f"loses {format_estimate(suggestion['before']['kl'])}. Gains of several modules add up roughly; with "
        "`correct`, later layers go on making up for an error that is gone, so a gain is rather too low. "
        "In the patch: those whose interval is above 0."
    )
    return Table(title="More bits where they count", columns=columns, rows=rows, note=note)


def canaries_line(canaries: CanaryFacts) -> str:
    """ "adapter 18/20 -> merged 18/20 -> gptq 16/20", base first in words of its own."""
    total, right = canaries["total"], dict(canaries["right"])
    base = right.pop("base", None)
    way = " -> ".join(f"{name} {n}/{total}" for name, n in right.items())
    return way + (f" (the base without the adapter: {base}/{total})" if base is not None else "")


def canaries_table(canaries: CanaryFacts) -> Table:
    """Canaries whose answers differ between variants, the base aside."""
    names = [n for n in canaries["right"] if n != "base"]
    rows = tuple(
        (
            _cut(item["prompt"]),
            _cut(item["answer"]),
            *(("right: " if item["right"][n] else "wrong: ") + _cut(item["given"][n]) for n in names),
        )
        for item in canaries["items"]
        if len({item["right"][n] for n in names}) > 1
    )
    columns = ("prompt", "answer", *names)
    return Table(title="Canaries answered differently", columns=columns, rows=rows, text=len(columns))


def _modules(facts: Facts) -> Sequence[ModuleFacts]:
    return (facts.get("quantize") or {}).get("modules") or []


def _unique(module: str, modules: Sequence[str]) -> bool:
    leaf = module.rpartition(".")[2]
    return sum(m.rpartition(".")[2] == leaf for m in modules) == 1


def _ratio(value: float | None) -> str:
    """A power ratio to three digits."""
    return "" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g} %"


def _cut(text: str) -> str:
    plain = " ".join(str(text).split())
    return plain if len(plain) <= SHOWN else plain[: SHOWN - 1] + "…"
