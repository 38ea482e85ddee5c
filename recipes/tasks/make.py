"""Data of the two local tasks: word problems from templates, questions from Python's docstrings.

    python recipes/tasks/make.py [DIRECTORY]     # writes four .jsonl files beside the tasks, or there

The word problems have whole numbers and one answer each. A question about Python gives a function's name and four
first lines of docstrings; the three wrong ones are of the same module.
"""

from __future__ import annotations

import importlib
import inspect
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEST, TRAIN = 200, 16  # rows
NAMES = ("Ada", "Ben", "Chen", "Dara", "Elif", "Femi", "Gita", "Hugo")
THINGS = ("apples", "books", "cards", "coins", "pens", "shells", "stamps", "tickets")
MODULES = (
    "bisect", "calendar", "collections", "copy", "csv", "datetime", "difflib", "fractions", "functools", "glob", "gzip",
    "heapq", "html", "inspect", "ipaddress", "itertools", "json", "locale", "math", "operator", "os", "os.path", "pathlib",
    "pprint", "random", "shutil", "statistics", "string", "tempfile", "textwrap", "threading", "time", "tokenize",
    "urllib.parse", "uuid", "zipfile",
)  # fmt: skip
LONGEST = 90  # characters of a choice


def word_problem(draw: random.Random) -> dict[str, Any]:
    """One problem of two steps, and its answer."""
    one, other = draw.sample(NAMES, 2)
    thing = draw.choice(THINGS)
    a, b, c = draw.randint(3, 30), draw.randint(2, 12), draw.randint(2, 9)
    kind = draw.randrange(4)
    if kind == 0:
        text = f"{one} has {a} {thing} and gets {b} more. Then {one} gives {min(c, a)} to {other}. How many are left?"
        answer = a + b - min(c, a)
    elif kind == 1:
        text = f"{one} buys {b} boxes with {c} {thing} each and already has {a}. How many {thing} does {one} have now?"
        answer = a + b * c
    elif kind == 2:
        text = f"{one} and {other} share {b * c} {thing} equally among {b} friends. How many does each friend get?"
        answer = c
    else:
        text = f"A card costs {c} coins. {one} has {a + b * c} coins and buys {b} cards. How many coins are left?"
        answer = a
    return {"question": text, "answer": str(answer)}


def word_problems(seed: int, count: int) -> list[dict[str, Any]]:
    """So many different problems."""
    draw, found = random.Random(seed), {}
    while len(found) < count:
        row = word_problem(draw)
        found[row["question"]] = row
    return list(found.values())


def docstrings(name: str) -> dict[str, str]:
    """Function of a module -> the first line of its docstring, where it is short and does not name the function."""
    module, found = importlib.import_module(name), {}
    for key in sorted(dir(module)):
        value = getattr(module, key)
        if key.startswith("_") or not callable(value) or isinstance(value, type):
            continue
        line = (inspect.getdoc(value) or "").split("\n")[0].strip()
        if 15 < len(line) <= LONGEST and key.lower() not in line.lower() and line not in found.values():
            found[key] = line
    return found


def questions(seed: int) -> Iterator[dict[str, Any]]:
    """Multiple-choice questions about functions of Python's library."""
    draw = random.Random(seed)
    for name in MODULES:
        known = docstrings(name)
        for key, line in known.items():
            others = [other for other in known.values() if other != line]
            if len(others) >= 3:
                choices = [line, *draw.sample(others, 3)]
                draw.shuffle(choices)
                yield {"name": f"{name}.{key}", "choices": choices, "label": choices.index(line)}


def write(folder: Path) -> None:
    """Write the four files."""
    problems = word_problems(1, TEST + TRAIN)
    asked = list(questions(1))
    random.Random(2).shuffle(asked)
    rows = {
        "word_problems.test": problems[:TEST],
        "word_problems.train": problems[TEST:],
        "python_functions.test": asked[TRAIN:][:TEST],
        "python_functions.train": asked[:TRAIN],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
