"""A fine-tune that ends its turns with a token of its own stops there in every checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.e2e import copied, edit_json, recipe, run
from transformers import AutoTokenizer

from requant.heal import stage as heal_stage
from requant.merge.stop_tokens import end_of_turn, stop_tokens
from requant.run import prepare

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
RAISES = "{{ raise_exception('no system role') }}"


def tuned(project: Path, tmp: Path, *, end: int = 7, eos: str | None = None, template: str | None = CHATML) -> Path:
    """A project whose adapter brings the base's tokenizer with one more special token, id `end`."""
    mine = copied(project, tmp, "adapter", "base")
    for file in (mine / "base").glob("tokenizer*"):
        shutil.copy(file, mine / "adapter")
    tokenizer = mine / "adapter" / "tokenizer.json"
    raw = json.loads(tokenizer.read_text())
    (old,) = (text for text, number in raw["model"]["vocab"].items() if number == end)
    raw["model"]["vocab"]["<|im_end|>"] = raw["model"]["vocab"].pop(old)
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": end, "content": "<|im_end|>"})
    tokenizer.write_text(json.dumps(raw))
    settings: dict[str, Any] = {"chat_template": template} if template else {}
    edit_json(mine / "adapter" / "tokenizer_config.json", **settings, **({"eos_token": eos} if eos else {}))
    return mine


def eos(directory: Path, file: str) -> Any:
    return json.loads((directory / file).read_text())["eos_token_id"]


FOUND: dict[str, dict[str, Any]] = {
    "the template ends turns with it": {},
    "the tokenizer's eos_token": {"eos": "<|im_end|>", "template": None},
    "both": {"eos": "<|im_end|>"},
    "a template that raises": {"eos": "<|im_end|>", "template": RAISES},
}


@pytest.mark.parametrize("options", FOUND.values(), ids=FOUND.keys())
def test_merged_gptq_and_healed_stop_at_the_new_token(project: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    mine = tuned(project, tmp_path / "p", **options)
    prepared = prepare.prepare(recipe(mine, tmp_path / "runs"))
    said = str(prepared.merge.stops)
    assert "ends turns with <|im_end|> (7), which the base's configs do not stop at" in said
    outcome = run(mine, tmp_path / "runs", until="quantize")
    (tmp_path / "healed").mkdir()
    heal_stage.write(outcome.path / "gptq", tmp_path / "healed", {}, {})
    for directory in (outcome.path / "merged", outcome.path / "gptq", tmp_path / "healed"):
        assert eos(directory, "generation_config.json") == [1, 7], directory
        assert eos(directory, "config.json") == 7, directory
    stages = json.loads((outcome.path / ".stages.json").read_text())
    assert stages["merge"]["result"]["stop_tokens"] == said


UNCHANGED: dict[str, dict[str, Any]] = {
    "no special token after an answer": {"template": PLAIN},
    "no template": {"template": None},
    "a template that raises": {"template": RAISES},
}


@pytest.mark.parametrize("options", UNCHANGED.values(), ids=UNCHANGED.keys())
def test_a_tokenizer_that_ends_turns_like_the_base_changes_nothing(
    project: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    mine = tuned(project, tmp_path / "p", **options)
    assert prepare.prepare(recipe(mine, tmp_path / "runs")).merge.stops is None


def test_an_adapter_without_a_tokenizer_changes_nothing(project: Path, tmp_path: Path) -> None:
    mine = copied(project, tmp_path / "p", "base")
    edit_json(mine / "base" / "tokenizer_config.json", chat_template=CHATML, eos_token="<s>")
    assert prepare.prepare(recipe(mine, tmp_path / "runs")).merge.stops is None


def test_a_base_that_already_stops_there_changes_nothing(project: Path, tmp_path: Path) -> None:
    mine = tuned(project, tmp_path / "p")
    edit_json(mine / "base" / "generation_config.json", eos_token_id=[1, 7])
    assert prepare.prepare(recipe(mine, tmp_path / "runs")).merge.stops is None


def test_configs_that_name_several_tokens_or_none(project: Path, tmp_path: Path) -> None:
    """Every stop of the base stays one; without generation_config.json config.json says what they are."""
    mine = tuned(project, tmp_path / "p")
    tokenizer = AutoTokenizer.from_pretrained(mine / "adapter")
    assert end_of_turn(tokenizer) == 7
    edit_json(mine / "base" / "generation_config.json", eos_token_id=[5, 6])
    found = stop_tokens(tokenizer, mine / "base", {"eos_token_id": 4})
    assert found is not None
    assert (found.generation, found.config) == ((5, 6, 4, 7, 1), 7)
    (mine / "base" / "generation_config.json").unlink()
    found = stop_tokens(tokenizer, mine / "base", {"text_config": {"eos_token_id": [1, 3]}})
    assert found is not None
    assert (found.generation, found.config, dict(found.added)) == ((1, 3, 7), 7, {7: "<|im_end|>"})
    assert stop_tokens(tokenizer, mine / "base", {"eos_token_id": [1, 7]}) is None
