"""The HTML report in headless Chromium: no errors, no requests, sorting, keyboard."""

from __future__ import annotations

import itertools
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import browser
from helpers.browser import Page
from helpers.reports import answered, built, everything, full, hostile

from requant_eval.render import html

ROOT = Path(__file__).parents[2]
AXE = Path(os.environ.get("REQUANT_AXE", ROOT / ".axe/node_modules/axe-core/axe.min.js"))
pytestmark = pytest.mark.skipif(browser.executable() is None, reason=browser.MISSING)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser.chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html.render(full()), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def with_answers(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("answers") / "report.html"
    path.write_text(html.render(answered()), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def with_everything(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Answers, tasks and roads too."""
    path = tmp_path_factory.mktemp("everything") / "report.html"
    path.write_text(html.render(everything(layers=12, prompts=5, letters=300)), encoding="utf-8")
    return path.as_uri()


def captioned(words: str) -> str:
    """JavaScript: the first table whose caption, after the heading of its section, holds `words`."""
    named = "t.closest('section').querySelector('h2').textContent + ': ' + (t.caption?.textContent ?? '')"
    return f"[...document.querySelectorAll('table')].find(t => ({named}).includes({json.dumps(words)}))"


def column(page: Page, words: str, number: int) -> list[str]:
    """The cells of a column of a table, in the order of the page."""
    cells = f"[...{captioned(words)}.tBodies[0].rows].map(r => r.cells[{number}].textContent)"
    found: list[str] = page.run(cells)
    return found


def tag(page: Page, words: str, number: int) -> str:
    """A selector of the button that sorts a column."""
    page.run(f"{captioned(words)}.tHead.rows[0].cells[{number}].firstElementChild.id = 'button{number}'")
    return f"#button{number}"


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_it_renders_in_silence_and_calls_nobody(page: Page, url: str, dark: bool) -> None:
    page.open(url, dark=dark)
    assert page.console == []
    assert page.requests == [url]
    assert page.run("document.querySelector('.verdict').getBoundingClientRect().top") < 200
    assert page.run("[...document.querySelectorAll('.row svg')].every(s => s.getBoundingClientRect().width > 100)")
    assert page.run("document.querySelectorAll('.chart .hit').length") == 30 * 7
    ground = page.run("getComputedStyle(document.body).backgroundColor")
    assert sum(int(part) for part in ground[4:-1].split(",")) < 150 if dark else ground == "rgb(253, 252, 249)"


@pytest.mark.slow
def test_it_could_not_call_if_it_were_told_to(page: Page, url: str) -> None:
    """The page's policy holds: a script's request does not reach a server that listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        there = f"http://127.0.0.1:{server.getsockname()[1]}"
        page.open(url)
        assert page.run(f"fetch('{there}/a').then(() => 'sent', () => 'refused')") == "refused"
        page.run(f"new Promise(r => document.body.append(Object.assign(new Image, {{src: '{there}/b', onerror: r}})))")
        with pytest.raises(TimeoutError):
            server.accept()
    assert any("Content Security Policy" in line for line in page.console)


@pytest.mark.slow
def test_hostile_names_do_not_run(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "hostile.html"
    path.write_text(html.render(hostile()), encoding="utf-8")
    page.open(path.as_uri())
    assert page.run("typeof hacked") == "undefined"
    assert page.console == []
    assert page.requests == [path.as_uri()]
    assert "<script>hacked=1</script>" in page.run("document.querySelector('h1').textContent")


@pytest.mark.slow
def test_a_click_sorts_up_down_and_back(page: Page, url: str) -> None:
    page.open(url)
    before = column(page, "worst of", 0)
    assert before[0] == "model.layers.29.mlp.down_proj"
    head = f"{captioned('worst of')}.tHead.rows[0].cells[0].ariaSort"
    button = tag(page, "worst of", 0)
    page.click(button)
    assert page.run(head) == "ascending"
    by_name = column(page, "worst of", 0)
    assert sorted(by_name) == sorted(before)
    layers = [int(name.split(".")[2]) for name in by_name]
    assert layers == sorted(layers)
    page.click(button)
    assert page.run(head) == "descending"
    assert column(page, "worst of", 0)[0].split(".")[2] == str(max(layers))
    page.click(button)
    assert page.run(head) is None
    assert column(page, "worst of", 0) == before


@pytest.mark.slow
def test_the_keyboard_sorts_numbers_as_numbers(page: Page, url: str) -> None:
    page.open(url)
    page.run(f"document.querySelector({json.dumps(tag(page, 'in-domain: What each', 2))}).focus()")
    values = [float(cell.split()[0]) for cell in column(page, "in-domain: What each", 2)]
    page.press("Enter")
    assert [float(c.split()[0]) for c in column(page, "in-domain: What each", 2)] == sorted(values)
    page.press(" ")
    assert [float(c.split()[0]) for c in column(page, "in-domain: What each", 2)] == sorted(values, reverse=True)
    assert [float(c.split()[0]) for c in column(page, "in-domain: What each", 2)] != values
    assert page.run("document.activeElement.closest('th').ariaSort") == "descending"


@pytest.mark.slow
def test_units_sort_by_what_they_mean(page: Page, url: str) -> None:
    page.open(url)
    page.click(tag(page, "Time and memory", 1))
    assert column(page, "Time and memory", 1) == ["3.0 s", "1 min 23 s"]
    page.click("#button1")
    assert column(page, "Time and memory", 1) == ["1 min 23 s", "3.0 s"]


@pytest.mark.slow
def test_pointing_and_arrow_keys_read_values(page: Page, url: str) -> None:
    page.open(url)
    read = "document.querySelector('.read').textContent"
    hint = page.run(read)
    assert "arrow keys" in hint
    page.move(*page.middle(".chart .m rect"))
    pointed = page.run(read)
    assert "ln perplexity" in pointed
    page.move(1, 1)
    assert page.run(read) == hint
    page.run("[...document.querySelectorAll('section:has(.chart) thead:first-of-type button')][5].focus()")
    page.press("Tab")
    assert page.run("document.activeElement.className") == "chart"
    first = page.run(read)
    assert first != hint
    page.press("ArrowDown")
    second = page.run(read)
    assert second not in (first, hint)
    page.press("ArrowUp")
    assert page.run(read) == first
    page.press("End")
    page.press("Escape")
    assert page.run(read) == hint


@pytest.mark.slow
def test_no_page_wider_than_a_phone(page: Page, url: str, with_everything: str) -> None:
    for width, at in itertools.product((320, 360, 768), (url, with_everything)):
        page.open(at, width=width, height=740)
        assert page.run("document.documentElement.scrollWidth") <= width
        small = page.run(
            "[...document.querySelectorAll('td, th, p, figcaption, small, svg text')]"
            ".filter(e => parseFloat(getComputedStyle(e).fontSize) < 11).length"
        )
        assert small == 0
        tall = page.run("[...document.querySelectorAll('td, tbody th')].filter(e => e.offsetHeight > 120).length")
        assert tall == 0, "a column is so narrow that it breaks words"
    assert page.console == []


@pytest.mark.slow
def test_what_scrolls_sideways_can_be_reached(page: Page, url: str) -> None:
    page.open(url, width=360)
    loose = page.run(
        "[...document.querySelectorAll('.table')].filter(b => b.scrollWidth > b.clientWidth + 1 && b.tabIndex < 0).length"
    )
    assert loose == 0
    assert page.run("document.querySelectorAll('.table[tabindex]').length") > 0
    page.open(url, width=1280)
    assert page.run("document.querySelectorAll('.table[tabindex]').length") == 0


@pytest.mark.slow
def test_a_screen_reader_finds_headings_tables_and_figures(page: Page, url: str) -> None:
    page.open(url)
    nodes = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in page.tree()]
    roles = [role for role, _ in nodes]
    assert roles.count("table") > 5
    assert ("heading", "What this cannot tell you") in nodes
    named = ("table", "button", "link", "image", "region", "heading")
    assert [role for role, name in nodes if role in named and not name] == []
    charts = [name for role, name in nodes if role == "group" and name]
    assert len(charts) == page.run("document.querySelectorAll('.chart').length")
    assert "navigation" in roles
    assert "main" in roles


@pytest.mark.slow
def test_it_prints(page: Page, url: str) -> None:
    page.open(url, dark=True)
    page.view(800, media="print", dark=True)
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    page.view(800)
    assert page.pdf().startswith(b"%PDF")
    assert page.run("[...document.querySelectorAll('details')].every(d => d.open)")
    assert page.console == []


@pytest.mark.slow
def test_without_scripts_everything_can_be_read(page: Page, url: str) -> None:
    page._send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.open(url)
        nodes = page.tree()
        assert sum(n["role"]["value"] == "table" for n in nodes) > 5
        assert not any(n["role"]["value"] == "button" for n in nodes)
    finally:
        page._send("Emulation.setScriptExecutionDisabled", value=False)


@pytest.mark.slow
@pytest.mark.parametrize("gates", [(), ("ppl_increase in-domain 50%",)])
def test_nothing_on_the_first_screen_overlaps(page: Page, tmp_path: Path, gates: tuple[str, ...]) -> None:
    path = tmp_path / "report.html"
    path.write_text(html.render(built(gates=gates)), encoding="utf-8")
    for width in (390, 1280):
        page.open(path.as_uri(), width=width)
        boxes = page.run(
            "[...document.querySelectorAll('header > p, header > h1, .first > p, .first > dl')]"
            ".map(e => e.getBoundingClientRect()).map(b => [b.top, b.bottom])"
        )
        assert len(boxes) >= 6
        assert all(above[1] <= below[0] + 1 for above, below in itertools.pairwise(boxes))


@pytest.mark.slow
@pytest.mark.skipif(not AXE.is_file(), reason="no axe-core here (make .axe/.ready): accessibility was not checked")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_is_accessible(page: Page, with_everything: str, width: int, dark: bool) -> None:
    """The rules of axe-core, with everything unfolded."""
    page.open(with_everything, width=width, dark=dark)
    page.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    page.run(AXE.read_text(encoding="utf-8") + "; 0")
    ran = page.run("axe.run(document).then(r => [r.passes.length, r.violations.map(v => [v.id, v.nodes[0].html])])")
    assert ran[0] > 20
    assert ran[1] == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_first_screen_reads_from_verdict_to_what_to_do(page: Page, with_answers: str, width: int) -> None:
    page.open(with_answers, width=width)
    places = page.run(
        "['.verdict', '.first .lead', '.card', '.sizes', 'h1', 'nav']"
        ".map(s => document.querySelector(s).getBoundingClientRect().top)"
    )
    assert places == sorted(places)
    assert page.run("document.querySelectorAll('.first .card').length") == 3
    assert page.run("document.querySelector('details.answers').open") is False
    assert page.run("document.documentElement.scrollWidth") <= width
    beside = page.run(
        "[...document.querySelector('.side').children].map(e => Math.round(e.getBoundingClientRect().left))"
    )
    assert (len(set(beside)) == 3) == (width > 700), "three columns, or one on a phone"
    marked = page.run("document.querySelector('.first mark').textContent")
    assert marked == "seven"
    assert page.run("document.querySelector('abbr').title.length") > 10
    assert page.console == []
