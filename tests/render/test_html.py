"""`requant_eval.render.html` as text: numbers, escaping, size, accessibility, no requests."""

from __future__ import annotations

import base64
import copy
import hashlib
import itertools
import re
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers.reports import FACTS, HOSTILE, built, everything, full, hostile
from hypothesis import given
from hypothesis import strategies as st

from requant_eval.render import html, markdown
from requant_eval.render.charts import charts, healing, losses, waterfall
from requant_eval.render.document import Bullets, Code, Document, Figure, Paragraph, Section, document
from requant_eval.render.first_screen import first_screen
from requant_eval.render.heal_tables import heal_tables
from requant_eval.render.module_maps import module_maps
from requant_eval.render.svg import Scale
from requant_eval.render.tables import Table
from requant_eval.report.number_format import format_bytes, format_seconds, read_number

ROOT = Path(__file__).resolve().parents[2]
VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}
LIMIT = 300_000


class Markup(HTMLParser):
    """A page as a flat list of elements and its text; checks that every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {tag} {attrs}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_every_word_of_the_document_is_on_the_page() -> None:
    d = document(full())
    text = Markup(html.page(d)).text
    assert d.headline in text
    for section in d.sections:
        assert section.title in text
        for block in section.blocks:
            match block:
                case Table():
                    cells = [*block.columns, *(cell for row in block.rows for cell in row), block.title, block.note]
                    assert [cell for cell in cells if " ".join(cell.split()) not in text] == []
                case Bullets(items):
                    assert [item for item in items if " ".join(item.replace("`", "").split()) not in text] == []
                case Code() | Paragraph():
                    assert " ".join(block.text.split()) in text
                case Figure():
                    drawn = charts(block)
                    assert drawn
                    assert all(row.value in text and row.label in text for chart in drawn for row in chart.rows)


def test_a_figure_says_no_number_that_no_table_beside_it_says() -> None:
    """Only the module map shows more than its table, which has the ten worst."""
    for section in document(full()).sections:
        cells = " ".join(cell for t in section.blocks if isinstance(t, Table) for row in t.rows for cell in row)
        for figure in section.blocks:
            if isinstance(figure, Figure) and figure.kind != "modules":
                rows = [row for chart in charts(figure) for row in chart.rows]
                said = " ".join(f"{row.value} {row.aside}" for row in rows)
                numbers = re.findall(r"[+-]?\d+\.\d+", said)
                assert numbers
                assert [n for n in numbers if n not in cells] == []


def test_the_answer_is_the_first_thing_on_the_page() -> None:
    report = built()
    body = html.render(report).split("<main>")[1]
    first = f"{report['verdict']['line']} {first_screen(report).plain[0]}"
    header = Markup(f"<main>{body.split('</header>')[0]}</header></main>").text
    assert header.startswith(first)
    assert report["headline"] in header


def test_the_page_needs_nothing_else_and_allows_nothing_else() -> None:
    page = html.render(full())
    markup = Markup(page)
    assert not re.search(r"(?i)https?://|@import|src=|//[a-z]+\.[a-z]", page.replace("//www.w3.org", ""))
    assert list(markup.all("link")) == [{"rel": "icon", "href": "data:,"}]
    policy = next(a["content"] for a in markup.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for kind in ("style", "script"):
        inside = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        assert len(inside) == 1
        digest = base64.b64encode(hashlib.sha256(inside[0].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not any(name.startswith("on") or name == "style" for _, a in markup.elements for name in a)


def test_hostile_names_are_text() -> None:
    report = hostile()
    harmless = HOSTILE.replace("<", "(").replace(">", ")")
    clean, spoilt = Markup(html.render(hostile(harmless))), Markup(html.render(report))
    assert [tag for tag, _ in spoilt.elements] == [tag for tag, _ in clean.elements]
    assert [sorted(a) for _, a in spoilt.elements] == [sorted(a) for _, a in clean.elements]
    assert " ".join(HOSTILE.split()) in spoilt.text
    assert "49" not in HOSTILE
    assert "hacked=1" in spoilt.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "sets", "left_out"), [(30, 2, ""), (126, 2, ""), (126, 6, "tables"), (126, 14, "figures")]
)
def test_small_enough_to_mail(layers: int, sets: int, left_out: str) -> None:
    """Two sets of the largest dense models fit whole; a longer page says what it leaves out."""
    report = full(layers)
    report["sets"] = [report["sets"][0] | {"name": f"set {n}"} for n in range(sets)]
    report["gates"] = []
    text = html.render(report)
    assert len(text.encode()) < LIMIT
    said = re.search(r"(\S+) were left out to keep this page under 300 kB", text)
    assert (said[1] if said else "") == left_out
    assert ("<figure" in text) == (left_out != "figures")
    assert text.count("in-domain: what each step") == 0
    assert all(f">set {n}</h2>" in text for n in range(sets))
    assert text.count("<caption>Perplexity</caption>") == sets


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "letters", "left_out", "cards"), [(30, 300, "", 20), (80, 900, "tables", 20), (126, 900, "answers", 3)]
)
def test_small_enough_to_mail_with_answers_tasks_and_roads(
    layers: int, letters: int, left_out: str, cards: int
) -> None:
    text = html.render(everything(layers, letters=letters))
    assert len(text.encode()) < LIMIT
    said = re.search(r"(\S+) were left out to keep this page under 300 kB", text)
    assert (said[1] if said else "") == left_out
    assert text.count('class="card"') == cards
    assert all(title in text for title in (">Roads</h2>", ">Tasks</h2>", "task 3"))


def test_markup_is_accessible() -> None:
    markup = Markup(html.render(full()))
    ids = [a["id"] for _, a in markup.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for attributes in markup.all("a"):
        assert (attributes["href"] or "").removeprefix("#") in ids
    assert all(a.get("scope") in ("col", "row") for a in markup.all("th"))
    labelled = [a["aria-label"] for a in markup.all("table") if "aria-label" in a]
    assert labelled == ["Gates", "Glossary"], "its caption would repeat the heading"
    assert len(markup.all("caption")) + len(labelled) == len(markup.all("table")) > 5
    assert all("aria-hidden" in a or a.get("aria-label") for a in markup.all("svg"))
    levels = [int(tag[1]) for tag, _ in markup.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert markup.all("html") == [{"lang": "en"}]


def test_templates_travel_in_the_wheel(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
    here = {f"requant_eval/render/templates/{p.name}" for p in (ROOT / "eval/requant_eval/render/templates").iterdir()}
    assert len(here) >= 4
    assert here <= names


def test_any_document_fits_the_shell() -> None:
    table = Table(title="Ways", columns=("way", "size"), rows=(("a", "115 MB"), ("b", "1.19 GB")))
    page = html.page(
        Document(
            headline="A beats B.", title="compare", about="", sections=(Section("Runs", (table, Bullets(("x < y",)))),)
        )
    )
    assert "x &lt; y" in page
    assert re.findall(r'data-k="([^"]*)"', page) == ["115000000", "1190000000"]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3.498 [3.461, 3.537]", 3.498), ("-0.580 [-0.6, -0.5]", -0.58), ("+3.66 % [+2.67, +4.65]", 3.66),
        ("1.2e-07", 1.2e-7), ("not defined", None), ("n/a", None), ("", None), ("False", None), ("5 B", 5.0),
        ("1 min 47 s", 107.0), ("1 h 2 min", 3720.0), ("4.2 s", 4.2), ("18/20", 18.0),
    ],
)  # fmt: skip
def test_cells_sort_by_the_number_they_begin_with(text: str, number: float | None) -> None:
    assert read_number(text) == number


@pytest.mark.parametrize("value", [5.0, 1500.0, 123456789.0, 4.12e9])
def test_sizes_and_times_are_read_back_to_the_digits_they_show(value: float) -> None:
    assert read_number(format_bytes(value)) == pytest.approx(value, rel=0.005)
    assert read_number(format_seconds(value)) == pytest.approx(value, rel=0.02)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    """WCAG 2.2, 1.4.3."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_told_apart_in_light_dark_and_print() -> None:
    style = (ROOT / "eval/requant_eval/render/templates/style.css").read_text()
    schemes = [
        dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{3,6});", root))
        for root in re.findall(r":root \{(.*?)\}", style, re.S)
    ]
    assert len(schemes) == 3
    for scheme in schemes:
        c = {name: "#" + "".join(2 * h for h in code[1:]) if len(code) == 4 else code for name, code in scheme.items()}
        for ground in ("paper", "wash"):
            assert contrast(c["ink"], c[ground]) >= 7
            assert contrast(c["soft"], c[ground]) >= 4.5
        for name in ("better", "worse", "control"):
            assert contrast(c[name], c["paper"]) >= 3
        shades = [luminance(c[f"q{n}"]) for n in range(1, 6)]
        assert shades == sorted(shades) or shades == sorted(shades, reverse=True)


