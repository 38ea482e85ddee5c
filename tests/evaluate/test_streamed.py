"""`requant.evaluate.streamed` against the whole model: families, variants, adapter kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import pico
from helpers.families import BY_KIND
from torch import Tensor

from requant import quantize
from requant.adapters import peft_directory
from requant.checkpoint.reader import Checkpoint
from requant.errors import StageError
from requant.evaluate import adapter_probe, streamed, variants
from requant.evaluate.streamed import StreamedModel
from requant.merge.base_weights import Nf4Settings
from requant.modeling import skeleton
from requant.modeling.block_walk import Walk
from requant.numerics.grid import Grid
from requant.quantize.plan import Settings
from requant.run import prepare
from requant_eval.scoring import batches
from requant_eval.scoring.batches import BatchSize
from requant_eval.scoring.canaries import Canary, ask, greedy

CPU = torch.device("cpu")
F32 = torch.float32


def windows(count: int = 5) -> list[Tensor]:
    """Of three lengths, one of them twice the same."""
    made = [*pico.ids(3, 20, seed=1), *pico.ids(2, 33, seed=2), *pico.ids(1, 9, seed=3)]
    return [*made, made[0]]


@torch.no_grad()
def compare(whole: Any, parts: StreamedModel, batch: int = 2, *, tolerance: float = 2e-6) -> None:
    """Logits of every window, alone and in batches, and of a window that was not run before."""
    seen: list[tuple[int, int]] = []
    parts.run(windows(), batch, lambda done, of: seen.append((done, of)))
    assert seen == [(i + 1, len(parts.walk)) for i in range(len(parts.walk))]
    assert all(p.is_meta for b in parts.walk.blocks for p in b.parameters() if id(p) not in parts.walk.own)
    for ids in [*(w[None] for w in windows()), pico.ids(3, 20, seed=1), pico.ids(1, 15, seed=9)]:
        assert pico.relative(parts(ids).logits.double(), pico.logits(whole, ids)) < tolerance


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "falcon", "cohere2", "granite", "mixtral", "opt", "phi"])
def test_blocks_one_after_another_are_the_model(tmp_path: Path, kind: str) -> None:
    """Tied heads, soft caps, windowed attention, multipliers, Conv1D, experts."""
    made = pico.model(kind, **BY_KIND[kind].changes)
    path = pico.save(made, tmp_path / "model")
    walk = Walk(Checkpoint(path), skeleton.open_model(path), device=CPU, dtype=F32)
    compare(made, StreamedModel(walk))


def tuned(tmp: Path, config: peft.PeftConfig, kind: str = "llama", **changes: Any) -> tuple[Any, StreamedModel]:
    """(PEFT's model on a 16-bit base, the streamed variant `adapter` made of the files)."""
    made = pico.model(kind, **changes)
    base = pico.save(made, tmp / "base")
    live = pico.train(made, tmp / "adapter", config=config)
    plan, _ = prepare.plan_merge(base, [peft_directory.load(tmp / "adapter")], None, trust_remote_code=False)
    sources = variants.VariantSources(base=base, adapter=tmp / "adapter", merged=base, gptq=base, plan=plan)
    return live, StreamedModel(streamed.walk_of("adapter", sources, device=CPU, dtype=F32))


ATTENTION = ["q_proj", "v_proj"]
KINDS: dict[str, tuple[peft.PeftConfig, dict[str, Any]]] = {
    "lora": (peft.LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION), {}),
    "dora": (peft.LoraConfig(r=4, lora_alpha=6, target_modules=[*ATTENTION, "down_proj"], use_dora=True), {}),
    "embedding": (peft.LoraConfig(r=4, lora_alpha=6, target_modules=["embed_tokens", "q_proj"]), {}),
    "head": (peft.LoraConfig(r=4, lora_alpha=6, target_modules=["lm_head", "q_proj"]), {}),
    "tied": (peft.LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION), {"tie_word_embeddings": True}),
    "saved": (peft.LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION, modules_to_save=["mlp", "norm", "lm_head"]), {}),
    "tokens": (peft.LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION, trainable_token_indices=[5, 90, 4]), {}),
    "bias": (peft.LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION, bias="all", lora_bias=True), {"attention_bias": True}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("config", "changes"), KINDS.values(), ids=KINDS.keys())
def test_the_adapter_stays_unmerged(tmp_path: Path, config: peft.PeftConfig, changes: dict[str, Any]) -> None:
    """The real PEFT over streamed weights: the logits of its model that is whole in memory."""
    compare(*tuned(tmp_path, config, **changes))


BASES = {
    "on disk": (None, 2e-6),
    "nf4": (Nf4Settings(quant_type="nf4", double_quant=False), 2e-6),
    # bitsandbytes' CPU code sends halves another way than its CUDA kernel, which ours follows (test_nf4)
    "fp4": (Nf4Settings(quant_type="fp4", double_quant=False), 0.1),
    "nested": (
        Nf4Settings(quant_type="nf4", double_quant=True),
        2e-3,
    ),  # bitsandbytes rounds a few scales wrongly: see test_merge
}


