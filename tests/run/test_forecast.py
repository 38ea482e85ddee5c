"""`requant check`'s forecast: the rehearsal runs the real code, the sums are sums.

On random weights. No time is asserted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.e2e import one_thread, recipe

from requant.data.prompts import Prompt, Prompts
from requant.evaluate import stage as evaluate_stage
from requant.evaluate import trained_base
from requant.evaluate.memory import VariantSize
from requant.modeling import fused_ops, skeleton
from requant.quantize import block_quantizer
from requant.quantize.calibration_plan import CalibrationPlan
from requant.run import evaluation_inputs, output_formats, prepare
from requant.run.check import forecast, forecast_asking, forecast_merge
from requant.run.check.forecast_merge import PROBED, Made, Need
from requant.run.check.rehearsal import Cost, Quantized, RandomWeights, Rehearsal, Scored, cost_of
from requant.run.prepared import Prepared
from requant_eval.scoring.batches import BatchSize

CPU = torch.device("cpu")
LAYERS, BLOCK = 2, 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64
OUTSIDE = 2 * 300 * 64 + 64


@pytest.fixture(scope="module")
def prepared(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare.prepare(recipe(project, tmp_path_factory.mktemp("none")))


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with one_thread():
        yield


def of(p: Prepared, batch: int = 4) -> dict[str, Need]:
    needs = forecast.forecast(
        p, evaluation_inputs.variant_sources(p, Path("nowhere")), CPU, torch.float32, BatchSize(windows=batch)
    )
    return {need.stage: need for need in needs}


def test_costs_add_up() -> None:
    a, b = Cost(3.0, 100), Cost(1.0, 40)
    assert a + b == Cost(4.0, 140)
    assert a - b == Cost(2.0, 60)
    assert b - a == Cost(0.0, 0), "noise is no gain"
    assert a * 2.5 == Cost(7.5, 250)


def test_the_peak_of_a_piece_is_seen() -> None:
    """16 MB more than what is kept, whatever the process already holds."""
    cost = cost_of(CPU, lambda: float((torch.ones(2**22) + 1).sum()))
    assert 2**24 <= cost.bytes < 2**27
    assert cost.seconds > 0


@pytest.mark.slow
def test_windows_are_rehearsed_as_many_at_a_time_as_will_run(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU at most TRIED tokens, in windows of the common length.

    The longest window may be rare.
    """
    (length,) = {len(w.ids) for w in forecast._alike(prepared.texts.sets).windows}
    seen: list[tuple[int, int]] = []

    def scoring(_: Rehearsal, sample: Any, rows: int, *__: Any) -> Scored:
        seen.append((rows, len(sample.windows)))
        nothing = (Cost(), Cost())
        return Scored(tokens=1, forward=Cost(), token=Cost(), head=nothing, first=nothing)

    monkeypatch.setattr(Rehearsal, "scoring", scoring)
    longer = [replace(s, window=100 * s.window) for s in prepared.texts.sets]
    for tried in (length, 3 * length, 100 * length):
        monkeypatch.setattr(forecast, "TRIED", tried)
        of(replace(prepared, texts=replace(prepared.texts, sets=tuple(longer))))
    count = len(forecast._alike(prepared.texts.sets).windows)
    assert seen == [(n, min(count, forecast.BATCHES * n)) for n in (1, 3, 4)]


