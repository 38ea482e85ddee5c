"""`requant.run.prepare`: what is known before a weight is read, and that none is read."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.e2e import copied, edit_json, edit_tensors, recipe, texts, write_rows

from requant.adapters import peft_directory
from requant.checkpoint import device_loader, reader
from requant.checkpoint.reader import Checkpoint, TensorInfo
from requant.data import documents, packing, tokenizer
from requant.deploy import conversion, gguf_export
from requant.errors import InputError
from requant.formats.registry import FORMATS
from requant.merge import packed_parts
from requant.run import disk_space, output_formats, prepare
from requant.run.prepared import Prepared


def prepared(project: Path, changes: dict[str, Any] | None = None) -> Prepared:
    return prepare.prepare(recipe(project, Path("runs"), changes))


def test_no_weight_is_read(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the quant_state JSON of packed weights, a few hundred bytes each."""
    seen: list[str] = []
    read = reader.read_tensor

    def watched(info: TensorInfo) -> torch.Tensor:
        seen.append(info.name)
        return read(info)

    for module in (peft_directory, reader, packed_parts, device_loader):
        monkeypatch.setattr(module, "read_tensor", watched)
    prepared(project)
    assert len(seen) == 14
    assert all("quant_state" in name for name in seen)


def test_a_download_is_told_of_hub_ids_alone(project: Path, tmp_path: Path) -> None:
    """Local directories are read, which nobody waits for."""
    said: list[str] = []
    prepare.prepare(recipe(project, Path("runs")), said.append)
    assert said[0].startswith("headers of ")
    assert not [line for line in said if "hub" in line or "download" in line]

    def stop(line: str) -> None:
        raise InterruptedError(line)

    asked = recipe(project, Path("runs"), {"base.original": "owner/base", "adapter": "owner/adapter"})
    with pytest.raises(
        InterruptedError, match=r"downloads from the hub what is not here of owner/adapter, owner/base$"
    ):
        prepare.prepare(asked, stop)


def test_the_disk_needed_is_what_the_run_still_writes(project: Path, finished: Path, tmp_path: Path) -> None:
    need, free = disk_space.check_disk(prepared(project), tmp_path / "new")
    written = sum(info.nbytes for name in ("merged", "gptq") for info in Checkpoint(finished / name).values())
    assert need == written
    assert free > need
    assert disk_space.check_disk(prepared(project), finished)[0] == 0, "a finished run needs no more"


@pytest.mark.skipif(find_spec("gptqmodel") is None, reason="gptqmodel is not installed")
def test_the_disk_that_gptqmodel_works_on_is_needed_too(project: Path, finished: Path, tmp_path: Path) -> None:
    """Its checkpoint, and the model that it unloads meanwhile."""
    plain, _ = disk_space.check_disk(prepared(project), tmp_path / "new")
    need, _ = disk_space.check_disk(prepared(project, {"evaluate.roads": ["gptqmodel"]}), tmp_path / "new")
    assert need - plain == plain, "as large as merged and gptq"


def test_the_disk_needed_by_each_format_is_what_a_conversion_writes(
    project: Path, finished: Path, tmp_path: Path
) -> None:
    """To the byte, but GGUF's header and the padding between its tensors."""
    layout = prepared(project).quantize.plan
    for name in set(FORMATS) - {"gptq"}:
        conversion.convert(finished / "gptq", tmp_path / name, name)
        written = sum(info.nbytes for info in Checkpoint(tmp_path / name).values())
        assert output_formats.stored_bytes(layout, name) == written, name
    done = gguf_export.export(finished / "gptq", tmp_path / "gguf")
    assert output_formats.stored_bytes(layout, "gguf") == done.nbytes[1]


def test_the_plan_is_what_the_run_writes(project: Path, finished: Path) -> None:
    plan = prepared(project)
    for name, slots in (("merged", plan.merge.plan.slots(torch.float32)), ("gptq", plan.quantize.plan.slots)):
        written = {n: (i.dtype, i.shape) for n, i in Checkpoint(finished / name).items()}
        assert {s.name: (s.dtype, s.shape) for s in slots} == written


# --- settings ---


def test_overrides_choose_the_grid_and_the_last_match_wins(project: Path) -> None:
    overrides = {
        "*.mlp.*": {"bits": 8},
        "*.1.mlp.down_proj": {"group_size": 64},
        "*.0.self_attn.o_proj": {"skip": True},
    }
    plan = prepared(project, {"quantize.overrides": overrides})
    grids = {n.removeprefix("model.layers."): (g.bits, g.group_size) for n, g in plan.quantize.plan.grids.items()}
    assert grids["0.mlp.up_proj"] == grids["0.mlp.down_proj"] == (8, 32)
    assert grids["1.mlp.down_proj"] == (4, 64)
    assert grids["0.self_attn.q_proj"] == (4, 32)
    assert plan.quantize.plan.left == ("model.layers.0.self_attn.o_proj",)
    assert len(grids) == 13
    assert any("transformers does not load this: it ignores settings of single modules" in w for w in plan.warnings)


