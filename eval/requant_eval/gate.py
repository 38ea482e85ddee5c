"""Metrics and gates: what is measured of a variant, and which limit a gate puts on it.

In a recipe `{metric: ppl_increase, set: in-domain, max: 5%}`, on the command line `ppl_increase in-domain 5%`.
`relative_to: rtn` (`50% of rtn`) puts the limit on the share of what rounding to nearest would cost.
Declarations only, without numpy: `metrics.definitions` computes a metric, `report.verdict` judges a report by its
gates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

Side = Literal["max", "min"]
Control = Literal["rtn"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number of a variant on a set: its place in the report, how it is shown and gated.

    words: its name in the report. short: its name in a gate; default: words.
    of, key: where the set's section has it: a key of the variant's row, of the step from the reference to the variant,
    or of the set itself, by variant; of a task, in its section; of answers, counted in theirs.
    part: the key of the estimate inside that value, where it is not the estimate itself.
    scale: the report's number times `scale` is in `unit` ("%", "nats" or none).
    signed: shown with its sign.
    side: whether a gate's limit is the largest ("max") or the smallest ("min") good value.
    column: its sums over documents (`documents` in the report), where a gate may limit it relative to the control's.
    from_reference: the reference's sums are subtracted from that column first.
    in_domain: measured on the in-domain set only.
    needs: variants that the recipe has to score as well.
    needs_kl: whether it needs evaluate.kl.
    own_table: whether the report has a table for it alone; the others share one.
    """

    words: str
    short: str = ""
    of: Literal["variant", "step", "set", "task", "answers"]
    key: str
    part: str | None = None
    scale: float = 1.0
    unit: str = ""
    signed: bool = False
    side: Side
    column: str | None = None
    from_reference: bool = False
    in_domain: bool = False
    needs: tuple[str, ...] = ()
    needs_kl: bool = False
    own_table: bool = False

    @property
    def relative(self) -> bool:
        """Whether a gate may limit it to a share of the control's."""
        return self.column is not None


METRICS: dict[str, Metric] = {
    "ppl_increase": Metric(
        words="perplexity against the reference",
        short="perplexity increase",
        of="step",
        key="loss_percent",
        unit="%",
        signed=True,
        side="max",
        column="nll",
        from_reference=True,
        own_table=True,
    ),
    "perplexity": Metric(words="perplexity", of="variant", key="ppl", side="max", own_table=True),
    "kl": Metric(
        words="mean KL divergence from the reference",
        short="KL divergence",
        of="step",
        key="kl",
        part="mean",
        unit="nats",
        side="max",
        column="kl",
        needs_kl=True,
        own_table=True,
    ),
    "right_to_wrong": Metric(
        words="tokens whose top-1 prediction became wrong",
        short="tokens that became wrong",
        of="step",
        key="right_to_wrong",
        scale=100,
        unit="%",
        side="max",
        column="right_to_wrong",
        own_table=True,
    ),
    "retention": Metric(
        words="of what the adapter learned, kept",
        short="retention",
        of="set",
        key="retention",
        scale=100,
        unit="%",
        side="min",
        in_domain=True,
        needs=("base",),
        own_table=True,
    ),
    "agreement": Metric(
        words="tokens with the reference's top-1 prediction",
        short="agreement",
        of="step",
        key="agreement",
        scale=100,
        unit="%",
        side="min",
        needs_kl=True,
        own_table=True,
    ),
    "lost_answers": Metric(
        words="answers that fail a check which the reference's do not",
        short="answers lost",
        of="answers",
        key="lost",
        side="max",
        in_domain=True,
        own_table=True,
    ),
    "task": Metric(
        words="points below the reference on a task",
        of="task",
        key="drop",
        unit="points",
        side="max",
        own_table=True,
    ),
}

if TYPE_CHECKING:
    MetricName = str
else:
    MetricName = Literal[tuple(METRICS)]  # for schemas

_PERCENT = re.compile(r"(-?[0-9]+(?:\.[0-9]+)?) ?%")
_POINTS = re.compile(r"(-?[0-9]+(?:\.[0-9]+)?)(?: ?points?)?")
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_FORMS = {"%": (_PERCENT, "a percentage: write 5%"), "points": (_POINTS, "a number of points: write 2 points")}
LARGEST = 1e9  # limit of a gate; nothing that is measured comes near
_HOW = '"METRIC SET LIMIT" such as "ppl_increase in-domain 5%", "... 50% of rtn", or "task gsm8k 2points"'


def gate_words(metric: str) -> str:
    """A metric's name in a gate, for people; the name itself of a metric that is not known."""
    declared = METRICS.get(metric)
    return (declared.short or declared.words) if declared else metric