@pytest.mark.slow
@pytest.mark.parametrize(("simulate", "tolerance"), BASES.values(), ids=BASES.keys())
def test_base_and_adapter_are_those_of_bitsandbytes(
    tmp_path: Path, simulate: Nf4Settings | None, tolerance: float
) -> None:
    """The 4-bit base, stored or quantized while loading, and the adapter, through bitsandbytes."""
    made = pico.model()
    base = pico.save(made, tmp_path / "original", torch.bfloat16)
    if simulate is None:
        base = pico.save_4bit(base, tmp_path / "base", bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    pico.train(made, tmp_path / "adapter")
    plan, _ = prepare.plan_merge(base, [peft_directory.load(tmp_path / "adapter")], simulate, trust_remote_code=False)
    sources = variants.VariantSources(
        base=base, adapter=tmp_path / "adapter", merged=base, gptq=base, simulate=simulate, plan=plan
    )
    for name in ("base", "adapter"):
        live = variants.load(name, sources, device=CPU, dtype=F32)
        compare(live, StreamedModel(streamed.walk_of(name, sources, device=CPU, dtype=F32)), tolerance=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_what_is_made_of_the_merged_model(tmp_path: Path, kind: str) -> None:
    made = pico.model(kind)
    source = pico.save(made, tmp_path / "merged")
    grid = Grid(4, 32)
    (tmp_path / "gptq").mkdir()
    planned, _ = quantize.quantize(
        source, tmp_path / "gptq", pico.ids(4), Settings(grid=grid), dtype=torch.bfloat16, device=CPU
    )
    sources = variants.VariantSources(
        base=source,
        adapter=source,
        merged=source,
        gptq=tmp_path / "gptq",
        healed=tmp_path / "gptq",
        grids=planned.grids,
    )
    for name in ("merged", "rtn", "gptq", "healed"):
        live = variants.load(name, sources, device=CPU, dtype=F32)
        compare(live, StreamedModel(streamed.walk_of(name, sources, device=CPU, dtype=F32)))


def test_a_resized_vocabulary(tmp_path: Path) -> None:
    made = pico.model()
    base = pico.save(made, tmp_path / "base")
    made.config._name_or_path = str(base)
    made.resize_token_embeddings(pico.VOCABULARY + 8, mean_resizing=False)
    live = pico.train(made, tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"])
    plan, _ = prepare.plan_merge(base, [peft_directory.load(tmp_path / "adapter")], None, trust_remote_code=False)
    sources = variants.VariantSources(base=base, adapter=tmp_path / "adapter", merged=base, gptq=base, plan=plan)
    parts = StreamedModel(streamed.walk_of("adapter", sources, device=CPU, dtype=F32))
    ids = torch.tensor([[1, pico.VOCABULARY + 3, 5, pico.VOCABULARY + 7]])
    assert pico.relative(parts(ids).logits.double(), pico.logits(live, ids)) < 2e-6


def test_two_weighted_adapters(tmp_path: Path) -> None:
    base = pico.save(pico.model(), tmp_path / "base")
    for name, seed in (("a", 1), ("b", 2)):
        pico.train(pico.model(), tmp_path / name, seed=seed)
    loaded = [peft_directory.load(tmp_path / n, weight=w) for n, w in (("a", 0.5), ("b", 1.5))]
    plan, _ = prepare.plan_merge(base, loaded, None, trust_remote_code=False)
    sources = variants.VariantSources(
        base=base,
        adapter=tmp_path / "a",
        merged=base,
        gptq=base,
        simulate=Nf4Settings(quant_type="nf4", double_quant=False),
        plan=plan,
    )
    live = variants.load("adapter", sources, device=CPU, dtype=F32)
    compare(live, StreamedModel(streamed.walk_of("adapter", sources, device=CPU, dtype=F32)))


class Full:
    """Raises out-of-memory whenever a block sees more than `room` windows, as a device would."""

    def __init__(self, walk: Walk, room: int, when: int = 0) -> None:
        self.calls, forward = 0, walk.forward

        def limited(block: Any, hidden: Tensor, others: Any) -> Tensor:
            self.calls += 1
            if len(hidden) > room and self.calls > when:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(block, hidden, others)

        walk.forward = limited  # type: ignore[method-assign]


@pytest.mark.parametrize("changes", [False, True])
@torch.no_grad()
def test_windows_of_different_lengths_share_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: bool
) -> None:
    """Padded rows are answered from the cache; where padding is found to change states, each length runs apart."""
    made = pico.model()
    walk = Walk(
        Checkpoint(pico.save(made, tmp_path / "model")), skeleton.open_model(tmp_path / "model"), device=CPU, dtype=F32
    )
    parts, sizes = StreamedModel(walk), list[list[torch.Size]]()
    embed = walk.embed_all
    monkeypatch.setattr(walk, "embed_all", lambda many: (sizes.append([ids.shape for ids in many]), embed(many))[1])
    if changes:
        monkeypatch.setattr(streamed.batches, "padding_changes", lambda *_: True)
    parts.run(windows(), BatchSize(tokens=200, padding=50))
    together, apart = [(5, 33), (1, 9), (1, 20)], [(1, 9), (3, 20), (2, 33)]  # of the first, the last: the witness
    expected = [together, apart] if changes else [together]
    assert sizes == expected
    assert bool(parts.notes) == changes
    found = parts.forward_padded(batches.padded([windows()[3], windows()[0], windows()[5]]), lengths=[33, 20, 9]).logits
    for row, number in enumerate((3, 0, 5)):
        alone = windows()[number]
        assert pico.relative(found[row, : len(alone)].double(), pico.logits(made, alone[None])[0]) < 2e-6
    assert len(sizes) == len(expected), "nothing was run again"


@pytest.mark.slow
@pytest.mark.parametrize("when", [0, 1, 4])
@torch.no_grad()
def test_out_of_memory_halves_the_batch_and_goes_on(tmp_path: Path, when: int) -> None:
    """Finished batches are kept, wherever it happens: the logits do not change."""
    made = pico.model()
    path = pico.save(made, tmp_path / "model")
    walk = Walk(Checkpoint(path), skeleton.open_model(path), device=CPU, dtype=F32)
    parts = StreamedModel(walk)
    Full(walk, 1, when)
    parts.run(windows(), 3)
    assert [n.split(": ")[1] for n in parts.notes][:1] == ["out of memory with 3 windows at a time, went on with 2"]
    for ids in windows():
        assert pico.relative(parts(ids[None]).logits.double(), pico.logits(made, ids[None])) < 2e-6
    assert all(p.is_meta for b in walk.blocks for p in b.parameters())


@pytest.mark.slow
def test_out_of_memory_with_one_window(tmp_path: Path) -> None:
    path = pico.save(pico.model(), tmp_path / "model")
    walk = Walk(Checkpoint(path), skeleton.open_model(path), device=CPU, dtype=F32)
    parts = StreamedModel(walk)
    Full(walk, 0)
    with pytest.raises(StageError, match=r"layers.0: out of memory on cpu with one window at a time: shorten"):
        parts.run(windows(), 2)


def test_the_adapter_can_be_taken_off(tmp_path: Path) -> None:
    """As the adapter probe does: the same rows with the adapter and without."""
    live, parts = tuned(tmp_path, KINDS["lora"][0])
    rows = windows()
    parts.run(rows, 2)
    with parts.disable_adapter():
        parts.run(rows, 2)
    walked: list[int] = []
    parts.walk.load = walked.append  # type: ignore[method-assign,assignment]
    text = {"text": [adapter_probe.ProbeRow.whole(ids) for ids in rows]}
    (theirs,), (ours,) = (adapter_probe.measure(m, text, CPU) for m in (live, parts))
    assert not walked, "all of them have been run"
    assert ours.moved > 1e-3
    for name in ("without", "with_adapter", "moved"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-5)


def test_canaries_are_asked_in_step(tmp_path: Path) -> None:
    """Answers of different lengths, some ending early, are those of the whole model.

    One walk through the blocks for each token.
    """
    made = pico.model()
    path = pico.save(made, tmp_path / "model")
    parts = StreamedModel(Walk(Checkpoint(path), skeleton.open_model(path), device=CPU, dtype=F32))
    asked = [Canary("", "", tuple(w.tolist()), 3 + i) for i, w in enumerate(windows())]
    stop = greedy(made, asked[0].ids, 3, stop=None, device=CPU)[-1]
    alone = [greedy(made, c.ids, c.new_tokens, stop=stop, device=CPU) for c in asked]
    assert len(alone[0]) < 3
    loads: list[int] = []
    load = parts.walk.load
    parts.walk.load = lambda index: (loads.append(index), load(index))[1]  # type: ignore[method-assign,func-returns-value]
    given = ask(parts, asked, str, stop=stop, device=CPU)
    assert given == [str(ids) for ids in alone]
    assert loads.count(1) == max(min(len(ids) + 1, c.new_tokens) for ids, c in zip(alone, asked, strict=True))


def test_lora_on_stacked_experts_is_not_streamed(tmp_path: Path) -> None:
    made = pico.model("mixtral")
    base = pico.save(made, tmp_path / "base")
    pico.train(made, tmp_path / "adapter", target_parameters=["mlp.experts.gate_up_proj"])
    plan, _ = prepare.plan_merge(base, [peft_directory.load(tmp_path / "adapter")], None, trust_remote_code=False)
    sources = variants.VariantSources(base=base, adapter=tmp_path / "adapter", merged=base, gptq=base, plan=plan)
    assert [streamed.can_stream(n, sources) for n in ("base", "adapter", "merged")] == [True, False, True]
