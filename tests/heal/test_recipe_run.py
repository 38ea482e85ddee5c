"""Healing as a stage of a run and as a command: files, skipping, report."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import answers
from helpers.e2e import copied, digests, edit_json, killed_run, one_thread, recipe, run, times, write_recipe

from requant import deploy
from requant.deploy import engine_processes
from requant.deploy.verification import save_verification
from requant.errors import InputError
from requant.heal.settings import HealSettings
from requant.run import heal_checkpoint, prepare
from requant.runtime.device import pick_device

HEAL = {
    "heal": {"steps": 20, "batch": 4, "length": 32, "lr": 0.003},
    "quantize.bits": 3,
    "evaluate.variants": ["adapter", "merged", "gptq"],
}
WEIGHTS = "*.safetensors"


@pytest.fixture(scope="module")
def healed(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a run that heals; tests only read it."""
    return Path(run(project, tmp_path_factory.mktemp("healed"), HEAL).path)


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


@pytest.mark.slow
def test_a_healed_run(healed: Path) -> None:
    report = read(healed / "report.json")
    events = [json.loads(line) for line in (healed / "events.jsonl").read_text().splitlines()]
    assert [e["stage"] for e in events if e["event"] == "done"] == ["merge", "quantize", "heal", "evaluate", "report"]
    told = report["facts"]["heal"]
    assert told["healed"]
    assert told["kl_best"] < told["kl_start"]
    assert told["mode"] == "whole"
    assert report["facts"]["cost"]["bytes"]["healed"] == report["facts"]["cost"]["bytes"]["gptq"]
    for s in report["sets"]:
        edges = {(e["from"], e["to"]): e for e in s["edges"]}
        parts = [
            edges[ends]["delta"]["value"] for ends in (("adapter", "merged"), ("merged", "gptq"), ("gptq", "healed"))
        ]
        assert sum(parts) == pytest.approx(edges["adapter", "healed"]["delta"]["value"], abs=1e-9)
    assert "+ heal" in report["headline"]
    text = (healed / "report.md").read_text()
    assert "## Healing" in text
    assert "KL on held-out healing text" in text
    assert "+ heal" in (healed / "healed" / "README.md").read_text()
    assert "heal" not in (healed / "gptq" / "README.md").read_text(), "its card tells of itself"
    assert not list((healed / ".cache").glob("heal-*")), "what a killed run needs is gone"


def test_the_healed_checkpoint_is_the_quantized_one_with_other_scales(healed: Path) -> None:
    gptq, other = (digests(healed / name) for name in ("gptq", "healed"))
    assert gptq.keys() == other.keys()
    changed = {name for name in gptq if gptq[name] != other[name]} - {"README.md", "manifest.json"}
    assert changed == {"model.safetensors", "config.json", "quantize_config.json"}


@pytest.mark.slow
def test_transformers_reads_the_healed_numbers(healed: Path) -> None:
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    with one_thread():
        done = deploy.verify(healed / "healed", source=healed / "merged", load_in=["transformers"])
    assert done.ok, done.message()
    assert done.engines[0]["kernels"], "really packed modules"
    assert abs(done.engines[0]["difference"]) <= engine_processes.TOLERANCE["float32"]


@pytest.mark.slow
def test_a_second_run_does_nothing_and_other_settings_heal_again(project: Path, healed: Path, tmp_path: Path) -> None:
    shutil.copytree(healed, tmp_path / healed.name)
    out = tmp_path / healed.name
    before = times(out)
    assert run(project, tmp_path, HEAL).ran == []
    assert times(out) == before
    outcome = run(project, tmp_path, HEAL | {"heal": HEAL["heal"] | {"seed": 1}})
    assert outcome.ran == ["heal", "evaluate", "report"]
    assert digests(out / "gptq", WEIGHTS) == digests(healed / "gptq", WEIGHTS)
    assert digests(out / "healed", WEIGHTS) != digests(healed / "healed", WEIGHTS)
    assert run(project, tmp_path, HEAL | {"heal": "off"}).ran == ["report"], "nothing is scored anew"
    assert [v["name"] for v in read(out / "report.json")["sets"][0]["variants"]] == ["adapter", "merged", "gptq"]


