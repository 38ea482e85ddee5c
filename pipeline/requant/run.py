"""The stages in order; skips what is whole and matches.

    merge -> quantize -> evaluate -> report

Only here are a recipe's values turned into the stages' plain arguments. Each stage has a key, the digest of all that it
depends on; a stage whose key is unchanged is not run again, and a killed run goes on where it stopped.
"""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from requant import __version__, facts, merge, prepare, quantize, recipe, selftest, variants
from requant.checkpoint import write_text
from requant.prepare import Prepared
from requant.rundir import RunDirectory, key_of

if TYPE_CHECKING:
    from requant_eval.score import TokenScores
    from requant_eval.windows import EvalSet

log = logging.getLogger(__name__)
Stage = Literal["merge", "quantize", "evaluate", "report"]
STAGES: tuple[Stage, ...] = ("merge", "quantize", "evaluate", "report")
LAYOUT = 1  # raised when a stage's files change their meaning


class Watcher:
    """What is told how a run goes; the CLI shows it. This one is silent."""

    def stage(self, name: str, done: bool) -> None:
        """A stage begins; `done` when there is nothing to do for it."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Steps of the current stage."""


@dataclass
class Outcome:
    """What a run left: its directory, the stages that were really run, the report if it got that far."""

    path: Path
    ran: list[str] = field(default_factory=list)
    report: dict[str, Any] | None = None


def run(wanted: recipe.Recipe, *, until: Stage = "report", watcher: Watcher | None = None) -> Outcome:
    """Run a recipe up to and including the stage `until`; raises RequantError, leaving finished stages in place."""
    directory = RunDirectory(Path(wanted.output.dir) / wanted.name)
    with directory.open():
        prepared = prepare.prepare(wanted)
        prepare.check_disk(prepared, directory.path)
        runner = Runner(prepared, directory, watcher or Watcher())
        with runner.logged():
            write_text(directory.path / "recipe.yaml", recipe.dump(wanted, directory.path))
            for stage in STAGES[: STAGES.index(until) + 1]:
                getattr(runner, stage)()
            if until == "report":
                runner.tidy()
    return runner.outcome


def pick_device(asked: str) -> torch.device:
    """`auto` is the first GPU, else the CPU."""
    if asked == "auto":
        asked = "cuda:0" if torch.cuda.is_available() else "cpu"
    return torch.device(asked)


