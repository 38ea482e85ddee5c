"""`requant.quantize`: files that transformers loads; the same bytes after an interruption."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico, tiny
from helpers.devices import set_profile
from helpers.quantizing import CPU, GRID, model_dir, run
from helpers.stagewise import assert_compared, led, recorded
from torch import Tensor

from requant.checkpoint.journal import Journal
from requant.checkpoint.reader import Checkpoint, file_digest
from requant.checkpoint.run_directory import sealed
from requant.checkpoint.writer import CheckpointWriter, Slot
from requant.errors import InputError, StageError
from requant.evaluate import variants
from requant.formats import gptq as gptq_format
from requant.formats.registry import load_quantized
from requant.modeling import block_walk, fused_ops, skeleton
from requant.numerics.grid import Grid
from requant.quantize import background_writer, block_quantizer, warmup
from requant.quantize import stage as quantize_module
from requant.quantize.background_writer import JOURNAL
from requant.quantize.plan import Settings, convert, plan
from requant.quantize.solve import solve_group
from requant.quantize.stage import quantize
from requant.runtime import ranks


def ours(source: Path, out: Path) -> Any:
    """The model as `load_quantized` reads it, fp32."""
    sources = variants.VariantSources.of_checkpoint(source, gptq=out)
    return variants.load("gptq", sources, device=CPU, dtype=torch.float32)


def test_the_written_weights_are_on_their_grid(tmp_path: Path) -> None:
    source = model_dir(tmp_path)
    layout, results = run(source, tmp_path / "out")
    written = Checkpoint(tmp_path / "out")
    before = Checkpoint(source)
    assert set(written) == {s.name for s in layout.slots}
    assert len(layout.grids) == len(results) == 14
    for name, weight in load_quantized(tmp_path / "out"):
        module = name.removesuffix(".weight")
        if module not in layout.grids:
            assert torch.equal(weight, before.read(name)), name
            continue
        scale = written.read(f"{module}.scales").float().T.repeat_interleave(32, dim=1)
        codes = weight / scale
        assert torch.equal(codes, codes.round()), name
        assert (int(codes.min()) >= -8, int(codes.max()) <= 7) == (True, True)
        assert torch.equal(scale.bfloat16().float(), scale), "scales are exact in bfloat16 too"
        error = weight - before.read(name).float()
        assert float(error.norm() / before.read(name).float().norm()) < 0.25
    assert layout.bits_per_weight == pytest.approx(4 + 20 / 32 + 32 / 64, abs=0.5)


def test_errors_are_reported_and_below_round_to_nearest(tmp_path: Path) -> None:
    _, results = run(model_dir(tmp_path), tmp_path / "out")
    assert [r.name for r in results][:4] == [f"model.layers.0.self_attn.{n}_proj" for n in "qkvo"]
    assert sum(r.relative_error < r.rtn_error for r in results) >= 13
    assert all(0 < r.relative_error < 0.2 for r in results)
    assert {r.damp for r in results} == {0.05}, "256 tokens are fewer than 16 for each of 64 inputs"
    assert not any(r.fallback for r in results)


def test_the_walk_ends_in_the_quantized_models_own_states(tmp_path: Path) -> None:
    """8 bits lose almost nothing: the file's logits are the model's within rounding."""
    source = model_dir(tmp_path)
    run(source, tmp_path / "out", Settings(grid=Grid(8, 32)))
    expected = pico.logits(pico.reload(source))
    got = pico.logits(ours(source, tmp_path / "out"))
    assert 0 < pico.relative(got, expected) < 0.03


class Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("survived", [1, 2])
@pytest.mark.parametrize("shard", [5 * 10**9, 30_000])
def test_an_interrupted_run_ends_in_the_same_bytes(
    tmp_path: Path, survived: int, shard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_module, "BEHIND", 0)
    source = model_dir(tmp_path, num_hidden_layers=3)
    _, expected = run(source, tmp_path / "whole", max_shard=shard)

    def kill(done: int, _total: int, _note: str) -> None:
        if done == survived:
            raise Killed

    with pytest.raises(Killed):
        run(source, tmp_path / "cut", max_shard=shard, progress=kill)
    assert len(Journal(tmp_path / "cut" / JOURNAL).blocks) == survived
    _, results = run(source, tmp_path / "cut", max_shard=shard)
    assert results == expected
    names = sorted(f.name for f in (tmp_path / "whole").iterdir())
    assert sorted(f.name for f in (tmp_path / "cut").iterdir()) == names
    assert JOURNAL not in names
    for name in names:
        assert file_digest(tmp_path / "cut" / name) == file_digest(tmp_path / "whole" / name), name


@pytest.mark.slow
def test_a_slow_disk_holds_up_no_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are solved while earlier ones are still being written; at the end all are."""
    source = model_dir(tmp_path, num_hidden_layers=5)
    _, expected = run(source, tmp_path / "whole")
    solved, in_time, told = threading.Event(), [], []
    block, sync = block_quantizer.Quantizer.block, CheckpointWriter.sync

    def counted(self: Any, index: int, items: Any) -> None:
        block(self, index, items)
        if index == 4:
            solved.set()

    def slow(self: CheckpointWriter) -> None:
        in_time.append(solved.wait(300))
        sync(self)

    monkeypatch.setattr(block_quantizer.Quantizer, "block", counted)
    monkeypatch.setattr(CheckpointWriter, "sync", slow)
    _, results = run(source, tmp_path / "slow", progress=lambda done, *_: told.append(done))
    assert in_time == [True] * 6
    assert told[-1] == 5
    assert results == expected
    for name in ("model.safetensors", "config.json"):
        assert file_digest(tmp_path / "slow" / name) == file_digest(tmp_path / "whole" / name)


