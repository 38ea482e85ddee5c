"""The commands verify, convert, push: output, exit codes, what a run keeps of it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers import e2e
from helpers.command_line import Here, answers
from helpers.e2e import edit_json, one_thread

from requant.checkpoint.run_directory import ARTIFACTS
from requant.cli import convert_command
from requant.deploy.verification import RESULTS
from requant.formats.registry import FORMATS
from requant.recipe import json_schema


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Here:
    monkeypatch.chdir(tmp_path)
    return Here(monkeypatch, capsys)


@pytest.mark.slow
def test_a_finished_run_passes(here: Here, finished: Path) -> None:
    assert here("verify", str(finished / "gptq"), "--against", str(finished / "merged")) == 0
    lines = here.out.splitlines()
    assert lines[0].startswith("structure  63 tensors, 14 packed linears, ")
    assert any(line.startswith("weights    at most ") for line in lines)
    assert any(line.startswith("scores     perplexity ") for line in lines)
    assert lines[-1] == "ok"


@pytest.mark.slow
def test_json_is_the_same_and_a_broken_one_exits_1(here: Here, finished: Path, tmp_path: Path) -> None:
    assert here("verify", str(finished / "gptq"), "--json", "--out", "result.json") == 0
    assert json.loads(here.out) == json.loads((tmp_path / "result.json").read_text())
    assert json.loads(here.out)["ok"] is True
    shutil.copytree(finished / "gptq", tmp_path / "bad")
    edit_json(tmp_path / "bad" / "config.json", _name_or_path="/home/ann/base")
    assert here("verify", "bad", "--json") == 1
    facts = json.loads(here.out)
    assert facts["ok"] is False
    assert facts["findings"][0]["where"] == "config.json: _name_or_path"
    assert here("verify", "bad") == 1
    assert "bad: 2 things are wrong:\n  config.json: _name_or_path: '/home/ann/base' is a path" in here.out
    assert re.search(r"config\.json: has \d+ bytes, \d+ were written: take the file from where it is whole", here.out)


def test_wrong_commands(here: Here, finished: Path, tmp_path: Path) -> None:
    path = str(finished / "gptq")
    assert here("verify", "nothing") == 2
    assert "nothing: no such checkpoint directory" in here.err
    assert here("verify", path, "--with", "tgi") == 2
    assert "--with tgi: expected one of transformers, vllm" in here.err
    assert here("verify", path, "--dtype", "int8") == 2
    assert "--dtype int8: expected float16, bfloat16 or float32" in here.err
    assert here("verify", path, "--device", "tpu") == 2
    assert "--device tpu: expected cpu, cuda or cuda:N" in here.err
    assert here("verify", path, "--text", "no.txt") == 2
    assert "no.txt: cannot be read as text" in here.err
    (tmp_path / "few.txt").write_text("too short")
    assert here("verify", path, "--text", "few.txt") == 2
    assert "2 words are too few to score" in here.err


@pytest.mark.slow
def test_what_engines_said_reaches_the_report_and_the_card(
    here: Here, project: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, 0.001)
    assert here("verify", str(ran / "pico" / "gptq"), "--with", "vllm") == 0
    assert "vllm       perplexity" in here.out
    assert json.loads((ran / "pico" / RESULTS["quantize"]).read_text())["engines"][0]["ok"] is True
    with one_thread():
        again = e2e.run(project, ran)
    assert again.ran == ["report"]
    report = json.loads((ran / "pico" / "report.json").read_text())
    assert report["facts"]["verify"]["engines"][0]["difference"] == pytest.approx(0.001, abs=1e-6)
    for file in ("report.md", "gptq/README.md"):
        text = (ran / "pico" / file).read_text()
        assert re.search(r"\| vllm 9.9 \|.*\| Kernel \| bfloat16 on cpu \|", text), file
        assert re.search(r"\| gptq -> vllm \|.*\| \+0.001.* \| served in bfloat16 on cpu, 20 documents \|", text), file


@pytest.mark.slow
def test_an_engine_that_reads_other_weights_is_a_failure(
    here: Here, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, 0.5)
    shutil.copytree(finished / "gptq", tmp_path / "gptq")
    assert here("verify", "gptq", "--with", "vllm") == 1
    assert "vllm: reads other weights (Kernel): its mean -ln p is +0.5 from ours, 0.02 is its rounding" in here.out
    assert not list(tmp_path.glob("verify-*.json")), "no run directory, nothing to remember"


def test_a_run_verifies_what_it_wrote(finished: Path) -> None:
    proof = json.loads((finished / "report.json").read_text())["facts"]["verify"]
    assert proof["ok"] is True
    assert proof["linears"] == 14
    assert 0 < proof["relative_error"] < 0.5
    text = (finished / "report.md").read_text()
    assert "## Read back" in text
    assert f"{proof['perplexity']:.4f}" in text


def test_convert(here: Here, finished: Path, tmp_path: Path) -> None:
    """A run's checkpoint in another format, verified like the one it was made of."""
    assert here("convert", str(finished), "--to", "compressed-tensors", "-o", "ct") == 0
    assert f"{finished} is a run: taking its gptq/" in here.err
    lines = here.out.splitlines()
    assert lines[0] == "converted  14 linears, each decodes to exactly what its source does"
    assert re.fullmatch(r"size       0\.\d MB of tensors, 0\.\d MB before", lines[1])
    assert lines[-1] == "done: ct"
    card, before = ((path / "README.md").read_text() for path in (tmp_path / "ct", finished / "gptq"))
    assert card.replace(card[card.index("> The files here") : card.index("# pico")], "") == before
    assert here("verify", "ct", "--against", str(finished / "merged")) == 0
    assert here("convert", str(finished), "--to", "compressed-tensors", "-o", "ct") == 2
    assert here.err.splitlines()[-1] == "error: ct: exists: nothing is overwritten; choose another --out"
    assert here("convert", str(finished), "--to", "exl3", "-o", "new") == 2
    assert here.err == "--to exl3: expected one of auto-round, compressed-tensors, gguf, gptq, mlx\n"
    assert here("convert", str(finished), "--to", "gguf", "-o", "for-llama") == 0
    assert here.out.splitlines()[0] == "converted  14 linears, each decodes to exactly what its source does"
    assert sorted(p.name for p in (tmp_path / "for-llama").iterdir()) == ["README.md", "model-Q4_0.gguf"]
    assert here("verify", "for-llama", "--against", str(finished)) == 0
    assert "weights    each decodes to its source's, exactly" in here.out
    assert here("verify", "for-llama/model-Q4_0.gguf") == 0
    assert "structure  21 tensors, 14 packed linears, 4.50 bits a weight" in here.out
    assert here("verify", "for-llama", "--with", "vllm") == 2
    assert here.err.splitlines()[-1] == "--with vllm: does not read GGUF files; llamacpp does"
    assert here("verify", "for-llama", "--with", "llamacpp") == 2
    assert here.err.splitlines()[-1].startswith("--with llamacpp: its scores are compared with those of the checkpoint")
    assert here("verify", str(finished), "--with", "llamacpp") == 2
    assert here.err.splitlines()[-1].startswith(
        "--with llamacpp: reads GGUF files: `requant convert CHECKPOINT --to gguf` makes one"
    )
    assert here("convert", "for-llama", "--to", "gptq", "-o", "new") == 2
    assert here.err.splitlines()[-1].startswith("error: for-llama: GGUF is written and not read back: convert the chec")
    assert here("verify", "none.gguf") == 2
    assert here.err.splitlines()[-1] == "error: none.gguf: no such file"
    assert here("convert", "nothing", "--to", "gptq", "-o", "new") == 2
    assert here.err.splitlines()[-1].startswith("error: nothing: no such model directory: name one")


def test_the_command_knows_every_format() -> None:
    every = {*FORMATS, "gguf"}
    assert set(convert_command.TARGETS) == every
    assert set(ARTIFACTS) - {"merged", "healed", "gptqmodel"} == every
    asked = json_schema()["$defs"]["Output"]["properties"]["formats"]["items"]["enum"]
    assert set(asked) == every
