"""Files of a run, and what commands print: no secret and no place of this machine in them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from helpers import e2e
from helpers.command_line import Here
from helpers.e2e import copied, edit_json, write_rows

from requant import outgoing

TOKEN = "hf_" + "mytokenmytoken"
SECRETS = {
    "LEAK_SET": "s3cr3t-set-name",
    "LEAK_COLUMN": "body-of-x7",
    "LEAK_SHORT": "text",
    "LEAK_BASE": "",  # the base's absolute path
    "LEAK_NAME": "adapter",
}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    monkeypatch.setattr(outgoing, "_values", {})
    monkeypatch.setattr(outgoing, "_roots", set())
    return Here(monkeypatch, capsys)


@pytest.fixture
def secretive(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose recipe is full of variables; the base, the tmp directory and the home are all below tmp_path."""
    folder = copied(project, tmp_path / "work" / "p", "adapter")
    edit_json(folder / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "work/p/base"))
    (folder / "train.jsonl").unlink()
    write_rows(folder / "train.jsonl", [{"body-of-x7": t} for t in e2e.texts()["train"]])
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home" / "hf"))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value or str(folder / "base"))
    e2e.write_recipe(
        folder,
        {
            "base.model": "${env:LEAK_BASE}",
            "base.original": None,
            "adapter": "./${env:LEAK_NAME}",
            "calibration.data": {"path": str(folder / "train.jsonl"), "column": "${env:LEAK_COLUMN}"},
            "evaluate.sets.1.name": "${env:LEAK_SET}",
            "evaluate.sets.1.data.column": "${env:LEAK_SHORT}",
            "evaluate.variants": ["base", "adapter", "gptq"],
            "gates": [{"metric": "ppl_increase", "set": "${env:LEAK_SET}", "max": "900%"}],
            "output.dir": str(tmp_path / "work" / "out"),
        },
    )
    return folder


def holding(run: Path, *texts: str) -> dict[str, list[str]]:
    """Text -> the files below `run` whose content or name holds it."""
    files = [f for f in run.rglob("*") if f.is_file()]
    found = {t: [f.name for f in files if t.encode() in f.read_bytes() or t in f.name] for t in texts}
    return {text: names for text, names in found.items() if names}


@pytest.mark.slow
def test_no_file_of_a_run_says_a_secret_or_a_place(secretive: Path, tmp_path: Path, here: Here) -> None:
    assert here("run", str(secretive / "recipe.yaml")) == 0, here.err
    run = tmp_path / "work" / "out" / "pico"
    hidden = (TOKEN, "s3cr3t-set-name", "body-of-x7", str(tmp_path), os.path.expanduser("~"), str(Path.cwd()))
    assert holding(run, *hidden) == {}
    assert [t for t in hidden[:3] if t in here.out + here.err] == []
    kept = (run / "recipe.yaml").read_text()
    for written in (
        "model: ${env:LEAK_BASE}",
        "column: ${env:LEAK_COLUMN}",
        "name: ${env:LEAK_SET}",
        "${env:LEAK_SHORT}",
    ):
        assert written in kept
    report = json.loads((run / "report.json").read_text())
    assert [s["name"] for s in report["sets"]] == ["in-domain", "${env:LEAK_SET}"]
    assert report["verdict"]["status"] == "pass"
    assert report["verdict"]["line"].count("${env:LEAK_SET}") == 1
    # The copy in the run's directory goes on with the run, also after both have moved.
    before = e2e.digests(run / "gptq")
    assert here("run", str(run)) == 0, here.err
    assert "nothing to do" in here.out
    assert here("run", str(run / "recipe.yaml")) == 0, here.err
    assert "nothing to do" in here.out
    assert here("gate", str(run)) == 0, here.err
    assert e2e.digests(run / "gptq") == before


@pytest.mark.slow
def test_errors_say_the_variable(secretive: Path, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = str(secretive / "recipe.yaml")
    long = "s3cr3t" + "x" * 100  # longer than what a message shows of a value
    monkeypatch.setenv("LEAK", long)
    for key in (
        "base.model",
        "adapter",
        "quantize.bits",
        "quantize.damp",
        "device",
        "calibration.data.path",
        "x",
    ):
        assert here("check", recipe, "--set", f"{key}=${{env:LEAK}}") == 2, key
        assert "s3cr3t" not in here.out + here.err, key
        assert "${env:LEAK}" in here.err or key == "x"


@pytest.mark.slow
def test_a_hub_that_echoes_the_token(
    project: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    from huggingface_hub import constants

    class Echo(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Silent."""

        def do_GET(self) -> None:
            said = f"no {self.headers.get('Authorization')} \x1b[31m"
            body = json.dumps({"error": said}).encode()
            self.send_response(400)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Error-Message", said)
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_POST = do_GET

    folder = copied(project, tmp_path / "p")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setenv("HF_ENDPOINT", constants.ENDPOINT)
        code = here("check", str(folder / "recipe.yaml"), "--set", "adapter=own/adp")
        server.shutdown()
    assert code == 2
    assert "***" in here.err, "the echo was heard"
    assert TOKEN not in here.out + here.err
    assert "\x1b" not in here.err
    shutil.rmtree(folder)