@pytest.mark.slow
def test_what_lies_outside_of_the_blocks_holds_up_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings may still be written when all is solved; the run ends only after them."""
    source = model_dir(tmp_path, num_hidden_layers=3)
    run(source, tmp_path / "whole")
    closing, in_time = threading.Event(), []
    close, rest = background_writer.BackgroundWriter.close, background_writer.BackgroundWriter._write_rest

    def closed(self: Any) -> None:
        threading.Timer(0.3, closing.set).start()
        close(self)

    def slow(self: Any, names: list[str]) -> None:
        if "model.embed_tokens.weight" in names:
            in_time.append(closing.wait(300))
        rest(self, names)

    monkeypatch.setattr(background_writer.BackgroundWriter, "close", closed)
    monkeypatch.setattr(background_writer.BackgroundWriter, "_write_rest", slow)
    run(source, tmp_path / "slow")
    assert in_time == [True]
    assert file_digest(tmp_path / "slow" / "model.safetensors") == file_digest(tmp_path / "whole" / "model.safetensors")


@pytest.mark.slow
def test_a_run_that_ends_early_ends_its_writing_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    rest = background_writer.BackgroundWriter._write_rest

    def slow(self: Any, names: list[str]) -> None:
        time.sleep(0.5)
        rest(self, names)
        ended.append("written")

    def failing(*_: Any) -> None:
        raise StageError("no block")

    monkeypatch.setattr(background_writer.BackgroundWriter, "_write_rest", slow)
    monkeypatch.setattr(block_quantizer.Quantizer, "block", failing)
    with pytest.raises(StageError, match="no block"):
        run(model_dir(tmp_path), tmp_path / "out")
    assert ended == ["written"]


@pytest.mark.slow
@pytest.mark.parametrize("stages", [True, False], ids=["", "a block without stages"])
def test_committed_later_a_block_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: bool) -> None:
    """On a GPU each block is committed while the next one is solved."""
    source, order = model_dir(tmp_path, num_hidden_layers=3), list[str]()
    settings = Settings(grid=GRID) if stages else Settings(grid=GRID, overrides=(("model.layers.1.*", None),))
    _, expected = run(source, tmp_path / "whole", settings)
    block, commit = block_quantizer.Quantizer.block, background_writer.BackgroundWriter.commit

    def begun(self: Any, index: int, items: Any) -> None:
        order.append(f"block {index}")
        block(self, index, items)

    def committed(self: Any, index: int, results: Any) -> None:
        order.append(f"commit {index}")
        commit(self, index, results)

    set_profile(monkeypatch, commits_later=True)
    monkeypatch.setattr(block_quantizer.Quantizer, "block", begun)
    monkeypatch.setattr(background_writer.BackgroundWriter, "commit", committed)
    told: list[int] = []
    _, results = run(source, tmp_path / "later", settings, progress=lambda done, *_: told.append(done))
    assert results == expected
    assert file_digest(tmp_path / "later" / "model.safetensors") == file_digest(
        tmp_path / "whole" / "model.safetensors"
    )
    assert order == ["block 0", "block 1", "commit 0", "block 2", "commit 1", "commit 2"]
    assert told[-1] == 3


def test_on_a_cpu_a_block_is_committed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks take long on a CPU: a killed run must not lose a finished one."""
    order, source = list[str](), model_dir(tmp_path)
    block, commit_block = block_quantizer.Quantizer.block, block_quantizer.Quantizer.commit_block

    def begun(self: Any, index: int, items: Any) -> None:
        order.append(f"block {index}")
        block(self, index, items)

    def committed(self: Any) -> None:
        order.extend(f"block {index} committed" for index, _ in ([self.uncommitted] if self.uncommitted else []))
        commit_block(self)

    monkeypatch.setattr(block_quantizer.Quantizer, "block", begun)
    monkeypatch.setattr(block_quantizer.Quantizer, "commit_block", committed)
    run(source, tmp_path / "out")
    assert order == ["block 0", "block 0 committed", "block 1", "block 1 committed"]