def test_a_report_without_optional_parts_renders() -> None:
    markup = Markup(html.render(built({})))
    assert "None" not in markup.text
    assert "Cost" not in markup.text


def positions(drawing: str, attribute: str) -> list[float]:
    return [float(x) for x in re.findall(rf' {attribute}="(-?[\d.]+)%"', drawing)]


def test_marks_stand_where_the_numbers_are() -> None:
    """The points of the loss chart, mapped back through its tick labels, are the losses."""
    s = next(s for s in built()["sets"] if s["in_domain"])
    chart = losses({**s, "gates": []})
    at = positions(chart.axis, "x")
    labels = [float(label) for label in re.findall(r">([-\d.]+) %<", chart.axis)]
    slope = (labels[-1] - labels[0]) / (at[-1] - at[0])
    for row in chart.rows:
        edge = next(e for e in s["edges"] if (e["from"], e["to"]) == (s["reference"], row.label))
        for x in positions(row.drawing, "cx"):
            assert labels[0] + slope * (x - at[0]) == pytest.approx(edge["loss_percent"]["value"], abs=0.01)
    assert sum(len(positions(row.drawing, "cx")) for row in chart.rows) >= 2


def test_a_control_far_outside_says_so_instead_of_standing_at_the_edge() -> None:
    s = copy.deepcopy(next(s for s in built()["sets"] if s["in_domain"]))
    for e in s["edges"]:
        if e["to"] == "rtn":
            e["loss_percent"] = {"value": 500.0, "se": 1.0, "low": 498.0, "high": 502.0}
    row = next(row for row in losses({**s, "gates": []}).rows if row.label == "rtn")
    assert "off the scale" in row.drawing
    assert positions(row.drawing, "cx") == []
    assert "+500" in row.value


