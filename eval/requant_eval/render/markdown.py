"""`report.md`: a document as Markdown, with the result in its first line."""

from __future__ import annotations

from requant_eval.escaping import fenced, markdown, markdown_block
from requant_eval.render.answer_cards import Card, Cards
from requant_eval.render.document import Block, Bullets, Code, Document, Figure, Folded, Paragraph, document
from requant_eval.render.first_screen import FirstScreen
from requant_eval.render.model_card import model_card
from requant_eval.render.tables import Table
from requant_eval.report.records import Report

__all__ = ["model_card", "page", "render"]


def render(report: Report) -> str:
    """The whole report as Markdown."""
    return page(document(report))


def page(d: Document) -> str:
    """Any document as Markdown, without figures: their numbers are in the tables."""
    parts = [markdown_block(d.verdict), markdown_block(d.headline), f"# {markdown(d.title)}", markdown_block(d.about)]
    parts += _first(d.first) if d.first else []
    for section in d.sections:
        parts += [f"## {markdown(section.title)}", *map(_block, section.blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _block(block: Block) -> str:
    match block:
        case Table():
            return block.markdown()
        case Paragraph(text):
            return markdown_block(text)
        case Bullets(items):
            return "\n".join(f"- {markdown_block(item)}" for item in items)
        case Code():
            return f"### {markdown(block.title)}\n\n{fenced(block.text, block.language)}"
        case Figure() | Folded() | Cards():
            return ""


def _first(first: FirstScreen) -> list[str]:
    """The first screen: sentences, size and speed, what to do, three answers side by side."""
    lines = [*first.plain, *(f"{what}: {value}" for what, value in first.sizes), *first.then]
    parts = ["## In plain words", "\n".join(f"- {markdown_block(line)}" for line in lines)]
    if first.answers.cards:
        parts += ["### The first answers side by side", *map(_card, first.answers.cards)]
    return parts


def _card(card: Card) -> str:
    """One prompt and its answers; the word at which one leaves the reference's is named, since code has no marks."""
    parts = [f"Row {card.row}:", fenced(card.prompt, "text")]
    parts += ["Its own answer:", fenced(card.own, "text")] if card.own else []
    for said in card.answers:
        where = f", differs at {said.word!r}" if said.word else " (the same words)" if said.is_same else ""
        note = f"; {said.note}" if said.note else ""
        parts += [
            markdown_block(f"{said.who} ({said.name}){where}{note}:"),
            fenced(said.before + said.word + said.after, "text"),
        ]
    return "\n\n".join(parts)