@pytest.mark.slow
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("error", [StageError, RuntimeError, KeyboardInterrupt])
def test_what_is_solved_is_kept_when_the_next_block_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: bool, error: type[BaseException]
) -> None:
    set_profile(monkeypatch, commits_later=later)
    stage = block_quantizer.Quantizer._solve_group

    def failing(self: Any, block: Any, prefix: str, *rest: Any) -> None:
        if prefix.endswith(".2."):
            raise error("here")
        stage(self, block, prefix, *rest)

    monkeypatch.setattr(block_quantizer.Quantizer, "_solve_group", failing)
    with pytest.raises(error, match="here"):
        run(model_dir(tmp_path, num_hidden_layers=3), tmp_path / "out")
    assert len(Journal(tmp_path / "out" / JOURNAL).blocks) == 2


def test_a_blocks_place_in_the_journal_needs_no_tensor_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_profile(monkeypatch, commits_later=True)
    write = CheckpointWriter.write

    def failing(self: Any, name: str, tensor: Tensor) -> None:
        if name == "model.layers.2.self_attn.q_proj.qweight":
            raise StageError("no room")
        write(self, name, tensor)

    monkeypatch.setattr(CheckpointWriter, "write", failing)
    with pytest.raises(StageError, match="no room"):
        run(model_dir(tmp_path, num_hidden_layers=3), tmp_path / "out")
    assert len(Journal(tmp_path / "out" / JOURNAL).blocks) == 2


CHANGED = json.dumps({"sha256": hashlib.sha256(b"[]").hexdigest(), "blocks": '[[{"loss": 2}]]'})


def blocks_of(*blocks: Any) -> str:
    return json.dumps(sealed({"blocks": list(blocks)}))