def test_the_waterfall_is_a_chain() -> None:
    """Each bar begins where its source's bar ends, within a hundredth of a percent of the plot."""
    s = next(s for s in built()["sets"] if s["in_domain"])
    rows = {row.label: row for row in waterfall(s).rows}
    bars = {
        name: sorted((x, x + w) for x, w in zip(positions(r.drawing, "x"), positions(r.drawing, "width"), strict=True))
        for name, r in rows.items()
    }
    assert bars["base"] == []
    base = positions(rows["base"].drawing, "cx")[0]
    assert bars["adapter"][0][1] == pytest.approx(base, abs=0.02), "learning goes down from the base"
    assert bars["merged"][0][0] == pytest.approx(bars["adapter"][0][0], abs=0.3)
    assert bars["gptq"][0][0] == pytest.approx(bars["rtn"][0][0], abs=0.02), "both start at merged"
    assert list(rows)[-1] == "rtn", "controls stand last"


@pytest.mark.parametrize("nats", [800.0, -800.0])
def test_a_perplexity_beyond_floats_is_drawn_at_the_edge(nats: float) -> None:
    """A damaged base can make the end of an interval more than exp can hold."""
    s = copy.deepcopy(next(s for s in built()["sets"] if s["in_domain"]))
    step = next(e for e in s["edges"] if (e["from"], e["to"]) == ("base", "adapter"))
    step["delta"]["high" if nats > 0 else "low"] = nats
    row = next(row for row in waterfall(s).rows if row.label == "adapter")
    ends = [x for x in positions(row.drawing, "x1") if not 1 < x < 99]
    assert ends, "the whisker goes to an edge"
    assert all(0 <= x <= 100 for x in positions(row.drawing, "x1"))


