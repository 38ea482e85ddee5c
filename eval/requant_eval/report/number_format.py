"""Numbers as text, one way for every rendering: the digits follow the standard error."""

from __future__ import annotations

import math
import re

from requant_eval.metrics.records import Estimate

NOT_AVAILABLE = "n/a"
NOT_DEFINED = "not defined"
MAX_DECIMALS = 8
UNITS = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "s": 1.0, "min": 60.0, "h": 3600.0}
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
MEASURED = re.compile(rf"({NUMBER.pattern}) ({'|'.join(UNITS)})\b")


def format_estimate(
    estimate: Estimate | None,
    *,
    factor: float = 1.0,
    signed: bool = False,
    unit: str = "",
    interval: bool = True,
) -> str:
    """{"value", "se", "low", "high"} -> "3.498 [3.461, 3.537]".

    To two significant digits of the standard error. None -> "not defined".
    factor: 100 to print a share in percent. unit: set after the value, e.g. " %".
    """
    if estimate is None:
        return NOT_DEFINED
    se = _times(estimate.get("se"), factor)
    value = format_value(_times(estimate.get("value"), factor), se, signed=signed) + unit
    ends = [_times(end, factor) for end in (estimate.get("low"), estimate.get("high"))]
    if not interval or None in ends:
        return value
    low, high = (format_value(end, se, signed=signed) for end in ends)
    return f"{value} [{low}, {high}]"


def format_value(value: float | None, se: float | None = None, *, signed: bool = False) -> str:
    """`value` to two significant digits of `se`.

    To four significant digits of its own where `se` is unknown or 0. Zero has no sign and no long row of zeros.
    """
    if value is None or not math.isfinite(value):
        return NOT_AVAILABLE
    sign = "+" if signed else ""
    known = se is not None and math.isfinite(se) and se > 0
    text = f"{value:{sign}.{decimals(se)}f}" if known and se else f"{value:{sign}.4g}"
    if float(text) == 0:
        return text.lstrip("+-") if len(text) <= len("+0.0000") else "0"
    return text


def decimals(se: float) -> int:
    """Decimals that show two significant digits of `se` > 0."""
    exponent = int(f"{se:.1e}".split("e")[1])
    return min(max(1 - exponent, 0), MAX_DECIMALS)


def format_bytes(count: float) -> str:
    """Decimal units, three significant digits: 123456789 -> "123 MB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            value = count / size
            return f"{value:.{max(0, 2 - int(math.log10(value)))}f} {unit}"
    return f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    """3725 -> "1 h 2 min", 83 -> "1 min 23 s", 4.2 -> "4.2 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def read_number(text: str) -> float | None:
    """The number that a text of this file begins with, in bytes or seconds; tables sort by it.

    "115 MB" -> 115e6, "1 min 47 s" -> 107, "3.498 [3.461, 3.537]" -> 3.498; None where the text begins otherwise.
    """
    found = NUMBER.match(text)
    if found is None:
        return None
    parts = MEASURED.findall(text)
    if parts and MEASURED.sub("", text).strip() == "":
        return sum(float(value) * UNITS[unit] for value, unit in parts)
    return float(found[0])


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