@pytest.mark.parametrize(
    "content",
    [
        *("", "[", "{}", "[[1]]", "[3]", "[" * 10**5, CHANGED),
        *(blocks_of([]), blocks_of({"results": []}), blocks_of({"results": [1], "checksum": ""}), blocks_of(1)),
    ],
)
def test_a_damaged_journal_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / JOURNAL).write_text(content)
    assert Journal(tmp_path / JOURNAL).blocks == []
    assert not (tmp_path / JOURNAL).exists()


def solved_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]) -> list[int]:
    """Blocks that are solved after a kill behind the second one and damage to what it left; the file is the same."""
    monkeypatch.setattr(quantize_module, "BEHIND", 0)
    source = model_dir(tmp_path, num_hidden_layers=3)

    def kill(done: int, _total: int, _note: str) -> None:
        if done == 2:
            raise Killed

    run(source, tmp_path / "whole")
    with pytest.raises(Killed):
        run(source, tmp_path / "cut", progress=kill)
    damage(tmp_path / "cut" / "model.safetensors")
    solved, block = list[int](), block_quantizer.Quantizer.block

    def counted(self: Any, index: int, items: Any) -> None:
        solved.append(index)
        block(self, index, items)

    monkeypatch.setattr(block_quantizer.Quantizer, "block", counted)
    run(source, tmp_path / "cut")
    one, two = (file_digest(tmp_path / n / "model.safetensors") for n in ("whole", "cut"))
    assert one == two
    return solved


def test_blocks_whose_shard_is_gone_are_solved_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that is laid out anew holds zeros."""
    assert solved_again(tmp_path, monkeypatch, Path.unlink) == [0, 1, 2]


@pytest.mark.parametrize(
    ("tensor", "solved"),
    [
        ("model.layers.1.self_attn.q_proj.qweight", [1, 2]),
        ("model.layers.1.mlp.down_proj.g_idx", [1, 2]),
        ("model.layers.0.input_layernorm.weight", [0, 1, 2]),
        ("model.layers.2.mlp.down_proj.scales", [2]),
    ],
)
def test_blocks_whose_bytes_have_changed_are_solved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: str, solved: list[int]
) -> None:
    """A flipped bit of an index was an IndexError, one of a code another checkpoint without a word."""

    def flip(file: Path) -> None:
        info = Checkpoint(file.parent)[tensor]
        with file.open("r+b") as handle:
            handle.seek(info.offset + info.nbytes - 1)
            byte = handle.read(1)[0]
            handle.seek(-1, 1)
            handle.write(bytes([byte ^ 0x80]))

    assert solved_again(tmp_path, monkeypatch, flip) == solved


def test_a_journal_notes_no_block_after_one_that_is_missing(tmp_path: Path) -> None:
    with (
        CheckpointWriter(tmp_path, []) as writer,
        pytest.raises(StageError, match="block 1 cannot follow 0 blocks"),
    ):
        Journal(tmp_path / JOURNAL).commit(1, writer, [], [], [])


def test_a_rank_that_is_not_finite_stops_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank's output is finite, another's is not: all stop."""
    monkeypatch.setattr(ranks.Ranks, "all", lambda *_: False)
    with pytest.raises(StageError, match=r"model.layers.0: its output holds NaN or infinity"):
        run(model_dir(tmp_path), tmp_path / "out")


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("index", [0, 1])
def test_an_output_that_is_not_finite_stops_the_run_and_names_its_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: int, later: bool
) -> None:
    """Also if the next block has already started on that output."""
    set_profile(monkeypatch, commits_later=later)
    source = pico.save(pico.model(), tmp_path / "merged", torch.float32)
    name = f"model.layers.{index}.mlp.down_proj.weight"
    pico.edit_tensors(source / "model.safetensors", change={name: lambda t: t * 1e38})
    with pytest.raises(
        StageError, match=rf"model.layers.{index}: its output holds NaN or infinity on the calibration text"
    ):
        run(source, tmp_path / "out")
    journal = tmp_path / "out" / JOURNAL
    assert len(Journal(journal).blocks) == index