def test_the_gates_limit_is_drawn_on_its_own_set_only() -> None:
    report = built()
    for section, s in (
        (section, s) for s in report["sets"] for section in document(report).sections if section.title == s["name"]
    ):
        figure = next(b for b in section.blocks if isinstance(b, Figure) and b.kind == "steps")
        limited = any(
            g["set"] == s["name"] and not g["relative_to"] and g["metric"] == "ppl_increase" for g in report["gates"]
        )
        assert all(('class="limit"' in row.drawing) == limited for row in losses(figure.data).rows)


def test_an_interval_without_an_upper_end_is_drawn_as_its_value() -> None:
    """A loss in percent can be too large for a float: null in the report."""
    s = copy.deepcopy(built()["sets"][0]) | {"gates": []}
    step = next(e for e in s["edges"] if (e["from"], e["to"]) == (s["reference"], "gptq"))
    assert 'class="ci"' in next(row for row in losses(s).rows if row.label == "gptq").drawing
    step["loss_percent"]["high"] = None
    drawn = next(row for row in losses(s).rows if row.label == "gptq").drawing
    assert "<circle" in drawn
    assert 'class="ci"' not in drawn


def test_the_healing_curve_falls_where_the_numbers_fall_and_fills_the_chosen_step() -> None:
    told = {"held": [[0, 0.08], [20, 0.03], [40, 0.02], [60, 0.025]], "best_step": 40}
    (row,) = healing(told).rows
    dots = re.findall(r'cx="([\d.]+)%" cy="([\d.]+)" r="4" class="(\w+)"', row.drawing)
    assert [float(x) for x, _, _ in dots] == pytest.approx([0, 100 / 3, 200 / 3, 100], abs=0.01)
    heights = [float(y) for _, y, _ in dots]
    assert heights[0] < heights[1] < heights[3] < heights[2], "pixels grow downwards"
    assert [kind for _, _, kind in dots] == ["open", "open", "level", "open"]
    facts = FACTS | {"heal": told}
    section = next(s for s in document(built(facts)).sections if s.title == "Healing")
    assert [b.kind for b in section.blocks if isinstance(b, Figure)] == ["healing"]
    assert "step 40: 0.02 nats a token" in html.render(built(facts))
    assert healing({"held": [[0, 0.1]]}).rows == ()


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"best_step": 20, "chosen_step": 20, "judged": [0.081, 0.033], "judge_windows": 16},
         "chose step 20; step 0 is the quantized checkpoint. 16 other windows judge it: 0.081 -> 0.033."),
        ({"best_step": 0, "chosen_step": 20, "judged": [0.081, 0.082], "judge_windows": 16},
         "16 other windows judge it: 0.081 -> 0.082, so the checkpoint stays as it was."),
        ({"best_step": 20, "chosen_step": 20, "judged": None, "judge_windows": 0},
         "chose step 20; step 0 is the quantized checkpoint. They were looked at 2 times: the least value is a little too good."),
        ({"best_step": 20}, "chose step 20"),
    ],
)  # fmt: skip
def test_the_report_says_what_judged_the_healed_step(told: dict[str, Any], said: str) -> None:
    facts = FACTS | {"heal": {"held": [[0, 0.08], [20, 0.03]], **told}}
    assert said in " ".join(markdown.render(built(facts)).split())


