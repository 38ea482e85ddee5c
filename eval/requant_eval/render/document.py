"""The report as sections and blocks, before any format: report.md and report.html print it.

A section is a title and blocks: tables, lists, code, and figures. A figure names what to draw and the part of the
report to draw it from. Formats without pictures leave figures out, so each number of a figure is in a table too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

from requant_eval import escaping
from requant_eval.metrics.engine_step import proofs
from requant_eval.metrics.facts import Facts, HealFacts, is_16_bit_base, known_facts
from requant_eval.metrics.records import EvaluationSet
from requant_eval.render import adapter_tables, road_tables
from requant_eval.render.answer_cards import FIRST, Cards, answers_said, cards, checks_table
from requant_eval.render.engine_table import checks_table as engine_checks
from requant_eval.render.first_screen import FirstScreen, first_screen
from requant_eval.render.format_table import formats_table
from requant_eval.render.glossary import glossary_table
from requant_eval.render.heal_tables import heal_tables
from requant_eval.render.input_tables import inputs_table
from requant_eval.render.set_tables import set_tables
from requant_eval.render.tables import Table, cost_tables, facts_table, gates_table, modules_table, options_table
from requant_eval.render.task_tables import task_tables
from requant_eval.report.records import GateResult, Report, Road

LONGEST = 300  # rows of a folded table
LIMITS = (
    "Losses hold for these texts, this tokenizer and this window length; another domain may lose more.",
    "Scoring is teacher-forced: every token is predicted from the true text. Errors that pile up while generating "
    "show only in answers, canaries and tasks that generate.",
    "The weights were scored with this machine's kernels; a serving engine's kernels round differently.",
    "KL does not add up along the steps; ln perplexity does.",
)

NO_TASKS = "Task accuracy was not measured: `evaluate.tasks` runs tasks of lm-evaluation-harness."


@dataclass(frozen=True)
class Paragraph:
    """Sentences in a row."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """Sentences, one a line."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """Preformatted text with a heading."""

    title: str
    language: str
    text: str


class SetWithGates(EvaluationSet):
    """A set's section with its gates, for figures."""

    gates: list[GateResult]


@dataclass(frozen=True)
class Figure:
    """A figure of numbers that a table beside it gives as well; its `data` is what it is drawn from."""

    kind: Literal["steps", "kl", "flips", "tails", "modules", "healing", "roads"]


@dataclass(frozen=True)
class SetFigure(Figure):
    """A figure of one evaluation set: steps, kl, flips or tails."""

    data: SetWithGates


@dataclass(frozen=True)
class HealingFigure(Figure):
    """The figure of the healing."""

    data: HealFacts


@dataclass(frozen=True)
class RoadsFigure(Figure):
    """The figure of the roads. home: the set whose losses are drawn."""

    data: Sequence[Road]
    home: str


@dataclass(frozen=True)
class ModulesFigure(Figure):
    """The figure of the quantized modules."""

    data: Facts


@dataclass(frozen=True)
class Folded:
    """A long table, for formats that can fold it; the others show only the table before it."""

    table: Table


Block = Table | Paragraph | Bullets | Code | Figure | Folded | Cards


