"""What held-out windows say of a healing: looks by source, curve, the judgement at its end.

A look has two values of every source of text: KL(teacher || student), and the loss, how many nats a token of the text
itself costs more than with the teacher. The sum of both, a loss below zero taken as zero, compares steps whose losses
differ by more than their noise; else KL does. KL alone prefers small rates: it grows with noise in the weights that
cancels in a loss. A loss alone says little on few windows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor

from requant_eval.strict_json import parse

PATIENCE = 3  # looks in a row that are worse than the best, in the second half, end a training
NOISE = 2.0  # standard errors that the KL or the loss of a source may rise by
SURE = 3.0  # standard errors by which losses choose a step: they are looked at ten times
MIN_WINDOWS = 8  # of fewer windows the noise is not known: their losses decide nothing, their KL may not rise


@dataclass(frozen=True, slots=True)
class Windows:
    """Held-out windows one by one: KL and loss, float64 [n] on the CPU, nats a token. sources: number of each one's."""

    kl: Tensor
    loss: Tensor
    sources: Sequence[int]

    def part(self, begin: int, end: int | None = None) -> Windows:
        """Some of the windows."""
        return Windows(self.kl[begin:end], self.loss[begin:end], self.sources[begin:end])

    def by_source(self, values: Tensor) -> dict[int, Tensor]:
        """Source -> its values."""
        return {source: values[[s == source for s in self.sources]] for source in sorted(set(self.sources))}


@dataclass(frozen=True, slots=True)
class Look:
    """Held-out windows after so many steps. kl, loss: the mean of every source, in nats a token."""

    steps: int
    windows: Windows

    @property
    def kl(self) -> list[float]:
        """The mean KL of every source."""
        return [float(v.mean()) for v in self.windows.by_source(self.windows.kl).values()]

    @property
    def loss(self) -> list[float]:
        """The mean loss of every source."""
        return [float(v.mean()) for v in self.windows.by_source(self.windows.loss).values()]

    @property
    def mean_kl(self) -> float:
        """KL, every source with the same weight."""
        return fmean(self.kl)

    @property
    def score(self) -> float:
        """KL and what the loss is above zero, every source with the same weight: the less the better."""
        return fmean(kl + max(0.0, loss) for kl, loss in zip(self.kl, self.loss, strict=True))

    @property
    def finite(self) -> bool:
        """Whether all values are numbers."""
        return all(map(math.isfinite, (*self.kl, *self.loss)))

    def gains_on(self, start: Look) -> bool:
        """Whether no source has a KL that is higher by more than its noise."""
        rises = start.windows.by_source(self.windows.kl - start.windows.kl)
        return not any(_surely_risen(rise) for rise in rises.values())

    def surely_cheaper_than(self, other: Look) -> bool:
        """Whether the score is less, and the loss by more than its noise on these windows."""
        fall = other.windows.loss - self.windows.loss
        return self.score < other.score and float(fall.mean()) > SURE * _error(fall)

    def beats(self, other: Look) -> bool:
        """Whether this is better: by KL and loss where the losses differ for sure, else by KL."""
        if other.surely_cheaper_than(self):
            return False
        return self.surely_cheaper_than(other) or self.mean_kl < other.mean_kl


@dataclass(frozen=True, slots=True)
class Judgement:
    """Start and chosen step on windows not looked at before. worse: numbers of the sources that became worse."""

    start: Look
    chosen: Look
    worse: tuple[int, ...]

    @classmethod
    def of(cls, start: Windows, chosen: Windows, steps: int) -> Judgement:
        """A source is worse when its KL or its loss rose by more than two standard errors of the difference."""
        kl, loss = start.by_source(chosen.kl - start.kl), start.by_source(chosen.loss - start.loss)
        worse = [s for s in kl if _surely_risen(kl[s]) or not float(loss[s].mean()) <= NOISE * _error(loss[s])]
        return cls(Look(0, start), Look(steps, chosen), tuple(worse))

    @property
    def better(self) -> bool:
        """Whether the whole gained, and no source became worse."""
        return not self.worse and self.chosen.mean_kl < self.start.mean_kl


def _surely_risen(rise: Tensor) -> bool:
    """Whether KLs of the same windows rose by more than their noise; where that is not known, by anything."""
    error = _error(rise)
    return not float(rise.mean()) <= (NOISE * error if math.isfinite(error) else 0.0)


def _error(values: Tensor) -> float:
    """The standard error of a mean; that of a few values is unknown."""
    return float(values.std()) / math.sqrt(len(values)) if len(values) >= MIN_WINDOWS else math.inf


@dataclass
class LossCurve:
    """The losses of a healing, in nats a token.

    train: KL of each step's batch. held_out: looks at the windows that choose. stopped: why it ended early.
    judged: by the windows that judge; None without such windows.
    """

    train: list[float] = field(default_factory=list)
    held_out: list[Look] = field(default_factory=list)
    stopped: str | None = None
    judged: Judgement | None = None

    @property
    def best(self) -> Look:
        """The start, or the last look that beat the best before it.

        Its mean KL is not above the start's, and no source's by more than its noise.
        """
        best = start = self.held_out[0]
        for look in self.held_out[1:]:
            if look.mean_kl <= start.mean_kl and look.gains_on(start) and look.beats(best):
                best = look
        return best

    @property
    def gained(self) -> bool:
        """Whether a step was chosen that is better than the start, by the windows that judge where there are some."""
        return self.best.steps > 0 and (self.judged is None or self.judged.better)

    def turned(self, steps: int) -> bool:
        """Whether the second half of `steps` has brought nothing for some looks: the text is learned by heart.

        The first half does not count: at a high rate the KL rises, and falls again with the rate.
        """
        last = self.held_out[-PATIENCE:]
        late = len(last) == PATIENCE and last[0].steps * 2 >= steps
        return late and not any(look is self.best or look.beats(self.best) for look in last)

    def to_json(self) -> str:
        """The curve as text for the metadata of a state file."""
        held = [(v.steps, v.windows.kl.tolist(), v.windows.loss.tolist(), v.windows.sources) for v in self.held_out]
        return json.dumps({"train": self.train, "held": held, "stopped": self.stopped})

    @classmethod
    def from_json(cls, text: str) -> LossCurve:
        """The curve that `to_json` wrote."""
        stored = parse(text, constants=True)
        held_out = [
            Look(
                int(n),
                Windows(
                    torch.tensor(kl, dtype=torch.float64),
                    torch.tensor(loss, dtype=torch.float64),
                    tuple(int(s) for s in sources),
                ),
            )
            for n, kl, loss, sources in stored["held"]
        ]
        if not held_out:
            raise ValueError("a curve without a look at held-out text")
        return cls([float(v) for v in stored["train"]], held_out, stored["stopped"])
