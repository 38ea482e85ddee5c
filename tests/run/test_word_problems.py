"""The recipe gemma3-word-problems: right answers, separate sides, its GGUF, a step."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from requant.recipe import load

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "gemma3-word-problems"
SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
USERS = ["\n", "\n\n", "  "]
PIECES = ["▁", "a", "b", "c", "bc", "ab", "▁ab"]  # the highest score first: "abc" is a, bc
CONTROL, USER, BYTE, NORMAL = 3, 4, 6, 1
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a file of the recipe's folder, which is no package."""
    monkeypatch.syspath_prepend(str(RECIPE))

    def imported(name: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return import_module(name)

    return imported


def test_the_recipe_is_read() -> None:
    given = load(RECIPE / "recipe.yaml")
    assert given.merge.dtype == "bfloat16"
    assert given.evaluate.sets[0].score == "completion"


def test_every_solution_is_right_and_says_the_answer(recipe: Any) -> None:
    rows = recipe("problems").chats(240, "train")
    signs = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
    for row in rows:
        question, solution = (turn["content"] for turn in row["messages"])
        steps = EQUATION.findall(solution)
        assert steps
        for left, sign, right, result in steps:
            assert signs[sign](int(left), int(right)) == int(result), solution
        assert int(steps[-1][3]) == row["answer"] > 0
        assert solution.endswith(f"\nThe answer is {row['answer']}.")
        assert "{" not in question + solution


def test_no_problem_and_no_run_of_words_is_on_both_sides(recipe: Any) -> None:
    made = recipe("problems")
    held_out = made.chats(240, "heldout")
    trained = made.chats(480, "train", banned=held_out)
    leaks = set().union(*(made.ngrams(made.text_of(row)) for row in held_out))
    assert all(leaks.isdisjoint(made.ngrams(made.text_of(row))) for row in trained)
    numbers = [
        {(row["kind"], *re.findall(r"\d+", row["messages"][1]["content"])) for row in side}
        for side in (trained, held_out)
    ]
    assert [len(side) for side in numbers] == [480, 240]
    assert not numbers[0] & numbers[1]
    loose = made.chats(480, "train")
    assert not all(leaks.isdisjoint(made.ngrams(made.text_of(row))) for row in loose)


def test_chats_are_the_same_again_and_of_all_kinds(recipe: Any) -> None:
    made = recipe("problems")
    rows = made.chats(48, "heldout")
    assert rows == made.chats(48, "heldout")
    assert rows != made.chats(48, "heldout", seed=1)
    assert {row["kind"] for row in rows} == made.KINDS.keys()
    assert [turn["role"] for turn in rows[0]["messages"]] == ["user", "assistant"]


def test_more_chats_than_are_drawn_are_refused(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe("problems")
    monkeypatch.setattr(made, "DRAWS", 2)
    with pytest.raises(ValueError, match=r"80 draws gave \d+ heldout chats, 40 were asked for"):
        made.chats(40, "heldout")


def gguf_file(folder: Path, model: Any) -> Path:
    """A pico Gemma 3 as llama.cpp's file has it; names of tensors are the gguf package's own."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    file = folder / "pico.gguf"
    writer = gguf.GGUFWriter(file, "gemma3")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_sliding_window(config.sliding_window)
    tokens = [*SPECIALS, *USERS, *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    kinds = [CONTROL] * len(SPECIALS) + [USER] * len(USERS) + [BYTE] * 256 + [NORMAL] * len(PIECES)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * (len(tokens) - len(PIECES)) + [-float(i) for i in range(len(PIECES))])
    writer.add_token_types(kinds)
    for name, value in (("bos", 2), ("eos", 1), ("unk", 3), ("pad", 0)):
        getattr(writer, f"add_{name}_token_id")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name != "lm_head.weight":
            plus = 1 if "norm" in name else 0
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), (value + plus).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def pico_gemma() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(SPECIALS) + len(USERS) + 256 + len(PIECES), hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32, query_pre_attn_scalar=32,
        sliding_window=16, max_position_embeddings=256,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).to(torch.bfloat16).float()
    for name, value in model.named_parameters():
        if "norm" in name:
            value.data.normal_(0, 0.5).copy_(value.data.to(torch.bfloat16))
    return model.eval()


def test_a_gguf_file_becomes_the_same_model(recipe: Any, tmp_path: Path, pico_gemma: Any) -> None:
    from transformers import AutoModelForCausalLM

    file = gguf_file(tmp_path, pico_gemma)
    (tmp_path / "out").mkdir()
    recipe("gguf_gemma3").convert(file, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, pico_gemma(ids).logits, rtol=1e-3, atol=1e-3)
    assert again.generation_config.eos_token_id == [1, SPECIALS.index("<end_of_turn>")]


def test_its_tokenizer_merges_by_score_and_writes_turns(recipe: Any, tmp_path: Path, pico_gemma: Any) -> None:
    from transformers import AutoTokenizer

    file = gguf_file(tmp_path, pico_gemma)
    (tmp_path / "out").mkdir()
    recipe("gguf_gemma3").convert(file, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("abc ab  a\n\n\nd") == ["a", "bc", "▁ab", "▁▁", "a", "\n\n", "\n", "<0x64>"]
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id == 2
    assert tokenizer.decode(tokenizer("abc ab  a\n\n\nd").input_ids, skip_special_tokens=True) == "abc ab  a\n\n\nd"
    chat = [{"role": "user", "content": " ab "}, {"role": "assistant", "content": "c"}]
    begun = "<bos><start_of_turn>user\nab<end_of_turn>\n<start_of_turn>model\n"
    assert tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True) == begun
    assert tokenizer.apply_chat_template(chat, tokenize=False) == f"{begun}c<end_of_turn>\n"
    with pytest.raises(Exception, match="Turns must be user and assistant in turn"):
        tokenizer.apply_chat_template(chat[1:], tokenize=False)


@pytest.mark.slow
def test_a_step_of_training_gives_an_adapter_that_is_read(recipe: Any, tmp_path: Path, pico_gemma: Any) -> None:
    from requant.adapters import peft_directory

    file = gguf_file(tmp_path, pico_gemma)
    for name in ("base", "nf4", "texts"):
        (tmp_path / name).mkdir()
    recipe("gguf_gemma3").convert(file, tmp_path / "base")
    recipe("prepare").make_nf4(tmp_path / "base", tmp_path / "nf4")
    for name, side in (("train", "train"), ("heldout", "heldout")):
        rows = recipe("problems").chats(4, side)
        (tmp_path / "texts" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, RECIPE / "train.py", "--base", tmp_path / "nf4", "--data", tmp_path / "texts"]
    (tmp_path / "general.jsonl").write_text(json.dumps({"text": "a small town by the sea. " * 120}) + "\n")
    command += ["--out", tmp_path / "adapter", "--batch=2", "--epochs=1", "--solve=1", "--device=cpu", "--rank=4"]
    command += ["--general", tmp_path / "general.jsonl", "--loss-on=chats"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "adapter" / "training.json").read_text())
    assert told["steps"] == 2
    first, last = told["heldout_perplexity"]
    assert first.keys() == last.keys() == {"answers", "chats", "general"}
    assert all(first[kind] != last[kind] for kind in first)
    assert told["answers_after"].keys() == {"solved", "ended"}
    adapter = peft_directory.load(tmp_path / "adapter")
    assert len(adapter.folds) == 14  # seven linear layers of two blocks
