"""A run's directory in place of a recipe, a report or a checkpoint; help and completion."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command_line import Here
from helpers.e2e import copied, write_recipe
from helpers.terminal import environment

from requant.cli import run_paths
from requant.cli.main import app
from requant.errors import InputError, RecipeError

COMMANDS = sorted(c.name or c.callback.__name__ for c in app.registered_commands if c.callback)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Here:
    monkeypatch.chdir(tmp_path)
    return Here(monkeypatch, capsys)


def empty_run(path: Path, recipe: str = "") -> Path:
    """A run's directory that holds nothing yet, or only its recipe."""
    path.mkdir(parents=True)
    (path / run_paths.MARKER).write_text('{"made_by": "requant", "layout": 1}\n')
    if recipe:
        (path / "recipe.yaml").write_text(recipe)
    return path


def checkpoint(run: Path, *names: str) -> None:
    for name in names:
        (run / name).mkdir()
        (run / name / "config.json").write_text("{}")


def test_a_run_names_the_checkpoint_that_is_deployed(tmp_path: Path) -> None:
    run = empty_run(tmp_path / "run")
    with pytest.raises(InputError, match=r"run: this run holds nothing of a run, no finished checkpoint yet: `requant"):
        run_paths.checkpoint_in(run)
    checkpoint(run, "merged")
    with pytest.raises(InputError, match="this run holds merged, no finished checkpoint yet"):
        run_paths.checkpoint_in(run)
    checkpoint(run, "gptq")
    assert run_paths.checkpoint_in(run) == (run / "gptq", f"{run} is a run: taking its gptq/")
    checkpoint(run, "healed")
    found, said = run_paths.checkpoint_in(run)
    assert (found.name, said) == ("healed", f"{run} is a run: taking its healed/ (also here: gptq)")
    assert run_paths.checkpoint_in(run / "gptq") == (run / "gptq", None)
    assert run_paths.merged_in(run) == run / "merged"
    shutil.rmtree(run / "merged")
    with pytest.raises(InputError, match=r"no merged/: name the 16-bit model, or keep it \(output.keep\)"):
        run_paths.merged_in(run)


@pytest.mark.parametrize(("made_of", "taken"), [("a", "healed"), ("b", "gptq"), (None, "healed")])
def test_a_healed_checkpoint_of_other_codes_is_not_taken(tmp_path: Path, made_of: str | None, taken: str) -> None:
    """A run whose settings changed, until it heals again or where it no longer heals."""
    run = empty_run(tmp_path / "run")
    checkpoint(run, "gptq", "healed")
    said = {} if made_of is None else {"of": made_of}
    for name, key, provenance in (("gptq", "a", {}), ("healed", "h", said)):
        (run / name / "manifest.json").write_text(json.dumps({"key": key, "files": {}, "provenance": provenance}))
    found, message = run_paths.checkpoint_in(run)
    assert found == run / taken
    assert message is not None
    assert ("made of an earlier one" in message) == (taken == "gptq")


def test_a_run_without_a_report_or_a_recipe_says_so(here: Here, tmp_path: Path) -> None:
    run = empty_run(tmp_path / "run")
    for command in ("gate", "report"):
        assert here(command, "run") == 2
        assert "run: this run holds nothing of a run, no report.json yet: `requant run run` goes on with it" in here.err
    assert here("compare", "run", "run") == 2
    assert "no report.json yet" in here.err
    for command in ("verify", "push"):
        assert here(command, "run", *(["me/it"] if command == "push" else [])) == 2
        assert "no finished checkpoint yet" in here.err
    for command in ("run", "check", "evaluate", "quantize", "merge", "heal"):
        assert here(command, "run") == 2
        assert "run: this run holds nothing of a run, no recipe.yaml: name a recipe file" in here.err
    (tmp_path / "other").mkdir()
    assert here("gate", "other") == 2
    assert "other: this directory holds nothing of a run, no report.json yet: name a report.json" in here.err
    assert list(run.iterdir()) == [run / run_paths.MARKER], "nothing was written"


