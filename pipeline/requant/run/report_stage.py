"""Stage report of a run: report.json, its renderings, model cards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from requant import __version__
from requant.checkpoint.atomic_write import read_state, write_text
from requant.checkpoint.run_directory import key_of
from requant.data.canaries import CanaryFacts
from requant.data.prompts import Prompts
from requant.deploy.verification import VerificationFacts, saved_verifications
from requant.evaluate.scores import Questions
from requant.outgoing import everywhere, shared
from requant.run import answer_prompts, report_facts, roads_stage, tasks_stage
from requant.run.context import RunContext
from requant.run.convert_stage import converted_key
from requant.run.stage_results import StageResults, SuggestStageResult

if TYPE_CHECKING:
    from requant_eval.metrics.answers import GivenAnswers
    from requant_eval.report.records import Report

FILES = ("report.json", "report.md", "report.html")
INCOMPLETE = "being written"
"""The stored key while the files are written. No digest equals it: after a kill they are all written again."""


def report_key(context: RunContext) -> str:
    """Digest of stages, scores, gates, canaries, suggestions and verifications."""
    from requant_eval.report.assemble import SCHEMA_VERSION

    p, keys = context.prepared, context.keys
    suggested = context.directory.result("suggest", keys.suggest)
    gates = [gate.parsed().rule() for gate in context.recipe.gates]
    answers = [canary.answer for canary in p.texts.canaries.items] if p.texts.canaries else []
    asked = (_in_domain(context), gates, answers, bool(suggested), SCHEMA_VERSION, __version__)
    told = p.texts.prompts.told if p.texts.prompts and p.texts.prompts.items else None
    others = [*_converted(context), *([told] if told else []), *([] if p.texts.prompts else ["no prompts asked for"])]
    tasks = [tasks_stage.tasks_key(context)] if p.tasks else []
    tasks += [*context.recipe.evaluate.roads, roads_stage.roads_key(context)] if context.recipe.evaluate.roads else []
    return key_of(keys.merge, keys.quantize, keys.heal, context.scores.key, *asked, _proofs(context), *others, *tasks)


def is_reported(context: RunContext, key: str) -> bool:
    """Whether no stage ran, the key is the stored one, every file exists and the report has the run's name."""
    names = (*FILES, *(f"{artifact}/README.md" for artifact in _cards(context)))
    exist = all((context.directory.path / name).exists() for name in names)
    if not exist or context.outcome.ran or context.directory.result("report", key) is None:
        return False
    report = read_state(context.directory.path / "report.json", _readable)
    return report is not None and report["name"] == context.recipe.name


def load_report(context: RunContext) -> None:
    """Read the finished report.json into the outcome."""
    context.outcome.report = _readable(context.directory.path / "report.json")


def run_report(context: RunContext, key: str) -> dict[str, Any]:
    """Build the report, write its files and one model card a checkpoint."""
    from requant_eval.metrics.set_metrics import SetResult
    from requant_eval.render import html, markdown, model_card
    from requant_eval.report.assemble import build, dumps

    scores, path = context.scores.load(), context.directory.path
    for name, of_roads in roads_stage.scores(context).items():
        scores[name] |= of_roads
    sets = [replace(SetResult.of(s, scores[s.name]), name=shared(s.name)) for s in context.prepared.texts.sets]
    facts = report_facts.run_facts(
        context.prepared, _stage_results(context), path, device=str(context.device), dtype=str(context.scores.dtype)[6:]
    )
    first = context.prepared.texts.sets[0].name
    stored = _stored_dtypes(facts)
    facts["evaluation"]["runtimes"] = {
        variant: f"{s.runtime}, computed in {facts['evaluation']['dtype']}{stored.get(variant, '')}"
        for variant, s in scores[first].items()
    }
    if context.recipe.evaluate.roads:
        facts["roads"] = roads_stage.facts(context)
    facts["canaries"] = _canaries(context)
    facts["suggestion"] = cast("SuggestStageResult | None", context.directory.result("suggest", context.keys.suggest))
    gates = [replace(gate, set=shared(gate.set)) for gate in (g.parsed() for g in context.recipe.gates)]
    report = build(
        sets=sets, facts=everywhere(facts, shared), in_domain=shared(_in_domain(context)), gates=gates,
        tasks=tasks_stage.results(context),
        answers=_answers(context),
    )  # fmt: skip
    context.directory.remember("report", INCOMPLETE, {})
    write_text(path / "report.json", dumps(report))
    write_text(path / "report.md", markdown.render(report))
    write_text(path / "report.html", html.render(report))
    for artifact, left_out in _cards(context).items():
        card = model_card.model_card(report, without=left_out, layout="gptq" if artifact == "healed" else artifact)
        write_text(path / artifact / "README.md", card)
    context.outcome.report = report
    return {}


