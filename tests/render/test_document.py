"""`requant_eval.render.document`: the order of sections; no format leaves a block out."""

from __future__ import annotations

from helpers.reports import built

from requant_eval.render import markdown
from requant_eval.render.document import Bullets, Code, Figure, Paragraph, document
from requant_eval.render.set_tables import set_tables
from requant_eval.render.tables import Table


def test_every_figure_stands_before_the_table_that_gives_its_numbers() -> None:
    for section in document(built()).sections:
        for block, following in zip(section.blocks, section.blocks[1:], strict=False):
            if isinstance(block, Figure):
                assert isinstance(following, Table)
                assert following.key == block.kind
        assert not isinstance(section.blocks[-1], Figure), f"nothing gives the numbers of {section.title}'s figure"


def test_the_order_is_answer_quality_causes_costs_origin_limits() -> None:
    titles = [section.title for section in document(built()).sections]
    assert titles == [
        "Warnings", "Gates", "Recommendation", "general", "in-domain", "Modules", "Cost",
        "Merge, quantization, calibration", "Reproduce", "What this cannot tell you", "Glossary",
    ]  # fmt: skip


def test_every_table_of_a_set_is_in_the_document_and_in_markdown() -> None:
    report = built()
    text = markdown.render(report)
    for s in report["sets"]:
        section = next(section for section in document(report).sections if section.title == s["name"])
        shown = [b for b in section.blocks if isinstance(b, Table)]
        assert [b.rows for b in shown] == [b.rows for b in set_tables(s)]
        assert [f"{s['name']}: {b.title}".lower() for b in shown] == [b.title.lower() for b in set_tables(s)]
    for section in document(report).sections:
        assert f"\n## {section.title}\n" in text
        for block in section.blocks:
            match block:
                case Table():
                    assert block.markdown() in text
                case Bullets(items):
                    assert all(f"- {item}\n" in text for item in items)
                case Code() | Paragraph():
                    assert block.text in text
                case Figure():
                    assert "<svg" not in text