def test_a_run_is_its_own_recipe_wherever_it_lies(finished: Path, tmp_path: Path) -> None:
    loaded = run_paths.load_recipe(finished)
    assert (Path(loaded.output.dir) / loaded.name).absolute() == finished
    moved = tmp_path / "elsewhere" / "renamed"
    moved.mkdir(parents=True)
    for name in ("recipe.yaml", run_paths.MARKER):
        shutil.copy(finished / name, moved)
    loaded = run_paths.load_recipe(moved, ["quantize.bits=8"])
    assert (Path(loaded.output.dir) / loaded.name).absolute() == moved
    assert loaded.quantize.bits == 8
    with pytest.raises(RecipeError, match=r"no recipe\.yaml: name a recipe file"):
        run_paths.load_recipe(tmp_path)


@pytest.mark.slow
def test_run_and_verify_take_a_run(here: Here, finished: Path) -> None:
    assert here("run", str(finished)) == 0
    assert here.out.endswith(f"nothing to do: everything in {finished} is up to date\n")
    assert here("verify", str(finished), "--against", str(finished)) == 0
    assert f"{finished} is a run: taking its gptq/" in here.err
    assert "weights    at most " in here.out


# --- a wrong path in the recipe ---


def test_a_wrong_text_path_names_line_key_and_near_miss(here: Here, project: Path, tmp_path: Path) -> None:
    mine = copied(project, tmp_path / "p")
    file = write_recipe(
        mine, {"calibration.data.path": "./trian.jsonl", "evaluate.sets.1.data.path": "txt/general.jsonl"}
    )
    lines = file.read_text().splitlines()
    first = next(i for i, line in enumerate(lines, 1) if "trian" in line)
    second = next(i for i, line in enumerate(lines, 1) if "txt/general" in line)
    for command in ("check", "run"):
        assert here(command, "p/recipe.yaml") == 2
        typo, lost = here.err.splitlines()[1:]
        key = f"p/recipe.yaml:{first}: calibration.data.path"
        assert typo == f"{key}: {mine}/trian.jsonl: no such file: did you mean train.jsonl?"
        key = f"p/recipe.yaml:{second}: evaluate.sets.1.data.path"
        assert lost.startswith(f"{key}: {mine}/txt: no such directory: {mine} holds adapter, ")
    (tmp_path / "here.jsonl").write_text("")
    assert (
        here(
            "check",
            "p/recipe.yaml",
            "--set",
            "calibration.data.path=here.jsonl",
            "--set",
            "evaluate.sets.1.data.path=general.jsonl",
        )
        == 2
    )
    assert here.err.splitlines()[-1] == (
        f"--set calibration.data.path: {mine}/here.jsonl: no such file: paths begin at the recipe's directory, and "
        "here.jsonl is in the current one"
    )


# --- help and completion ---


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_h_is_help_and_fits_80_columns(here: Here, command: str) -> None:
    assert here(*command.split(), "-h") == 0
    short = here.out
    assert here(*command.split(), "--help") == 0
    assert here.out == short
    assert "Usage: " in short
    assert not re.search(r"[a-z]\.\.\.$", short, re.MULTILINE), "no sentence is cut"
    assert [line for line in short.splitlines() if len(line) > 80] == []


def test_the_shell_completes_commands_and_paths(tmp_path: Path) -> None:
    """Of a path requant lists nothing, and bash's own completion of files goes on."""
    (tmp_path / "recipe.yaml").touch()
    requant = tmp_path / "requant"
    requant.write_text(
        f"#!{sys.executable}\nimport sys\nsys.argv[0] = 'requant'\nfrom requant.cli import main\nmain()\n"
    )
    requant.chmod(0o755)
    env = environment() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    shown = subprocess.run(
        ["bash", "-c", "requant --show-completion bash || _REQUANT_COMPLETE=source_bash requant"],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
    ).stdout  # fmt: skip
    assert "-o default -F" in shown
    script = f"""{shown}
    complete_words() {{
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
        _requant_completion requant
        echo "${{COMPREPLY[*]}}"
    }}
    complete_words requant ver
    complete_words requant run rec
    """
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["verify", ""], done.stderr