def test_the_serving_dtype_is_the_bases_own_unless_asked(project: Path, tmp_path: Path) -> None:
    assert prepared(project).quantize.dtype == torch.bfloat16
    assert prepared(project, {"quantize.dtype": "float16"}).quantize.dtype == torch.float16
    mine = copied(project, tmp_path / "p", "base")
    edit_json(mine / "base" / "config.json", dtype="float16")
    assert prepared(mine).quantize.dtype == torch.float16


def test_damp_auto_is_left_to_the_quantizer(project: Path) -> None:
    assert prepared(project).quantize.settings.damp is None
    assert prepared(project, {"quantize.damp": 0.02}).quantize.settings.damp == 0.02


def test_a_16_bit_base_is_simulated_as_the_recipe_says(project: Path, tmp_path: Path) -> None:
    nf4 = {"quant_type": "nf4", "double_quant": True}
    plan = prepared(project, {"base": {"model": "./original", "nf4": nf4}})
    kinds = {w.kind for n, w in plan.merge.plan.base.weights.items() if "_proj" in n}
    assert kinds == {"simulated"}
    assert plan.merge.plan.base.weights["lm_head.weight"].kind == "stored"
    assert plan.sources.original == plan.sources.base, "the 16-bit base is the original too"
    as_stored = prepared(project).merge.plan.base.read("model.layers.0.mlp.up_proj.weight")
    assert torch.equal(plan.merge.plan.base.read("model.layers.0.mlp.up_proj.weight"), as_stored)


def test_merging_onto_the_original(project: Path) -> None:
    plan = prepared(project, {"merge.onto": "original"})
    assert plan.merge.plan.base.checkpoint.path == project / "original"
    assert {w.kind for w in plan.merge.plan.base.weights.values()} == {"stored"}


# --- calibration and evaluation texts ---


def test_calibration_depends_on_the_seed_and_on_nothing_else(project: Path) -> None:
    first, again, other = (prepared(project, {"calibration.seed": seed}) for seed in (0, 0, 1))
    assert first.texts.calibration.shape == (8, 64)
    assert first.texts.calibration.dtype == torch.int64
    assert torch.equal(first.texts.calibration, again.texts.calibration)
    assert not torch.equal(first.texts.calibration, other.texts.calibration)
    assert (
        first.texts.calibration_facts["digest"]
        == again.texts.calibration_facts["digest"]
        == packing.digest(first.texts.calibration)
    )
    assert first.texts.calibration_facts["digest"] != other.texts.calibration_facts["digest"]


def test_a_mix_takes_its_shares(project: Path, tmp_path: Path) -> None:
    digits = [{"text": "7" * 3000}]
    write_rows(tmp_path / "digits.jsonl", digits)
    mix = [
        {"data": {"path": "./train.jsonl"}, "share": 3.0},
        {"data": {"path": str(tmp_path / "digits.jsonl")}, "share": 1.0},
    ]
    plan = prepared(project, {"calibration": {"mix": mix, "samples": 8, "length": 64}})
    seven = tokenizer.load(plan.sources.base, plan.sources.adapter)("7")["input_ids"][0]
    assert (
        sorted(bool((row == seven).float().mean() > 0.9) for row in plan.texts.calibration) == [False] * 6 + [True] * 2
    )
    assert plan.texts.calibration_facts["data"] == ["train.jsonl", "digits.jsonl"], "names, no local paths"


def test_overlap_is_measured_and_warned_of(project: Path, tmp_path: Path) -> None:
    """Every run of 13 tokens is looked for in the calibration windows, as text."""
    held, seen = texts()["heldout"], texts()["train"]
    write_rows(tmp_path / "leaky.jsonl", [{"text": t} for t in [*held[:18], *seen[:6]]])
    path = str(tmp_path / "leaky.jsonl")
    changes = {"evaluate.sets": [{"name": "leaky", "data": {"path": path}}], "calibration.samples": 130}
    plan = prepared(project, changes)
    spelt = [",".join(map(str, row)) + "," for row in plan.texts.calibration.tolist()]
    windows = [w.ids.tolist() for s in plan.texts.sets for w in s.windows]
    runs = ["," + "".join(f"{t}," for t in ids[i : i + 13]) for ids in windows for i in range(len(ids) - 12)]
    found = sum(any(run in "," + row for row in spelt) for run in runs) / len(runs)
    assert plan.texts.calibration_facts["overlap"]["leaky"] == pytest.approx(found, abs=1e-9)
    assert 0.05 < found < 0.5, "of the six documents that were seen, what the windows drew"
    assert any(
        "13-token runs of set leaky are in the calibration text: its loss is understated" in w for w in plan.warnings
    )
    clean = prepared(project)
    assert clean.texts.calibration_facts["overlap"]["general"] == 0
    assert not any("general" in w for w in clean.warnings)


