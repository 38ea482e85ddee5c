"""Codes block by block: gain, one block in memory, resuming, a second pass, the plan."""

from __future__ import annotations

import gc
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from heal import test_codes
from heal.test_codes import CODES, WHOLE, changed_codes, pair, same_but_for, sample  # noqa: F401
from heal.test_stage import CPU, Killed, divergence, quantized, size_8b
from helpers import pico

from requant.data.healing_text import HealingText
from requant.deploy import conversion
from requant.errors import InputError, StageError
from requant.formats.registry import open_quantized
from requant.heal import block_streams, blockwise, latents, student
from requant.heal import stage as heal
from requant.heal.model_size import ModelSize
from requant.heal.plan import BLOCK_TOKENS, HealPlan, choose_plan
from requant.modeling import skeleton
from requant.modeling.token_ends import EndBits
from requant.numerics.grid import Grid

BLOCKS = HealPlan(mode="blocks", teacher_resident=False, recompute=False, micro_batch=16)
BOTH = replace(BLOCKS, then=replace(WHOLE, codes=False))
CUDA: dict[str, Any] = {"device": torch.device("cuda"), "rate": 5e14, "free_host": 10**12}
TEXT = HealingText(torch.zeros(9664, 512, dtype=torch.int64), 32, 32)
DEFAULT = replace(CODES, steps=600, length=512)


def run(pair: tuple[Path, Path], out: Path, settings: Any = CODES, **changes: Any) -> dict[str, Any]:  # noqa: F811
    return test_codes.run(pair, out, settings, **{"plan": BLOCKS} | changes)


def weights_of(path: Path) -> bytes:
    return (path / "model.safetensors").read_bytes()


def test_codes_leave_less_of_every_blocks_error_than_scales_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    """On windows that were not trained on: less than 0.8 of what scales leave, of the first block and of the whole."""
    before = {f.name: f.read_bytes() for f in pair[1].iterdir()}
    both = run(pair, tmp_path / "both", replace(CODES, steps=40))
    alone = run(pair, tmp_path / "alone", replace(CODES, steps=40, tune=("scales",)))
    assert both["healed"]
    assert alone["healed"]
    assert both["mode"] == "blocks"
    assert both["blocks"][0]["start"] == pytest.approx(alone["blocks"][0]["start"], rel=1e-3), "the same start"
    assert both["blocks"][0]["best"] < 0.8 * alone["blocks"][0]["best"] < 0.8 * alone["blocks"][0]["start"]
    assert both["kl_best"] < 0.8 * alone["kl_best"] < 0.8 * alone["kl_start"]
    same_but_for(pair[1], tmp_path / "both", "qweight", "scales")
    same_but_for(pair[1], tmp_path / "alone", "scales")
    assert {f.name: f.read_bytes() for f in pair[1].iterdir()} == before, "the unhealed file is never touched"


