"""What ended well, and the root cause of what did not.

Well: exit code 0 where every outside reader agrees, or a documented code with a message of ours. A root cause is one line:
kind, the deepest function of ours, the exception's class; failures with the same line are one fault.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from requant.cli.exit_codes import MEANINGS

TRACEBACK = "Traceback (most recent call last)"
FRAME = re.compile(r'File "([^"]+/(?:pipeline/requant|eval/requant_eval)/[^"]+)", line \d+, in (\S+)')
RAISED = re.compile(r"^((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Warning|Exit|NotFound|Undefined))\b", re.MULTILINE)
SECRET = "hf_CampaignSecretCampaignSecret00"  # a planted token that no output may show
LONGEST = 6000  # characters of a message: more helps nobody
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f\u202a-\u202e\u2066-\u2069]")
STYLE = re.compile("\x1b\\[[0-9;]*m")


@dataclass(frozen=True, kw_only=True)
class End:
    """How a command ended. stopped: "", "hang" or "memory" when the campaign ended it."""

    code: int
    text: str
    seconds: float
    peak: int  # bytes resident
    cpu: float = 0.0  # seconds
    stopped: str = ""


def root_of_traceback(text: str) -> str:
    """The deepest function of ours and the class of the last exception."""
    shown = text[text.index(TRACEBACK) :]
    ours = FRAME.findall(shown)
    path, function = ours[-1] if ours else ("", "?")
    place = re.split(r"/(?:pipeline|eval)/", path)[-1]
    raised = RAISED.findall(shown)
    return f"{place}:{function} <- {raised[-1] if raised else '?'}"


def fault_of(end: End, codes: frozenset[int] = frozenset(MEANINGS)) -> str:
    """The root cause of a command's bad end; "" when it ended well. codes: those it may end with."""
    if end.stopped:
        return end.stopped
    if TRACEBACK in end.text:
        return f"traceback {root_of_traceback(end.text)}"
    if end.code not in codes:
        return f"died {end.code}"
    if end.code and not end.text.strip():
        return f"speechless {end.code}"
    if SECRET in end.text:
        return "secret in the output"
    if CONTROL.search(STYLE.sub("", end.text)):
        return "control characters in the output"
    if end.code == 2 and len(end.text) > LONGEST:
        return "message of more than 6,000 characters"
    return ""


@dataclass
class Fault:
    """Failures of one root cause. first: how the first of them is repeated."""

    cause: str
    count: int
    first: str
    label: str
    shown: str  # the end of its output


@dataclass
class Tally:
    """What came of a campaign's trials."""

    campaign: str
    faults: dict[str, Fault] = field(default_factory=dict)
    trials: Counter[str] = field(default_factory=Counter)  # by kind
    codes: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # of CPU, by kind

    def add(self, kind: str, end: End, cause: str, *, repeat: str, label: str) -> bool:
        """Count a trial; whether its fault is one not seen before."""
        self.trials[kind] += 1
        self.codes[end.stopped or str(end.code)] += 1
        self.seconds[kind] += end.cpu
        if not cause:
            return False
        cause = f"{kind}: {cause}"
        known = self.faults.get(cause)
        if known:
            known.count += 1
            return False
        self.faults[cause] = Fault(cause, 1, repeat, label, end.text.strip()[-600:])
        return True

    def summary(self) -> str:
        """One line of figures and one a root cause, the most frequent first."""
        failed = sum(f.count for f in self.faults.values())
        codes = ", ".join(f"{code}: {n}" for code, n in sorted(self.codes.items()))
        lines = [
            f"{self.campaign}: {self.trials.total()} trials, {failed} failed, {len(self.faults)} root causes; ended {codes}"
        ]
        for fault in sorted(self.faults.values(), key=lambda f: -f.count):
            last = fault.shown.splitlines()[-1][:160] if fault.shown else ""
            lines.append(f"  {fault.count} x {fault.cause} | {fault.label[:100]} | {last}\n      {fault.first}")
        return "\n".join(lines)

    def costs(self) -> str:
        """CPU seconds a trial, by kind."""
        return ", ".join(f"{kind} {s / self.trials[kind]:.2f}" for kind, s in sorted(self.seconds.items()))

    def save(self, file: Path) -> None:
        file.write_text(
            f"{self.summary()}\nCPU seconds a trial: {self.costs()}\n", encoding="utf-8", errors="backslashreplace"
        )