def is_counted(metric: str) -> bool:
    """Whether a metric is counted, and so has no interval."""
    declared = METRICS.get(metric)
    return declared is not None and declared.of == "answers"


class GateError(ValueError):
    """A gate that is not valid; `key` names the wrong part."""

    def __init__(self, key: str, message: str) -> None:
        self.key = key
        super().__init__(message)


@dataclass(frozen=True)
class Gate:
    """A limit on one metric of one set; `set` is the name of a task where the metric is of tasks.

    limit: in the metric's unit, or in percent of the control's where `relative_to` is set.
    """

    metric: MetricName
    set: str
    limit: float
    relative_to: Control | None = None

    @property
    def side(self) -> Side:
        """Whether the limit is the largest or the smallest good value."""
        return METRICS[self.metric].side

    @property
    def unit(self) -> str:
        return "%" if self.relative_to else METRICS[self.metric].unit

    @property
    def text(self) -> str:
        """ "perplexity increase on in-domain at most 5 %"."""
        bound = f"{self.limit:g} {self.unit}".rstrip()
        whose = f" of {self.relative_to}'s" if self.relative_to else ""
        if METRICS[self.metric].of == "task":
            return f"drop on task {self.set} at most {bound}"
        return f"{gate_words(self.metric)} on {self.set} at {'most' if self.side == 'max' else 'least'} {bound}{whose}"

    def rule(self) -> dict[str, Any]:
        """The gate as `report.json` has it."""
        return asdict(self) | {"side": self.side, "unit": self.unit}


def make(
    metric: str, on: str, *, most: float | str | None = None, least: float | str | None = None, relative_to: str | None
) -> Gate:
    """A gate from the keys of a recipe; `most` and `least` are its `max` and `min`.

    Raises:
        GateError: an unknown metric or control, the wrong side, no limit or a limit without its unit.
    """
    declared = METRICS.get(metric)
    if declared is None:
        raise GateError("metric", f"{metric!r} is not one of {', '.join(METRICS)}")
    given: dict[Side, float | str | None] = {"max": most, "min": least}
    other: Side = "min" if declared.side == "max" else "max"
    if given[other] is not None:
        good = "small" if declared.side == "max" else "large"
        raise GateError(other, f"{metric} is good when it is {good}: use {declared.side}")
    if relative_to is not None and relative_to not in get_args(Control):
        raise GateError("relative_to", f"{relative_to!r} is not {get_args(Control)[0]}, the control")
    if relative_to is not None and not declared.relative:
        those = ", ".join(name for name, q in METRICS.items() if q.relative)
        raise GateError("relative_to", f"only {those} can be a share of the control's, not {metric}")
    unit = "%" if relative_to is not None else declared.unit
    limit = _limit(declared.side, given[declared.side], unit)
    return Gate(metric, on, limit, relative_to)  # type: ignore[arg-type]  # looked up above


def parse(text: str) -> Gate:
    """A gate from the command line.

    Raises:
        GateError: not METRIC SET LIMIT, or not a valid gate.
    """
    words = re.sub(r"(?<=[0-9]) (%|points?\b)", r"\1", text).split()
    relative_to = words[4] if len(words) == 5 and words[3] == "of" else None
    if len(words) != 3 and relative_to is None:
        raise GateError("", f"{text!r} is not a gate: write {_HOW}")
    metric, on, limit = words[:3]
    is_least = metric in METRICS and METRICS[metric].side == "min"
    return make(
        metric, on, most=None if is_least else limit, least=limit if is_least else None, relative_to=relative_to
    )


def from_rule(rule: Mapping[str, Any]) -> Gate:
    """The gate of a `report.json` entry (`Gate.rule`)."""
    if rule["metric"] not in METRICS:
        raise GateError("metric", f"{rule['metric']!r} is not one of {', '.join(METRICS)}")
    return Gate(rule["metric"], rule["set"], float(rule["limit"]), rule["relative_to"])


def _limit(side: Side, value: float | str | None, unit: str) -> float:
    if value is None:
        raise GateError(side, "required key is missing")
    text = str(value).strip()
    pattern, wanted = _FORMS.get(unit, (_NUMBER, "a number"))
    match = pattern.fullmatch(text)
    if match is None:
        raise GateError(side, f"{text if len(text) <= 60 else text[:60] + '...'} is not {wanted}")
    limit = float(match[match.re.groups])
    if abs(limit) > LARGEST:
        raise GateError(side, f"{limit:g} is not a limit: expected at most {LARGEST:g}")
    return limit