@pytest.mark.slow
def test_a_disk_too_slow_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of blocks that a kill would lose is limited."""
    source = model_dir(tmp_path, num_hidden_layers=4)
    monkeypatch.setattr(quantize_module, "BEHIND", 1)
    blocks: list[int] = []
    finished: list[int] = []
    block, commit = block_quantizer.Quantizer.block, Journal.commit

    def counted(self: Any, index: int, items: Any) -> None:
        block(self, index, items)
        blocks.append(index)

    def slow(self: Journal, *args: Any) -> None:
        time.sleep(0.3)
        finished.append(len(blocks) - 1 - len(self.blocks))
        commit(self, *args)

    monkeypatch.setattr(block_quantizer.Quantizer, "block", counted)
    monkeypatch.setattr(Journal, "commit", slow)
    run(source, tmp_path / "out")
    assert len(finished) == 4
    assert max(finished) <= 2, "solved beyond the one that is being brought to the disk"


def test_killed_before_the_first_block_starts_anew(tmp_path: Path) -> None:
    source = model_dir(tmp_path)
    run(source, tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"half a header")
    run(source, tmp_path / "cut")
    assert file_digest(tmp_path / "cut" / "model.safetensors") == file_digest(tmp_path / "whole" / "model.safetensors")


def test_batch_size_hardly_matters(tmp_path: Path) -> None:
    """Sums of the same outer products in another order."""
    source, steps = model_dir(tmp_path), {}  # type: ignore[var-annotated]
    settings = Settings(grid=GRID, order="activation")
    run(source, tmp_path / "a", settings, batch=1, function=recorded, steps=steps)
    _, compared = run(source, tmp_path / "b", settings, batch=8, function=led, steps=steps)
    assert_compared(compared, 8)


LOADS = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    "gpt_neox": {},
    "opt": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LOADS)
def test_every_architecture_is_quantized(tmp_path: Path, case: str) -> None:
    """Biases, tied heads, fused projections, parallel blocks: 8 bits keep the logits."""
    source = model_dir(tmp_path, case.split()[0], **LOADS[case])
    layout, _ = run(source, tmp_path / "out", Settings(grid=Grid(8, 32)))
    assert not layout.left
    assert pico.relative(pico.logits(ours(source, tmp_path / "out")), pico.logits(pico.reload(source))) < 0.03
    assert ("lm_head.weight" in Checkpoint(tmp_path / "out")) == ("lm_head.weight" in Checkpoint(source))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "grid"),
    [
        ("llama", GRID),
        ("llama", Grid(4, 64, signed=True)),
        ("llama", Grid(4, -1, symmetric=False)),
        ("llama", Grid(8, 32)),
        ("qwen2", GRID),
    ],
    ids=["4 bit", "signed", "asymmetric", "8 bit", "biases"],
)
@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_it_with_our_numbers(tmp_path: Path, kind: str, grid: Grid) -> None:
    """gptqmodel and optimum read the file as meant: fp32 logits differ by the order of sums."""
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    import transformers

    source = model_dir(tmp_path, kind)
    run(source, tmp_path / "out", Settings(grid=grid))
    # The plain torch kernel: the one chosen by itself on a CPU multiplies in int4 with a 16-bit accumulator.
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        device_map={"": "cpu"},
        dtype=torch.float32,
        quantization_config=transformers.GPTQConfig(bits=grid.bits, backend="gptq_torch"),
    ).eval()
    assert not any(type(m) is torch.nn.Linear for m in skeleton_blocks(loaded).modules()), "really quantized modules"
    # It forms scale * (code - zero) in float16: exact for |code - zero| <= 8 with the 8-bit mantissas of our scales,
    # else rounded to 11 bits.
    bound = 1e-5 if grid.bits == 4 and grid.symmetric else 2**-10
    assert pico.relative(pico.logits(loaded), pico.logits(ours(source, tmp_path / "out"))) < bound


def skeleton_blocks(made: Any) -> Any:
    from requant.modeling.blocks import block_list

    return block_list(made)[1]


def test_overrides_and_what_the_config_says(tmp_path: Path) -> None:
    source = model_dir(tmp_path)
    overrides = (("*.down_proj", {"bits": 8, "group_size": 64}), ("model.layers.0.self_attn.o_proj", None))
    layout, results = run(source, tmp_path / "out", Settings(grid=GRID, overrides=overrides), meta={"tool": "requant"})
    assert layout.left == ("model.layers.0.self_attn.o_proj",)
    assert {r.name: (r.bits, r.group_size) for r in results if r.bits == 8} == {
        f"model.layers.{i}.mlp.down_proj": (8, 64) for i in (0, 1)
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    q = config["quantization_config"]
    assert q == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert (q["bits"], q["group_size"], q["sym"], q["desc_act"], q["lm_head"]) == (4, 32, True, False, False)
    assert (q["quant_method"], q["checkpoint_format"], q["meta"]) == ("gptq", "gptq", {"tool": "requant"})
    assert 0 < q["damp_percent"] < 1
    assert q["dynamic"] == {
        r"-:^model\.layers\.0\.self_attn\.o_proj$": {},
        r"+:^model\.layers\.0\.mlp\.down_proj$": {"bits": 8, "group_size": 64, "sym": True},
        r"+:^model\.layers\.1\.mlp\.down_proj$": {"bits": 8, "group_size": 64, "sym": True},
    }
    assert config["dtype"] == "float16"
    assert (tmp_path / "out" / "generation_config.json").exists()
    written = Checkpoint(tmp_path / "out")
    kept = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(written.read(kept), Checkpoint(source).read(kept))
    assert written["model.layers.0.mlp.down_proj.qweight"].shape == (128 * 8 // 32, 64)
    stored = dict(load_quantized(tmp_path / "out"))
    assert stored["model.layers.1.mlp.down_proj.weight"].shape == (64, 128)


def test_everything_skipped_in_one_block(tmp_path: Path) -> None:
    source = model_dir(tmp_path)
    layout, results = run(source, tmp_path / "out", Settings(grid=GRID, overrides=(("model.layers.0.*", None),)))
    assert len(layout.left) == len(results) == 7
    assert pico.logits(ours(source, tmp_path / "out")).isfinite().all()


def test_everything_skipped_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no linear is left to quantize: all 14 .*by quantize\.overrides"):
        run(model_dir(tmp_path), tmp_path / "out", Settings(grid=GRID, overrides=(("*", None),)))
    assert not list((tmp_path / "out").iterdir()), "known from headers: nothing was written"


def test_a_group_that_does_not_divide_is_refused_by_name(tmp_path: Path) -> None:
    source = model_dir(tmp_path, hidden_size=96, num_attention_heads=6)
    with pytest.raises(InputError) as caught:
        run(source, tmp_path / "out", Settings(grid=Grid(4, 128)))
    message = str(caught.value)
    assert "12 linears cannot be quantized as asked" in message
    assert "model.layers.0.self_attn.q_proj: group_size 128 does not divide its 96 inputs; use 32 or -1" in message
    assert not list((tmp_path / "out").iterdir()), "known from headers: nothing was written"


def test_a_model_without_linears_is_refused(tmp_path: Path) -> None:
    made = torch.nn.Module()
    made.blocks = torch.nn.ModuleList([torch.nn.LayerNorm(4)])
    with pytest.raises(InputError, match=r"Module cannot be quantized: its blocks hold no Linear"):
        plan({}, made, Settings(grid=GRID), torch.float16, where=tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "quantized", "stays"),
    [
        (  # 32 value heads: a and b have sizes that could be packed, engines hold them in 16 bit
            "qwen3_5_text", {"linear_num_value_heads": 32}, {"linear_attn.in_proj_qkv", "linear_attn.in_proj_z"},
            {"linear_attn.in_proj_b", "linear_attn.in_proj_a"},
        ),
        ("qwen3_5_text", {"linear_value_head_dim": 12}, set(), {"linear_attn.in_proj_qkv", "linear_attn.in_proj_z"}),
        ("deepseek_v3", {}, {"self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"}, set()),
        ("deepseek_v3", {"kv_lora_rank": 24}, set(), {"self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"}),
        ("afmoe", {"num_experts": 32}, {"self_attn.q_proj"}, {"mlp.router.gate"}),
    ],
)  # fmt: skip
def test_what_engines_fuse_is_quantized_or_left_together(
    tmp_path: Path, kind: str, changes: dict[str, Any], quantized: set[str], stays: set[str]
) -> None:
    made = skeleton.build(tiny.config(kind, **changes), split=True)
    stored = {name: Slot(name, torch.bfloat16, tuple(p.shape)) for name, p in made.named_parameters()}
    planned = plan(stored, made, Settings(grid=GRID), torch.float16, where=tmp_path)
    of_kind = {re.sub(r".*?layers\.\d+\.", "", name) for name in planned.grids}
    left = {re.sub(r".*?layers\.\d+\.", "", name) for name in planned.left}
    assert quantized <= of_kind
    assert stays <= left
    assert not stays & of_kind


@pytest.mark.parametrize("order", ["activation", "auto"])
def test_nan_activations_stop_the_run(tmp_path: Path, order: Any) -> None:
    source = model_dir(tmp_path)
    name = "model.layers.1.input_layernorm.weight"
    pico.edit_tensors(source / "model.safetensors", change={name: lambda t: t * float("nan")})
    with pytest.raises(StageError, match=r"model.layers.1.self_attn.q_proj: its calibration inputs hold NaN"):
        run(source, tmp_path / "out", Settings(grid=GRID, order=order))


def test_unquantized_tensors_that_do_not_fit_the_serving_dtype(tmp_path: Path) -> None:
    source = pico.save(pico.model(), tmp_path / "merged", torch.float32)
    pico.edit_tensors(source / "model.safetensors", change={"lm_head.weight": lambda t: t * 1e9})
    with pytest.raises(StageError, match=r"lm_head.weight does not fit float16: set quantize.dtype to bfloat16"):
        run(source, tmp_path / "out")


def test_the_plan_is_the_file(tmp_path: Path) -> None:
    """The plan that `requant check` makes from headers is what is written."""
    source = model_dir(tmp_path)
    made = skeleton.open_model(source)
    promised = plan(Checkpoint(source), made, Settings(grid=GRID), torch.bfloat16, where=source)
    run(source, tmp_path / "out", dtype=torch.bfloat16)
    written = Checkpoint(tmp_path / "out")
    assert {s.name: (s.dtype, s.shape) for s in promised.slots} == {n: (i.dtype, i.shape) for n, i in written.items()}
    shapes = gptq_format.shapes(64, 128, 4, 32)
    assert written["model.layers.0.mlp.down_proj.qzeros"].shape == shapes["qzeros"][0]


def test_load_quantized_refuses_other_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"quant_method is None, expected one of gptq, compressed-tensors"):
        list(load_quantized(model_dir(tmp_path)))


def test_the_last_matching_override_wins() -> None:
    settings = Settings(grid=GRID, overrides=(("*", {"bits": 8}), ("*.o_proj", None), ("a.*", {"group_size": 64})))
    assert settings.grid_of("b.q_proj") == Grid(8, 32)
    assert settings.grid_of("b.o_proj") is None
    assert settings.grid_of("a.o_proj") == Grid(4, 64)


@pytest.mark.slow
@pytest.mark.parametrize("by_drift", [False, True])
@pytest.mark.parametrize("overrides", [(), (("*.q_proj", {"bits": 8}),)])  # one grid a stage; two
def test_correcting_keeps_the_model_closer_to_itself(
    tmp_path: Path, overrides: Any, by_drift: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer makes up for part of the earlier error: last hidden states end nearer."""
    set_profile(monkeypatch, corrects_by_drift=by_drift)
    source = model_dir(tmp_path)
    windows = torch.randint(0, 64, (16, 32), generator=torch.Generator().manual_seed(0))

    def distance(correct: float) -> float:
        out = tmp_path / f"out-{correct}"
        out.mkdir()
        settings = Settings(grid=GRID, order="activation", correct=correct, overrides=overrides)
        quantize(source, out, windows, settings, dtype=torch.float16, device=torch.device("cpu"), batch=4)
        return hidden_error(source, dict(load_quantized(out)), windows)

    assert distance(1.0) < 0.95 * distance(0.0)


