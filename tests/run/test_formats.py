"""`output.formats`: one solve, a directory a format, each with its manifest, card and key."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import cast

import gguf
import pytest
import torch
from helpers.e2e import copied, killed_run, one_thread, recipe, run, times

from requant.checkpoint.artifact import changed_files, read_manifest
from requant.checkpoint.run_directory import MARKER, RunDirectory
from requant.deploy import hub_upload
from requant.deploy.gguf_verification import verify_gguf
from requant.deploy.verification import EngineResult, save_verification
from requant.errors import InputError
from requant.formats.registry import open_quantized
from requant.run import prepare
from requant.run.observer import Watcher
from requant.run.stages import STAGES

CT = "compressed-tensors"
FEW = {"evaluate.variants": ["base", "adapter", "merged", "gptq"]}


@pytest.mark.slow
def test_a_run_writes_its_codes_in_every_format(finished: Path, project: Path, ran: Path) -> None:
    """Of a run that is finished in GPTQ, only the new format and the report are made."""
    before = times(ran / "pico" / "gptq")
    asked = {"output.formats": ["gptq", CT, "auto-round", "mlx"]}
    out = run(project, ran, asked)
    assert out.ran == [CT, "auto-round", "mlx", "report"]
    made = out.path / CT
    assert {n: t for n, t in times(out.path / "gptq").items() if n != "README.md"} == {
        n: t for n, t in before.items() if n != "README.md"
    }
    one, other = open_quantized(out.path / "gptq"), open_quantized(made)
    assert one.quantized == other.quantized
    others = [open_quantized(out.path / name) for name in (CT, "auto-round", "mlx")]
    for name in one:
        assert all(torch.equal(one.read(name), same.read(name)) for same in others)
    assert "mlx_lm.generate --model PATH" in (out.path / "mlx" / "README.md").read_text()
    manifest = read_manifest(made)
    assert manifest is not None
    assert manifest["provenance"]["from"] == "gptq"
    assert "README.md" not in manifest["files"]
    assert changed_files(made) == {}
    card = (made / "README.md").read_text()
    assert 'tags: ["compressed-tensors", "requant"]' in card or "- compressed-tensors" in card
    assert "pip install compressed-tensors" in card
    assert "pip install gptqmodel" not in card
    assert "pip install gptqmodel optimum" in (out.path / "gptq" / "README.md").read_text()
    facts = json.loads((out.path / "report.json").read_text())["facts"]
    sizes, formats = facts["cost"]["bytes"], facts["formats"]
    assert formats[CT]["directory"] == CT
    assert formats["gptq"]["directory"] == "gptq"
    assert formats["gptq"]["made_from"] is None
    assert formats[CT]["made_from"] == "gptq"
    assert {name: found["bytes"] for name, found in formats.items()} == {name: sizes[name] for name in formats}
    assert "gptqmodel" in formats["gptq"]["read_by"]
    assert "gptqmodel" not in formats[CT]["read_by"]
    assert formats[CT]["largest_rounding"] == 0
    assert 4.5 < formats[CT]["bits_per_weight"] < formats["gptq"]["bits_per_weight"], "without g_idx"
    assert "| compressed-tensors |" in (out.path / "report.md").read_text()
    assert "every weight against gptq/: exactly" in card
    assert sizes[CT] == sum(f.stat().st_size for f in made.glob("*.safetensors"))
    assert {name for name, _ in hub_upload.plan_upload(made, "ann/model").files} >= {"config.json", "README.md"}
    assert run(project, ran, asked).ran == []
    shutil.rmtree(made)
    assert run(project, ran, asked).ran == [CT, "report"]
    assert not [p for p in out.path.iterdir() if p.name.startswith(f".{CT}")]


@pytest.mark.slow
def test_a_run_writes_a_gguf_file(finished: Path, project: Path, ran: Path, tmp_path: Path) -> None:
    asked = {"output.formats": ["gptq", "gguf"]}
    out = run(project, ran, asked)
    assert out.ran == ["gguf", "report"]
    (file,) = (out.path / "gguf").glob("*.gguf")
    done = verify_gguf(file, source=out.path / "gptq")
    assert (done.findings, done.largest_rounding) == ([], 0)
    assert gguf.GGUFReader(file).fields["general.name"].contents() == "pico", "the run's name, not gptq"
    manifest = read_manifest(out.path / "gguf")
    assert manifest is not None
    assert (manifest["provenance"]["from"], list(manifest["files"])) == ("gptq", [file.name])
    facts = json.loads((out.path / "report.json").read_text())["facts"]
    assert facts["formats"]["gguf"]["bytes"] == facts["cost"]["bytes"]["gguf"] == file.stat().st_size
    assert facts["formats"]["gguf"]["read_by"] == ["llama.cpp"]
    assert facts["formats"]["gguf"]["bits_per_weight"] == 4.5
    assert facts["cost"]["seconds"]["gguf"] > 0
    card = (out.path / "gguf" / "README.md").read_text()
    assert "llama-server -m PATH" in card
    assert "compared with it: all weights are equal." in card
    assert "library_name" not in card
    upload = hub_upload.plan_upload(out.path / "gguf", "ann/model")
    assert ({name for name, _ in upload.files}, upload.format) == ({file.name, "README.md"}, "gguf")
    assert run(project, ran, asked).ran == []
    done.engines.append(cast(EngineResult, {"engine": "llamacpp", "ok": True}))  # as verify --with llamacpp keeps it
    assert save_verification(done) == out.path / "verify-gguf.json"
    assert run(project, ran, asked).ran == ["report"]
    facts = json.loads((out.path / "report.json").read_text())["facts"]
    assert facts["formats"]["gguf"]["loaded_in"] == ["llamacpp"]
    file.write_bytes(file.read_bytes()[:-1])
    assert run(project, ran, asked).ran == ["gguf", "report"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"quantize.bits": 8, "quantize.symmetric": False}, r"cannot be stored as gguf: 8 bits with zero points"),
    ],
)
def test_what_gguf_cannot_hold_is_refused_before_any_work(
    project: Path, tmp_path: Path, changes: dict[str, object], told: str
) -> None:
    asked = {**changes, "output.formats": ["gptq", "gguf"]}
    with one_thread(), pytest.raises(InputError, match=rf"^\S+:\d+: output\.formats: gguf: .*{told}"):
        prepare.prepare(recipe(project, tmp_path, asked))


def test_groups_that_mlx_does_not_have_are_refused_before_any_work(project: Path, tmp_path: Path) -> None:
    asked = {"quantize.group_size": -1, "output.formats": ["gptq", "mlx"]}
    told = (
        r"^\S+:\d+: output\.formats: mlx: model.layers.0.self_attn.q_proj: MLX has groups of 32, 64, 128 inputs, not "
        "of a whole"
    )
    with one_thread(), pytest.raises(InputError, match=told):
        prepare.prepare(recipe(project, tmp_path, asked))


def test_a_tokenizer_that_gguf_cannot_hold_is_refused_before_any_work(project: Path, tmp_path: Path) -> None:
    other = copied(project, tmp_path / "project", "base")
    raw = json.loads((other / "base" / "tokenizer.json").read_text())
    raw["pre_tokenizer"] = {"type": "Whitespace"}
    (other / "base" / "tokenizer.json").write_text(json.dumps(raw))
    with (
        one_thread(),
        pytest.raises(InputError, match=r"^\S+:\d+: output\.formats: gguf: .*llama.cpp has no name for how it cuts"),
    ):
        prepare.prepare(recipe(other, tmp_path, {"output.formats": ["gptq", "gguf"]}))


@pytest.mark.slow
def test_a_run_killed_before_the_report_writes_the_cards_of_formats(finished: Path, project: Path, ran: Path) -> None:
    asked = {"output.formats": ["gptq", CT, "gguf"]}
    out = run(project, ran, asked).path
    cards = {name: out / name / "README.md" for name in (CT, "gguf")}
    for card in cards.values():
        shutil.rmtree(card.parent)
    assert killed_run(project, ran, "report:0", asked) == -signal.SIGKILL
    assert run(project, ran, asked).ran == ["report"]
    assert "pip install compressed-tensors" in cards[CT].read_text()
    assert "llama-server -m PATH" in cards["gguf"].read_text()


def test_every_directory_that_a_run_writes_is_refused_as_a_link(tmp_path: Path) -> None:
    for name in (stage.artifact for stage in STAGES if stage.artifact is not None):
        run_of = tmp_path / name
        run_of.mkdir()
        (run_of / MARKER).touch()
        (run_of / name).symlink_to(tmp_path)
        with pytest.raises(InputError, match="is a link"):
            RunDirectory(run_of).check()


@pytest.mark.slow
def test_a_run_names_what_an_earlier_recipe_left(project: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(Watcher, "warn", lambda _, text: said.append(text))
    asked = {"output.formats": ["gptq", CT]}
    for changes in (asked, asked, {}):
        assert not [text for text in said if "earlier recipe" in text]
        run(project, ran, changes)
    assert [text for text in said if f"{ran / 'pico' / CT} is of an earlier recipe" in text]


@pytest.mark.slow
def test_a_healed_checkpoint_is_what_is_converted(project: Path, tmp_path: Path) -> None:
    healing = {"heal": {"steps": 2, "batch": 2, "length": 32}, "output.formats": ["gptq", CT]} | FEW
    healing["evaluate.variants"] = [*FEW["evaluate.variants"], "healed"]
    out = run(project, tmp_path, healing)
    assert out.ran.index(CT) == out.ran.index("heal") + 1
    of = [read_manifest(out.path / name) or {} for name in ("gptq", "healed")]
    assert of[1]["provenance"]["of"] == of[0]["key"]
    one, other = open_quantized(out.path / "healed"), open_quantized(out.path / CT)
    assert all(torch.equal(one.read(name), other.read(name)) for name in one)


def test_a_server_may_load_one_of_the_formats(project: Path, tmp_path: Path) -> None:
    """Three bits: vLLM has no GPTQ kernel for them, and one for compressed-tensors."""
    changes = {"quantize.bits": 3, "deploy": ["vllm"]}
    with one_thread():
        with pytest.raises(InputError, match=r"^\S+:\d+: deploy: vllm does not load this: .*no 3-bit weights"):
            prepare.prepare(recipe(project, tmp_path, changes))
        prepared = prepare.prepare(recipe(project, tmp_path, {**changes, "output.formats": ["gptq", CT]}))
    verdict = next(v for v in prepared.quantize.engines if v.target.name == "vllm")
    assert str(verdict).startswith("loads, as compressed-tensors; Hopper: Humming (where installed) ")
    assert prepared.quantize.served_as(CT, ("vllm",)) == ("vllm",)
    assert prepared.quantize.served_as("gptq", ("vllm", "gptqmodel")) == ("gptqmodel",)
