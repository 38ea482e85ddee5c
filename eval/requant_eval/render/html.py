"""`report.html`: a document as one self-contained page, without network, fonts or libraries.

Its Content-Security-Policy forbids every request and every script but ours (named by its digest), so a hostile name in
a report can neither run code nor send a request. `page` takes any document: the report's or a comparison's.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from requant_eval.render.answer_cards import Cards
from requant_eval.render.charts import charts
from requant_eval.render.document import Document, Figure, Folded, document
from requant_eval.render.glossary import explained
from requant_eval.report.number_format import read_number
from requant_eval.report.records import Report

LIMIT = 300_000
LONGEST_NAME = 24  # characters that are never broken
LEFT_OUT = (
    ("The longest tables were", (Folded,)),
    ("The longest tables and all but the first answers were", (Folded, Cards)),
    ("The longest tables, all but the first answers and all figures were", (Folded, Cards, Figure)),
)
UNIT = re.compile(r"(?<=\d) (?=(?:%|[kMG]?B|s|min|h)(?!\w))")
JOINT = re.compile(r"(?<=\w)[./_](?=[A-Za-z])")
NAME = re.compile(r"`([^`]+)`")
INTERVAL = re.compile(r"(.*?) (\[[^\]]*\])(.*)", re.DOTALL)


def render(report: Report) -> str:
    """The whole report as one HTML page."""
    return page(document(report))


def page(content: Document) -> str:
    """A document as one HTML page: verdict, contents, sections with figures, sortable tables.

    A page of more than `LIMIT` bytes leaves out the longest tables, then the figures, and says so.
    """
    text = _page(content, "")
    for names, kinds in LEFT_OUT:
        if len(text.encode()) > LIMIT:
            sections = (
                replace(s, blocks=tuple(b for b in s.blocks if not isinstance(b, kinds))) for s in content.sections
            )
            shorter = replace(content, sections=tuple(s for s in sections if s.blocks))
            text = _page(shorter, f"{names} left out to keep this page under {LIMIT // 1000} kB; report.json has them.")
    return text


def _page(content: Document, note: str) -> str:
    style, script = _source("style.css"), _source("script.js")
    return (
        _environment()
        .get_template("page.html")
        .render(
            d=content,
            note=note,
            style=Markup(style),
            script=Markup(script),
            style_digest=_digest(style),
            script_digest=_digest(script),
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("requant_eval.render"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "kind": lambda block: "Figure" if isinstance(block, Figure) else type(block).__name__,
        "cell": _cell,
        "is_name": _is_name,
        "breaks": _breaks,
        "order": _order,
        "tie": _tie,
        "explained": explained,
        "status": _status,
    }
    environment.globals |= {"charts": charts}
    return environment


def _source(name: str) -> str:
    environment = _environment()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _cell(text: str) -> Markup:
    """A table's cell; the interval after a value is in a span, the text unchanged."""
    found = INTERVAL.fullmatch(text)
    if found is None:
        return Markup("{}").format(text)
    return Markup("{} <span>{}</span>{}").format(*found.groups())


def _is_name(text: str) -> bool:
    """Whether a cell is one short name, which is never broken at its hyphen."""
    return " " not in text and len(text) <= LONGEST_NAME


def _breaks(text: str) -> Markup:
    """Words as HTML; a long name may be broken after its dots, slashes and underscores, and there first."""
    return Markup(JOINT.sub("\\g<0><wbr>", str(escape(text))))


def _order(text: str) -> str:
    """The number a cell sorts by, where it is not the text itself."""
    number = read_number(text)
    try:
        return "" if float(text) == number else f"{number:.10g}"
    except ValueError:
        return "" if number is None else f"{number:.10g}"


def _tie(text: str) -> Markup:
    """A sentence as HTML: no line break between a number and its unit, `names` as code, words explained on hover."""
    return Markup(NAME.sub(r"<code>\1</code>", str(explained(UNIT.sub("\u00a0", text)))))


def _status(verdict: str) -> str:
    """The word in front of a verdict, "" where there is none."""
    word, colon, _ = verdict.partition(":")
    return word if colon and word in ("PASS", "FAIL", "INCONCLUSIVE") else ""
