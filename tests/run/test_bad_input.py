"""Bad inputs: a message that says what to do, the right exit code, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.e2e import (
    copied,
    digests,
    edit_json,
    edit_tensors,
    one_thread,
    recipe,
    run,
    texts,
    visible,
    write_recipe,
    write_rows,
)

from requant.errors import InputError, RecipeError, RequantError, StageError

Tensors = dict[str, torch.Tensor]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{Q_PROJ}.quant_state.bitsandbytes__nf4"
ADAPTER = "adapter_model.safetensors"


def refusal(project: Path, out: Path, changes: dict[str, Any] | None = None, **options: Any) -> RequantError:
    """The error of a run that must fail; nothing under a final name may be left of it."""
    with pytest.raises(RequantError) as caught:
        run(project, out, changes, **options)
    left = {"recipe.yaml", "log.txt", "events.jsonl"} if caught.value.exit_code == 1 else set()
    assert visible(out / "pico") <= left
    return caught.value


# --- exit code 2: seen from headers, configs and texts ---


def other_shape(base: Path, adapter: Path) -> None:
    edit_tensors(adapter / ADAPTER, lambda t: {n: v[:, :32].clone() if "lora_A" in n else v for n, v in t.items()})


def other_names(base: Path, adapter: Path) -> None:
    edit_tensors(adapter / ADAPTER, lambda t: {n.replace("model.layers", "transformer.h"): v for n, v in t.items()})


def half_renamed(base: Path, adapter: Path) -> None:
    edit_tensors(adapter / ADAPTER, lambda t: {n.replace("layers.1.", "layers.7."): v for n, v in t.items()})


def one_sided(base: Path, adapter: Path) -> None:
    edit_tensors(adapter / ADAPTER, lambda t: {n: v for n, v in t.items() if "layers.0.mlp.up_proj.lora_B" not in n})


def stray_tensor(base: Path, adapter: Path) -> None:
    edit_tensors(adapter / ADAPTER, lambda t: t | {"base_model.model.classifier.weight": torch.zeros(2, 64)})


def other_rank(base: Path, adapter: Path) -> None:
    edit_json(adapter / "adapter_config.json", r=16)


def pickled_adapter(base: Path, adapter: Path) -> None:
    (adapter / ADAPTER).rename(adapter / "adapter_model.bin")


def no_config(base: Path, adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()


def missing_shard(base: Path, adapter: Path) -> None:
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    (base / "model.safetensors").rename(base / first)
    names = {"model.norm.weight": first, "lm_head.weight": second}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def truncated(base: Path, adapter: Path) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def truncated_header(base: Path, adapter: Path) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])


def truncated_adapter(base: Path, adapter: Path) -> None:
    (adapter / ADAPTER).write_bytes((adapter / ADAPTER).read_bytes()[:-100])


def html_for_weights(base: Path, adapter: Path) -> None:
    (base / "model.safetensors").write_text("<!DOCTYPE html><html>404 not found</html>" * 10)


def eight_bit(base: Path, adapter: Path) -> None:
    edit_tensors(base / "model.safetensors", lambda t: t | {"model.layers.0.self_attn.q_proj.SCB": torch.ones(64)})


def pickled_base(base: Path, adapter: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def no_weights(base: Path, adapter: Path) -> None:
    (base / "model.safetensors").unlink()


def lost_scales(base: Path, adapter: Path) -> None:
    edit_tensors(base / "model.safetensors", lambda t: {n: v for n, v in t.items() if n != f"{Q_PROJ}.nested_absmax"})


def lost_state(base: Path, adapter: Path) -> None:
    edit_tensors(base / "model.safetensors", lambda t: {n: v for n, v in t.items() if n != STATE})


def no_tokenizer(base: Path, adapter: Path) -> None:
    for file in base.glob("tokenizer*"):
        file.unlink()


class Damage(NamedTuple):
    do: Callable[[Path, Path], None]
    says: tuple[str, ...]


DAMAGES = (
    Damage(other_shape, ("makes a (64, 32) delta, the base's weight is (64, ", "belongs to another base")),
    Damage(other_names, ("14 of 14 adapted tensors do not exist", "transformer.h.0", "Is this the adapter's base?")),
    Damage(half_renamed, ("7 of 14 adapted tensors do not exist", "model.layers.7.", "Is this the adapter's base?")),
    Damage(one_sided, ("model.layers.0.mlp.up_proj", "not both lora_A and lora_B")),
    Damage(stray_tensor, ("classifier.weight", "is the head of a classifier")),
    Damage(other_rank, ("rank of", "16 there, 8 in")),
    Damage(pickled_adapter, ("adapter_model.bin", "pickle", "safe_serialization")),
    Damage(no_config, ("no adapter_config.json", "save_pretrained")),
    Damage(missing_shard, ("model-00002-of-00002.safetensors: missing", "download")),
    Damage(truncated, ("model.safetensors: truncated", "download it again")),
    Damage(truncated_header, ("model.safetensors: not a safetensors file, or truncated (100 bytes)",)),
    Damage(truncated_adapter, (f"{ADAPTER}: truncated", "download it again")),
    Damage(html_for_weights, ("model.safetensors: not a safetensors file",)),
    Damage(eight_bit, ("8-bit bitsandbytes checkpoint", "q_proj.SCB")),
    Damage(pickled_base, ("only pickled weights (pytorch_model.bin)", "safetensors first")),
    Damage(no_weights, ("no safetensors weights found",)),
    Damage(lost_scales, (f"{Q_PROJ}.nested_absmax is missing", "incomplete")),
    Damage(lost_state, (Q_PROJ, "no quant_state")),
    Damage(no_tokenizer, ("no tokenizer files",)),
)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.do.__name__)
def test_a_damaged_model_or_adapter_is_refused_before_any_work(project: Path, tmp_path: Path, damage: Damage) -> None:
    mine = copied(project, tmp_path / "p", "base", "adapter")
    damage.do(mine / "base", mine / "adapter")
    error = refusal(mine, tmp_path / "runs")
    assert isinstance(error, InputError)
    assert error.exit_code == 2
    for words in damage.says:
        assert words in str(error)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (b'{"quant_type": "nf4", "blocks', "not the expected JSON"),
        (b"\xff\xfe\x00", "not the expected JSON"),
        (b"[1, 2]", "not the expected JSON"),
        (b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16"}', "no 'shape'"),
        (b'{"quant_type": "nf4", "blocksize": null, "dtype": "bfloat16", "shape": [64, 64]}', "not the expected JSON"),
        (b'{"quant_type": "int5", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 64]}', "'int5'"),
        (b'{"quant_type": "nf4", "blocksize": 0, "dtype": "bfloat16", "shape": [64, 64]}', "impossible blocksize 0"),
        (
            b'{"quant_type": "nf4", "blocksize": 64.0, "dtype": "bfloat16", "shape": [64, 64]}',
            "64.0 is not a whole number",
        ),
        (
            b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 64], "nested_blocksize": 1'
            + b"0" * 29
            + b', "nested_offset": 0.1}',
            "impossible blocksize 64 or nested_blocksize 1000",
        ),
        (
            b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4294967296, 4294967297]}',
            "impossible shape",
        ),
        (b'{"quant_type": "nf4", "blocksize": 64, "dtype": "a", "shape": [64, 64]}', "dtype is 'a'"),
        (b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 96]}', "needs float32 [96]"),
    ],
)
def test_a_corrupt_quant_state_is_refused(project: Path, tmp_path: Path, state: bytes, says: str) -> None:
    mine = copied(project, tmp_path / "p", "base")
    stored = torch.tensor(list(state), dtype=torch.uint8)
    edit_tensors(mine / "base" / "model.safetensors", lambda t: t | {STATE: stored})
    error = refusal(mine, tmp_path / "runs")
    assert error.exit_code == 2
    assert Q_PROJ in str(error)
    assert says in str(error)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("init_lora_weights", kind) for kind in ("pissa", "pissa_niter_16", "olora", "loftq", "corda")]
    + [("peft_type", "PREFIX_TUNING"), ("layer_replication", [[0, 2], [1, 2]]), ("some_new_feature", True)],
)
def test_an_adapter_that_has_no_exact_merge_is_refused(project: Path, tmp_path: Path, setting: str, value: Any) -> None:
    mine = copied(project, tmp_path / "p", "adapter")
    edit_json(mine / "adapter" / "adapter_config.json", **{setting: value})
    error = refusal(mine, tmp_path / "runs")
    assert error.exit_code == 2
    assert str(error).startswith(str(mine / "adapter" / "adapter_config.json"))
    assert (value if isinstance(value, str) else setting) in str(error)


def test_settings_that_do_not_fit_the_model_or_the_text(project: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"quantize.group_size": 128}, "q_proj: group_size 128 does not divide its 64 inputs; use 64 or 32 or -1"),
        (
            {"calibration.samples": 5000},
            "but its share is 5000: lower calibration.samples or length, or give more text",
        ),
        ({"calibration.data.column": "body"}, "train.jsonl: no column 'body'; it has text"),
        ({"evaluate.sets.1.data.column": "body"}, "general.jsonl: no column 'body'; it has text"),
        ({"calibration.format": "chat"}, "train.jsonl: no chat column (messages or conversations); it has text"),
        ({"calibration.data.path": "./nothing.jsonl"}, "nothing.jsonl: no such file"),
        ({"adapter": "./nothing"}, "nothing: no such directory"),
        ({"adapter": "./adaptr"}, "recipe.yaml:1: adapter: "),
        ({"adapter": "./adaptr"}, "adaptr: no such directory: did you mean ./adapter?"),
        ({"base.original": "./orginal"}, "recipe.yaml:1: base.original: "),
        ({"base.original": "./base"}, "base: a 4-bit checkpoint: expected the 16-bit model behind base.model"),
        ({"base.original": "./adapter"}, "an adapter's directory (adapter_config.json, no model's weights)"),
        ({"base.model": "./adapter"}, "recipe.yaml:1: base.model: "),
        ({"adapter": "./original"}, "a full model (config.json, no adapter_config.json), not an adapter"),
        ({"base.nf4": {"quant_type": "nf4", "double_quant": True}}, "already 4-bit on disk; remove base.nf4"),
    ]
    for changes, says in cases:
        error = refusal(project, tmp_path, changes)
        assert error.exit_code == 2
        assert says in str(error)


def test_a_refused_recipe_leaves_no_directory_behind(project: Path, tmp_path: Path) -> None:
    refusal(project, tmp_path / "runs", {"quantize.group_size": 128})
    assert not (tmp_path / "runs").exists()


def test_calibrating_on_the_evaluation_file_is_a_recipe_error(project: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"same text as calibration.data: judge on text that the quantizer has not seen"
    ):
        recipe(project, tmp_path, {"evaluate.sets.0.data.path": "./train.jsonl"})
    (tmp_path / "link.jsonl").symlink_to(project / "train.jsonl")
    with pytest.raises(RecipeError, match=r"same text as calibration.data"):
        recipe(project, tmp_path, {"evaluate.sets.0.data.path": str(tmp_path / "link.jsonl")})


@pytest.mark.parametrize("samples", [4, 130], ids=["a sample of it", "nearly all of it"])
def test_calibrating_on_the_evaluation_text_under_another_name(project: Path, tmp_path: Path, samples: int) -> None:
    rows = [{"text": text} for text in texts()["train"]]
    write_rows(tmp_path / "renamed.jsonl", rows[::-1])
    changes = {"evaluate.sets.0": {"name": "in-domain", "data": {"path": str(tmp_path / "renamed.jsonl")}}}
    error = refusal(project, tmp_path / "runs", changes | {"calibration.samples": samples})
    assert error.exit_code == 2
    assert "in-domain" in str(error)
    assert "use other text" in str(error)


# --- exit code 1: only the data itself shows it ---


def poison(file: Path, name: str, value: float) -> None:
    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[3] = value

    edit_tensors(file, change)


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("part", "file", "name", "named"),
    [
        ("base", "model.safetensors", "model.norm.weight", "model.norm.weight"),
        ("base", "model.safetensors", "lm_head.weight", "lm_head.weight"),
        ("base", "model.safetensors", f"{Q_PROJ}.nested_quant_map", Q_PROJ),
        ("adapter", ADAPTER, f"base_model.model.{Q_PROJ.removesuffix('.weight')}.lora_A.weight", Q_PROJ),
        ("adapter", ADAPTER, f"base_model.model.{Q_PROJ.removesuffix('.weight')}.lora_B.weight", Q_PROJ),
    ],
)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_nan_and_infinity_stop_the_merge(
    project: Path, tmp_path: Path, part: str, file: str, name: str, named: str, value: float, dtype: str
) -> None:
    mine = copied(project, tmp_path / "p", part)
    if name.endswith("quant_map"):  # every code of it, so that one in use is hit
        edit_tensors(mine / part / file, lambda t: t | {name: torch.full_like(t[name], value)})
    else:
        poison(mine / part / file, name, value)
    error = refusal(mine, tmp_path / "runs", {"merge.dtype": dtype})
    assert isinstance(error, StageError)
    assert error.exit_code == 1
    assert str(error).startswith(f"{named}: NaN or infinity in the")


def test_a_weight_too_large_for_float16(project: Path, tmp_path: Path) -> None:
    mine = copied(project, tmp_path / "p", "base")
    poison(mine / "base" / "model.safetensors", "model.norm.weight", 1e5)
    error = refusal(mine, tmp_path / "runs", {"merge.dtype": "float16"})
    assert error.exit_code == 1
    assert "model.norm.weight" in str(error)
    assert "overflows float16: set merge.dtype to bfloat16 or auto" in str(error)
    run(mine, tmp_path / "runs", {"merge.dtype": "auto"}, until="merge")
    assert json.loads((tmp_path / "runs" / "pico" / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_untrained_adapter(project: Path, tmp_path: Path) -> None:
    mine = copied(project, tmp_path / "p", "adapter")
    edit_tensors(
        mine / "adapter" / ADAPTER, lambda t: {n: torch.zeros_like(v) if "lora_B" in n else v for n, v in t.items()}
    )
    error = refusal(mine, tmp_path / "runs")
    assert error.exit_code == 2
    assert "adapter: every LoRA delta is exactly zero: this adapter was never trained" in str(error)
    assert not list((tmp_path / "runs").glob("*/merged*")), "nothing is decoded, measured or written before"


def test_adapters_that_cancel_each_other_out(project: Path, tmp_path: Path) -> None:
    both = [{"path": str(project / "adapter"), "weight": w} for w in (0.5, -0.5)]
    error = refusal(project, tmp_path / "runs", {"adapter": None, "adapters": both})
    assert error.exit_code == 2
    assert "adapter: together these adapters change nothing" in str(error)
    assert "correct the weights, or leave adapters out" in str(error)
    assert not list((tmp_path / "runs").glob("*/merged*"))


@pytest.mark.slow
@pytest.mark.parametrize("full_at", [1, 2], ids=["merge", "quantize"])
def test_a_full_disk(
    project: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, full_at: int
) -> None:
    calls: list[int] = []

    def reserve(handle: int, offset: int, size: int) -> None:
        calls.append(size)
        if len(calls) >= full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", reserve)
    with pytest.raises(StageError, match=r"write failed \(No space left on device: .* needed, .* free; free"):
        run(project, tmp_path, until="quantize")
    assert visible(tmp_path / "pico") & {"merged", "gptq"} == ({"merged"} if full_at == 2 else set())
    monkeypatch.undo()
    run(project, tmp_path, until="quantize")
    assert digests(tmp_path / "pico" / "gptq", "*.safetensors") == digests(finished / "gptq", "*.safetensors")


def test_a_disk_too_small_is_seen_before_the_work(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))  # type: ignore[attr-defined]
    error = refusal(project, tmp_path)
    assert error.exit_code == 2
    assert "1.00 kB free, the run writes" in str(error)
    assert "free space or set output.dir" in str(error)


@pytest.mark.slow
def test_a_model_that_overflows_when_it_is_scored(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finite weights whose logits are not: the last norm is near float16's end."""
    from requant.cli.main import main

    mine = copied(project, tmp_path / "p", "base")
    norm = torch.full((64,), 60000.0, dtype=torch.bfloat16)
    edit_tensors(mine / "base" / "model.safetensors", lambda t: t | {"model.norm.weight": norm})
    changes = {"merge.dtype": "auto", "evaluate.dtype": "float16", "evaluate.variants": ["adapter", "merged"]}
    file = write_recipe(mine, changes | {"output.dir": str(tmp_path / "runs")})
    monkeypatch.setattr("sys.argv", ["requant", "run", str(file)])
    with one_thread(), pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert "error: " in error
    assert "NaN/inf in logits" in error
    assert "Traceback" not in error
    assert visible(tmp_path / "runs" / "pico") == {"recipe.yaml", "merged", "gptq", "log.txt", "events.jsonl"}


