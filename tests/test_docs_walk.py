"""A newcomer's way: the commands of README and AGENTS.md, as they stand there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from helpers.command_line import Here
from helpers.e2e import copied, write_rows

ROOT = Path(__file__).resolve().parents[1]
EDITS = {
    # no hub is reached in a test
    "- data:\n        dataset: Salesforce/wikitext": "- data:\n        path: ./more.jsonl",
    "dataset: Salesforce/wikitext": "path: ./general.jsonl",
    "        config: wikitext-2-raw-v1\n": "",
    "        split: train        # text, default train\n": "",
    "        split: test\n": "",
    # a few pages of text, a model of two layers
    "samples: 128": "samples: 8",
    "length: 256 ": "length: 64 ",
    "window: 256 ": "window: 64 ",
    "max: 5%": "max: 90%",
    "max: 10%": "max: 90%",
}


def section(page: str, heading: str) -> list[str]:
    """Arguments of the `requant ...` lines in the first block of commands under a heading."""
    text = (ROOT / page).read_text().partition(f"\n## {heading}\n")[2]
    block = re.search(r"(?:^ {4}requant .*\n)+", text, re.MULTILINE)
    assert block
    return [line.strip().removeprefix("requant ").partition(" #")[0].strip() for line in block[0].splitlines()]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(monkeypatch, capsys)


def mine(project: Path, to: Path) -> Path:
    """What a newcomer has: an adapter under both of its names on the pages, and texts under those that `init` writes."""
    place = copied(project, to)
    (place / "recipe.yaml").unlink()
    write_rows(place / "more.jsonl", [{"text": f"{n} times {n} is {n * n}. " * 20} for n in range(40)])
    (place / "my-adapter").symlink_to(project / "adapter", target_is_directory=True)
    return place


def edit(file: Path) -> None:
    """The lines marked FIXME name files that are there; the rest is made small."""
    text = file.read_text()
    for old, new in EDITS.items():
        assert old in text, old
        text = text.replace(old, new)
    file.write_text(text)


@pytest.mark.slow
def test_the_way_of_the_readme(here: Here, project: Path, tmp_path: Path) -> None:
    here.monkeypatch.chdir(mine(project, tmp_path / "p"))
    init, *rest = section("README.md", "Your own adapter")
    assert [line.split()[0] for line in (init, *rest)] == ["init", "check", "run", "sweep"]
    assert here(*shlex.split(init)) == 0, here.err
    edit(Path("recipe.yaml"))
    for line in rest:
        assert here(*shlex.split(line)) == 0, f"{line}: {here.err}"
    runs = sorted(path.name for path in Path("runs").iterdir())
    assert runs == ["my-adapter-w4g64", "my-adapter-w4g64-bits3", "my-adapter-w4g64-bits4"]
    report = json.loads(Path("runs/my-adapter-w4g64/report.json").read_text())
    assert report["verdict"]["status"] == "pass"
    assert Path("runs/my-adapter-w4g64/gptq/config.json").is_file()


@pytest.mark.slow
def test_the_way_of_a_coding_agent(here: Here, project: Path, tmp_path: Path) -> None:
    here.monkeypatch.chdir(mine(project, tmp_path / "p"))
    init, check, run, gate, verify, compare = section("AGENTS.md", "Commands, in this order")
    assert here(*shlex.split(init)) == 0, here.err
    edit(Path("recipe.yaml"))
    for line in (check, run):
        assert here(*shlex.split(line)) == 0, f"{line}: {here.err}"
    assert here(*shlex.split(run), "--set", "name=second", "--set", "quantize.sweeps=0") == 0, here.err
    names = {"runs/NAME": "runs/adapter-w4g64", "runs/A": "runs/adapter-w4g64", "runs/B": "runs/second"}
    for line in (gate, verify, compare):
        words = [names.get(word, word) for word in shlex.split(line)]
        assert words != shlex.split(line)
        assert here(*words) == 0, f"{line}: {here.err}"
    assert json.loads(Path("out.json").read_text())