class Runner:
    """One run of one recipe in its directory: the keys and the four stages."""

    def __init__(self, prepared: Prepared, directory: RunDirectory, watcher: Watcher) -> None:
        self.p, self.dir, self.watcher = prepared, directory, watcher
        self.recipe = prepared.recipe
        self.device = pick_device(self.recipe.device)
        self.outcome = Outcome(directory.path)
        base, adapter = directory.fingerprint(prepared.base), directory.fingerprint(prepared.adapter)
        original = directory.fingerprint(prepared.original) if prepared.original else None
        onto_original = self.recipe.merge.onto == "original"
        simulate = asdict(prepared.simulate) if prepared.simulate else None
        self.base_key = key_of(LAYOUT, "base", base, simulate)
        self.adapter_key = key_of(self.base_key, "adapter", adapter)
        self.original_key = key_of(LAYOUT, "original", original, adapter)
        self.merge_key = key_of(
            LAYOUT, "merge", original if onto_original else base, None if onto_original else simulate, adapter, self.recipe.merge.model_dump()
        )
        grids = {name: asdict(grid) for name, grid in prepared.quantize.grids.items()}
        self.rtn_key = key_of(self.merge_key, "rtn", grids)
        self.quantize_key = key_of(
            self.merge_key, "quantize", grids, prepared.settings.order, prepared.settings.damp, str(prepared.serving_dtype),
            prepared.calibration_facts["digest"], self.device.type,
        )  # fmt: skip

    # -- logging ------------------------------------------------------------------------------------------------

    def logged(self) -> _Log:
        """Send log records to log.txt while the run lasts."""
        return _Log(self.dir.path / "log.txt")

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
        with facts.measured() as cost:
            result = work()
        result |= {"seconds": cost.seconds, "peak_rss": cost.peak_rss}
        self.dir.remember(stage, key, result)
        self.event("done", stage=stage, seconds=round(cost.seconds, 2), peak_rss=cost.peak_rss)
        log.info("%s: done in %.1f s, peak %.2f GB", stage, cost.seconds, cost.peak_rss / 1e9)
        self.outcome.ran.append(stage)
        return result

    # -- stages -------------------------------------------------------------------------------------------------

    def merge(self, *, needed: bool = False) -> dict[str, Any]:
        """The merged checkpoint. When it is not to be kept, it is made again only when a later stage needs it."""
        artifact = self.dir.artifact("merged")
        known = self.dir.result("merge", self.merge_key)
        spared = "merged" not in self.recipe.output.keep and not needed
        if known is not None and (artifact.whole(self.merge_key) or spared):
            if not needed:
                self.watcher.stage("merge", True)
            return known

        def work() -> dict[str, Any]:
            out = artifact.begin(self.merge_key)
            done = merge.merge(
                self.p.merge, out, dtype=self.recipe.merge.dtype, max_shard=self.recipe.merge.max_shard_bytes, progress=self.watcher.progress
            )
            proof = selftest.self_test(self.p.merge, out)
            artifact.finish(self.merge_key, {"stage": "merge", "requant": __version__})
            return asdict(done) | {"selftest": asdict(proof)}

        return self._do("merge", self.merge_key, work)

    def quantize(self) -> dict[str, Any]:
        """The GPTQ checkpoint."""
        artifact = self.dir.artifact("gptq")
        known = self.dir.result("quantize", self.quantize_key)
        if known is not None and artifact.whole(self.quantize_key):
            self.watcher.stage("quantize", True)
            return known
        self.merge(needed=True)

        def work() -> dict[str, Any]:
            out = artifact.begin(self.quantize_key)
            layout, modules = quantize.quantize(
                self.dir.path / "merged", out, self.p.calibration, self.p.settings, dtype=self.p.serving_dtype, device=self.device,
                batch=max(1, 2048 // self.p.calibration.shape[1]), trust_remote_code=self.recipe.trust_remote_code,
                max_shard=self.recipe.merge.max_shard_bytes, meta={"quantizer": [f"requant:{__version__}"]},
                progress=self.watcher.progress,
            )  # fmt: skip
            artifact.finish(self.quantize_key, {"stage": "quantize", "requant": __version__})
            return {
                "modules": [asdict(m) for m in modules], "bits_per_weight": layout.bits_per_weight,
                "bytes": sum(s.nbytes for s in layout.slots), "left": list(layout.left),
            }  # fmt: skip

        return self._do("quantize", self.quantize_key, work)

    def evaluate(self) -> dict[str, dict[str, TokenScores]]:
        """Scores of every variant on every set, {set: {variant: scores}}; one variant resident at a time."""
        from requant_eval.score import TokenScores

        names = sorted(self.recipe.evaluate.variants, key=lambda n: n != "adapter")  # the reference first
        todo = {v: [s for s in self.p.sets if not self._score_file(v, s).exists()] for v in names}
        todo = {v: sets for v, sets in todo.items() if sets}
        if todo:
            self._do("evaluate", self._evaluate_key(), lambda: self._score_all(todo))
        else:
            self.watcher.stage("evaluate", True)
        return {s.name: {v: TokenScores.load(self._score_file(v, s)) for v in self.recipe.evaluate.variants} for s in self.p.sets}

    def _score_all(self, todo: dict[str, list[EvalSet]]) -> dict[str, Any]:
        from requant_eval.score import score

        reference_lost = [s for s in self.p.sets if self.recipe.evaluate.kl and not self._reference_file(s).exists()]
        if reference_lost:
            todo = {"adapter": list(dict.fromkeys([*todo.get("adapter", []), *reference_lost]))} | {v: s for v, s in todo.items() if v != "adapter"}
        if any(v in ("merged", "rtn", "original") for v in todo):
            self.merge(needed=True)
        total = sum(len(s.windows) for sets in todo.values() for s in sets)
        done = 0
        for name, sets in todo.items():
            model = variants.load(name, self._places(), device=self.device, dtype=self._dtype())
            for s in sets:
                log.info("evaluate: %s on %s", name, s.name)
                before = done

                def progress(at: int, _: int, before: int = before, name: str = name, s: EvalSet = s) -> None:
                    self.watcher.progress(before + at, total, f"{name} on {s.name}")

                kl = self.recipe.evaluate.kl
                scores = score(
                    model, s, batch=self._batch(), device=self.device, on_progress=progress,
                    reference=self._reference_file(s) if kl and name != "adapter" else None,
                    write_reference=self._reference_file(s) if kl and name == "adapter" else None,
                )  # fmt: skip
                scores.save(self._score_file(name, s))
                done += len(s.windows)
            del model
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return {"variants": list(todo)}

    def report(self) -> None:
        """report.json, report.md and the model card, from saved scores: cheap, so always written anew."""
        from requant_eval import markdown
        from requant_eval import report as reports

        scores = self.evaluate() if "evaluate" not in self.outcome.ran else self._loaded()
        results = [reports.SetResult.of(s, scores[s.name]) for s in self.p.sets]
        key = key_of(self.merge_key, self.quantize_key, self._evaluate_key(), __version__)
        path = self.dir.path
        known = self.dir.result("report", key)
        if known is not None and not self.outcome.ran and all((path / n).exists() for n in ("report.json", "report.md", "gptq/README.md")):
            self.watcher.stage("report", True)
            self.outcome.report = json.loads((path / "report.json").read_text())
            return
        report = reports.build(sets=results, facts=self._facts())

        def work() -> dict[str, Any]:
            reports.save(report, path / "report.json")
            write_text(path / "report.md", markdown.render(report))
            write_text(path / "gptq" / "README.md", markdown.model_card(report))
            return {}

        self._do("report", key, work)
        self.outcome.report = report

    def tidy(self) -> None:
        """Remove the artifacts that the recipe does not keep."""
        if "merged" not in self.recipe.output.keep:
            self.dir.artifact("merged").remove()

    # -- details ------------------------------------------------------------------------------------------------

    def _loaded(self) -> dict[str, dict[str, TokenScores]]:
        from requant_eval.score import TokenScores

        return {s.name: {v: TokenScores.load(self._score_file(v, s)) for v in self.recipe.evaluate.variants} for s in self.p.sets}

    def _dtype(self) -> torch.dtype:
        """The forward pass: fp32 on a CPU, the serving dtype on a GPU, unless asked otherwise."""
        asked = self.recipe.evaluate.dtype
        if asked != "auto":
            return merge.DTYPES[asked]
        return torch.float32 if self.device.type == "cpu" else self.p.serving_dtype

    def _batch(self) -> int:
        asked = self.recipe.evaluate.batch
        tokens = 2048 if self.device.type == "cpu" else 16384
        return max(1, tokens // self.p.sets[0].window) if asked == "auto" else asked

    def _places(self) -> variants.Places:
        return variants.Places(
            self.p.base, self.p.adapter, self.dir.path / "merged", self.dir.path / "gptq", self.p.simulate, self.p.quantize.grids,
            self.p.original_merge, self.recipe.trust_remote_code,
        )  # fmt: skip

    def _variant_key(self, name: str) -> str:
        keys = {
            "base": self.base_key, "adapter": self.adapter_key, "merged": self.merge_key, "rtn": self.rtn_key,
            "gptq": self.quantize_key, "original": self.original_key,
        }  # fmt: skip
        return keys[name]

    def _score_file(self, name: str, s: EvalSet) -> Path:
        reference = self.adapter_key if self.recipe.evaluate.kl and name != "adapter" else None
        key = key_of(self._variant_key(name), s.digest, str(self._dtype()), self.device.type, reference)
        return self.dir.cache / f"{name}-{s.name}-{key[:16]}.safetensors"

    def _reference_file(self, s: EvalSet) -> Path:
        key = key_of(self.adapter_key, s.digest, str(self._dtype()), self.device.type)
        return self.dir.cache / f"reference-{s.name}-{key[:16]}.safetensors"

    def _evaluate_key(self) -> str:
        return key_of([self._score_file(v, s).name for v in self.recipe.evaluate.variants for s in self.p.sets])

    def _facts(self) -> dict[str, Any]:
        """Everything the report says besides scores; names only, no local paths."""
        merged = self.dir.result("merge", self.merge_key) or {}
        quantized = self.dir.result("quantize", self.quantize_key) or {}
        evaluated = self.dir.result("evaluate", self._evaluate_key()) or {}
        stages = {"merge": merged, "quantize": quantized, "evaluate": evaluated}
        r = self.recipe
        measured = ("seconds", "peak_rss")
        return {
            "name": r.name,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "recipe": recipe.dump(r),
            "base": {"name": _public(r.base.model), "nf4": asdict(self.p.simulate) if self.p.simulate else "pre-quantized"},
            "adapter": {"name": _public(r.adapter.path)},
            "merge": {k: v for k, v in merged.items() if k not in measured},
            "quantize": {
                "settings": r.quantize.model_dump(), "bits_per_weight": quantized.get("bits_per_weight"),
                "modules": quantized.get("modules", []), "left_in_16_bit": quantized.get("left", []),
            },
            "calibration": self.p.calibration_facts,
            "cost": {
                "bytes": {n: _size(self.dir.path / n) for n in ("merged", "gptq") if (self.dir.path / n).exists()},
                "seconds": {n: s["seconds"] for n, s in stages.items() if "seconds" in s},
                "peak_rss": {n: s["peak_rss"] for n, s in stages.items() if "peak_rss" in s},
            },
            "evaluation": {"dtype": str(self._dtype()).removeprefix("torch."), "protocol": r.evaluate.protocol},
            "versions": facts.versions(),
            "hardware": facts.hardware(str(self.device)),
            "warnings": [*self.p.warnings, *merged.get("warnings", []), *_fallbacks(quantized.get("modules", []))],
        }  # fmt: skip


def _public(name: str) -> str:
    """A hub id as it is, of a local path the last part only."""
    return name if name.count("/") == 1 and not name.startswith((".", "/", "~")) else Path(name).name


def _size(path: Path) -> int:
    return sum(f.stat().st_size for f in path.glob("*.safetensors"))


def _fallbacks(modules: Sequence[dict[str, Any]]) -> list[str]:
    lost = [m["name"] for m in modules if m["fallback"]]
    return [f"{len(lost)} linears were rounded without error feedback: no Cholesky factor was found, e.g. {lost[0]}"] if lost else []


class _Log:
    """Attach a file handler to our loggers for the time of a `with`."""

    def __init__(self, file: Path) -> None:
        self.handler = logging.FileHandler(file, encoding="utf-8")
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self.logger = logging.getLogger("requant")

    def __enter__(self) -> None:
        self.logger.setLevel(logging.INFO)
        self.logger.addHandler(self.handler)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: Any) -> None:
        if error is not None:
            self.logger.error("stopped: %s", error)
        self.logger.removeHandler(self.handler)
        self.handler.close()
