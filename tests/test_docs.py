"""The pages for readers: shown commands parse, links and anchors lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from requant.cli.main import app
from requant.recipe import parse as parse_recipe

errors: Any = importlib.import_module(  # typer may carry a click of its own
    "typer._click.exceptions" if importlib.util.find_spec("typer._click") else "click.exceptions"
)
ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "recipes").rglob("*.md"),
        *(ROOT / "bench").glob("*.md"),
    ]
)
HISTORY = ROOT / "CHANGELOG.md"  # names commands as they were
COMMANDS: Any = typer.main.get_command(app)
PLACEHOLDERS = {"N": "3", "...": "3"}  # where an option takes a number
FENCE = re.compile(r"^( *)(```|~~~)(\w*)[^\n]*\n(.*?)^\1\2", re.MULTILINE | re.DOTALL)
PROGRAM = r"(?:(?:\.venv/bin/|\$BIN/)?requant|(?:\.venv/bin/)?python3? -m requant|torchrun .*-m requant)"
LINE = re.compile(rf"^(?:\$ |run: |- run: )?(?:\w+=\S* )*{PROGRAM} (?P<arguments>.+)$")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(text: str) -> Iterator[str]:
    """Blocks of code: fenced, and indented by four after an empty line."""
    for found in FENCE.finditer(text):
        yield found[4]
    yield from re.findall(r"(?:(?<=\n\n)|\A)((?: {4}[^\n]*\n)+)", FENCE.sub("\n", text))


def prose(text: str) -> str:
    """The text without blocks of code."""
    return re.sub(r"(?:(?<=\n\n)|\A)(?: {4}[^\n]*\n)+", "\n", FENCE.sub("\n", text))


def alone(line: str) -> list[str]:
    """The commands of a line of a shell."""
    return re.split(r" && | \|\|? |; ", line)


def shown_lines(text: str) -> Iterator[str]:
    """Arguments of every `requant ...` that stands in a block of code, its continued lines joined."""
    for block in blocks(text):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            for part in alone(re.sub(r"\s+#.*", "", line.strip())):
                found = LINE.match(part)
                if found:
                    yield found["arguments"]


def inline(text: str) -> Iterator[str]:
    """Arguments of every `requant ...` in the running text."""
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(text)):
        for part in alone(code):
            found = LINE.match(part)
            if found:
                yield found["arguments"]


def words(arguments: str) -> list[str]:
    """As a shell splits them, up to where it redirects."""
    return shlex.split(re.split(r"\s>>?\s", arguments)[0], comments=True)


def parse(arguments: list[str], *, whole: bool) -> None:
    """Let the real parser read a command; a part of a command in a sentence may lack arguments."""
    known = [PLACEHOLDERS.get(word, word) for word in arguments]
    if known[0] == "COMMAND":  # any of them
        known[0] = "run"
    try:
        with COMMANDS.context_class(COMMANDS, info_name="requant", **COMMANDS.context_settings) as context:
            if known[0].startswith("-"):
                assert known[0] in {name for option in COMMANDS.params for name in option.opts} | {"--help", "-h"}
                return
            name, command, rest = COMMANDS.resolve_command(context, known)
            command.make_context(name, list(rest), parent=context)
    except (errors.MissingParameter, errors.BadOptionUsage):
        if whole:
            raise
    except typer.Exit:  # of --help and its kind
        return


SHOWN = sorted({(named(page), line) for page in PAGES if page != HISTORY for line in shown_lines(page.read_text())})
INLINE = sorted({(named(page), line) for page in PAGES if page != HISTORY for line in inline(page.read_text())})


@pytest.mark.parametrize(("page", "line"), SHOWN)
def test_a_shown_command_parses(page: str, line: str) -> None:
    parse(words(line), whole=True)


@pytest.mark.parametrize(("page", "line"), INLINE)
def test_a_command_in_a_sentence_exists_with_its_options(page: str, line: str) -> None:
    parse(words(line), whole=False)


def test_commands_are_found() -> None:
    pages = {page for page, _ in SHOWN}
    assert {"README.md", "docs/serving.md", "docs/formats.md", "docs/several-gpus.md"} <= pages
    lines = {line for _, line in SHOWN}
    assert "init ./my-adapter -o recipe.yaml" in lines
    assert "run recipe.yaml" in lines
    assert len(INLINE) > 40


@pytest.mark.parametrize("wrong", ["chek recipe.yaml", "check recipe.yaml --show-txt 3", "run", "convert x -o y"])
def test_a_wrong_command_is_found(wrong: str) -> None:
    with pytest.raises(errors.UsageError):
        parse(words(wrong), whole=True)


# --- links ---


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them: the second of the same name ends in -1."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", FENCE.sub("\n", text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        count = found[slug] = found.get(slug, -1) + 1
        names.add(slug if not count else f"{slug}-{count}")
    return names


def links(text: str) -> set[str]:
    text = re.sub(r"(?<!`)`[^`\n]+`(?!`)", "", prose(text))
    return {
        link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link and not link.startswith("mailto:")
    }


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    def leads(link: str) -> bool:
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or not target.is_relative_to(ROOT):
            return False
        return not anchor or (target.suffix == ".md" and anchor in anchors(target.read_text()))

    assert sorted(link for link in links(page.read_text()) if not leads(link)) == []


def test_links_are_found() -> None:
    text = "# A b\n\n[x](y.md#z) and `[no](no.md)`\n\n```\n[no](no.md)\n# no\n```\n\n## `c.d` e (f)\n\n## A b\n"
    assert links(text) == {"y.md#z"}
    assert anchors(text) == {"a-b", "cd-e-f", "a-b-1"}
    assert sum(len(links(page.read_text())) for page in PAGES) > 100


# --- recipes ---

YAML_BLOCKS = [
    (named(page), found[4])
    for page in PAGES
    for found in FENCE.finditer(page.read_text())
    if found[3] == "yaml" and re.search(r"^name: ", found[4], re.MULTILINE) and "\nbase:" in found[4]
]


@pytest.mark.parametrize(("page", "text"), YAML_BLOCKS, ids=[page for page, _ in YAML_BLOCKS])
def test_a_whole_recipe_on_a_page_is_a_recipe(page: str, text: str) -> None:
    recipe = parse_recipe(text, directory=ROOT / "nowhere")
    assert {"gptq", "adapter"} <= set(recipe.evaluate.variants)


def test_recipes_are_found() -> None:
    pages = [page for page, _ in YAML_BLOCKS]
    assert pages.count("docs/examples.md") >= 5
    assert {"README.md", "docs/recipe.md"} <= set(pages)