def _canaries(context: RunContext) -> CanaryFacts | None:
    """The canaries and the answers of all variants; None without canaries."""
    asked = context.prepared.texts.canaries
    return asked.result(_given(context, asked)) if asked else None


def _answers(context: RunContext) -> GivenAnswers | None:
    """The answers to held-out prompts, or why there are none; None where the recipe asks for none."""
    asked = next((q for q in context.scores.questions if isinstance(q, Prompts)), None)
    if asked is not None:
        return answer_prompts.given(asked, _given(context, asked))
    without = context.prepared.texts.prompts
    return answer_prompts.given(without, {}) if without else None


def _given(context: RunContext, asked: Questions) -> dict[str, list[Any]]:
    """The answers of all variants and roads."""
    return context.scores.answers(asked) | roads_stage.answers(context, asked.kind)


def _readable(file: Path) -> Report:
    """The report in a file; EvaluationError where it is none of this version."""
    from requant_eval.report.schema import load

    return load(file)


def _stored_dtypes(facts: report_facts.RunFacts) -> dict[str, str]:
    """Of each variant that is a checkpoint: the dtype it ships in, where the evaluation computed in another."""
    shipped = {"merged": facts["merge"].get("dtype")} | dict.fromkeys(
        ("gptq", "healed", "ends"), facts["quantize"]["dtype"]
    )
    computed = facts["evaluation"]["dtype"]
    return {variant: f", ships in {dtype}" for variant, dtype in shipped.items() if dtype and dtype != computed}


def _in_domain(context: RunContext) -> str:
    """Name of the set on which retention is computed."""
    return context.recipe.evaluate.in_domain or context.prepared.texts.sets[0].name


def _cards(context: RunContext) -> dict[str, tuple[str, ...]]:
    """Artifact that gets a model card -> the variants that the card leaves out."""
    p = context.prepared
    ends: tuple[str, ...] = ("ends",) if p.quantize.ends.grids else ()
    cards: dict[str, tuple[str, ...]] = {"gptq": ("healed", *ends), "healed": ends} if p.heal else {"gptq": ends}
    return cards | {name: () if name in p.quantize.ends.formats else ends for name in _converted(context)}


def _converted(context: RunContext) -> list[str]:
    """The formats besides GPTQ that the run writes."""
    return sorted(name for name in context.recipe.output.formats if name != "gptq")


def _proofs(context: RunContext) -> dict[str, VerificationFacts]:
    """Stage -> what `requant verify` kept of its checkpoint after the run."""
    keys = {"quantize": context.keys.quantize, "heal": context.keys.heal}
    keys |= {name: converted_key(context, name=name) for name in _converted(context)}
    return saved_verifications(context.directory.path, keys)


def _stage_results(context: RunContext) -> StageResults:
    """Stage -> its stored result; a later `requant verify` replaces the verification inside."""
    keys = {"merge": context.keys.merge, "quantize": context.keys.quantize, "evaluate": context.scores.key}
    keys |= {"heal": context.keys.heal} if context.prepared.heal else {}
    keys |= {"roads": roads_stage.roads_key(context)} if context.recipe.evaluate.roads else {}
    keys |= {"gptqmodel": roads_stage.gptqmodel_key(context)} if "gptqmodel" in context.recipe.evaluate.roads else {}
    keys |= {"tasks": tasks_stage.tasks_key(context)} if context.prepared.tasks else {}
    keys |= {name: converted_key(context, name=name) for name in _converted(context)}
    results: dict[str, Any] = {name: context.directory.result(name, key) or {} for name, key in keys.items()}
    results["probe"] = context.probe or {}
    for name, proof in _proofs(context).items():
        results[name] = {**results.get(name, {}), "verify": proof}
    results["resonance"] = context.delta_prediction()
    return cast(StageResults, results)
