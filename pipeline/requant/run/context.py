"""`RunContext`: what the stages of one run share: inputs, directory, device, keys, scores."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any, Unpack

import torch

from requant.checkpoint.atomic_write import append_text
from requant.checkpoint.run_directory import RunDirectory
from requant.evaluate.scores import Scores
from requant.evaluate.variant_sources import VariantSources
from requant.recipe import Recipe
from requant.run import evaluation_inputs
from requant.run.check.delta_prediction import stored_prediction
from requant.run.observer import Outcome, Watcher
from requant.run.prepared import Prepared
from requant.run.stage_keys import Keys
from requant.run.stage_results import Event, PredictionResult, ProbeResult
from requant.runtime.device import free_bytes, limit_host_threads, pick_device
from requant.runtime.ranks import SINGLE_PROCESS, Ranks
from requant_eval.scoring.batches import BatchSize


@dataclass(kw_only=True)
class RunContext:
    """Inputs and state of one run, handed to every stage.

    ranks: the other processes of this run. variant_sources: where each variant is made from. batch: how much
    evaluation runs at a time. outcome: filled in by the stages. probe: set before quantizing. reference: the adapter's
    model, from the probe until evaluate, where it takes next to no memory.
    """

    prepared: Prepared
    directory: RunDirectory
    watcher: Watcher
    ranks: Ranks
    device: torch.device
    variant_sources: VariantSources
    batch: BatchSize
    keys: Keys
    scores: Scores
    outcome: Outcome
    probe: ProbeResult | None = None
    reference: Any = None

    @classmethod
    def of(
        cls, prepared: Prepared, directory: RunDirectory, watcher: Watcher, ranks: Ranks = SINGLE_PROCESS
    ) -> RunContext:
        """Derive device, keys and scores from the recipe.

        The directory must be open: its cache is created.
        """
        device = pick_device(prepared.recipe.device)
        limit_host_threads(device)
        keys = Keys.of(prepared, directory, device)
        scores = Scores(
            cache=directory.cache,
            sets=prepared.texts.sets,
            keys=keys.variants,
            device=device,
            dtype=evaluation_inputs.dtype(prepared, device),
            kl=prepared.recipe.evaluate.kl,
            questions=prepared.questions,
            free=free_bytes(device),
        )
        return cls(
            prepared=prepared,
            directory=directory,
            watcher=watcher,
            ranks=ranks,
            device=device,
            variant_sources=evaluation_inputs.variant_sources(prepared, directory.path),
            batch=evaluation_inputs.batch(prepared, device),
            keys=keys,
            scores=scores,
            outcome=Outcome(directory.path),
        )

    @property
    def recipe(self) -> Recipe:
        """The recipe of this run."""
        return self.prepared.recipe

    def event(self, **event: Unpack[Event]) -> None:
        """Append one line to events.jsonl; its time is added."""
        line = json.dumps({"time": round(time.time(), 3), **event})
        append_text(self.directory.path / "events.jsonl", line + "\n")

    def delta_prediction(self) -> PredictionResult:
        """How much of the adapter's delta round-to-nearest keeps.

        Computed once for each quantization.
        """
        p = self.prepared
        return stored_prediction(self.directory, self.keys.quantize, p.merge.plan, p.quantize.plan, self.device)
