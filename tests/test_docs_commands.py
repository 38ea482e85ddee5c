"""Commands of pages that are not requant's: what they name exists.

requant's own are read by its parser in test_docs.py and run in test_docs_walk.py and test_docs_run.py.
"""

from __future__ import annotations

import importlib.util
import re
import tomllib
from collections.abc import Iterator

import pytest
from test_docs import FENCE, HISTORY, PAGES, PROGRAM, ROOT, named, prose

TARGETS = set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BENCH = "".join(file.read_text() for file in sorted((ROOT / "bench").glob("*.py")))  # options that scripts share
OURS = ("make", "python", "pip", "pytest")
ELSEWHERE = ("git", "cd", ".", "vllm", "curl", "torchrun", "hf", "docker", "mlx_lm.generate")
"""Programs that are not ours and not run by a test here."""
VARIABLES = r"(?:\w+=\S* )*"


def lines(text: str) -> Iterator[str]:
    """Single commands of blocks that show a shell: fenced without a language or as one, and indented ones."""
    blocks = [found[4] for found in FENCE.finditer(text) if found[3] in ("", "bash", "sh", "console")]
    blocks += re.findall(r"(?:(?<=\n\n)|\A)((?: {4}[^\n]*\n)+)", FENCE.sub("\n", text))
    for block in blocks:
        whole = re.sub(r"\\\n\s*", " ", re.sub(r"<<'(\w+)'.*?^\s*\1$", "", block, flags=re.MULTILINE | re.DOTALL))
        for line in whole.splitlines():
            for part in re.split(r" && | \|\| ", re.sub(r"\s+#.*", "", line.strip().removeprefix("$ "))):
                yield re.sub(rf"^{VARIABLES}", "", part)


def program(command: str) -> str:
    """`python` of `.venv/bin/python3.11 x.py`."""
    word = command.split(" ")[0]
    return re.sub(r"^(python)[\d.]*$", r"\1", word if word == "." else word.rpartition("/")[2])


def commands() -> set[tuple[str, str]]:
    """(page, command) of ours, in blocks and in sentences."""
    found = set()
    for page in PAGES:
        if page == HISTORY:
            continue
        text = page.read_text()
        inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(text))
        for command in [*lines(text), *(re.sub(rf"^{VARIABLES}", "", code) for code in inline)]:
            if program(command) in OURS and " " in command and not re.match(PROGRAM, command):
                found.add((named(page), command))
    return found


SHOWN = sorted(commands())


def problem(command: str) -> str | None:
    """What a command names that is not there."""
    if program(command) == "make":
        wanted = {word for word in command.split()[1:] if "=" not in word and not word.startswith("-")}
        return f"no target {wanted - TARGETS}" if wanted - TARGETS else None
    for extra in re.findall(r"\.\[([\w,-]+)\]", command):
        if missing := set(extra.split(",")) - PROJECT["optional-dependencies"].keys():
            return f"no extra {missing}"
    if module := re.search(r" -m (requant[\w.]*|requant_eval[\w.]*|helpers[\w.]*)", command):
        return None if importlib.util.find_spec(module[1]) else f"no module {module[1]}"
    files = [word for word in re.findall(r"(?:bench|tests|recipes|docs)/[\w./-]*", command) if "*" not in word]
    for file in files:
        path = ROOT / file.partition("::")[0]
        if not path.exists() and "/work/" not in f"{file}/":  # what a command makes
            return f"no file {file}"
        if path.suffix == ".py" and path.parts[-2] == "bench":
            source = path.read_text() + BENCH
            options = {o: o[2:].replace("-", "_") for o in re.findall(r" (--[a-z-]+)", command)}
            wrong = [
                o for o, name in options.items() if f'"{o}"' not in source and not re.search(rf"\b{name}: ", source)
            ]
            if wrong:
                return f"{file} has no option {wrong}"
    return None


@pytest.mark.parametrize(("page", "command"), SHOWN)
def test_what_a_command_names_exists(page: str, command: str) -> None:
    assert problem(command) is None


def test_commands_are_found_and_wrong_ones_too() -> None:
    assert {"README.md", "CONTRIBUTING.md", "docs/commands.md", "docs/figures.md"} <= {page for page, _ in SHOWN}
    assert ("README.md", "make demo") in SHOWN
    assert len(SHOWN) > 40
    for wrong in (
        "make deno", "pip install '.[gptq]'", "python -m requant.recipe.nothing", "python bench/none.py",
        "python -m pytest tests/none.py", "python bench/hardware.py --none 3",
    ):  # fmt: skip
        assert problem(wrong) is not None


def test_a_program_of_a_shown_block_is_ours_or_known_to_be_of_others() -> None:
    """A block whose first line is a command has no other lines than commands."""
    unknown = []
    for page in PAGES:
        for command in lines(page.read_text()) if page != HISTORY else ():
            first = program(command)
            looks = re.match(r"^[a-z][\w./-]* (-\w|--\w|install |run |serve )", command)
            if looks and first not in (*OURS, *ELSEWHERE) and not re.match(PROGRAM, command):
                unknown.append(f"{named(page)}: {command}")
    assert unknown == []


def test_every_line_that_check_prints_is_explained() -> None:
    printed = set(re.findall(r'_line\("(\w+)"', (ROOT / "pipeline/requant/cli/check_command.py").read_text()))
    page = (ROOT / "docs/commands.md").read_text().partition("\n## What check prints\n")[2].partition("\n## ")[0]
    explained = {
        name for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert len(printed) > 15
    assert explained == printed
