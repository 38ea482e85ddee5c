"""`requant.deploy.stage`: a good checkpoint passes; each damage is found.

By tensor and reason.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico
from helpers.e2e import edit_json, edit_tensors, make_model, one_thread
from helpers.ranks import Turns
from safetensors.torch import load_file, save_file

from requant.checkpoint.reader import INDEX, Checkpoint
from requant.deploy import check_tensors, conversion, own_scores, stage, verification
from requant.errors import InputError, StageError
from requant.formats import gptq as gptq_format
from requant.formats.quantized_format import Finding
from requant.formats.registry import open_quantized
from requant.numerics.grid import Grid
from requant.numerics.solution import checksum
from requant.runtime.ranks import SINGLE_PROCESS

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
WEIGHTS = "model.safetensors"
GRID = Grid(4, 32)


def check(path: Path, **options: object) -> verification.Verification:
    with one_thread():
        return stage.verify(path, **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_good_checkpoint_passes(good: Path, source: Path) -> None:
    done = check(good, source=source)
    assert done.ok, done.message()
    assert done.findings == []
    assert (done.tensors, done.linears) == (2 * (7 * 4 + 2) + 3, 14)
    assert done.relative_error is not None
    assert 0.03 < done.relative_error < 0.2
    assert done.bits_per_weight == pytest.approx(4 + 20 / 32 + 32 / 64, abs=0.5)
    assert done.perplexity is not None
    assert 1 < done.perplexity < 10_000
    assert len(done.generated) == own_scores.NEW_TOKENS
    assert done.sample_tokens > 100
    done.raise_if_wrong()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 5])
def test_ranks_share_the_linears(good: Path, source: Path, tmp_path: Path, count: int) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(good, broken)
    tensor(f"{Q}.qweight", lambda t: t.flip(0))(broken)
    tensor(f"{DOWN}.qweight", lambda t: t.flip(0))(broken)
    tensor("model.norm.weight", lambda t: t * float("nan"))(broken)
    for path in (good, broken):
        one, many = check(path, source=source), check(path, source=source, ranks=Turns(count))
        assert sorted(map(str, many.findings)) == sorted(map(str, one.findings))
        assert (many.linears, many.tensors, many.negative_scales) == (one.linears, one.tensors, one.negative_scales)
        assert (many.relative_error, many.bits_per_weight) == (one.relative_error, one.bits_per_weight)
        assert len(one.findings) == (0 if path is good else 3)


@pytest.mark.slow
def test_a_model_that_does_not_generate_is_told(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever transformers' generate raises for what config.json says."""

    def fails(*_: object, **__: object) -> None:
        raise ValueError("exactly one of input_ids or inputs_embeds")

    monkeypatch.setattr(own_scores, "_generate", fails)
    done = check(good)
    assert not done.ok
    assert "config.json: transformers cannot generate with it: ValueError: exactly one of input_ids" in done.message()


@pytest.mark.slow
def test_the_size_is_what_the_config_describes(good: Path) -> None:
    """Every byte of the files is a tensor the format page asks for, or the header."""
    done = check(good)
    header = int.from_bytes((good / WEIGHTS).read_bytes()[:8], "little") + 8
    assert done.expected_bytes == (good / WEIGHTS).stat().st_size - header
    assert done.disk_bytes == (good / WEIGHTS).stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize(
    "grid",
    [Grid(b, 32, symmetric=s) for b in (2, 3, 4, 8) for s in (True, False)] + [Grid(4, -1), Grid(4, 64, signed=True)],
    ids=str,
)
def test_every_format_passes(source: Path, tmp_path: Path, grid: Grid) -> None:
    pico.packed(source, tmp_path / "out", grid)
    done = check(tmp_path / "out", source=source)
    assert done.ok, done.message()
    assert (done.negative_scales or 0) > 0 if grid.signed else done.negative_scales == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "llama tied", "qwen2", "gemma2", "gpt_neox", "opt"])
def test_every_architecture_passes(tmp_path: Path, kind: str, good: Path) -> None:
    """Biases, tied heads, other prefixes: everything in the file has its place in the model."""
    changes = {"tie_word_embeddings": True} if "tied" in kind else {}
    pico.save(pico.model(kind.split()[0], vocab_size=300, **changes), tmp_path / "model", torch.float16)
    for file in good.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "model")
    pico.packed(tmp_path / "model", tmp_path / "out", GRID)
    done = check(tmp_path / "out", source=tmp_path / "model")
    assert done.ok, done.message()