@pytest.mark.slow
def test_engines_of_the_recipe_are_asked_about_what_ships(
    project: Path, healed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's step starts at healed; the unhealed checkpoint's card does not mention it."""
    shutil.copytree(healed, tmp_path / healed.name)
    answers(monkeypatch, 0.001)
    monkeypatch.setattr(engine_processes, "interpreter", lambda engine, directory=None: "python")
    outcome = run(project, tmp_path, HEAL | {"heal": HEAL["heal"] | {"seed": 2}, "deploy": ["transformers"]})
    assert outcome.ran == ["heal", "evaluate", "report"]
    (step,) = next(s for s in outcome.report["sets"] if s["in_domain"])["kernels"]
    assert (step["from"], step["to"]) == ("healed", "transformers")
    assert step["delta"]["value"] == pytest.approx(0.001, abs=1e-6)
    row = re.compile(r"\| healed -> transformers \|.*\| served in bfloat16 on cpu, 20 documents \|")
    assert row.search((outcome.path / "healed" / "README.md").read_text())
    assert not row.search((outcome.path / "gptq" / "README.md").read_text())
    save_verification(deploy.verify(outcome.path / "healed", load_in=["vllm"]))
    again = run(project, tmp_path, HEAL | {"heal": HEAL["heal"] | {"seed": 2}, "deploy": ["transformers"]})
    assert again.ran == ["report"]
    assert "| healed -> vllm |" in (outcome.path / "report.md").read_text()


@pytest.mark.slow
def test_a_killed_healing_goes_on(project: Path, healed: Path, tmp_path: Path) -> None:
    assert killed_run(project, tmp_path, "heal:7", HEAL) == -signal.SIGKILL
    out = tmp_path / "pico"
    assert not (out / "healed").exists()
    assert list((out / ".cache").glob("heal-*/state.safetensors"))
    assert run(project, tmp_path, HEAL, until="heal").ran == ["heal"]
    assert digests(out / "healed", WEIGHTS) == digests(healed / "healed", WEIGHTS)


@pytest.mark.slow
def test_towards_the_adapter_through_its_own_runtime(project: Path, tmp_path: Path) -> None:
    settings = HEAL | {"heal": HEAL["heal"] | {"target": "adapter", "tune": ["scales", "norms"]}}
    outcome = run(project, tmp_path, settings, until="heal")
    assert outcome.ran == ["merge", "quantize", "heal"]
    assert (tmp_path / "pico" / "healed" / "manifest.json").exists()


def test_healing_text_that_is_judged_is_refused(project: Path, tmp_path: Path) -> None:
    other = copied(project, tmp_path / "p")
    shutil.copy(project / "heldout.jsonl", other / "again.jsonl")
    section = HEAL["heal"] | {"data": {"path": "./again.jsonl"}}
    with pytest.raises(InputError, match=r"evaluation set in-domain: 100% of its documents are in"):
        prepare.prepare(recipe(other, tmp_path, HEAL | {"heal": section}))


def test_auto_heals_on_a_gpu_only(project: Path, tmp_path: Path) -> None:
    assert prepare.prepare(recipe(project, tmp_path)).heal is None
    with pytest.raises(InputError, match=r"heal is 'auto', and auto heals on a GPU only: give it settings"):
        run(project, tmp_path, until="heal")


def cli(*arguments: Any, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from requant.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=120)


@pytest.mark.slow
def test_any_checkpoint_from_the_command_line(healed: Path, project: Path, tmp_path: Path) -> None:
    checkpoint, teacher, text = healed / "gptq", healed / "merged", project / "train.jsonl"
    small = ("--steps", 5, "--batch", 2, "--length", 32, "--lr", 0.003, "--device", "cpu")
    asked = (
        "heal",
        "--checkpoint",
        checkpoint,
        "--teacher",
        teacher,
        "--data",
        text,
        "--out",
        tmp_path / "out",
        *small,
    )
    done = cli(*asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "held-out" in done.stdout
    assert set(digests(tmp_path / "out")) == set(digests(checkpoint)) - {"README.md", "manifest.json"}
    again = cli(*asked, cwd=tmp_path)
    assert again.returncode == 2
    assert "out: exists: nothing is overwritten" in again.stderr
    lacking = cli("heal", "--checkpoint", checkpoint, cwd=tmp_path)
    assert (lacking.returncode, lacking.stderr) == (2, "healing needs a RECIPE, or --teacher, --data too\n")
    both = cli("heal", write_recipe(copied(project, tmp_path / "p")), "--teacher", teacher, cwd=tmp_path)
    assert (both.returncode, both.stderr) == (2, "--teacher cannot be used with a RECIPE: give one of the two\n")


@pytest.mark.slow
def test_check_says_how_healing_fits(project: Path, tmp_path: Path) -> None:
    other = copied(project, tmp_path / "p")
    off = cli("check", write_recipe(other), cwd=tmp_path)
    assert "heal      off: auto heals on a GPU only" in off.stdout, off.stderr
    on = cli("check", write_recipe(other, HEAL), cwd=tmp_path)
    assert "heal      20 steps of 4 x 32 tokens, end to end, teacher beside it, about " in on.stdout, on.stderr
    both = cli("check", write_recipe(other, HEAL | {"heal": HEAL["heal"] | {"mode": "blocks+whole"}}), cwd=tmp_path)
    assert "tokens, block by block on 80 windows, about " in both.stdout, both.stderr
    assert " min; then without codes end to end, teacher beside it, about " in both.stdout


def test_what_stands_alone_leaves_nothing_behind_when_refused(healed: Path, project: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a b c")
    with pytest.raises(InputError, match=r"healing: short\.txt has \d+ tokens"):
        heal_checkpoint.heal_checkpoint(
            healed / "gptq", healed / "merged", [short], tmp_path / "out", HealSettings(), device=pick_device("cpu")
        )
    assert [f.name for f in tmp_path.iterdir()] == ["short.txt"]


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(healed: Path, project: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(healed / "gptq", tmp_path / "gptq"))
    edit_json(mine / "tokenizer_config.json", eos_token=" ")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"gptq: the text holds token 30\d .*, but the model has 300 embeddings: copy"):
        heal_checkpoint.heal_checkpoint(
            mine, healed / "merged", [project / "train.jsonl"], tmp_path / "out" / "new",
            HealSettings(steps=2, batch=1, length=16), device=pick_device("cpu"),
        )  # fmt: skip
