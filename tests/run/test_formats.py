"""`output.formats`: one solve, a directory a format, each with its manifest, card and key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.e2e import one_thread, recipe, run, times

from requant.checkpoint.artifact import changed_files, read_manifest
from requant.deploy import hub_upload
from requant.errors import InputError
from requant.formats.registry import open_quantized
from requant.run import prepare

CT = "compressed-tensors"
FEW = {"evaluate.variants": ["base", "adapter", "merged", "gptq"]}


@pytest.mark.slow
def test_a_run_writes_its_codes_in_every_format(finished: Path, project: Path, ran: Path) -> None:
    """Of a run that is finished in GPTQ, only the new format and the report are made."""
    before = times(ran / "pico" / "gptq")
    asked = {"output.formats": ["gptq", CT]}
    out = run(project, ran, asked)
    assert out.ran == [CT, "report"]
    made = out.path / CT
    assert {n: t for n, t in times(out.path / "gptq").items() if n != "README.md"} == {
        n: t for n, t in before.items() if n != "README.md"
    }
    one, other = open_quantized(out.path / "gptq"), open_quantized(made)
    assert one.quantized == other.quantized
    for name in one:
        assert torch.equal(one.read(name), other.read(name))
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
    sizes = json.loads((out.path / "report.json").read_text())["facts"]["cost"]["bytes"]
    assert sizes[CT] == sum(f.stat().st_size for f in made.glob("*.safetensors"))
    assert {name for name, _ in hub_upload.plan_upload(made, "ann/model").files} >= {"config.json", "README.md"}
    assert run(project, ran, asked).ran == []
    shutil.rmtree(made)
    assert run(project, ran, asked).ran == [CT, "report"]
    assert not [p for p in out.path.iterdir() if p.name.startswith(f".{CT}")]


@pytest.mark.slow
def test_a_healed_checkpoint_is_what_is_converted(project: Path, tmp_path: Path) -> None:
    healing = {"heal": {"steps": 2, "batch": 2, "length": 32}, "output.formats": ["gptq", CT]} | FEW
    healing["evaluate.variants"] = [*FEW["evaluate.variants"], "healed"]
    out = run(project, tmp_path, healing)
    assert out.ran.index(CT) == out.ran.index("heal") + 1
    one, other = open_quantized(out.path / "healed"), open_quantized(out.path / CT)
    assert all(torch.equal(one.read(name), other.read(name)) for name in one)


def test_a_server_may_load_one_of_the_formats(project: Path, tmp_path: Path) -> None:
    """Three bits: vLLM has no GPTQ kernel for them, and one for compressed-tensors."""
    changes = {"quantize.bits": 3, "deploy": ["vllm"]}
    with one_thread():
        with pytest.raises(InputError, match=r"deploy: vllm does not load this: .*no 3-bit weights"):
            prepare.prepare(recipe(project, tmp_path, changes))
        prepared = prepare.prepare(recipe(project, tmp_path, {**changes, "output.formats": ["gptq", CT]}))
    verdict = next(v for v in prepared.quantize.engines if v.target.name == "vllm")
    assert str(verdict).startswith("loads, as compressed-tensors; Hopper: Humming (where installed) ")
    assert prepared.quantize.served_as(CT, ("vllm",)) == ("vllm",)
    assert prepared.quantize.served_as("gptq", ("vllm", "gptqmodel")) == ("gptqmodel",)
