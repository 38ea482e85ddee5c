"""Commands that README, docs and recipes show: run on a tiny model, or named in NOT_HERE.

The first steps, from no recipe at all, are walked in test_docs_walk.py. A command stands here as its page has it: the
run directory is named NAME, and the values that a tiny model cannot take are in SMALLER.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest
import test_docs_commands
import torch
from helpers.command_line import Here
from helpers.e2e import copied, one_thread, visible, write_recipe
from test_docs import HISTORY, INLINE, PAGES, PROGRAM, errors, named, parse, shown_lines, words
from transformers import AutoConfig

from requant.checkpoint.writer import Slot
from requant.deploy import engine_support, engine_targets
from requant.modeling import skeleton
from requant.numerics.grid import Grid
from requant.quantize import plan as layout

NOT_HERE = {  # what a shown command matches -> why it is not run here, or which test runs it
    r"requant (check|run|merge) recipes/": "a model of its size; on tiny ones: tests/cli/test_gallery.py",
    r"torchrun .*-m requant run": "GPUs; with two ranks on a CPU: tests/runtime/test_launch.py",
    r"make (demo|setup|setup-vllm|quick)$": "installs from an index, or is these tests; .ci/run",
    r"(\.venv/bin/)?pip install": "an index of packages",
    r"(git clone|cd |\. \.venv/|python3\.11 -m venv)": "a shell around requant",
    r"docker build": "a daemon; its commands: tests/test_dockerfile.py",
    r"(vllm serve|\.venv-vllm/bin/python -m vllm|curl localhost)": "vLLM; tests/deploy/test_vllm.py",
    r"python -m sglang": "SGLang and a GPU",
    r"mlx_lm\.generate": "MLX; tests/formats/test_mlx_library.py",
    r"python -c \"from transformers": "gptqmodel in a process: test_transformers_answers",
    r"python -$": "gptqmodel in a process: test_transformers_answers",
    r"python recipes/.*/prepare\.py": "packages with a model; make demo, tests/run/test_demo_inputs.py",
    r"python3 train\.py": "hours of training",
    r"(\.venv/bin/python -m )?pytest tests/": "a test",
}
ENGINES = {"vllm": "vllm", "llamacpp": "xllamacpp", "mlx": "mlx_lm", "transformers": "gptqmodel"}
"""What `--with` asks -> the package without which that part is left out here."""
PLACES = {  # a word of a command in a sentence -> what it is here
    "RECIPE": "recipe.yaml", "RUN": "runs/NAME", "RUN...": "runs/a", "REPORT": "runs/NAME/report.json",
    "ADAPTER": "./adapter", "CHECKPOINT": "runs/NAME/gptq", "FORMAT": "mlx", "REPO": "OWNER/NAME",
    "runs/deployed": "runs/a", "runs/new": "runs/b", "KEY=VALUE,VALUE": "quantize.sweeps=0,1",
}  # fmt: skip
PARTS = {  # commands in a sentence that leave out what they need, though they parse
    "heal --checkpoint DIR --teacher DIR --data FILE": "its output; tests/heal/test_recipe_run.py",
    "heal": "the name of a stage",
    "push ... --yes": "what never to do; tests/deploy/test_hub_upload.py",
}
SMALLER = {
    "quantize.group_size=64,128": "quantize.group_size=32,64",
    "calibration.length=512": "calibration.length=64",
}
SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
SHOWN = [
    (named(page), line)
    for page in PAGES
    if page != HISTORY and not named(page).startswith(("bench/", "recipes/"))
    for line in dict.fromkeys(shown_lines(page.read_text()))
]


def all_commands() -> list[tuple[str, str]]:
    """(page, command) of every shell block, requant's own too."""
    return [
        (named(page), command)
        for page in PAGES
        if page != HISTORY and not named(page).startswith("bench/")
        for command in test_docs_commands.lines(page.read_text())
        if test_docs_commands.program(command) in (*test_docs_commands.OURS, *test_docs_commands.ELSEWHERE, "requant")
        or re.match(rf"{PROGRAM} ", command)
    ]


def reason(command: str) -> str | None:
    return next((why for pattern, why in NOT_HERE.items() if re.match(pattern, command)), None)


def test_every_shown_command_is_run_or_says_why_not() -> None:
    commands = all_commands()
    assert len(commands) > 60
    run = {line for _, line in SHOWN}
    left = [
        f"{page}: {command}"
        for page, command in commands
        if reason(command) is None and not (command.startswith("requant ") and command.removeprefix("requant ") in run)
    ]
    assert left == []
    for pattern in NOT_HERE:
        assert any(re.match(pattern, command) for _, command in commands), f"{pattern}: no page shows it any more"
    assert reason("python -m sglang.launch_server --model-path x")
    assert reason("requant run recipe.yaml") is None