@pytest.mark.slow
def test_overrides_and_skipped_modules_pass(source: Path, tmp_path: Path) -> None:
    overrides = (("*.down_proj", {"bits": 8, "group_size": 64}), ("*.layers.0.self_attn.o_proj", None))
    pico.packed(source, tmp_path / "out", GRID, overrides=overrides)
    done = check(tmp_path / "out", source=source)
    assert done.ok, done.message()
    assert done.linears == 13


# --- what is broken: (damage, where, reason) ---


def config(path: Path, **changes: object) -> None:
    for name, inside in (("config.json", True), ("quantize_config.json", False)):
        raw = json.loads((path / name).read_text())
        (raw["quantization_config"] if inside else raw).update(changes)
        (path / name).write_text(json.dumps(raw))


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        def edit(tensors: dict[str, torch.Tensor]) -> None:
            out = change(tensors.pop(name))
            if out is not None:
                tensors[name] = out.contiguous()

        edit_tensors(path / WEIGHTS, edit)

    return damage


def put(index: tuple[int, int], value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(t: torch.Tensor) -> torch.Tensor:
        t[index] = value
        return t

    return change


def cut(path: Path) -> None:
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[:-100])


def v2_zeros(path: Path) -> None:
    """Every zero point as format v2 stores it, the config left at v1."""
    edit_tensors(path / WEIGHTS, lambda t: {n: v + 0x11111111 if n.endswith("qzeros") else v for n, v in t.items()})


def extra(path: Path) -> None:
    edit_tensors(path / WEIGHTS, lambda t: t | {"model.layers.0.self_attn.q_norm.weight": torch.zeros(4)})


