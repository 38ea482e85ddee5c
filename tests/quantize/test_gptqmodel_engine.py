"""`quantize.engine: gptqmodel`: its weights in our layout, measured and verified like ours."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import e2e, pico
from helpers.e2e import make_model, make_tokenizer, one_thread
from safetensors.torch import load_file

from requant import deploy
from requant.checkpoint.reader import Checkpoint
from requant.errors import InputError
from requant.heal.settings import HealSettings
from requant.numerics.grid import Grid
from requant.quantize import gptqmodel_engine
from requant.quantize.plan import Settings
from requant.quantize.stage import quantize
from requant.run import heal_checkpoint

pytest.importorskip("gptqmodel")
pytestmark = pytest.mark.filterwarnings("ignore")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model")
    make_model(out)
    return out


def windows() -> torch.Tensor:
    return pico.ids(8, 32, seed=3)


@pytest.mark.slow
def test_the_same_files_and_the_same_numbers(source: Path, tmp_path: Path) -> None:
    settings = Settings(grid=Grid(4, 32))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "ours").mkdir()
    said: list[tuple[int, int]] = []
    with one_thread():
        layout, results = gptqmodel_engine.quantize(
            source, tmp_path / "theirs", windows(), settings, dtype=torch.bfloat16, device=CPU, batch=4,
            progress=lambda done, total, note: said.append((done, total)),
        )  # fmt: skip
        _, ours = quantize(source, tmp_path / "ours", windows(), settings, dtype=torch.bfloat16, device=CPU, batch=4)
    assert said == [(1, 2), (2, 2)]
    a, b = Checkpoint(tmp_path / "theirs"), Checkpoint(tmp_path / "ours")
    assert {n: (i.shape, i.dtype) for n, i in a.items()} == {n: (i.shape, i.dtype) for n, i in b.items()}
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("theirs", "ours")]
    assert configs[0] == configs[1] | {"quantization_config": configs[0]["quantization_config"]}
    assert sorted(f.name for f in (tmp_path / "theirs").iterdir()) == sorted(
        f.name for f in (tmp_path / "ours").iterdir()
    )
    assert {r.name for r in results} == {r.name for r in ours} == set(layout.grids)
    assert {r.order for r in results} == {"gptqmodel"}
    by_name = {r.name: r for r in ours}
    for r in results:
        assert 0 < r.relative_error < 0.3
        assert 0.2 < r.rtn_error / by_name[r.name].rtn_error < 5, "the same control on about the same inputs"
    done = deploy.verify(tmp_path / "theirs", source=source)
    assert done.ok, done.message()


@pytest.mark.slow
def test_what_the_library_itself_wrote_is_healed(source: Path, tmp_path: Path) -> None:
    """Its own process from loading to saving; healing then moves its scales and nothing else."""
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(windows().tolist()))
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    code = (
        "import json, sys, torch; from gptqmodel import GPTQModel, QuantizeConfig; source, rows, out = sys.argv[1:];"
        "model = GPTQModel.load(source, QuantizeConfig(bits=4, group_size=32, device='cpu'));"
        "made = [torch.tensor([r]) for r in json.load(open(rows))];"
        "model.quantize([{'input_ids': r, 'attention_mask': torch.ones_like(r)} for r in made]); model.save(out)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(rows), str(theirs)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    text = tmp_path / "text.txt"
    text.write_text("\n".join(e2e.texts()["train"]))
    settings = HealSettings(steps=20, batch=4, length=32, lr=3e-3, tune=("scales",))
    with one_thread():
        told = heal_checkpoint.heal_checkpoint(theirs, source, [text], out, settings, device=CPU)
    before, after = load_file(theirs / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert told["healed"]
    assert {name.rpartition(".")[2] for name in moved} == {"scales"}
    found = [[str(f) for f in deploy.verify(path, source=source).findings] for path in (theirs, out)]
    assert found[0] == found[1]
    assert all("is a path of the machine that made it" in f for f in found[0]), (
        "what the library left, and nothing else"
    )


@pytest.mark.slow
def test_rotary_settings_for_each_kind_of_layer_are_saved(tmp_path: Path) -> None:
    """Gemma 3: the library alone raises AttributeError when it saves."""
    (tmp_path / "gemma").mkdir()
    (tmp_path / "out").mkdir()
    pico.save(pico.model("gemma3_text"), tmp_path / "gemma")
    make_tokenizer(tmp_path / "gemma")
    with one_thread():
        gptqmodel_engine.quantize_by_defaults(
            tmp_path / "gemma", tmp_path / "out", windows(), bits=4, group_size=32, dtype=torch.bfloat16, device=CPU
        )
    before, after = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("gemma", "out"))
    assert after["rope_parameters"] == before["rope_parameters"]
    assert after["rope_parameters"].keys() == {"full_attention", "sliding_attention"}


@pytest.mark.slow
def test_overrides_and_skipped_linears(source: Path, tmp_path: Path) -> None:
    settings = Settings(grid=Grid(4, 32), overrides=(("*.down_proj", {"bits": 8}), ("*.o_proj", None)))
    out = tmp_path / "out"
    out.mkdir()
    layout, results = gptqmodel_engine.quantize(source, out, windows(), settings, dtype=torch.float16, device=CPU)
    assert {r.name: r.bits for r in results if r.bits == 8} == {f"model.layers.{i}.mlp.down_proj": 8 for i in (0, 1)}
    assert set(layout.left) == {f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)}
    done = deploy.verify(out, source=source)
    assert done.ok, done.message()


@pytest.mark.slow
def test_a_recipe_runs_through_it(project: Path, tmp_path: Path) -> None:
    done = e2e.run(
        project, tmp_path, {"quantize.engine": "gptqmodel", "evaluate.variants": ["adapter", "merged", "gptq"]}
    )
    report = json.loads((done.path / "report.json").read_text())
    config = json.loads((done.path / "gptq" / "config.json").read_text())
    assert config["quantization_config"]["meta"]["quantizer"][0].startswith("gptqmodel:7.")
    assert report["facts"]["quantize"]["settings"]["engine"] == "gptqmodel"
    assert {m["order"] for m in report["facts"]["quantize"]["modules"]} == {"gptqmodel"}
    assert report["facts"]["verify"]["ok"] is True
    assert "gptqmodel" in report["facts"]["versions"]


def test_what_it_cannot_do_is_refused_before_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InputError, match=r"gptqmodel has no signed scales: set quantize.signed_scales to false"):
        gptqmodel_engine.check(Settings(grid=Grid(4, 32, signed=True)))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "gptqmodel" else find(n, *a))
    with pytest.raises(InputError, match="which is not installed: pip install gptqmodel optimum"):
        gptqmodel_engine.check(Settings(grid=Grid(4, 32)))