def test_text_with_nothing_to_score(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from requant.cli.main import main

    write_rows(tmp_path / "short.jsonl", [{"text": "a"}])
    changes = {"evaluate.sets.0": {"name": "in-domain", "data": {"path": str(tmp_path / "short.jsonl")}}}
    mine = copied(project, tmp_path / "p")
    monkeypatch.setattr("sys.argv", ["requant", "check", str(write_recipe(mine, changes))])
    with one_thread(), pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "set 'in-domain': nothing to score" in error
    assert "Traceback" not in error


def test_too_few_documents_for_an_interval(project: Path, tmp_path: Path) -> None:
    error = refusal(project, tmp_path, {"evaluate.sets.1.data": {"path": "./general.jsonl", "documents": 2}})
    assert isinstance(error, InputError)
    assert "set 'general' has 2 documents with something to score: an interval needs at least 3" in str(error)


def test_an_empty_evaluation_set(project: Path, tmp_path: Path) -> None:
    mine = copied(project, tmp_path / "p", "general.jsonl")
    (mine / "general.jsonl").write_text("")
    error = refusal(mine, tmp_path)
    assert error.exit_code == 2
    assert "general.jsonl" in str(error)


@pytest.mark.slow
def test_damaged_scores_are_named_and_scored_again(project: Path, ran: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = next((ran / "pico" / ".cache").glob("rtn-in-domain-*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    gates = {"gates": [{"metric": "ppl_increase", "set": "in-domain", "max": "90%"}]}
    with caplog.at_level("WARNING"):
        assert run(project, ran, gates).ran == ["evaluate", "report"]
    (told,) = [r.getMessage() for r in caplog.records if r.name == "requant.damaged"]
    assert "rtn-in-domain-" in told
    assert "no readable scores" in told
    assert file.stat().st_size > 100, "scored again"