@dataclass(frozen=True)
class Section:
    """A heading and its blocks."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True)
class Document:
    """A page in any format.

    headline: the result in one sentence. verdict: the gates in one line, printed first. about: what was measured when.
    first: what a page begins with after the verdict; None: with the headline.
    """

    headline: str
    title: str
    about: str
    sections: tuple[Section, ...]
    verdict: str = ""
    first: FirstScreen | None = None


def document(report: Report) -> Document:
    """The whole report; sections without content are left out, and names cannot hold what a terminal obeys."""
    given = report["answers"]["items"] if "answers" in report else []
    report = readable(report)
    created = report["created"]
    if given:  # with their line breaks, made harmless by `cards`
        report = {**report, "answers": {**report["answers"], "items": given}}
    return Document(
        headline=report["headline"],
        title=str(report["name"] or "Quality report"),
        about=f"Measured {created}. {_about(report)}" if created else "",
        sections=tuple(_under_heading(s) for s in _sections(report) if s.blocks),
        verdict=report["verdict"]["line"],
        first=first_screen(report),
    )


def readable(report: Report) -> Report:
    """The report with every text on one line and without control characters, YAML in as many lines as it has."""
    return cast("Report", escaping.everywhere(report, whole=frozenset({"recipe", "patch"})))


def _about(report: Report) -> str:
    said = "Perplexities and losses on the same tokens for every variant."
    if is_16_bit_base(report["facts"]):
        said += " Variant base: the 16-bit base, as training held it. Variant adapter: 16-bit base + adapter, unmerged."
    return said


def _under_heading(section: Section) -> Section:
    """The section whose tables do not repeat its title in theirs."""
    return replace(section, blocks=tuple(_shorter(block, section.title) for block in section.blocks))


def _shorter(block: Block, heading: str) -> Block:
    if not isinstance(block, Table):
        return block
    name = heading.removesuffix(" (in-domain)")
    if block.title == name:
        return replace(block, title="")
    title = block.title.removeprefix(f"{name}: ")
    return block if title == block.title else replace(block, title=title[:1].upper() + title[1:])


def _sections(report: Report) -> Iterator[Section]:
    facts = known_facts(report["facts"])
    yield Section("Warnings", (Bullets(tuple(report["warnings"])),) if report["warnings"] else ())
    gates, way = gates_table(report), report["recommendation"]
    yield Section("Gates", (gates,) if gates.rows else ())
    yield Section("Recommendation", (Paragraph(way["text"]), options_table(report), Paragraph(way["rule"])))
    for s in report["sets"]:
        yield _set(s, [g for g in report["gates"] if g["set"] == s["name"] and g["metric"] != "task"])
    yield Section("Roads", tuple(_roads(report)))
    yield Section("Tasks", tuple(task_tables(report)))
    yield Section("Healing", tuple(_healing(report)))
    yield Section("Answers", tuple(_answers(report)))
    yield Section("Canaries", tuple(_canaries(facts)))
    yield Section("Adapter retention", tuple(_retention(facts)))
    yield Section("Modules", tuple(_modules(facts)))
    read_back = (engine_checks(name, proof) for name, proof in proofs(facts))
    yield Section("Read back", tuple(t for t in read_back if t.rows))
    formats = formats_table(facts)
    yield Section("Formats", (formats,) if formats.rows else ())
    yield Section("Cost", tuple(cost_tables(facts)))
    described = (
        facts_table("Merge", facts.get("merge")),
        facts_table("Quantization", facts.get("quantize"), skip=("modules", "resonance", "budget_units")),
        facts_table("Calibration", facts.get("calibration")),
    )
    yield Section("Merge, quantization, calibration", tuple(t for t in described if t.rows))
    yield Section("Reproduce", tuple(_reproduce(report)))
    without = () if report.get("tasks") else (NO_TASKS,)
    yield Section("What this cannot tell you", (Bullets((*LIMITS, *without)),))
    yield Section("Glossary", (glossary_table(),))


def _set(s: EvaluationSet, gates: list[GateResult]) -> Section:
    """One evaluation set: tables, figures in front of theirs; figures get the set's gates too."""
    mark = " (in-domain)" if s["in_domain"] and s["name"] != "in-domain" else ""
    data: SetWithGates = {**s, "gates": gates}
    figures: dict[str, Figure] = {kind: SetFigure(kind, data) for kind in ("steps", "kl", "flips", "tails")}
    blocks: list[Block] = []
    for table in set_tables(s):
        if table.key in figures:
            blocks.append(figures[table.key])
        blocks.append(table)
    return Section(f"{s['name']}{mark}", tuple(blocks))


def _roads(report: Report) -> Iterator[Block]:
    roads = report.get("roads")
    if not roads:
        return
    if said := road_tables.conclusion(report):
        yield Paragraph(said)
    yield RoadsFigure("roads", roads, road_tables.home_set(report))
    yield road_tables.roads_table(report)
    yield Bullets(tuple(road_tables.road_lines(report)))


def _healing(report: Report) -> Iterator[Block]:
    facts = known_facts(report["facts"]).get("heal")
    for table in heal_tables(report):
        if table.key == "healing" and facts:
            yield HealingFigure("healing", facts)
        yield table


def _modules(facts: Facts) -> Iterator[Block]:
    worst = modules_table(facts)
    if worst.rows:
        yield ModulesFigure("modules", facts)
        yield worst
        longer = modules_table(facts, most=LONGEST)
        if len(longer.rows) > len(worst.rows):
            yield Folded(longer)


def _answers(report: Report) -> Iterator[Block]:
    """Which checks each variant's answers pass, and the answers that the first screen has no room for."""
    section = report.get("answers")
    if section is None:
        return
    yield Bullets(tuple(map(escaping.one_line, answers_said(section))))
    checks = checks_table(section)
    if checks.rows:
        yield checks
    if len(section["items"]) > FIRST:
        yield Cards(cards(section)[FIRST:], f"The other {len(section['items']) - FIRST} answers side by side")


def _canaries(facts: Facts) -> Iterator[Block]:
    """How many canaries each variant answers right, and where variants differ."""
    canaries = facts.get("canaries")
    if not canaries:
        return
    yield Paragraph(adapter_tables.canaries_line(canaries))
    yield Paragraph(canaries["rule"])
    different = adapter_tables.canaries_table(canaries)
    if different.rows:
        yield different


def _retention(facts: Facts) -> Iterator[Block]:
    """The adapter's signal to noise by module, and the modules worth more bits."""
    if said := adapter_tables.delta_lines(facts):
        yield Bullets(tuple(said))
    for table in (adapter_tables.signal_to_noise_table(facts), adapter_tables.worst_modules_table(facts)):
        if table.rows:
            yield table
    suggestion = facts.get("suggestion")
    if suggestion and suggestion["units"]:
        yield adapter_tables.suggestion_table(suggestion)
        if suggestion["patch"]:
            yield Code("In the recipe, in place of quantize.overrides", "yaml", suggestion["patch"].rstrip())


def _reproduce(report: Report) -> Iterator[Block]:
    facts = known_facts(report["facts"])
    sets = {s["name"]: f"sha256 {s['digest']}, fingerprint {s['fingerprint']}" for s in report["sets"]}
    for t in (
        inputs_table(facts),
        facts_table("Evaluation tokens", sets),
        facts_table("What ran each variant", (facts.get("evaluation") or {}).get("runtimes")),
        facts_table("Versions", facts.get("versions")),
        facts_table("Hardware", facts.get("hardware")),
    ):
        if t.rows:
            yield t
    if facts.get("recipe"):
        yield Code("Recipe", "yaml", str(facts["recipe"]).strip())
