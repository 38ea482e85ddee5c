"""`requant push` to a stand-in hub on loopback: uploads, refusals, interruptions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import hub, pico
from helpers.e2e import edit_json, make_model, one_thread

from requant.checkpoint.reader import file_digest
from requant.checkpoint.run_directory import MARKER
from requant.cli.main import main
from requant.deploy.hub_upload import plan_upload
from requant.errors import InputError, StageError
from requant.numerics.grid import Grid

REPO = "ann/pico-w4g32"


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a checkpoint and its card."""
    run = tmp_path_factory.mktemp("run")
    make_model(run / "model")
    pico.packed(run / "model", run / "gptq", Grid(4, 32), dtype=torch.bfloat16)
    (run / "gptq" / "README.md").write_text("---\nlibrary_name: transformers\n---\n\n# pico\n")
    (run / "gptq" / "manifest.json").write_text("{}")
    (run / "gptq" / "additional_chat_templates").mkdir()
    (run / "gptq" / "additional_chat_templates" / "tool_use.jinja").write_text("A")
    return run


@pytest.fixture
def server() -> Iterator[hub.Hub]:
    with hub.serve() as made:
        yield made


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


Push = Callable[..., Done]


@pytest.fixture
def push(server: hub.Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Push:
    """The command with the stand-in as its hub, online and without waiting before retries."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_ENDPOINT", server.url)

    def command(run: Path, *options: str, token: str | None = hub.TOKEN) -> Done:
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        else:
            monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("sys.argv", ["requant", "push", str(run), REPO, *options])
        with one_thread(), pytest.raises(SystemExit) as stopped:
            main()
        done = Done(int(stopped.value.code or 0), *capsys.readouterr())
        assert hub.TOKEN not in done.stdout + done.stderr, "the token is never printed"
        return done

    return command


@pytest.mark.slow
def test_a_dry_run_says_what_would_go_and_asks_nobody(server: hub.Hub, gptq: Path, push: Push) -> None:
    done = push(gptq, token=None)
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stdout
    assert "manifest.json" not in done.stdout
    assert f"files to {REPO} (private)" in done.stdout
    assert "dry run: nothing was sent; --yes sends it" in done.stdout
    assert server.requests == []


@pytest.mark.slow
def test_a_push_sends_every_file_as_it_is(server: hub.Hub, gptq: Path, push: Push) -> None:
    done = push(gptq, "--yes")
    assert done.returncode == 0, done.stderr
    assert f"sent: {server.url}/{REPO}" in done.stdout
    written = [f for f in (gptq / "gptq").rglob("*") if f.is_file() and f.name != "manifest.json"]
    local = {f.relative_to(gptq / "gptq").as_posix(): f.read_bytes() for f in written}
    assert "additional_chat_templates/tool_use.jinja" in local
    assert server.repos == {REPO: local}
    assert server.private[REPO] is True


@pytest.mark.slow
def test_no_token_and_a_wrong_one(server: hub.Hub, gptq: Path, push: Push) -> None:
    done = push(gptq, "--yes", token=None)
    assert (done.returncode, server.requests) == (2, [])
    assert "HF_TOKEN is not set: put a write token in the environment" in done.stderr
    done = push(gptq, "--yes", token="hf_another")
    assert done.returncode == 2
    assert "the hub refuses the token in HF_TOKEN (HTTP 401): it needs write access" in done.stderr
    assert "hf_another" not in done.stderr
    assert server.repos == {}


@pytest.mark.slow
def test_a_repository_that_has_files_is_not_overwritten(server: hub.Hub, gptq: Path, push: Push) -> None:
    server.repos[REPO] = {"model.safetensors": b"somebody's work"}
    done = push(gptq, "--yes")
    assert done.returncode == 2
    assert f"{REPO}: exists and holds 1 files, e.g. model.safetensors: pass --update" in done.stderr
    assert server.repos[REPO] == {"model.safetensors": b"somebody's work"}
    assert push(gptq, "--yes", "--update", "--public").returncode == 0
    assert server.repos[REPO]["model.safetensors"] == (gptq / "gptq" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_drop_leaves_nothing_visible_and_the_next_push_goes_on(server: hub.Hub, gptq: Path, push: Push) -> None:
    server.drop.append(("POST", "/commit/"))
    done = push(gptq, "--yes")
    assert done.returncode == 1
    assert "the connection broke (" in done.stderr
    assert "run the same command again, weights that arrived are not sent again" in done.stderr
    assert server.repos == {REPO: {}}
    assert server.count("PUT", "/blob/") == 1
    assert push(gptq, "--yes").returncode == 0
    assert server.count("PUT", "/blob/") == 1, "the weights were there already"
    assert "config.json" in server.repos[REPO]


@pytest.mark.slow
def test_a_drop_while_weights_are_sent_is_tried_again(server: hub.Hub, gptq: Path, push: Push) -> None:
    server.drop.append(("PUT", "/blob/"))
    assert push(gptq, "--yes").returncode == 0
    assert server.count("PUT", "/blob/") == 2
    assert server.repos[REPO]["model.safetensors"] == (gptq / "gptq" / "model.safetensors").read_bytes()


def test_what_is_no_parcel(gptq: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'pico' is not a hub id: expected OWNER/NAME"):
        plan_upload(gptq, "pico")
    with pytest.raises(
        InputError, match=r"holds no finished checkpoint \(gptq/config.json\): finish `requant run` first"
    ):
        plan_upload(tmp_path, REPO)
    shutil.copytree(gptq / "gptq", tmp_path / "gptq")
    (tmp_path / "gptq" / "README.md").unlink()
    with pytest.raises(InputError, match="there is no model card: `requant report RECIPE` writes it"):
        plan_upload(tmp_path, REPO)
    (tmp_path / "gptq" / "README.md").write_text("# pico\n")
    edit_json(tmp_path / "gptq" / "config.json", _name_or_path="/home/ann/base")
    with pytest.raises(StageError, match=r"not pushed, 1 things are wrong with it:\n  config.json: _name_or_path"):
        plan_upload(tmp_path, REPO)


def test_a_link_that_leads_out_of_the_run_is_not_sent(gptq: Path, tmp_path: Path) -> None:
    shutil.copytree(gptq, tmp_path / "run")
    (tmp_path / "run" / MARKER).write_text("{}")
    (tmp_path / "secret").write_text("precious")
    link = tmp_path / "run" / "gptq" / "vocab.txt"
    link.symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"gptq/vocab\.txt: is a link to .*/secret, outside of .*/run: not sent"):
        plan_upload(tmp_path / "run", REPO)
    link.unlink()
    shutil.move(tmp_path / "run" / "gptq", tmp_path / "other")
    (tmp_path / "run" / "gptq").symlink_to(tmp_path / "other")
    with pytest.raises(InputError, match=r"run/gptq: is a link to .*/other, outside of .*/run: not sent"):
        plan_upload(tmp_path / "run", REPO)


def test_a_file_that_changed_since_it_was_written_is_not_sent(gptq: Path, tmp_path: Path) -> None:
    shutil.copytree(gptq, tmp_path / "run")
    file = tmp_path / "run" / "gptq" / "model.safetensors"
    manifest = {"key": "k", "files": {file.name: file.stat().st_size}, "sha256": {file.name: file_digest(file)}}
    (file.parent / "manifest.json").write_text(json.dumps(manifest))
    assert plan_upload(tmp_path / "run", REPO).files
    content = bytearray(file.read_bytes())
    content[-5000] ^= 255
    file.write_bytes(content)
    with pytest.raises(StageError, match=r"not pushed, 1 files are not as they were written; take .*\n  model\.safe"):
        plan_upload(tmp_path / "run", REPO)