def test_kernels_are_waited_for_before_the_first_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    solve = solve_group
    monkeypatch.setattr(warmup.WarmUp, "wait", lambda _: order.append("wait"))
    monkeypatch.setattr(warmup.WarmUp, "wait_all", lambda _: order.append("wait all"))
    monkeypatch.setattr(fused_ops.FusedOps, "use", lambda _: order.append("use"))
    warming, later = warmup.WarmUp, []
    monkeypatch.setattr(quantize_module, "WarmUp", lambda *a, **k: later.append(k["later"]) or warming(*a, **k))
    monkeypatch.setattr(block_quantizer, "solve_group", lambda *a, **k: order.append("solve") or solve(*a, **k))
    run(model_dir(tmp_path), tmp_path / "out")
    stages = order.count("solve") // 2  # of each of two blocks
    assert order == ["wait", "solve"] * stages + ["wait all", "use"] + ["wait", "solve"] * stages
    assert [f.__func__ for f in later] == [fused_ops.FusedOps.try_out]


def test_the_next_block_is_read_once_the_last_stage_has_all_its_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next block is read in the last stage, not in the busy first ones.

    A block without stages is followed by the next one all the same.
    """
    order: list[str] = []
    solve, soon = solve_group, block_walk.Walk.read_soon
    monkeypatch.setattr(block_quantizer, "solve_group", lambda *a, **k: order.append("solve") or solve(*a, **k))
    monkeypatch.setattr(
        block_walk.Walk, "read_soon", lambda self, index: order.append(f"read {index}") or soon(self, index)
    )
    monkeypatch.setattr(block_quantizer, "freeze_garbage_collector", lambda _: order.append("set aside"))
    run(model_dir(tmp_path), tmp_path / "out")
    begun = ["read 0", "read 1"]  # what is read with the embeddings
    first = ["solve"] * 3 + ["read 1", "set aside", "solve", "read 1"]
    assert order == begun + first + ["solve"] * 3 + ["read 2", "solve", "read 2"]


def hidden_error(source: Path, stored: dict[str, Tensor], windows: Tensor) -> float:
    """Relative distance of the last hidden states: a model with `stored` weights and `source`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).model
    with torch.no_grad():
        exact = model(windows).last_hidden_state
        for name, parameter in model.named_parameters():
            parameter.copy_(stored[f"model.{name}"].float())
        return float((model(windows).last_hidden_state - exact).norm() / exact.norm())


@pytest.mark.parametrize("value", [1e9, -1e9, torch.inf, torch.nan])
@pytest.mark.parametrize("at", [0, 7, 15])
def test_one_value_that_does_not_fit_is_enough(value: float, at: int) -> None:
    tensor = torch.ones(4, 4)
    assert torch.equal(convert("w", tensor, torch.float16), tensor.half())
    tensor.view(-1)[at] = value
    with pytest.raises(StageError, match="w does not fit float16"):
        convert("w", tensor, torch.float16)


def test_nothing_and_whole_numbers_always_fit() -> None:
    assert convert("w", torch.ones(0, 4), torch.float16).shape == (0, 4)
    assert convert("w", torch.tensor([1, 2]), torch.int64).tolist() == [1, 2]
