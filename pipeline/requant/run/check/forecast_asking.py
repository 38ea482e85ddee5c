"""Forecast of prompts, tasks, roads, and of what a recipe leaves to be measured.

An answer takes a pass through all weights for each token; the answers of a batch share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from requant.evaluate import width_losses
from requant.evaluate.memory import VariantSize
from requant.evaluate.roads import NF4_ROADS
from requant.evaluate.stage import Stream
from requant.evaluate.trained_base import may_be_kept
from requant.evaluate.unit_solver import NEAREST_FROM
from requant.run import bit_budget, budget_widths, merge_onto
from requant.run.check.forecast_merge import Need
from requant.run.prepared import Prepared
from requant.run.road_recipe import scored_roads
from requant.run.task_recipe import served
from requant_eval.scoring.answers import BATCH_TOKENS, batches
from requant_eval.scoring.batches import BatchSize

IN_FP32 = {"cpu": 1, "cuda": 8}  # times the seconds of a forward in the dtype of scoring
LIKE = dict.fromkeys(NF4_ROADS, "adapter") | {"gptqmodel": "gptq"}
"""Road -> the variant that takes as much."""


class Scoring(Protocol):
    """What is known of scoring: the evaluation's own forecast."""

    def streams(self, name: str, stream: Stream | None = None) -> bool:
        """Whether a variant runs block by block. stream: in place of the recipe's."""

    def size_of(self, name: str) -> VariantSize:
        """The size of a variant."""

    def seconds(self, name: str) -> float:
        """Seconds to score a variant on all sets."""

    def bytes(self, name: str) -> int:
        """Peak bytes meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What was timed here, in seconds. token: of a batch. step: one token of one sequence, through all blocks.

    scored: the head, a token. weight: to read one. decoded: to decode one of 4 bits. cached: bytes of a token's keys
    and values. item: of a number. device: its type.
    """

    p: Prepared
    scoring: Scoring
    batch: BatchSize
    device: str
    token: float
    step: float
    scored: float
    weight: float
    decoded: float
    cached: int
    item: int

    def of_prompts(self, name: str) -> float:
        """Seconds of a variant's answers to prompts of held-out rows, each as long as it may be."""
        asked = self.p.texts.prompts
        if asked is None or not asked.items or self.scoring.streams(name):
            return 0.0
        prompts = [item.ids for item in asked.items]
        some = batches(prompts, asked.new_tokens, BATCH_TOKENS[self.device])
        kept = self._kept(name)
        once = self.scoring.size_of(name).packed * self.decoded if kept else 0.0
        written = sum(self._written(name, len(one), asked.new_tokens, kept=bool(kept)) for one in some)
        return sum(map(len, prompts)) * self.token + once + written

    def bytes_of_prompts(self, name: str) -> int:
        """Bytes of the largest batch's keys and values, prompts and answers, and of weights that stay decoded."""
        asked = self.p.texts.prompts
        if asked is None or not asked.items or self.scoring.streams(name):
            return 0
        some = batches([item.ids for item in asked.items], asked.new_tokens, BATCH_TOKENS[self.device])
        tokens = max((len(one) * (max(map(len, one)) + asked.new_tokens) for one in some), default=0)
        return tokens * self.cached + self._kept(name)

    def _kept(self, name: str) -> int:
        """Bytes of the weights that stay decoded for prompts and tasks; 0 where each pass decodes them."""
        need = self.scoring.size_of(name).packed * self.item
        return need if self.device == "cuda" and may_be_kept(need, torch.device(self.device)) else 0

    def of_tasks(self, name: str) -> float:
        """Seconds to load a variant and run its tasks."""
        size, kept = self.scoring.size_of(name), self._kept(name)
        seconds = size.total * self.weight + (size.packed * self.decoded if kept else 0.0)
        for task in self.p.tasks.items if self.p.tasks else ():
            seconds += task.tokens * (self.token + self.scored)
            rows = self.batch.rows(max(task.longest, 1))
            if task.written:
                steps = -(-task.requests // rows) * -(-task.written // task.requests)
                seconds += self._written(name, min(rows, task.requests), steps, kept=bool(kept))
        return seconds

    def _written(self, name: str, rows: int, new_tokens: int, *, kept: bool = False) -> float:
        """Seconds of a batch's new tokens: base and adapter decode their weights in each pass, but for kept ones."""
        decoded = 0.0 if kept else self.scoring.size_of(name).packed * self.decoded
        return new_tokens * (max(self.step, rows * self.token) + rows * self.scored + decoded)

    def needs(self, started: int) -> list[Need]:
        """The probe of the merge, roads and tasks, those that the recipe asks for. started: bytes of the process."""
        return [
            Need(stage, seconds, started if self.device == "cuda" else started + peak, peak * (self.device == "cuda"))
            for stage, seconds, peak in (*self._onto(), *self._budget(), *self._roads(), *self._tasks())
        ]

    def _onto(self) -> Iterator[tuple[str, float, int]]:
        """Both merges, block by block, on a part of the sets."""
        if self.p.merge.other is None:
            return
        parts, size = merge_onto.parts(self.p), self.scoring.size_of("merged")
        read, scored = sum(len(w.ids) for s in parts for w in s.windows), sum(s.n_scored for s in parts)
        each = read * self.token + scored * self.scored + size.total * (self.weight + self.decoded)
        yield (
            "merge onto",
            2 * each,
            4 * (3 * size.block + size.outside + read * size.width),
        )  # its delta and the sum too

    def _budget(self) -> Iterator[tuple[str, float, int]]:
        """Every unit solved for every width, its block run for each, and its states run on through half the blocks."""
        if not self.p.widths:
            return
        size, device, inside = self.scoring.size_of("merged"), torch.device(self.device), self.p.quantize.plan.shapes
        units, text = budget_widths.units_of(self.p.quantize.plan), bit_budget.texts_of(self.p, self.device)
        tokens, learned = text.measured.numel(), text.learned.numel()
        passes = len(units) * (0.5 + len(self.p.widths) / max(1, size.layers))
        solved = sum(bits < NEAREST_FROM for bits in self.p.widths) * sum(rows * n for rows, n in inside.values())
        seconds = passes * tokens * self.token * IN_FP32[self.device] + len(units) * tokens * self.scored
        seconds += 2 * learned * self.token  # blocks, and as much again for the Hessians
        seconds += solved * width_losses.seconds_a_weight(device) + size.total * (self.weight + self.decoded)
        states = learned * size.width  # and those of every unit's change, on the host
        states += len(units) * tokens * size.width if self.device == "cpu" else 0
        hessians = width_losses.solver_numbers(units, inside)
        yield "bit budget", seconds, 4 * (3 * size.block + size.outside + states + hessians)

    def _roads(self) -> Iterator[tuple[str, float, int]]:
        """Each road as the variant that it is like; what gptqmodel does before is its own."""
        like = [LIKE[name] for name in scored_roads(self.p.recipe)]
        if like:
            seconds = sum(self.scoring.seconds(name) + self.of_prompts(name) for name in like)
            yield "roads", seconds, max(self.scoring.bytes(name) + self.bytes_of_prompts(name) for name in like)

    def _tasks(self) -> Iterator[tuple[str, float, int]]:
        """The variants that fit as a whole and are not served."""
        own = [name for name in self.p.task_variants if name not in served(self.p.recipe)]
        names = [name for name in own if not self.scoring.streams(name, "auto")] if self.p.tasks else []
        if names:
            peak = max(self.scoring.bytes(name) + self._kept(name) for name in names)
            yield "tasks", sum(map(self.of_tasks, names)), peak