def test_the_report_says_what_happened_in_every_block(pair: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    told = run(pair, tmp_path / "out")
    assert [b["block"] for b in told["blocks"]] == [0, 1]
    for block in told["blocks"]:
        assert block["held"][0] == [0, block["start"]]
        assert [block["best_step"], block["best"]] in block["held"]
        assert len(block["held"]) == 5
        assert 0 < block["changed"] < 0.5
    share = told["changed_codes"]["share"]
    assert share == pytest.approx(changed_codes(pair[1], tmp_path / "out"))
    assert share == pytest.approx(sum(b["changed"] for b in told["blocks"]) / 2), "blocks of one size"
    assert told["kl_best"] == pytest.approx(divergence(tmp_path / "out", pair[0], sample().windows[-16:]), rel=5e-3)
    assert told["kl_start"] == pytest.approx(divergence(pair[1], pair[0], sample().windows[-16:]), rel=5e-3)


def test_of_a_finished_block_nothing_stays_in_memory(
    pair: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When a block is loaded no latent, moment or code of another one is there: the peak does not grow with depth."""
    made: list[weakref.ref[Any]] = []
    load, alive = blockwise._Student.load, []

    def counted(self: Any, index: int) -> student.Student:
        gc.collect()
        alive.append(sum(found() is not None for found in made))
        part = load(self, index)
        made.extend(weakref.ref(v.offset) for v in part.trainable)
        made.extend(weakref.ref(v.codes.packed) for v in part.trainable if isinstance(v, latents.TrainableCodes))
        return part

    monkeypatch.setattr(blockwise._Student, "load", counted)
    run(pair, tmp_path / "out", replace(CODES, steps=2))
    assert alive == [0, 0]
    assert len(made) == 2 * (1 + 2 * 7), "scales, and of seven linears latents and codes"


def test_hidden_states_on_the_host_give_the_same_bytes(
    pair: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU both places are one, so the windows of a step are gathered as they are for a GPU."""
    settings = replace(CODES, steps=4)
    run(pair, tmp_path / "a", settings)
    read = []

    def elsewhere(self: Any, stream: Any, numbers: Any, buffer: Any) -> Any:
        read.append(len(numbers))
        return block_streams.from_host(stream, numbers, buffer, CPU).clone()

    monkeypatch.setattr(block_streams.Streams, "_chosen", elsewhere)
    run(pair, tmp_path / "b", settings)
    assert read
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize("then", [False, True])
def test_killed_in_a_block_it_goes_on_to_the_same_bytes(
    pair: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    then: bool,
) -> None:
    """In the middle of the second block; then, of two passes, in the middle of the second one."""
    settings, plan = replace(CODES, steps=12), BOTH if then else BLOCKS
    run(pair, tmp_path / "a", settings, plan=plan)
    step, steps, kill = blockwise.Trainer.step, [], [12 + 7, *([24 + 9] if then else [])]

    def counted(self: Any, number: int, chosen: Any) -> float:
        steps.append(number)
        if kill and len(steps) == kill[0]:
            raise Killed
        return step(self, number, chosen)

    monkeypatch.setattr(blockwise.Trainer, "step", counted)
    out = tmp_path / "b"
    for expected in ([*range(12), *range(7)], [*range(12), *range(9)]) if then else ([*range(12), *range(7)],):
        with pytest.raises(Killed):
            run(pair, out, settings, plan=plan)
        assert steps == expected, "a finished block is not healed again, the one in the middle from its start"
        shutil.rmtree(out)
        steps.clear()
        kill[:] = [12 + 9] if then and expected[-1] == 6 else []
    run(pair, out, settings, plan=plan)
    assert steps == [*range(6, 12)] if then else [*range(12)]
    assert weights_of(out) == weights_of(tmp_path / "a")


def test_a_block_healed_otherwise_is_healed_again(pair: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    """Other values to train, or another number of windows, under one key: a smaller machine resumes."""
    settings = replace(CODES, steps=2)
    run(pair, tmp_path / "a", settings, plan=replace(BLOCKS, codes=False))
    shutil.rmtree(tmp_path / "a")
    told = run(pair, tmp_path / "a", settings)
    assert told["tuned"] == ["scales", "codes"]
    shutil.rmtree(tmp_path / "a")
    run(pair, tmp_path / "a", settings, plan=replace(BLOCKS, windows=64))
    run(pair, tmp_path / "b", settings, plan=replace(BLOCKS, windows=64))
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")


@pytest.mark.parametrize("harm", [lambda file: file.write_bytes(file.read_bytes()[:100]), Path.unlink])
def test_a_block_whose_file_is_lost_before_the_end_is_named(
    pair: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    harm: Any,
) -> None:
    """Between the last block and writing; the same command heals that block again."""
    settings, heal_blocks = CODES, blockwise.heal_blocks

    def harmed(*given: Any) -> Any:
        found = heal_blocks(*given)
        harm(tmp_path / "out-work" / "block-0001")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(blockwise, "heal_blocks", harmed)
        with pytest.raises(StageError, match=r"block-0001: not readable .*: the same command heals this block again"):
            run(pair, tmp_path / "out", settings)
    shutil.rmtree(tmp_path / "out")
    assert run(pair, tmp_path / "out", settings)["healed"]


# --- a second pass ---


@pytest.mark.slow
def test_scales_after_codes_gain_once_more(pair: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    settings = replace(CODES, steps=40)
    one = run(pair, tmp_path / "one", settings)
    told = run(pair, tmp_path / "two", settings, plan=BOTH)
    first, second = told["passes"]
    assert (told["mode"], told["tuned"]) == ("blocks+whole", ["scales", "codes"])
    assert (first["mode"], second["mode"], second["tuned"]) == ("blocks", "whole", ["scales"])
    assert first["kl_best"] == one["kl_best"] == pytest.approx(second["kl_start"], rel=5e-3)
    assert second["healed"]
    assert told["kl_best"] == second["kl_best"] < 0.97 * one["kl_best"]
    assert told["kl_start"] == first["kl_start"]
    assert told["kl_best"] == pytest.approx(divergence(tmp_path / "two", pair[0], sample().windows[-16:]), rel=1e-3)
    assert told["best_step"] == 40 + second["best_step"]
    assert [n for n, _ in told["held"]][:3] == [0, 40, 45]
    assert told["held"][0][1] > told["held"][1][1] > told["held"][-1][1]
    a, b = (open_quantized(tmp_path / name) for name in ("one", "two"))
    for name in a.quantized:
        assert torch.equal(a.unpack(name)[0], b.unpack(name)[0]), "codes stay in the second pass"
    assert told["changed_codes"] == one["changed_codes"]


@pytest.mark.slow
@pytest.mark.parametrize("fails", ["first", "second", "both"])
def test_a_pass_that_gains_nothing_is_not_kept(pair: tuple[Path, Path], tmp_path: Path, fails: str) -> None:  # noqa: F811
    """Each is judged alone: the file is that of the other pass, or the unhealed one."""
    settings = replace(CODES, steps=8)
    kept = {"first": replace(BOTH, then=None), "second": replace(WHOLE, codes=False)}
    ruin = {"first": {"blocks"}, "second": {"whole"}, "both": {"blocks", "whole"}}[fails]
    with pytest.MonkeyPatch.context() as patch:
        judged = heal.LossCurve.gained.fget
        patch.setattr(
            heal.LossCurve,
            "gained",
            property(lambda self: judged(self) and ("whole" if self.train else "blocks") not in ruin),
        )
        told = run(pair, tmp_path / "out", settings, plan=BOTH)
    assert [p["healed"] for p in told["passes"]] == ["blocks" not in ruin, "whole" not in ruin]
    if fails == "both":
        assert not told["healed"]
        assert told["kl_best"] == told["kl_start"]
        assert weights_of(tmp_path / "out") == weights_of(pair[1])
        return
    run(pair, tmp_path / "other", settings, plan=kept["second" if fails == "first" else "first"])
    assert told["healed"]
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "other")


def test_a_rate_that_ruins_the_codes_leaves_the_file(pair: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    told = run(pair, tmp_path / "out", replace(CODES, code_lr=1.0, lr=1.0, steps=6), plan=BOTH)
    assert not told["healed"]
    assert [b["best_step"] for b in told["blocks"]] == [0, 0]
    assert weights_of(tmp_path / "out") == weights_of(pair[1])


# --- families and widths ---


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, False), (4, False), (8, True)])
def test_codes_alone_at_every_width(tmp_path: Path, bits: int, symmetric: bool) -> None:
    both = quantized(tmp_path, grid=Grid(bits, 32, symmetric=symmetric))
    told = run(both, tmp_path / "out", replace(CODES, tune=("codes",), steps=12))
    assert told["tuned"] == ["codes"]
    if told["healed"]:
        same_but_for(both[1], tmp_path / "out", "qweight")
    else:
        assert bits == 8, "there is nearly nothing to gain"
    after = divergence(tmp_path / "out", both[0], sample().windows[-16:])
    assert after <= divergence(both[1], both[0], sample().windows[-16:]) * (1 + 1e-3)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gemma3_text", "gpt2"])
def test_families(tmp_path: Path, kind: str) -> None:
    """Experts, sliding windows beside full attention, Conv1D: the file is the student that was judged."""
    both = quantized(tmp_path, kind)
    told = run(both, tmp_path / "out", replace(CODES, steps=12, lr=1e-3, code_lr=3e-3), plan=BOTH)
    assert told["healed"]
    assert any(b["changed"] > 0 for b in told["blocks"])
    assert all(b["best"] <= b["start"] for b in told["blocks"])
    same_but_for(both[1], tmp_path / "out", "qweight", "scales")
    assert told["kl_best"] == pytest.approx(divergence(tmp_path / "out", both[0], sample().windows[-16:]), rel=1e-3)
    assert told["kl_best"] < told["kl_start"]


def test_a_file_of_gptqmodels_kind(pair: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    """desc_act: columns of a group lie apart; codes come back to their places from the blocks' files."""
    merged, other = pair[0], test_codes.of_gptqmodels_kind(pair, tmp_path / "other")
    told = run((merged, other), tmp_path / "out", plan=BOTH)
    assert told["healed"]
    same_but_for(other, tmp_path / "out", "qweight", "scales")
    assert told["kl_best"] == pytest.approx(divergence(tmp_path / "out", merged, sample().windows[-16:]), rel=1e-3)


def test_a_quantized_head_counts(tmp_path: Path) -> None:
    """The KL that is told is the file's, of both passes: with its own head, not the 16-bit model's."""
    merged, source = quantized(tmp_path, grid=Grid(4, 32))
    conversion.convert(source, tmp_path / "head", "gptq", ends=EndBits(head=4))
    told = run((merged, tmp_path / "head"), tmp_path / "out", plan=BOTH)
    windows = sample().windows[-16:]
    start = divergence(tmp_path / "head", merged, windows)
    assert start > 1.05 * divergence(source, merged, windows), "the head's rounding shows"
    first, second = told["passes"]
    assert told["kl_start"] == first["kl_start"] == pytest.approx(start, rel=5e-3)
    assert first["kl_best"] == pytest.approx(second["kl_start"], rel=5e-3)


def test_a_quantized_head_has_no_latents_end_to_end(tmp_path: Path) -> None:
    """It gets no gradient there: latents and moments of its codes would be the largest of all."""
    merged, source = quantized(tmp_path, grid=Grid(4, 32))
    conversion.convert(source, tmp_path / "head", "gptq", ends=EndBits(head=4))
    found = student.load(tmp_path / "head", device=CPU, dtype=torch.float32, tune=("scales", "codes"), original=merged)
    without = student.load(source, device=CPU, dtype=torch.float32, tune=("scales", "codes"), original=merged)
    assert isinstance(found.model.get_output_embeddings(), student.ScaledLinear)
    assert set(found.values()) == set(without.values())


# --- the plan ---


def planned(gb: float, size: ModelSize | None = None, mode: Any = "auto", settings: Any = DEFAULT) -> HealPlan:
    return choose_plan(size or size_8b(), settings, TEXT, mode=mode, free=int(gb * 1e9), **CUDA)


def test_codes_come_first_wherever_they_fit() -> None:
    """8B: end to end on 200 GB; block by block and then scales on 80 and on 24; block by block on 10."""
    found = [planned(gb) for gb in (200, 80, 24, 10)]
    assert [f.name for f in found] == ["whole", "blocks+whole", "blocks+whole", "blocks"]
    assert all(f.codes and f.peak <= 0.85 * gb * 1e9 for f, gb in zip(found, (200, 80, 24, 10), strict=True))
    assert all(f.then is None or not f.then.codes for f in found)
    assert [f.on_host for f in found[1:]] == [False, True, True], "hidden states wait where they fit"
    assert {f.windows for f in found[1:]} == {BLOCK_TOKENS // 512}, "what is read does not depend on the GPU"
    assert str(found[1]).startswith("block by block on 2,048 windows, about ")
    assert "; then without codes end to end, teacher beside it, about " in str(found[1])
    assert "codes stay" not in str(found[3])


def test_scales_alone_where_no_blocks_latents_fit() -> None:
    plan = planned(6)
    assert (plan.name, plan.codes) == ("blocks", False)
    assert "; codes stay: with them 6." in str(plan)


def test_the_forecast_is_that_of_one_block() -> None:
    """Latents, gradient and moments of the largest block, its codes, hidden states: by hand."""
    size, plan = size_8b(), planned(80, mode="blocks")
    block = 4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert size.block.quantized == block
    states = (2 * (2048 + 64) + 64) * 512 * 4096 * 2
    least = 16 * block + 3 * block // 2 + 2 * block + states
    widths = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    activations = 16 * 512 * widths * 6
    assert least + activations < plan.bytes < least + activations + 40 * 4096 * 14336 + 30 * size.block.scales
    deeper = replace(size, layers=320, quantized=10 * size.quantized, scales=10 * size.scales)
    assert planned(80, deeper, mode="blocks").bytes == plan.bytes, "whatever the number of blocks"
    two = planned(80)
    assert two.peak == max(two.bytes, two.then.bytes)  # type: ignore[union-attr]


def test_the_largest_kind_of_block_bounds_the_memory() -> None:
    """One dense block beside one of many experts: not the mean of both; a token passes two experts of sixteen."""
    config = pico.config("qwen3_moe", num_hidden_layers=2, num_experts=16, mlp_only_layers=[0])
    model = skeleton.build(config, split=True)
    names = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear and "head" not in n]
    size = ModelSize.of(model, dict.fromkeys(names, Grid(4, 32)))
    attention, expert = 64 * 64 * 2 + 2 * 64 * 32, 3 * 64 * 32
    assert size.block.quantized == attention + 16 * expert > size.quantized / 2
    widths = 2 * (64 + 64) + 2 * (64 + 32) + 2 * 3 * (64 + 32)
    assert size.block.inputs_outputs == widths


def test_few_windows_where_the_host_has_little_memory() -> None:
    counts = [
        choose_plan(
            size_8b(), DEFAULT, TEXT, mode="blocks", free=80 * 10**9, **CUDA | {"free_host": gb * 10**9}
        ).windows
        for gb in (64, 16, 1)
    ]
    assert counts == [2048, 512, 256]


def test_what_fits_nowhere_is_refused() -> None:
    alone = replace(DEFAULT, tune=("codes",))
    assert planned(24, settings=alone).name == "blocks", "codes alone are trained block by block too"
    with pytest.raises(InputError, match=r"at least [0-9.]+ GB \(blocks\), .* tune scales instead of codes"):
        planned(4, settings=alone)
    with pytest.raises(InputError, match=r"\(blocks\+whole\), cuda has 6\.0 GB free: .* heal\.mode: auto"):
        planned(6, mode="blocks+whole")
    with pytest.raises(InputError, match=r"\(whole\), cuda has 6\.0 GB free: .* heal\.mode: auto"):
        planned(6, mode="whole")
    assert planned(80, mode="blocks+whole", settings=replace(DEFAULT, tune=("scales",))).name == "blocks+whole"
    assert planned(80, mode="whole").name == "whole"