@pytest.fixture(scope="module")
def home(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages speak of: adapter, texts, recipe.yaml, and runs with every format: NAME, and four to compare."""
    from requant import run

    place = copied(project, tmp_path_factory.mktemp("home") / "p")
    write_recipe(place, {
        "name": "NAME", "evaluate.variants": ["base", "adapter", "merged", "rtn", "gptq"],
        "merge": {}, "output": {"formats": ["gptq", "compressed-tensors", "mlx", "gguf"]},
        "gates": [{"metric": "ppl_increase", "set": "in-domain", "max": "90%"}],
    })  # fmt: skip
    (place / "my-adapter").symlink_to(project / "adapter", target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.chdir(place)
        assert run("recipe.yaml").report["verdict"]["status"] == "pass"
    for other in ("a", "b", "A", "B"):
        shutil.copytree(place / "runs" / "NAME", place / "runs" / other)
    shutil.copytree(place / "runs" / "NAME", place / "reports")
    return place


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path) -> Here:
    monkeypatch.chdir(home)
    return Here(monkeypatch, capsys)


def tiny(line: str) -> list[str]:
    """The words of a command; engines that are not installed are left out, and values made small."""
    given = [SMALLER.get(word, word) for word in words(line)]
    kept: list[str] = []
    for word in given:
        if kept and kept[-1] == "--with" and find_spec(ENGINES[word]) is None:
            kept.pop()
        else:
            kept.append(word)
    return kept


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", dict.fromkeys(page for page, _ in SHOWN))
def test_the_commands_of_a_page_run(here: Here, page: str, home: Path) -> None:
    """In the order of the page; what one writes the next may read."""
    kept = (home / "recipe.yaml").read_bytes()
    for _, line in (item for item in SHOWN if item[0] == page):
        if line.startswith("init "):
            (home / "recipe.yaml").unlink()
        for name in re.findall(r"-o (NAME-\w+)", line):  # another page may have written it
            shutil.rmtree(home / name, ignore_errors=True)
        assert here(*tiny(line)) == 0, f"{page}: requant {line}: {here.err}"
        if line.startswith("init "):  # its FIXME lines are edited in test_docs_walk
            assert "FIXME" in (home / "recipe.yaml").read_text()
            (home / "recipe.yaml").write_bytes(kept)


def is_whole(line: str) -> bool:
    """Whether a command in a sentence can be typed: it has all that it needs, but for names."""
    if line.startswith(("-", "COMMAND")) or line in PARTS or reason(f"requant {line}"):
        return False
    try:
        parse(words(line), whole=True)
    except errors.UsageError:
        return False
    return True


SENTENCES = sorted({line for page, line in INLINE if not page.startswith("bench/") and is_whole(line)},
                   key=lambda line: ("--set" in line, line))  # fmt: skip


def test_commands_in_sentences_are_found() -> None:
    assert {"verify runs/NAME", "report --suggest RECIPE", "run recipe.yaml --set quantize.bits=8"} <= set(SENTENCES)
    assert {line for _, line in INLINE} >= PARTS.keys()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", SENTENCES)
def test_a_command_in_a_sentence_runs(here: Here, line: str, home: Path) -> None:
    kept = (home / "recipe.yaml").read_bytes()
    if "-o recipe.yaml" in line:
        (home / "recipe.yaml").unlink()
    shutil.rmtree(home / "OUT", ignore_errors=True)
    assert here(*(PLACES.get(word, word) for word in tiny(line))) == 0, f"requant {line}: {here.err}"
    (home / "recipe.yaml").write_bytes(kept)


@pytest.mark.slow
def test_the_run_directory_is_as_shown(home: Path) -> None:
    """docs/commands.md lists what a run leaves, and nothing that none leaves."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "commands.md").read_text()
    listed = re.search(r"^ {4}runs/NAME/\n((?: {6}.*\n)+)", page, re.MULTILINE)
    assert listed
    names = {name.rstrip("/") for line in listed[1].splitlines() for name in line.strip().partition("  ")[0].split()}
    left = visible(home / "runs" / "NAME") | {".cache"}
    assert left <= names
    assert names - left <= {"healed", "auto-round", "verify-gptq.json"}, "where they are asked for"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gptqmodel") is None, reason="gptqmodel is not installed")
def test_transformers_answers(home: Path) -> None:
    """The two pieces of Python that load a checkpoint from a shell."""
    root = Path(__file__).resolve().parents[1]
    found = re.search(r'^ {4}python -c "(from transformers .*)"$', (root / "README.md").read_text(), re.MULTILINE)
    block = re.search(r"^ {4}python - <<'END'\n(.*?)^ {4}END$", (root / "docs/serving.md").read_text(), re.M | re.S)
    assert found
    assert block
    for script in (found[1], textwrap.dedent(block[1])):
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=home, capture_output=True, text=True, timeout=300,
            check=False, env=os.environ | {"GPTQMODEL_CPU_WORKERS": "1", "GPTQMODEL_DISABLE_PACK_EXT": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_the_servers_of_the_demo_are_as_shown() -> None:
    """docs/serving.md shows what `check` prints for the shape of the demo's model."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "serving.md").read_text()
    shown = re.findall(r"^ {4}serve {5}(\w+) (.*)$", page, re.MULTILINE)
    model = skeleton.build(AutoConfig.for_model("llama", **SMOLLM2), split=True)
    slots = {n: Slot(n, torch.bfloat16, tuple(p.shape)) for n, p in model.named_parameters()}
    planned = layout.plan(slots, model, layout.Settings(grid=Grid(4, 64)), torch.bfloat16, where=Path("demo"))
    assert [engine for engine, _ in shown] == ["vllm", "sglang", "transformers"]
    for engine, line in shown:
        target = next(t for name, t in engine_targets.TARGETS.items() if name == engine)
        assert str(engine_support.judge(planned, model, target)) == line