def test_module_maps_place_layers_and_take_the_worst_expert() -> None:
    experts = [
        {"name": f"model.layers.{layer}.mlp.experts.{n}.up_proj", "relative_error": 0.1 * (layer + 1) + 0.01 * n}
        for layer in range(2)
        for n in range(3)
    ]
    (chart,) = [
        c
        for c in module_maps({"quantize": {"modules": [*experts, {"name": "lm_head", "relative_error": 9}]}})
        if c.rows
    ]
    (row,) = chart.rows
    assert row.values == ((0, "0.12"), (1, "0.22"))
    assert row.label == "up_proj"


@given(st.floats(1e-9, 1e6), st.floats(1.001, 1e9), st.booleans())
def test_scales_keep_everything_inside_and_label_it(low: float, times: float, log: bool) -> None:
    scale = Scale.around([low, low * times], log=log)
    assert 0 <= scale.at(low) < scale.at(low * times) <= 100
    ticks = scale.ticks()
    assert len(ticks) <= 8
    assert ticks == sorted(set(ticks))
    assert all(0 <= scale.at(tick) <= 100 and scale.low <= tick * (1 + 1e-9) for tick in ticks)
    if not log or times > 200:
        assert ticks


def test_the_report_has_the_curve_of_every_source_and_what_codes_changed() -> None:
    sources = [
        {"name": name, "reads": 2.5, "held": [[0, 0.08, 0.02], [20, 0.03, 0.01]], "judged": None, "worse": worse}
        for name, worse in (("own.jsonl", False), ("wiki", True))
    ]
    codes = {"share": 0.0123, "codes": 1000, "by": {"1": 12, "2": 1}, "most": 2, "modules": []}
    told = {"held": [[0, 0.08], [20, 0.03]], "best_step": 20, "sources": sources, "changed_codes": codes}
    tables = {t.title: t for t in heal_tables(built(FACTS | {"heal": told}))}
    assert tables["Held-out text of own.jsonl"].rows[1][0] == "20"
    assert tables["Held-out text of own.jsonl"].note == "Its text is read 2.5 times."
    assert "became worse" in tables["Held-out text of wiki"].note
    assert tables["Changed codes"].note == "1.23% of 1,000 codes changed."
    assert tables["Changed codes"].rows == (("1", "12"), ("2", "1"))


def test_the_report_has_each_block_and_each_pass() -> None:
    blocks = [
        {"block": n, "start": 0.08, "best": 0.05, "best_step": 20, "held": [], "changed": share}
        for n, share in enumerate((0.0123, None))
    ]
    one = {"mode": "blocks", "tuned": ["scales", "codes"], "healed": True, "kl_start": 0.08, "kl_best": 0.03}
    two = {"mode": "whole", "tuned": ["scales"], "healed": False, "kl_start": 0.03, "kl_best": 0.03}
    told = {"held": [[0, 0.08], [20, 0.03]], "best_step": 20, "chosen_step": 25, "judged": [0.08, 0.03]}
    found = built(FACTS | {"heal": told | {"blocks": blocks, "passes": [one, two], "judge_windows": 16}})
    tables = {t.title: t for t in heal_tables(found)}
    assert tables["Blocks"].rows == (("0", "0.08", "0.05", "20", "1.23%"), ("1", "0.08", "0.05", "20", ""))
    assert tables["Passes of the healing"].rows == (
        ("scales, codes, block by block", "0.08", "0.03", "kept"),
        ("scales, end to end", "0.03", "0.03", "gained nothing, not kept"),
    )
    assert "stays as it was" not in markdown.render(found), "the first pass was kept"
    assert "Passes of the healing" in html.render(found)