@pytest.mark.slow
def test_the_headers_of_a_variant_are_read_once(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    of_variant = forecast.VariantSize.of

    def noted(name: str, sources: Any) -> VariantSize:
        read.append(name)
        return of_variant(name, sources)

    monkeypatch.setattr(forecast.VariantSize, "of", noted)
    of(prepared)
    assert sorted(read) == ["adapter", "base"]


def test_drawn_weights_have_the_models_shapes(prepared: Prepared) -> None:
    model = skeleton.open_model(prepared.sources.base)
    drawn = RandomWeights(model, CPU)
    for name, parameter in model.named_parameters():
        value = drawn.read(name)
        assert value.shape == parameter.shape
        if value.ndim > 1:
            assert float(value.std()) == pytest.approx(0.02, rel=0.1)
        else:
            assert bool((value == 1).all())


def test_a_rehearsal_runs_the_real_code_and_leaves_nothing(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    block = block_quantizer.Quantizer.block
    monkeypatch.setattr(fused_ops.FusedOps, "use", lambda _: order.append("one pass"))
    monkeypatch.setattr(block_quantizer.Quantizer, "block", lambda *args: order.append("block") or block(*args))
    rehearsal = Rehearsal(skeleton.open_model(prepared.sources.base), CPU)
    assert rehearsal.samples == [(1, LAYERS)]
    parts = rehearsal.quantizing(
        prepared.quantize.plan, prepared.quantize.settings, prepared.texts.calibration, 4, lambda _: None
    )
    sample = forecast._alike(prepared.texts.sets)
    assert len({len(w.ids) for w in sample.windows}) == 1
    scored = rehearsal.scoring(sample, 4, torch.float32, tmp_path)
    assert scored.tokens == sum(len(w.ids) for w in sample.windows[:4])
    assert parts.one.seconds > parts.more.seconds >= 0
    assert scored.forward.seconds > 0
    assert parts.calibration.inside_block
    assert parts.calibration.batches == (4, 4)
    assert order[:2] == ["one pass", "block"], "as the run computes all blocks but the first"
    assert all(p.is_meta for p in rehearsal.model.parameters())


@pytest.mark.slow
def test_the_sums(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs of all blocks, 2 batches of calibration, the evaluation's tokens."""
    calibration = CalibrationPlan(
        share=slice(0, 8), batches=(4, 4), unquantized=(0,), first_held_out=1, inside_block=True, waiting_bytes=0
    )
    quantized = Quantized(one=Cost(2.0, 1000), more=Cost(0.5, 10), unquantized=Cost(0.75, 20), calibration=calibration)
    scored = Scored(
        tokens=100,
        forward=Cost(1.0, 5000),
        token=Cost(0.0, 0),
        head=(Cost(1.0, 0), Cost(3.0, 0)),
        first=(Cost(1.5, 7000), Cost(4.0, 9000)),
    )
    monkeypatch.setattr(Rehearsal, "quantizing", lambda *_: quantized)
    monkeypatch.setattr(Rehearsal, "scoring", lambda *_: scored)
    monkeypatch.setattr(forecast, "_rates", lambda *_: (0.0, 0.0))
    monkeypatch.setattr(forecast.time, "perf_counter", lambda: 0.0)
    monkeypatch.setattr(forecast, "product_rate", lambda _: math.inf)
    for module in (forecast, evaluate_stage):  # no last check, and everything is streamed
        monkeypatch.setattr(module, "free_bytes", lambda _: 0)
    monkeypatch.setattr(forecast.measurements, "reset_peak", lambda: 0)
    monkeypatch.setattr(forecast, "LIBRARIES", 0)
    monkeypatch.setattr(forecast, "merging", lambda *_: Need("merge", 1.0, 2))
    needs = of(prepared)
    assert prepared.texts.calibration.shape == (8, 64)
    assert needs["quantize"].seconds == pytest.approx(2.0 + 0.5)
    states = 8 * 64 * 64 * 4 * (1 + 1 / 2)
    assert needs["quantize"].host == BLOCK * 4 + 1000 + 10 + states
    sets, scored_tokens = prepared.texts.sets, sum(s.n_scored for s in prepared.texts.sets)
    tokens = sum(len(w.ids) for s in sets for w in s.windows)
    batch = sum(int(w.scored.sum()) for w in forecast._alike(sets).windows[:4])
    heads = {0: scored_tokens / batch + 0.5, 1: 3 * scored_tokens / batch + 1.0}
    adapter = 3 * sum(math.prod(t.shape) for t in prepared.merge.plan.adapter.tensors.values()) / (LAYERS * BLOCK)
    expected = sum(heads[name != "adapter"] for name in prepared.variants)
    expected += tokens / 100 * (len(prepared.variants) + adapter)
    assert needs["evaluate"].seconds == pytest.approx(expected)
    adapter_bytes = 4 * sum(math.prod(t.shape) for t in prepared.merge.plan.adapter.tensors.values())
    assert needs["evaluate"].host == (BLOCK + OUTSIDE + tokens * 64) * 4 + adapter_bytes + 9000


class Known:
    """A scoring whose numbers are known. streamed: variants that run block by block."""

    def __init__(self, *streamed: str) -> None:
        self.streamed = streamed

    def streams(self, name: str, stream: str | None = None) -> bool:
        return name in self.streamed

    def size_of(self, name: str) -> Any:
        packed = 1000 if name == "adapter" else 0
        return SimpleNamespace(total=5000, packed=packed, block=100, outside=50, width=8)

    def seconds(self, name: str) -> float:
        return {"adapter": 7.0, "gptq": 11.0}[name]

    def bytes(self, name: str) -> int:
        return {"adapter": 500, "merged": 900, "gptq": 300}[name]


def asking(p: Prepared, *streamed: str, **settings: Any) -> Any:
    given = {
        "p": p, "scoring": Known(*streamed), "batch": BatchSize(windows=4), "device": "cpu", "token": 0.5, "step": 1.0,
        "scored": 0.25, "weight": 0.001, "decoded": 0.002, "cached": 10, "item": 2,
    }  # fmt: skip
    return forecast_asking.Asking(**given | settings)


def test_the_sums_of_answers(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are read once; each new token is a pass of the batch, in which 4-bit weights are decoded.

    On a GPU with room for them they are decoded once.
    """
    items = tuple(Prompt(row=n, shown="?", text="?", ids=(3,) * (n + 1), own="") for n in range(3))
    prompts = Prompts(set_name="s", items=items, new_tokens=8, decode=str)
    p = replace(prepared, texts=replace(prepared.texts, prompts=prompts))
    assert asking(p).of_prompts("gptq") == 6 * 0.5 + 8 * (1.5 + 3 * 0.25), "three at once take longer than one"
    assert asking(p, token=0.1).of_prompts("gptq") == pytest.approx(6 * 0.1 + 8 * (1.0 + 0.75)), "not less than one"
    assert asking(p).of_prompts("adapter") == 6 * 0.5 + 8 * (1.5 + 0.75 + 2.0)
    assert asking(p).bytes_of_prompts("gptq") == asking(p).bytes_of_prompts("adapter") == 3 * (3 + 8) * 10
    for free, kept in ((4000, True), (3999, False)):
        monkeypatch.setattr(trained_base, "free_bytes", lambda device, free=free: free)
        on_gpu = asking(p, device="cuda")
        assert on_gpu.of_prompts("adapter") == 6 * 0.5 + 8 * (1.5 + 0.75) + (1 if kept else 8) * 2.0
        assert on_gpu.bytes_of_prompts("adapter") == 3 * (3 + 8) * 10 + kept * 2 * 1000
        assert on_gpu.bytes_of_prompts("gptq") == 3 * (3 + 8) * 10
    assert asking(p, "gptq").of_prompts("gptq") == asking(p, "gptq").bytes_of_prompts("gptq") == 0
    assert asking(prepared).of_prompts("gptq") == 0, "plain text has no prompts"


def test_the_sums_of_tasks_and_roads(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained_base, "free_bytes", lambda _: 3999)  # 4-bit weights of 2000 bytes stay packed
    task: Any = SimpleNamespace(tokens=600, written=0, requests=10, longest=40)
    writes: Any = SimpleNamespace(tokens=100, written=60, requests=6, longest=40)
    tasks: Any = SimpleNamespace(items=(task, writes))
    assert asking(prepared).needs(7) == [], "of what is not asked for there is no line"
    p = replace(prepared, tasks=tasks)
    of_one = 5.0 + 700 * 0.75 + 2 * 10 * (2.0 + 4 * 0.25)
    assert asking(p).of_tasks("merged") == pytest.approx(of_one), "four at a time, twice, ten tokens each"
    (need,) = asking(p).needs(7)
    assert (need.stage, need.host, need.device) == ("tasks", 7 + 900, 0)
    assert need.seconds == pytest.approx(3 * of_one + 2 * 10 * 2.0), "adapter, merged, gptq"
    evaluate = prepared.recipe.evaluate
    served = evaluate.model_copy(update={"task_backend": "vllm", "roads": ("rtn", "nf4-again", "gptqmodel")})
    through = replace(p, recipe=p.recipe.model_copy(update={"evaluate": served}))
    roads, own = asking(through, device="cuda").needs(7)
    assert (roads.stage, roads.seconds, roads.host, roads.device) == ("roads", 7.0 + 11.0, 7, 500)
    assert own.seconds == pytest.approx(of_one + 2 * 10 * 2.0), "the adapter alone"
    assert own.device == 500
    monkeypatch.setattr(trained_base, "free_bytes", lambda _: 4000)
    _, own = asking(through, device="cuda").needs(7)
    assert own.seconds == pytest.approx(of_one + 2.0), "decoded once"
    assert own.device == 500 + 1000 * 2
    assert asking(p, "adapter", "merged", "gptq").needs(7) == [], "what does not fit is not run"


def test_the_sums_of_a_merge(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower of computing all tensors and of reading and writing them, plus both ends."""
    ops, target = prepared.merge.plan.ops, torch.float32
    monkeypatch.setattr(forecast_merge, "cost_of", lambda *_: Cost(2.0, 10**6))
    total = sum(s.nbytes for s in prepared.merge.plan.slots(target))
    assert prepared.recipe.merge.dtype == "float32"
    slow_disk = forecast_merge.merging(prepared, CPU, 7, forecast_merge.Disk(3.0, 0.25, 1.0))
    assert slow_disk.seconds == pytest.approx(4.25 * total)
    fast_disk = forecast_merge.merging(prepared, CPU, 7, forecast_merge.Disk(1e-9, 0.25, 1e-9))
    assert fast_disk.seconds == pytest.approx(2.0 * len(ops) + 0.25 * total)
    assert fast_disk.host == 7 + 10**6 + 4 * 300 * 64
    assert fast_disk.device == 0
    auto = prepared.recipe.model_copy(update={"merge": prepared.recipe.merge.model_copy(update={"dtype": "auto"})})
    own = forecast_merge.merging(replace(prepared, recipe=auto), CPU, 7, forecast_merge.Disk(1e-9, 0.0, 1e-9))
    assert own.seconds == pytest.approx(2.0 * len(ops)), "a bfloat16 base stays one, whatever its weights"
    monkeypatch.setattr(forecast_merge, "merged_in", lambda _: torch.float16)
    bounded = forecast_merge.merging(replace(prepared, recipe=auto), CPU, 7, forecast_merge.Disk(1e-9, 0.0, 1e-9))
    assert bounded.seconds == pytest.approx(4.0 * len(ops)), "a bound of each tensor comes first"


def test_a_gpu_holds_what_is_made_rounded_and_written() -> None:
    def op(*shape: int) -> Any:
        return SimpleNamespace(shape=shape, action="folded")

    def there(*shapes: int) -> int:
        made = {
            ((10,), "folded"): Made(500, 40, 20),
            ((1,), "folded"): Made(7, 4, 2),
            ((9,), "folded"): Made(90, 18, 0),
        }
        return forecast_merge._peak_on_gpu([op(n) for n in shapes], made)

    assert there(10) == 500
    assert there(10, 1) == 500, "nothing else is there while the first is made"
    assert there(1, 10) == 4 + 2 + 500
    assert there(1, 1, 10) == 4 + 2 + 2 + 500
    assert there(1, 10, 10) == 40 + 20 + 2 + 500
    assert there(9, 9, 10) == 18 + 18 + 500, "what needs no rounding is written as it is"
    assert there(1, 1, 1) == 4 + 2 + 2 + 7


def test_what_a_tensor_takes_is_seen_on_the_way(prepared: Prepared) -> None:
    op = next(op for op in prepared.merge.plan.ops if op.folds)
    made = Made.of(prepared, op, CPU, torch.float16)
    assert made.held == 4 * math.prod(op.shape)
    assert made.rounded == 2 * math.prod(op.shape)
    assert Made.of(prepared, op, CPU, torch.float32).rounded == 0


def test_the_disk_is_asked_to_write_and_to_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def cost(_: torch.device, work: Any) -> Cost:
        asked.append(work())
        return Cost(float(len(asked)) * PROBED)

    monkeypatch.setattr(forecast_merge, "cost_of", cost)
    disk = forecast_merge.Disk.probed(tmp_path, CPU)
    assert (disk.write, disk.sync, disk.fetch) == (1.0, 2.0, 0.0)
    assert asked == [PROBED, None]
    assert (tmp_path / "probe").stat().st_size == PROBED


@pytest.mark.slow
def test_a_block_that_takes_too_long_is_not_tried(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsal = Rehearsal(skeleton.open_model(prepared.sources.base), CPU)
    outputs = (64, 32, 32, 64, 128, 128)  # of the linears with 64 inputs; down has 128
    assert rehearsal.effort == sum(64**2 * (2 * 64 + 4 * n) for n in outputs) + 128**2 * (2 * 128 + 4 * 64)
    monkeypatch.setattr(forecast, "product_rate", lambda _: rehearsal.effort / forecast.LONGEST_REHEARSAL / 1.01)
    assert list(of(prepared)) == ["merge"]


def test_a_line_of_it() -> None:
    assert str(Need("merge", 4.2, 3 * 10**9)) == "merge about 4 s, 3.0 GB of memory"
    assert str(Need("quantize", 400.0, 10**9, 6 * 10**9)) == (
        "quantize about 6.7 min, 1.0 GB of memory, 6.0 GB of the GPU"
    )


@pytest.mark.slow
def test_each_format_is_forecast(project: Path, tmp_path: Path) -> None:
    """With the bytes that it writes; embeddings and head that are quantized make fewer."""
    asked = {"output.formats": ["gptq", "compressed-tensors", "gguf"]}
    plain = of(prepare.prepare(recipe(project, tmp_path, asked)))
    assert list(plain) == ["merge", "quantize", "compressed-tensors", "gguf", "evaluate"]
    p = prepare.prepare(recipe(project, tmp_path, asked | {"quantize.embeddings": 8, "quantize.head": 8}))
    ended = of(p)
    for name in ("compressed-tensors", "gguf"):
        written = output_formats.stored_bytes(p.quantize.ends.added_to(p.quantize.plan, name), name)
        assert ended[name].written == written < plain[name].written
        assert ended[name].seconds > 0
        assert ", writes 0.00 GB" in str(ended[name])
    assert plain["merge"].written == 0
