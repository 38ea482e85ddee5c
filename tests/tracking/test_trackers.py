"""Reports in trackers: what is sent, clients offline, clients that fail or hang."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from helpers.reports import built

from requant.errors import InputError
from requant.recipe.text_sections import Variant
from requant.tracking import clients, trackers
from requant.tracking.payload import STAGES, payload


def needs(name: str) -> Any:
    there = importlib.util.find_spec(name) is not None
    return pytest.mark.skipif(not there, reason=f"needs {name}: pip install {name}")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    made = [tmp_path / "report.html", tmp_path / "report.json"]
    for file in made:
        file.write_text("the report")
    return made


def test_numbers_have_the_name_of_set_variant_and_metric() -> None:
    report = built()
    found = payload(report)
    ppl = next(v["ppl"] for v in report["sets"][0]["variants"] if v["name"] == "gptq")
    assert found["numbers"]["general/gptq/perplexity"] == ppl["value"]
    assert found["numbers"]["general/gptq/perplexity_low"] == ppl["low"]
    assert found["numbers"]["bytes/gptq"] == 100_000_000
    assert found["numbers"]["in-domain/gptq/retention"] < 1
    assert [step for step, _ in found["stages"]] == [0, 1, 2, 4, 5]
    assert found["settings"]["bits"] == "4"
    assert found["settings"]["verdict"] == report["verdict"]["status"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    names = [*found["numbers"], *found["curves"], *(name for _, numbers in found["stages"] for name in numbers)]
    assert not [(a, b) for a in names for b in names if b.startswith(f"{a}/")], "a file and a folder in mlflow's store"


def test_every_variant_has_a_place_on_the_axis() -> None:
    assert set(STAGES) == set(get_args(Variant))


def test_curves_and_tasks_are_sent() -> None:
    report = built() | {
        "tasks": [
            {
                "name": "words",
                "variants": [{"name": "gptq", "score": {"value": 0.5, "low": 0.4, "high": 0.6}}],
                "steps": [],
            }
        ]
    }
    report["facts"]["heal"] = {"held": [[0, 0.5], [10, 0.25], [20, None]]}
    found = payload(report)
    assert found["curves"] == {"heal/kl": [[0.0, 0.5], [10.0, 0.25]]}
    assert found["numbers"]["words/gptq/score"] == 0.5
    assert found["stages"][-1][1]["stages/words/score"] == 0.5


@pytest.mark.parametrize(
    ("name", "taken"),
    [("in-domain/gptq/kl", "in-domain/gptq/kl"), ("mine (v2), a/kl", "mine _v2__ a/kl"), ("../a//b", "_../a/_/b")],
)
def test_names_are_as_mlflow_takes_them(name: str, taken: str) -> None:
    assert clients.mlflow_name(name) == taken


def test_artifacts_have_names_as_wandb_takes_them() -> None:
    assert clients.wandb_name("my run|é-w4.g64-report") == "my_run__-w4.g64-report"
    assert clients.wandb_name("x" * 200 + "-report") == "x" * 121 + "-report"


def test_a_tracker_that_is_not_installed_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"recipe\.yaml:3: output\.track: wandb is not installed: pip install wandb"):
        trackers.require(["wandb"], "recipe.yaml:3: output.track")


def a_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Callable[..., str | None]:
    script = tmp_path / "client.py"
    script.write_text(text)
    monkeypatch.setattr(trackers, "SCRIPT", script)
    return lambda **more: trackers.send("wandb", built(), [], tmp_path, **more)


def test_a_client_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send = a_client(tmp_path, monkeypatch, "print('CommError: no route')\nraise SystemExit(1)\n")
    assert send() == "CommError: no route"


def test_a_client_that_hangs_is_ended_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "import pathlib, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\n"
        "child.wait()\n"
    )
    send = a_client(tmp_path, monkeypatch, text)
    assert send(seconds=20.0) == "no end after 20 s"
    child = (tmp_path / "child").read_text()
    state, until = Path(f"/proc/{child}/stat"), time.monotonic() + 30.0  # a killed process ends when it is next run
    while (running := state.exists() and state.read_text().split(") ")[1][0] != "Z") and time.monotonic() < until:
        time.sleep(0.05)
    assert not running


def test_a_client_does_not_get_the_tokens_of_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 20)
    send = a_client(tmp_path, monkeypatch, "import os\nraise SystemExit('HF_TOKEN' in os.environ)\n")
    assert send() is None


@needs("tensorboard")
@pytest.mark.slow
def test_tensorboard_gets_event_files(tmp_path: Path, files: list[Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert trackers.send("tensorboard", built(), files, tmp_path) is None
    found = EventAccumulator(str(next((tmp_path / "tensorboard").iterdir())))
    found.Reload()
    assert "general/gptq/perplexity" in found.Tags()["tensors"]
    assert [e.step for e in found.Tensors("stages/general/perplexity")] == [0, 1, 2, 4, 5]


@needs("mlflow")
@pytest.mark.slow
def test_mlflow_gets_a_run_in_a_local_folder(
    tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert trackers.send("mlflow", built(), files, tmp_path) is None
    if (tmp_path / "mlflow.db").exists():
        rows = sqlite3.connect(tmp_path / "mlflow.db").execute("select key from metrics").fetchall()
        assert ("bytes/gptq",) in rows
        assert list((tmp_path / "mlruns").rglob("report.html"))
        held = b"".join(f.read_bytes() for f in [tmp_path / "mlflow.db"])
    else:
        kept = [f for f in (tmp_path / "mlruns").rglob("*") if f.is_file()]
        assert any(f.as_posix().endswith("metrics/bytes/gptq") for f in kept)
        assert any(f.name == "report.html" for f in kept)
        held = b"".join(f.read_bytes() for f in kept)
    assert b"clients.py" not in held, "the script is not named"


@needs("wandb")
@pytest.mark.slow
def test_wandb_keeps_an_offline_run(tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert trackers.send("wandb", built(), files, tmp_path) is None
    folder = next((tmp_path / "wandb").glob("offline-run-*"))
    assert not list((folder / "files").rglob("*.*")), "no list of packages, no code"
    held = b"".join(f.read_bytes() for f in folder.glob("*.wandb"))
    assert b"general/gptq/perplexity" in held
    assert b"report.html" in held
    assert b"clients.py" not in held, "the script is not named"


@needs("trackio")
@pytest.mark.slow
def test_trackio_keeps_a_local_database(tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    assert trackers.send("trackio", built(), files, tmp_path) is None
    assert list((tmp_path / "trackio").glob("*.db"))