def test_document_tokens_and_tokens_cut_the_set(project: Path) -> None:
    sets = [{"name": "s", "data": {"path": "./heldout.jsonl"}, "document_tokens": 20, "tokens": 100}]
    (s,) = prepared(project, {"evaluate.sets": sets}).texts.sets
    assert (s.n_documents, s.n_scored, s.bos) == (6, 6 * 19, False)
    sets[0]["data"]["documents"] = 3  # type: ignore[index]
    (s,) = prepared(project, {"evaluate.sets": sets}).texts.sets
    assert s.n_documents == 3


def test_completions_are_scored_and_prompts_are_not(project: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "qa.jsonl", [{"prompt": f"What is {i}? ", "completion": f"{i}!"} for i in range(20)])
    source = {"path": str(tmp_path / "qa.jsonl")}
    sets = [{"name": n, "data": source, "score": n} for n in ("all", "completion")]
    whole, answers = prepared(project, {"evaluate.sets": sets}).texts.sets
    made = tokenizer.load(project / "base", project / "adapter")
    assert answers.n_scored < whole.n_scored
    for window in answers.windows:
        text = made.decode(window.ids[window.scored])
        assert text.endswith("!")
        assert "What" not in text
    assert answers.n_bytes == sum(len(f"{i}!") for i in range(20))


def test_the_adapters_own_tokenizer_comes_first(project: Path, tmp_path: Path) -> None:
    mine = copied(project, tmp_path / "p", "adapter")
    for file in (project / "base").glob("tokenizer*"):
        (mine / "adapter" / file.name).write_bytes(file.read_bytes())
    raw = json.loads((mine / "adapter" / "tokenizer.json").read_text())
    raw["model"]["merges"] = []
    (mine / "adapter" / "tokenizer.json").write_text(json.dumps(raw))
    plan = prepared(mine)
    longer, shorter = (len(tokenizer.load(plan.sources.base, a)("the import statement")["input_ids"])
                       for a in (plan.sources.adapter, project / "adapter"))  # fmt: skip
    assert longer == len("the import statement") > shorter


# --- reading texts: what a user's files hold ---