def unpacked(path: Path) -> None:
    def edit(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weight = gptq_format.dequantize({s: t.pop(f"{Q}.{s}") for s in gptq_format.SUFFIXES}, 4)
        return t | {f"{Q}.weight": weight.half()}

    edit_tensors(path / WEIGHTS, edit)


def stray(path: Path) -> None:
    (path / "consolidated.safetensors").write_bytes((path / WEIGHTS).read_bytes())


def no_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()


def longer_tokenizer(path: Path, token: str = "<tool>") -> None:
    raw = json.loads((path / "tokenizer.json").read_text())
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": 300, "content": token})
    (path / "tokenizer.json").write_text(json.dumps(raw))


def eos_without_a_row(path: Path) -> None:
    longer_tokenizer(path)
    edit_json(path / "tokenizer_config.json", eos_token="<tool>")


BROKEN: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "truncated": (cut, "model.safetensors", r"truncated: .* \('.*' is cut\)"),
    "no header": (lambda p: (p / WEIGHTS).write_bytes(b"\xff" * 64) and None, "model.safetensors", "not a safetensors"),
    "group size": (lambda p: config(p, group_size=64), f"{Q}.qzeros", r"expected \[1, 8\].*groups of 32"),
    "bits": (lambda p: config(p, bits=8), f"{Q}.qweight", r"for 8 bits.*the tensor is 4-bit"),
    "odd bits": (lambda p: config(p, bits=5), "config.json: quantization_config", "bits is 5, expected one of"),
    "method": (lambda p: config(p, quant_method="hqq"), "config.json: quantization_config", "quant_method is 'hqq'"),
    "v2 zeros": (v2_zeros, f"{Q}.qzeros", r"stored the v2 .* says 'gptq': every weight is off by one step"),
    "v2 config": (lambda p: config(p, checkpoint_format="gptq_v2"), f"{Q}.qzeros", r"the v1 .* says 'gptq_v2'"),
    "one zero point": (tensor(f"{Q}.qzeros", put((0, 0), 0x77777776)), f"{Q}.qzeros", r"stores zero point 6, .* 7"),
    "infinite scale": (
        tensor(f"{DOWN}.scales", put((1, 5), float("inf"))), f"{DOWN}.scales",
        r"1 of 256 scales are not finite, the first of group 1, output 5",
    ),
    "zero scale": (tensor(f"{DOWN}.scales", put((0, 3), 0)), f"{DOWN}.scales", "1 of 256 scales are zero"),
    "scales dtype": (tensor(f"{Q}.scales", lambda t: t.float()), f"{Q}.scales", "dtype float32, expected float16"),
    "g_idx": (tensor(f"{Q}.g_idx", lambda t: t.flip(0)), f"{Q}.g_idx", r"is not i // 32, but desc_act is false"),
    "g_idx range": (tensor(f"{Q}.g_idx", lambda t: t + 1), f"{Q}.g_idx", "spans 1 to 2, there are 2 groups"),
    "missing": (tensor(f"{Q}.scales", lambda t: None), f"{Q}.scales", r"missing: expected float16 \[2, 64\]"),
    "missing norm": (tensor("model.norm.weight", lambda t: None), "model.norm.weight", "missing: LlamaForCausalLM"),
    "extra": (extra, "model.layers.0.self_attn.q_norm.weight", "extra: LlamaForCausalLM with this config"),
    "unpacked": (unpacked, f"{Q}.weight", "in 16 bit, the config says that this linear is 4-bit"),
    "norm shape": (
        tensor("model.norm.weight", lambda t: t[:32]), "model.norm.weight", r"shape \[32\], expected \[64\]"
    ),
    "norm nan": (
        tensor("model.norm.weight", lambda t: t * float("nan")), "model.norm.weight", "64 of 64 values are not finite"
    ),
    "stray file": (stray, "consolidated.safetensors", "not named by"),
    "no tokenizer": (no_tokenizer, "tokenizer", "none of tokenizer.json"),
    "eos": (eos_without_a_row, "tokenizer.json", "eos_token '<tool>' has id 300, the embedding has 300 rows"),
    "a token without a row": (
        lambda p: longer_tokenizer(p, "lighthouse"), "tokenizer.json",
        r"the sample holds token 300 \('lighthouse'\), but the model has 300 embeddings: the tokenizer is another",
    ),
    "bitsandbytes": (
        lambda p: config(p, bnb_4bit_quant_type="nf4"), "config.json: quantization_config", "bnb_4bit_quant_type is a leftover"
    ),
    "leftover": (
        lambda p: edit_json(p / "config.json", _pre_quantization_dtype="bfloat16"),
        "config.json: _pre_quantization_dtype", "a leftover of the bitsandbytes base",
    ),
    "local path": (
        lambda p: edit_json(p / "config.json", _name_or_path="/home/ann/models/base"), "config.json: _name_or_path",
        "'/home/ann/models/base' is a path of the machine that made it",
    ),
    "dtype": (lambda p: edit_json(p / "config.json", dtype="float64"), "config.json: dtype", "'float64', expected float16"),
    "a width of nothing": (lambda p: edit_json(p / "config.json", hidden_size=0), f"{Q}.qweight", "expected"),
    "junk behind the tensors": (
        lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes() + b"j" * 64) and None,
        "model.safetensors", "64 bytes behind the last tensor",
    ),
    "bits as a float": (lambda p: config(p, bits=4.0), "config.json: quantization_config", r"bits is 4\.0, expected one of"),
    "true as a group": (lambda p: config(p, group_size=True), "config.json: quantization_config", "group_size is True"),
    "no object": (
        lambda p: edit_json(p / "config.json", quantization_config=[1]), "config.json",
        r"quantization_config is \[1\], expected an object",
    ),
    "dynamic list": (lambda p: config(p, dynamic=[]), "config.json: quantization_config", r"dynamic is \[\], expected pairs"),
    "dynamic bits": (
        lambda p: config(p, dynamic={"+:.*": {"bits": "x"}}), "config.json: quantization_config",
        r"dynamic of '\+:\.\*': bits is 'x', expected one of",
    ),
    "dynamic number": (lambda p: config(p, dynamic={"+:.*": 3}), "config.json: quantization_config", "is 3, expected settings"),
    "dynamic pattern": (lambda p: config(p, dynamic={"[": {}}), "config.json: quantization_config", "no regular expression"),
    "dynamic that never ends": (
        lambda p: config(p, dynamic={"-:([a-z0-9._]+)+!": {}}), "config.json: quantization_config", "takes too long",
    ),
    "length as text": (
        lambda p: edit_json(p / "tokenizer_config.json", model_max_length="x"), "tokenizer.json",
        "transformers cannot load the tokenizer",
    ),
    "tokenizer of another kind": (
        lambda p: edit_json(p / "tokenizer_config.json", tokenizer_class="BertTokenizer"), "tokenizer.json",
        "transformers cannot load the tokenizer",
    ),
    "modules": (
        lambda p: config(p, modules_in_block_to_quantize=3), "config.json: quantization_config",
        "modules_in_block_to_quantize is 3, expected lists",
    ),
    "eos list": (
        lambda p: edit_json(p / "tokenizer_config.json", eos_token=["x"]), "tokenizer_config.json", r"eos_token is \['x'\]"
    ),
    "generation": (
        lambda p: (p / "generation_config.json").write_text("[1]") and None, "generation_config.json",
        "expected a JSON object|transformers cannot read it",
    ),
    "decoder": (
        lambda p: edit_json(p / "tokenizer.json", decoder={"type": "x"}), "tokenizer.json",
        "transformers cannot load the tokenizer",
    ),
    "two configs": (
        lambda p: edit_json(p / "quantize_config.json", group_size=128), "quantize_config.json: group_size",
        "128, config.json says 32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_named(good: Path, tmp_path: Path, case: str) -> None:
    damage, where, reason = BROKEN[case]
    bad = tmp_path / "gptq"
    shutil.copytree(good, bad)
    damage(bad)
    done = check(bad)
    assert not done.ok
    assert str(tmp_path) not in done.findings[0].where
    mine = [f for f in done.findings if f.where.startswith(where)]
    assert mine, done.message()
    assert any(re.search(reason, f.reason) for f in mine), done.message()
    with pytest.raises(StageError, match=re.escape(mine[0].reason[:40])):
        done.raise_if_wrong()


def sharded(source: Path, out: Path) -> Path:
    pico.packed(source, out, GRID, max_bytes=60_000)
    assert len(list(out.glob("*.safetensors"))) > 2
    return out


def test_a_source_that_is_quantized_is_refused(good: Path) -> None:
    with pytest.raises(InputError, match="is quantized itself: compare with the 16-bit model"):
        check(good, source=good)


def test_a_tokenizer_longer_than_the_embedding_passes(good: Path, tmp_path: Path) -> None:
    """That of official Gemma 3 text models is; a fine-tune's [PAD] that no text uses is another."""
    mine = Path(shutil.copytree(good, tmp_path / "longer"))
    longer_tokenizer(mine)
    assert stage.verify(mine).findings == []


@pytest.mark.slow
def test_shards_pass_and_swapped_ones_do_not(source: Path, tmp_path: Path) -> None:
    out = sharded(source, tmp_path / "out")
    assert check(out).ok
    files = sorted(out.glob("*.safetensors"))
    first, second = files[0].read_bytes(), files[1].read_bytes()
    files[0].write_bytes(second)
    files[1].write_bytes(first)
    done = check(out)
    assert [f.where for f in done.findings] == [INDEX]
    assert "tensors are not in the shards it names, e.g. '" in done.findings[0].reason


def test_a_lost_shard_and_a_wrong_total(source: Path, tmp_path: Path) -> None:
    out = sharded(source, tmp_path / "out")
    index = json.loads((out / INDEX).read_text())
    index["metadata"]["total_size"] += 1
    (out / INDEX).write_text(json.dumps(index))
    assert [f.where for f in check(out).findings] == [f"{INDEX}: metadata.total_size"]
    lost = sorted(out.glob("*.safetensors"))[1]
    lost.unlink()
    done = check(out)
    assert done.findings[0].where == lost.name
    assert "missing; the checkpoint is incomplete" in done.findings[0].reason


@pytest.mark.slow
def test_a_shard_of_another_model_is_seen_beside_the_source(source: Path, good: Path, tmp_path: Path) -> None:
    """Same names, same shapes: only the weights differ."""
    make_model(tmp_path / "other", seed=5)
    pico.packed(tmp_path / "other", tmp_path / "out", GRID, dtype=torch.bfloat16)
    assert check(tmp_path / "out").ok
    done = check(tmp_path / "out", source=source)
    assert any(
        f.where == f"{Q}.qweight" and "decodes to other weights than the source's" in f.reason for f in done.findings
    )
    assert any(f.where == "lm_head.weight" and "is not the source's" in f.reason for f in done.findings)


def rows_of(path: Path, distance: float | None = None) -> dict[str, Any]:
    """What a solver would have told of a checkpoint's linears."""
    reader = open_quantized(path)
    return {
        name.removesuffix(".weight"): {"checksum": int(checksum(*reader.unpack(name)[:3])), "distance": distance}
        for name in reader.quantized
    }


@pytest.mark.slow
def test_a_file_must_decode_to_what_was_solved(good: Path, source: Path) -> None:
    """One code that differs is seen, however small the change of the weights."""
    solved = rows_of(good)
    assert check(good, source=source, solved=solved).ok
    solved[Q] |= {"checksum": solved[Q]["checksum"] ^ 1}
    assert [str(f) for f in check(good, source=source, solved=solved).findings] == [
        f"{Q}.qweight: does not decode to what was solved"
    ]


@pytest.mark.slow
def test_a_right_solution_may_be_far_from_its_source(good: Path, source: Path, tmp_path: Path) -> None:
    """Compensation may move a weight by more than its size: 107 % in one linear of a model at 2 bits.

    The distance of the solution says what is right; without one, the share of the source that is left.
    """
    grid, stored = Grid(2, 32), Checkpoint(source)
    far = tmp_path / "far"
    pico.save(pico.reload(source), far, torch.float32)
    weights = {n: stored.read(n).float() for n in stored}
    g = torch.Generator().manual_seed(0)
    for name in weights:
        if name.endswith("_proj.weight"):
            noise = torch.randn(weights[name].shape, generator=g)
            weights[name] += 1.2 * noise * weights[name].norm() / noise.norm()
    save_file(weights, far / "model.safetensors", metadata={"format": "pt"})
    for file in good.glob("tokenizer*"):
        shutil.copy(file, far)
    pico.packed(far, tmp_path / "out", grid, dtype=torch.bfloat16)
    done = check(tmp_path / "out", source=source)
    assert done.ok, done.message()
    assert (done.relative_error or 0) > 1
    solved = rows_of(tmp_path / "out")
    reader = open_quantized(tmp_path / "out")
    for stem, row in solved.items():
        weight = stored.read(f"{stem}.weight").float()
        row["distance"] = float((reader.read(f"{stem}.weight") - weight).norm() / weight.norm())
    assert check(tmp_path / "out", source=source, solved=solved).ok
    solved[Q] |= {"distance": 0.6}
    (found,) = check(tmp_path / "out", source=source, solved=solved).findings
    assert "decodes to other weights than the source's" in found.reason
    assert "60% when it was solved" in found.reason


@pytest.mark.parametrize(("bits", "with_source"), [(3, True), (4, True), (8, True), (3, False), (4, False)])
def test_asymmetric_zero_points_of_the_other_version(
    source: Path, tmp_path: Path, bits: int, with_source: bool
) -> None:
    """Zero points of another version move all weights one step.

    Seen against the source, or against a mean of zero.
    """
    pico.packed(source, tmp_path / "out", Grid(bits, 32, symmetric=False))
    config(tmp_path / "out", checkpoint_format="gptq_v2")
    done, shared = (
        check(tmp_path / "out", source=source if with_source else None, ranks=ranks)
        for ranks in (SINGLE_PROCESS, Turns(3))
    )
    wrong = [f for f in done.findings if f.where == f"{Q}.qzeros"]
    assert wrong, done.message()
    assert sorted(map(str, shared.findings)) == sorted(map(str, done.findings))
    assert "zero points of the other format version than checkpoint_format 'gptq_v2'" in wrong[0].reason


@pytest.mark.slow
def test_a_tied_head_stored_apart(tmp_path: Path, good: Path) -> None:
    make_model(tmp_path / "model", tied=True)
    pico.packed(tmp_path / "model", tmp_path / "out", GRID)
    assert check(tmp_path / "out").ok
    edit_tensors(tmp_path / "out" / WEIGHTS, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] * 2})
    done = check(tmp_path / "out")
    assert [f.where for f in done.findings] == ["lm_head.weight"]
    assert "stored although tie_word_embeddings is true" in done.findings[0].reason


