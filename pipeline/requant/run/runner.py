"""The stages in order; skips what is whole and matches.

    merge -> quantize -> (heal) -> evaluate -> report

Only here are a recipe's values turned into the stages' plain arguments. Each stage has a key, the digest of all that it
depends on; a stage whose key is unchanged is not run again, and a killed run goes on where it stopped.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from requant import __version__, deploy, merge, quantize, recipe
from requant.checkpoint.reader import write_text
from requant.checkpoint.run_directory import LogFile, RunDirectory, key_of
from requant.deploy.scored_sample import Sample
from requant.deploy.stage import demand
from requant.deploy.stage import remembered as proofs_of
from requant.errors import InputError
from requant.evaluate import over_ranks
from requant.evaluate.stage import Scores
from requant.merge import selftest
from requant.merge.deltas import deltas
from requant.quantize import gptqmodel_engine as peer
from requant.quantize import warmup
from requant.quantize.stage import check_ranks
from requant.run import evaluation_inputs, prepare, report_facts
from requant.run.check.delta_prediction import remembered
from requant.run.evaluation_inputs import probe_stage
from requant.run.heal_recipe import Healing, heal_stage
from requant.run.observer import Outcome, Watcher
from requant.run.prepare import Prepared
from requant.run.stage_keys import Keys
from requant.run.suggest import advise
from requant.runtime import measurements
from requant.runtime.device import pick_device
from requant.runtime.ranks import ALONE, Ranks

__all__ = ["STAGES", "Outcome", "Runner", "Stage", "Watcher", "run"]

log = logging.getLogger(__name__)
Stage = Literal["merge", "quantize", "heal", "evaluate", "report"]
STAGES: tuple[Stage, ...] = ("merge", "quantize", "evaluate", "report")  # of every run
WITH_HEAL: tuple[Stage, ...] = ("merge", "quantize", "heal", "evaluate", "report")


def run(
    wanted: recipe.Recipe, *, until: Stage = "report", watcher: Watcher | None = None, suggest: bool = False,
    ranks: Ranks = ALONE,
) -> Outcome:  # fmt: skip
    """Run a recipe up to and including the stage `until`; raises RequantError, leaving finished stages in place.

    suggest: before the report, also measure which modules are worth more bits. ranks: others who wait to be called.
    """
    directory = RunDirectory(Path(wanted.output.dir) / wanted.name)
    directory.check()
    prepared = prepare.prepare(wanted)
    check_ranks(len(prepared.calibration), pick_device(wanted.device), ranks)
    prepare.check_disk(prepared, directory.path)
    stages = WITH_HEAL if prepared.heal else STAGES
    if until not in stages:
        raise InputError(f"heal is {wanted.heal!r}, and auto heals on a GPU only: give it settings, such as heal.steps")
    todo = stages[: stages.index(until) + 1]
    if prepared.unmeasurable and "evaluate" in todo:
        raise InputError(f"{prepared.base}: {prepared.unmeasurable}, or stop after requant quantize")
    with directory.open():
        runner = Runner(prepared, directory, watcher or Watcher(), ranks)
        with LogFile(directory.path / "log.txt"), runner.ahead() if "quantize" in todo else nullcontext():
            write_text(directory.path / "recipe.yaml", recipe.dump(wanted, directory.path))
            for stage in todo:
                if stage == "quantize":
                    runner.probe()
                if stage == "report" and suggest:
                    runner.suggest()
                getattr(runner, stage)()
            if until == "report":
                runner.tidy()
    return runner.outcome


class Runner:
    """One run of one recipe in its directory: the four stages."""

    def __init__(self, prepared: Prepared, directory: RunDirectory, watcher: Watcher, ranks: Ranks = ALONE) -> None:
        self.p, self.dir, self.watcher, self.ranks = prepared, directory, watcher, ranks
        self.recipe = prepared.recipe
        self.device = pick_device(self.recipe.device)
        self.outcome = Outcome(directory.path)
        self.probed: dict[str, Any] = {}
        self.places, self.batch = (
            evaluation_inputs.places(prepared, directory.path),
            evaluation_inputs.batch(prepared, self.device),
        )
        self.keys = Keys.of(prepared, directory, self.device)
        self.scores = Scores(
            directory.cache, prepared.sets, self.keys.variants, self.device, evaluation_inputs.dtype(prepared, self.device),
            self.recipe.evaluate.kl,
            prepared.canaries,
        )  # fmt: skip

    def ahead(self) -> AbstractContextManager[None]:
        """What quantizing compiles on a GPU comes beside the stages before it, where it is still to be done; ranks meet too."""
        if self.recipe.quantize.engine != "requant" or self.dir.result("quantize", self.keys.quantize) is not None:
            return nullcontext()
        self.ranks.call(warmup.meet, self.device, own={})
        return warmup.ahead(
            self.p.base, self.p.quantize, self.p.settings, self.p.serving_dtype, self.device,
            trust_remote_code=self.recipe.trust_remote_code,
        )  # fmt: skip

    def event(self, kind: str, **values: Any) -> None:
        """Append one line to events.jsonl."""
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **values})
        with (self.dir.path / "events.jsonl").open("a") as f:
            f.write(line + "\n")

    def _do(self, stage: str, key: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run `work`, measure it, remember its result under `key`."""
        self.watcher.stage(stage, False)
        self.event("start", stage=stage)
        log.info("%s: started", stage)
        with measurements.measured(str(self.device)) as cost:
            result = work()
        result |= cost.facts
        self.dir.remember(stage, key, result)
        self.event("done", stage=stage, seconds=round(cost.seconds, 2), peak_rss=cost.peak_rss)
        log.info("%s: done in %.1f s, peak %.2f GB", stage, cost.seconds, cost.peak_rss / 1e9)
        self.outcome.ran.append(stage)
        return result

    def merge(self, *, needed: bool = False) -> dict[str, Any]:
        """The merged checkpoint. When it is not to be kept, it is made again only when a later stage needs it."""
        artifact = self.dir.artifact("merged")
        known = self.dir.result("merge", self.keys.merge)
        spared = "merged" not in self.recipe.output.keep and not needed
        if known is not None and (artifact.whole(self.keys.merge) or spared):
            if not needed:
                self.watcher.stage("merge", True)
            return known

        def work() -> dict[str, Any]:
            out = artifact.begin(self.keys.merge)
            done = merge.merge(
                self.p.merge, out, dtype=self.recipe.merge.dtype, max_shard=self.recipe.merge.max_shard_bytes,
                device=self.device, progress=self.watcher.progress,
            )  # fmt: skip
            proof = selftest.self_test(self.p.merge, out)
            artifact.finish(self.keys.merge, {"stage": "merge", "requant": __version__})
            return asdict(done) | {"selftest": asdict(proof)}

        return self._do("merge", self.keys.merge, work)

    def probe(self) -> None:
        """Before the long work: does the adapter lower the loss on its own text? Warns when it does not."""
        known = probe_stage(self.p, self.dir, self.scores, self.places, self.batch)
        log.info("probe: %s", known["said"])
        for warning in known["warnings"]:
            log.warning("probe: %s", warning)
            self.watcher.warn(warning)
        self.probed = known

    def quantize(self) -> dict[str, Any]:
        """The GPTQ checkpoint."""
        Sample.of(self.p.sets, self.recipe.evaluate.in_domain).keep(self.dir.path)
        artifact = self.dir.artifact("gptq")
        known = self.dir.result("quantize", self.keys.quantize)
        if known is not None and artifact.whole(self.keys.quantize):
            self.watcher.stage("quantize", True)
            return known
        self.merge(needed=True)
        self._predicted()

        def work() -> dict[str, Any]:
            out = artifact.begin(self.keys.quantize)
            by = {"requant": (self.ranks, quantize.quantize), "gptqmodel": (ALONE, peer.quantize)}
            ranks, function = by[self.recipe.quantize.engine]
            notes: list[str] = []
            own: dict[str, Any] = {"deltas": deltas(self.p.merge), "progress": self.watcher.progress}
            own |= {"notes": notes} if function is quantize.quantize else {}
            layout, modules = ranks.call(
                function, self.dir.path / "merged", out, self.p.calibration, self.p.settings, dtype=self.p.serving_dtype,
                device=self.device, trust_remote_code=self.recipe.trust_remote_code, max_shard=self.recipe.merge.max_shard_bytes,
                meta={"quantizer": [self._quantizer()]}, own=own,
            )  # fmt: skip
            proof = deploy.verify(
                out, source=self.dir.path / "merged", deploy=self.recipe.deploy, own=self.device,
                trust_remote_code=self.recipe.trust_remote_code,
            )  # fmt: skip
            demand(proof)
            artifact.finish(self.keys.quantize, {"stage": "quantize", "requant": __version__})
            return {
                "modules": [asdict(m) for m in modules],
                "bits_per_weight": layout.bits_per_weight,
                "left": list(layout.left),
                "verify": proof.facts(),
                "notes": notes,
            }

        return self._do("quantize", self.keys.quantize, work)

    def _quantizer(self) -> str:
        return f"{(e := self.recipe.quantize.engine)}:{__version__ if e == 'requant' else version(e)}"

    def heal(self) -> dict[str, Any]:
        """The healed checkpoint, beside the one that it was made from."""
        artifact, asked, key = self.dir.artifact("healed"), self.p.heal, self.keys.heal
        known = self.dir.result("heal", key)
        if asked is None or (known is not None and artifact.whole(key)):
            self.watcher.stage("heal", True)
            return known or {}
        self.merge(needed=True)
        work = self.dir.scratch("heal", key)

        def run(plan: Healing = asked) -> dict[str, Any]:
            out = artifact.begin(key)
            told = heal_stage(plan, self.places, out, key, work, self.device, self.watcher.progress)
            artifact.finish(key, {"stage": "heal", "requant": __version__})
            return told

        result = self._do("heal", key, run)
        shutil.rmtree(work, ignore_errors=True)
        return result

    def _predicted(self) -> dict[str, Any]:
        return remembered(self.dir, self.keys.quantize, self.p.merge, self.p.quantize, self.device)

    def evaluate(self) -> None:
        """Scores of every variant on every set."""
        todo = self.scores.missing()
        if not todo:
            self.watcher.stage("evaluate", True)
            return
        if {"merged", "rtn", "original"} & todo.keys():
            self.merge(needed=True)

        def work() -> dict[str, Any]:
            return over_ranks.evaluate(
                self.scores, self.places, ranks=self.ranks, batch=self.batch, stream=self.recipe.evaluate.stream,
                progress=self.watcher.progress,
            )  # fmt: skip

        self._do("evaluate", self.scores.key, work)

    def suggest(self) -> None:
        """What the modules with the largest error would give with more bits."""
        if self.dir.result("suggest", self.keys.suggest) is not None:
            self.watcher.stage("suggest", True)
            return
        self.merge(needed=True)
        modules = (self.dir.result("quantize", self.keys.quantize) or {})["modules"]

        def work() -> dict[str, Any]:
            return advise(
                modules, self.places, plan=self.p.quantize, grid=self.p.settings.grid, overrides=self.p.overrides,
                calibration=self.p.calibration, device=self.device, dtype=self.scores.dtype, batch=self.batch,
                progress=self.watcher.progress,
            )  # fmt: skip

        self._do("suggest", self.keys.suggest, work)

    def report(self) -> None:
        """report.json, report.md, report.html and the model card, from saved scores."""
        from requant_eval.metrics import set_metrics
        from requant_eval.render import html, markdown, model_card
        from requant_eval.report.build import SCHEMA_VERSION, build, save

        in_domain = self.recipe.evaluate.in_domain or self.p.sets[0].name
        gates = [gate.rule() for gate in self.recipe.gates]
        advised = self.dir.result("suggest", self.keys.suggest)
        answers = [c.answer for c in self.p.canaries.items] if self.p.canaries else []
        versions = (SCHEMA_VERSION, __version__)
        asked = (in_domain, [gate.rule() for gate in gates], answers, bool(advised), *versions)
        path = self.dir.path
        proofs = proofs_of(path, {"quantize": self.keys.quantize, "heal": self.keys.heal})
        key = key_of(self.keys.merge, self.keys.quantize, self.keys.heal, self.scores.key, *asked, proofs)
        cards = {"gptq": "healed", "healed": None} if self.p.heal else {"gptq": None}  # directory: variant left out
        needed = ("report.json", "report.md", "report.html", *(f"{name}/README.md" for name in cards))
        written = all((path / name).exists() for name in needed)
        if written and not self.outcome.ran and self.dir.result("report", key) is not None:
            self.watcher.stage("report", True)
            self.outcome.report = json.loads((path / "report.json").read_text())
            return
        scores = self.scores.load()
        results = [set_metrics.SetResult.of(s, scores[s.name]) for s in self.p.sets]
        wanted = {"merge": self.keys.merge, "quantize": self.keys.quantize, "evaluate": self.scores.key}
        wanted |= {"heal": self.keys.heal} if self.p.heal else {}
        stages = {name: self.dir.result(name, stage_key) or {} for name, stage_key in wanted.items()} | {
            "probe": self.probed
        }
        for stage, proof in proofs.items():
            stages[stage] = {**stages.get(stage, {}), "verify": proof}
        stages["resonance"] = self._predicted()
        told = report_facts.account(self.p, stages, path, device=str(self.device), dtype=str(self.scores.dtype)[6:])
        told["evaluation"]["runtimes"] = {v: s.runtime for v, s in scores[self.p.sets[0].name].items()}
        told |= {"canaries": self.scores.answers(), "suggestion": advised}
        self.outcome.report = report = build(sets=results, facts=told, in_domain=in_domain, gates=gates)

        def work() -> dict[str, Any]:
            save(report, path / "report.json")
            write_text(path / "report.md", markdown.render(report))
            write_text(path / "report.html", html.render(report))
            for name, left_out in cards.items():
                write_text(path / name / "README.md", model_card.model_card(report, without=left_out))
            return {}

        self.dir.remember("report", "being written", {})
        self._do("report", key, work)

    def tidy(self) -> None:
        """Remove the artifacts that the recipe does not keep."""
        if "merged" not in self.recipe.output.keep:
            self.dir.artifact("merged").remove()