def rows(file: Path) -> list[Any]:
    return [dict(row) for row in documents.read_rows(documents.TextSource(path=file))]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_jsonl_lines_end_at_newlines_only(tmp_path: Path, separator: str) -> None:
    """JSON may hold U+2028 and U+0085 unescaped (RFC 8259, section 7).

    json.dumps(ensure_ascii=False) writes them so.
    """
    wanted = [{"text": f"one{separator}two"}, {"text": "three"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in wanted]
    (tmp_path / "t.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert rows(tmp_path / "t.jsonl") == wanted


def test_csv_fields_may_hold_newlines(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('text,n\n"def f():\n    return 1\n",1\nplain,2\n', encoding="utf-8")
    assert rows(tmp_path / "t.csv") == [{"text": "def f():\n    return 1\n", "n": "1"}, {"text": "plain", "n": "2"}]


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n', encoding="utf-8-sig")
    (tmp_path / "t.csv").write_text("text\na\n", encoding="utf-8-sig")
    assert rows(tmp_path / "t.jsonl") == rows(tmp_path / "t.csv") == [{"text": "a"}]


def test_parquet_json_and_txt(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    wanted = [{"text": "one"}, {"text": "two\nlines"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(wanted), tmp_path / "t.parquet")
    (tmp_path / "t.json").write_text(json.dumps(wanted))
    (tmp_path / "t.txt").write_text("one\n\ntwo\n")
    assert rows(tmp_path / "t.parquet") == rows(tmp_path / "t.json") == wanted
    assert rows(tmp_path / "t.txt") == [{"text": "one\n\ntwo\n"}]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.jsonl", b'{"text": "a"}\n{"text": \n', r"t\.jsonl:2: not valid JSON"),
        ("t.jsonl", b'"just a string"\n', r"t\.jsonl:1: expected objects with columns, found str"),
        ("t.jsonl", b"\n\n", "holds no rows"),
        ("t.jsonl", b'{"text": ""}\n', "every row is empty"),
        ("t.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "row 2 is not a text row"),
        ("t.txt", b"\xff\xfe\x00", "cannot be read"),
        ("t.parquet", b"PAR1 not really", "cannot be read"),
    ],
)
def test_unreadable_texts(project: Path, tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"^\S+: calibration\.data\.path: .*{says}"):
        prepared(project, {"calibration.data.path": str(tmp_path / name)})


def test_what_is_wrong_with_a_text_names_line_and_key(project: Path, tmp_path: Path) -> None:
    """Of each section that names texts; a hub dataset that cannot be had is one of them."""
    (tmp_path / "bad.jsonl").write_text("[]\n")
    mix = [{"data": {"path": "./train.jsonl"}}, {"data": {"dataset": "requant/no-such-dataset"}}]
    bad = {"path": str(tmp_path / "bad.jsonl")}
    for changes, key, says in (
        (
            {"calibration": {"mix": mix, "samples": 8, "length": 64}},
            "calibration.mix.1.data.dataset",
            "dataset requant/",
        ),
        ({"evaluate.sets.1.data": bad}, "evaluate.sets.1.data.path", "bad.jsonl: holds no rows"),
        ({"heal": {"steps": 2, "batch": 2, "length": 64, "data": bad}}, "heal.data.path", "bad.jsonl: holds no rows"),
    ):
        with pytest.raises(InputError) as error:
            prepared(project, changes)
        file, _, rest = str(error.value).partition(": ")
        assert re.fullmatch(r"recipe\.yaml:\d+", file.rpartition("/")[2])
        assert rest.startswith(f"{key}: ")
        assert says in rest


def with_longer_tokenizer(project: Path, out: Path) -> Path:
    """A copy of the project whose adapter brings the base's tokenizer and the token <tool>, id 300."""
    mine = copied(project, out, "adapter")
    for file in (project / "base").glob("tokenizer*"):
        (mine / "adapter" / file.name).write_bytes(file.read_bytes())
    raw = json.loads((mine / "adapter" / "tokenizer.json").read_text())
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": 300, "content": "<tool>"})
    (mine / "adapter" / "tokenizer.json").write_text(json.dumps(raw))
    return mine


def test_of_a_longer_tokenizer_only_the_ids_that_texts_use_count(project: Path, tmp_path: Path) -> None:
    """Official Gemma 3 text models have such a tokenizer; so has a fine-tune with a [PAD] that nothing uses."""
    mine = with_longer_tokenizer(project, tmp_path / "p")
    assert prepared(mine).texts.calibration.max() < 300
    for changes, what in (
        ({"calibration.data.path": str(tmp_path / "uses.jsonl")}, "the calibration text"),
        ({"evaluate.sets.0.data.path": str(tmp_path / "uses.jsonl")}, "evaluation set in-domain"),
    ):
        write_rows(tmp_path / "uses.jsonl", [{"text": t.replace(" ", " <tool> ")} for t in texts()["train"]])
        with pytest.raises(InputError, match=rf"{what} holds token 300 \('<tool>'\), but the model has 300 embeddings"):
            prepared(mine, changes)


def test_resized_embeddings_go_with_the_adapters_tokenizer(project: Path, tmp_path: Path) -> None:
    mine = with_longer_tokenizer(project, tmp_path / "p")
    names = ("model.embed_tokens", "lm_head")
    new = {f"base_model.model.{n}.weight": torch.zeros(304, 64) for n in names}
    edit_tensors(mine / "adapter" / "adapter_model.safetensors", lambda t: t | new)
    edit_json(mine / "adapter" / "adapter_config.json", modules_to_save=["embed_tokens", "lm_head"])
    plan = prepared(mine)
    assert plan.merge.plan.vocab_size == 304
    assert {op.name for op in plan.merge.plan.ops if op.action == "replaced"} == {f"{n}.weight" for n in names}


def test_the_adapter_probe_reads_the_answers_of_chats(project: Path) -> None:
    """Training may have had no loss on questions, on which the adapter then gains nothing."""
    chats = [{"prompt": f"How many are {n} and {n}? " * 3, "completion": f"They are {2 * n}. " * 3} for n in range(40)]
    write_rows(project / "chats.jsonl", chats)
    wanted = recipe(project, Path("runs"), {"calibration.data": {"path": "./chats.jsonl"}, "calibration.samples": 4})
    prepared = prepare.prepare(wanted)
    (rows,) = prepared.texts.probes.values()
    for row in rows:
        assert "They are" in prepared.texts.decode(row.ids[row.counted].tolist())
        assert "How many" not in prepared.texts.decode(row.ids[row.counted].tolist())