@pytest.mark.slow
def test_a_true_activation_order_is_read(source: Path, tmp_path: Path) -> None:
    """desc_act of another tool: groups in any order, each of at most group_size inputs."""
    pico.packed(source, tmp_path / "out", GRID)
    config(tmp_path / "out", desc_act=True)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    tensor(f"{Q}.g_idx", lambda t: t[order])(tmp_path / "out")
    assert check(tmp_path / "out").ok
    tensor(f"{Q}.g_idx", torch.zeros_like)(tmp_path / "out")
    done = check(tmp_path / "out")
    assert done.findings[0] == Finding(f"{Q}.g_idx", "a group has more than 32 inputs")


def test_many_findings_are_counted(good: Path, tmp_path: Path) -> None:
    bad = tmp_path / "gptq"
    shutil.copytree(good, bad)
    config(bad, group_size=64)
    done = check(bad)
    text = done.message()
    assert text.startswith(f"{bad}: {len(done.findings)} things are wrong:")
    assert text.endswith(f"and {len(done.findings) - verification.SHOWN} more")
    assert done.skipped == ["generation and engines: not tried on a checkpoint that is wrong"]


def test_no_directory_is_a_wrong_command(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such checkpoint directory"):
        check(tmp_path / "nothing")


@pytest.mark.slow
def test_facts_are_json_without_local_paths(good: Path) -> None:
    text = json.dumps(check(good).facts())
    assert str(good.parent) not in text
    assert json.loads(text)["ok"] is True


def test_a_model_too_large_for_memory_is_said(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_scores, "_free", lambda device: 1e5)
    done = check(good)
    assert done.ok
    assert done.perplexity is None
    assert done.skipped == ["generation and engines: fp32 weights are 0.0 GB, 0.0 GB are free"]


@pytest.mark.slow
def test_a_device_without_room_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs out of memory on the GPU is done on the CPU."""
    tried: list[str] = []

    def short_of_memory(device: torch.device) -> str:
        tried.append(device.type)
        if device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: tried.append("released"))
    assert stage._with_cpu_fallback(torch.device("cuda", 0), short_of_memory) == "done"
    assert tried == ["cuda", "released", "cpu"]


def test_the_reference_decoder_agrees(good: Path) -> None:
    """The undamaged files of these tests, decoded by one formula in fp64."""
    stored = load_file(good / WEIGHTS)
    codes = gptq_format.unpack_rows(stored[f"{Q}.qweight"], 4).double()
    weight = (codes - 8) * stored[f"{Q}.scales"].double().repeat_interleave(32, 0)
    ours = gptq_format.dequantize({s: stored[f"{Q}.{s}"] for s in gptq_format.SUFFIXES}, 4)
    assert torch.equal(ours.double(), weight.T)


def test_tensors_are_compared_part_by_part() -> None:
    """The norm over parts is that of the whole difference."""
    torch.manual_seed(0)
    was = torch.randn(1000)
    now = (was + 0.3 * torch.randn(1000)).bfloat16()
    exact = float((now.double() - was.double()).norm() / was.double().norm())
    for size in (1000, 300, 7):
        parts = [torch.split(t, size) for t in (now, was)]
        assert check_tensors._relative_distance(*parts) == pytest.approx(exact, rel=1e-5)
    zeros = [torch.zeros(4)]
    assert check_tensors._relative_distance(zeros, zeros) == 0
    assert check_tensors._relative_distance([torch.ones(4)], zeros) > check_tensors.OTHER_WEIGHTS


@pytest.mark.parametrize("at", [0, 4, 9])
def test_every_part_of_a_tensor_is_looked_at(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_tensors, "PART", 3)
    tensor = torch.ones(2, 5)
    assert not list(check_tensors._unquantized("norm", tensor, None))
    tensor.view(-1)[at] = torch.inf
    (finding,) = check_tensors._unquantized("norm", tensor, None)
    assert finding.reason == "1 of 10 values are not finite"


def test_a_tokenizer_that_fails_on_letters_it_does_not_know(good: Path, tmp_path: Path) -> None:
    """The class makes WordPiece of the file, whose vocabulary has no [UNK]."""
    mine = shutil.copytree(good, tmp_path / "mine")
    edit_json(mine / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    with pytest.raises(InputError, match=r"tokenizer\.json: transformers cannot load the tokenizer"):
        conversion.convert(mine, tmp_path / "out", "auto-round")
    assert not (tmp_path / "out").exists()
