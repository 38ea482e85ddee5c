"""What the commands print, in processes of their own: every line is ours."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.e2e import copied, write_recipe
from helpers.terminal import environment, on_terminal, piped
from rich.console import Console

from requant_eval.render import terminal

STAGES = ("prepare", "merge", "probe", "quantize", "evaluate", "report", "check", "forecast", "verify", "heal")
ROW = re.compile(rf"({'|'.join(STAGES)}) +[━─]{{16}} .*")
PLAIN = re.compile(rf"(({'|'.join(STAGES)}): |warning: ).+")
CHECK = re.compile(r"(?=[a-z ]{10}\S)[a-z]+ +\S.*|ok")  # a name, and text from column 10 on
PLAIN_LORA = {"base": {"model": "./original", "nf4": "none"}, "evaluate.variants": ["adapter", "gptq"]}
"""A 16-bit base in training: the road on which PEFT asks gptqmodel for its layers."""


@pytest.fixture
def mine(project: Path, tmp_path: Path) -> Path:
    """A project whose recipe is of a LoRA on a 16-bit base; runs go to its folder runs/."""
    folder = copied(project, tmp_path / "p")
    write_recipe(folder, PLAIN_LORA)
    return folder


def rendered(run: Path, width: int) -> set[str]:
    """The lines that `requant run` shows of a report."""
    console = Console(width=width, file=io.StringIO())
    console.print(terminal.table(json.loads((run / "report.json").read_text())))
    assert isinstance(console.file, io.StringIO)
    return {line.rstrip() for line in console.file.getvalue().splitlines()}


def foreign(lines: list[str], *own: re.Pattern[str]) -> list[str]:
    """Lines that none of the patterns describes."""
    return [line for line in lines if not any(pattern.fullmatch(line) for pattern in own)]


@pytest.mark.slow
def test_every_line_in_a_file_is_ours(mine: Path) -> None:
    code, out, err = piped("run", "recipe.yaml", cwd=mine)
    assert code == 0, err
    assert foreign(err, PLAIN) == []
    assert err[0] == "prepare: started"
    report = rendered(mine / "runs" / "pico", 120)
    assert out[-4:] == [
        "report      runs/pico/report.html",
        "checkpoint  runs/pico/gptq",
        "next        `vllm serve runs/pico/gptq`; `requant verify runs/pico/gptq --with vllm` proves it in the server first",
        "merge, quantize, evaluate, report done: runs/pico",
    ]
    assert {line.rstrip() for line in out} - report == set(out[-4:])
    code, out, err = piped("check", "recipe.yaml", cwd=mine)
    assert (code, foreign(out, CHECK), foreign(err, PLAIN)) == (0, [], [])
    code, out, err = piped("verify", "runs/pico", cwd=mine)
    assert (code, out[-1]) == (0, "ok")
    assert {line.split()[0] for line in out[:-1]} == {"structure", "size", "scores", "generates"}
    assert foreign(err, PLAIN) == ["runs/pico is a run: taking its gptq/"]


@pytest.mark.slow
def test_every_line_on_a_terminal_is_ours_and_ctrl_c_says_one(mine: Path) -> None:
    code, lines = on_terminal("run", "recipe.yaml", cwd=mine, interrupt_at="quantize ")
    assert code == 130
    assert foreign([line.removeprefix("^C") for line in lines], ROW, re.compile("warning: .*|.*make sure.*|")) == [
        "interrupted; the same command resumes the run"
    ]
    code, lines = on_terminal("run", "recipe.yaml", cwd=mine)
    assert code == 0
    report = rendered(mine / "runs" / "pico", 80)
    left = [line for line in foreign(lines, ROW) if line not in report]
    ends = re.compile(r"(report|checkpoint|next) {2,}.*| {12}.*|.*done: runs/pico")  # `next` is wrapped
    assert foreign(left, ends) == []
    assert all(len(line) <= 80 for line in lines)
    assert "stopped: SIGINT" in (mine / "runs/pico/log.txt").read_text()
    code, lines = on_terminal("check", "runs/pico", cwd=mine, interrupt_at="check ")
    assert code == 130
    assert foreign([line.removeprefix("^C") for line in lines], ROW, re.compile("")) == ["interrupted"]


def test_peft_does_not_import_gptqmodel(project: Path, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel")
    script = (
        "import sys; from pathlib import Path; from transformers import AutoModelForCausalLM as Model; "
        "from requant.evaluate import peft_runtime; base, adapter = map(Path, sys.argv[1:]); "
        "model = peft_runtime.attach(Model.from_pretrained(base), adapter); "
        "from peft.import_utils import is_gptqmodel_available; from peft.tuners.lora.layer import LoraLayer; "
        "print(sum(isinstance(m, LoraLayer) for m in model.modules()), 'gptqmodel' in sys.modules, "
        "is_gptqmodel_available())"
    )
    command = [sys.executable, "-c", script, str(project / "original"), str(project / "adapter")]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "14 False True\n", (
        "adapters are attached, nothing of gptqmodel, and PEFT still finds it later"
    )
