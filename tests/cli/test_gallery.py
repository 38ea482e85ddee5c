"""Every recipe of recipes/ is checked and run on a tiny random model of its family."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico, tiny
from helpers.command_line import Here
from helpers.e2e import make_tokenizer, texts, write_rows
from ruamel.yaml import YAML

from requant.checkpoint.reader import Checkpoint
from requant.recipe import load

FOLDER = Path(__file__).parents[2] / "recipes"
REAL = {"smollm2-pydocs", "gemma3-word-problems"}  # real fine-tunes, with tests of their own in tests/run
KINDS = {
    "gemma-2-9b": "gemma2",
    "gemma-3-12b": "gemma3",
    "gemma-4-31b": "gemma4",
    "gpt-oss-20b": "gpt_oss",
    "llama-3.1-8b": "llama",
    "llama-3.3-70b": "llama",
    "mistral-7b": "mistral",
    "mistral-small-24b": "mistral3",
    "qwen2.5-7b": "qwen2",
    "qwen3-30b-a3b": "qwen3_moe",
    "qwen3-8b": "qwen3",
    "qwen3-vl-8b": "qwen3_vl",
    "qwen3.5-9b": "qwen3_5",
}
WORDS = 320  # of the model: more than the tokenizer has, so that no text holds the placeholder of an image
PLACES = ("image_token_index", "boi_token_index", "eoi_token_index", "image_token_id", "video_token_id")
SHAPES: dict[str, dict[str, Any]] = {  # of a size within a family
    "gemma-4-31b": {"text_config.hidden_size_per_layer_input": 0, "text_config.attention_k_eq_v": True}
}
PACKED: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Here:
    monkeypatch.chdir(tmp_path)
    return Here(monkeypatch, capsys)


def test_every_recipe_has_its_family() -> None:
    assert KINDS.keys() == {file.parent.name for file in FOLDER.glob("*/recipe.yaml")} - REAL


def small(name: str, out: Path) -> Path:
    """The recipe in `out`, beside a tiny model of its family, an adapter and texts: only sizes and places differ."""
    kind = KINDS[name]
    default = tiny.config(kind).to_dict()
    places = {place: WORDS - 1 for place in PLACES if place in default}
    words = {"text_config.vocab_size" if "text_config" in default else "vocab_size": WORDS}
    made = tiny.model(kind, **places, **words, **SHAPES.get(name, {}))
    base = pico.save(made, out / "base", torch.bfloat16)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if name == "gpt-oss-20b" else "all-linear"
    pico.train(made, out / "adapter", target_modules=targets)
    given = load(FOLDER / name / "recipe.yaml")
    if given.base.nf4 == "auto":
        base = pico.save_4bit(base, out / "packed", **PACKED)
    make_tokenizer(base)
    (base / "chat_template.jinja").write_text(CHAT)
    for file, rows in texts().items():
        write_rows(out / f"{file}.jsonl", [{"messages": [{"role": "user", "content": "Explain."},
                                                         {"role": "assistant", "content": text}]} for text in rows])  # fmt: skip
    if given.base.original is not None:
        shutil.copytree(out / "base", out / "original", dirs_exist_ok=True)
    text = (FOLDER / name / "recipe.yaml").read_text()
    text = re.sub(r"\{dataset: [^}]*split: (train|test)\}", lambda m: f"{{path: ./general-{m[1]}.txt}}", text)
    written = YAML(typ="safe").load(text)
    written["base"]["model"] = f"./{base.name}"
    if given.base.original is not None:
        written["base"]["original"] = "./original"
    written["quantize"]["group_size"] = 32
    for setting in written["quantize"].get("overrides", {}).values():
        setting.update(dict.fromkeys(setting.keys() & {"group_size"}, 32))
    written["calibration"] |= {"samples": 8, "length": 64}
    written["evaluate"]["window"] = 64
    (out / "general-train.txt").write_text("\n".join(texts()["general"][:10]) * 3)
    write_rows(out / "general.jsonl", [{"text": row} for row in texts()["general"][10:]])
    for item in written["evaluate"]["sets"]:
        item["document_tokens"] = 64
        if item["name"] == "general":
            item["data"] = {"path": "./general.jsonl"}
    with (out / "recipe.yaml").open("w") as file:
        YAML(typ="safe").dump(written, file)
    return out / "recipe.yaml"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_a_recipe_passes_check_and_runs_on_its_family(here: Here, tmp_path: Path, name: str) -> None:
    recipe = str(small(name, tmp_path))
    assert here("check", recipe, "--set", "device=cpu") == 0, here.err
    assert here.out.rstrip().endswith("ok")
    found = re.search(r"^quantize +(\d+) linears", here.out, re.MULTILINE)
    assert found, here.out
    assert int(found[1]) > 3
    assert re.search(r"^serve +vllm loads", here.out, re.MULTILINE), here.out
    assert here("run", recipe, "--set", "device=cpu", "--set", "gates=[]") == 0, here.err
    (report,) = Path("runs").glob("*/report.json")
    scored = {v["name"]: v["ppl"]["value"] for v in json.loads(report.read_text())["sets"][0]["variants"]}
    assert {"adapter", "merged", "gptq"} <= scored.keys()
    assert all(math.isfinite(ppl) for ppl in scored.values())
    assert sum(n.endswith(".qweight") for n in Checkpoint(report.parent / "gptq")) == int(found[1])
