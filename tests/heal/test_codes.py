"""Trained codes: gradients, files, resuming, never worse, every width, other tools' files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from heal import test_stage
from heal.test_stage import CPU, LENGTH, SETTINGS, Killed, divergence, quantized
from helpers import pico
from torch import Tensor

from requant.checkpoint.reader import Checkpoint
from requant.data import healing_text
from requant.data.documents import TokenDocument
from requant.errors import InputError
from requant.formats import gptq as gptq_format
from requant.formats.registry import open_quantized
from requant.heal import curve, latents, student, trainer
from requant.heal import stage as heal
from requant.heal.codes import Codes
from requant.heal.plan import choose_plan
from requant.numerics.grid import Grid, deployable

CODES = replace(SETTINGS, tune=("scales", "codes"), steps=20, batch=16, code_lr=0.01)
WHOLE = replace(test_stage.WHOLE, micro_batch=16)


def sample() -> healing_text.HealingText:
    """640 windows to train on, 16 to choose by, 16 to judge by."""
    windows = [pico.ids(count, LENGTH, seed=seed) for seed, count in ((1, 640), (2, 16), (3, 16))]
    return healing_text.HealingText(torch.cat(windows), 16, 16)


def run(pair: tuple[Path, Path], out: Path, settings: Any = CODES, **changes: Any) -> dict[str, Any]:
    """Heal on random text that is not learned by heart; `out` is made."""
    return test_stage.run(pair, out, settings, text=sample(), **{"plan": WHOLE} | changes)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return quantized(tmp_path_factory.mktemp("codes"), tie_word_embeddings=True)


def layer_of(
    bits: int, *, symmetric: bool = True, shuffled: bool = False
) -> tuple[student.ScaledLinear, Tensor, Tensor, Tensor, Tensor]:
    """A linear [32, 64] of two groups, its codes, scales, zero points and the group of each column."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (32, 64), dtype=torch.uint8, generator=generator)
    scale = deployable(torch.rand(32, 2, generator=generator) * 0.1 + 0.05)
    zero = torch.full((32, 2), 2.0 ** (bits - 1))
    if not symmetric:
        zero = torch.randint(1, 2**bits, (32, 2), generator=generator).float()
    g_idx = torch.arange(64) // 32
    if shuffled:
        g_idx = g_idx[torch.randperm(64, generator=generator)]
    stored = Codes.of(codes, scale, zero, g_idx, bits=bits, where="x")
    return student.ScaledLinear(stored, None, torch.float32), codes, scale, zero, g_idx


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("symmetric", "shuffled"), [(True, False), (False, False), (False, True)])
def test_the_gradient_goes_straight_through_the_rounding(bits: int, symmetric: bool, shuffled: bool) -> None:
    """As of W = scale (1 + d) (u + (round(u) - u).detach() - zero) in fp64, by autograd."""
    layer, codes, scale, zero, g_idx = layer_of(bits, symmetric=symmetric, shuffled=shuffled)
    weight = (codes.float() - zero[:, g_idx] + 0.9 * (torch.rand(32, 64) - 0.5)) * scale[:, g_idx]
    moving = student.trainable_scales({"x": layer}, torch.float32)
    trained = student.train_codes("x", layer, weight)
    x, weights = torch.randn(7, 64, requires_grad=True), torch.randn(7, 32)
    (layer(x) * weights).sum().backward()

    twin, d = x.detach().double().requires_grad_(), torch.zeros(32, 2, dtype=torch.float64, requires_grad=True)
    order = torch.argsort(g_idx, stable=True)
    u = torch.empty(32, 64, dtype=torch.float64)
    u[:, order] = trained.offset.detach().double()
    u.requires_grad_()
    rounded = u + (u.round() - u).detach()
    dense = (rounded - zero[:, g_idx].double()) * (scale.double() * (1 + d))[:, g_idx]
    ((twin @ dense.T) * weights).sum().backward()
    torch.testing.assert_close(trained.offset.grad.double(), u.grad[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moving.view(moving.offset.grad, "x.scales").double(), d.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), twin.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shuffled", [False, True])
def test_what_moved_is_packed_exactly(bits: int, shuffled: bool) -> None:
    """The packed codes decode to the weight that the forward pass used."""
    layer, _, scale, zero, g_idx = layer_of(bits, symmetric=False, shuffled=shuffled)
    trained = student.train_codes("x", layer, None)
    with torch.no_grad():
        trained.offset += 3 * torch.randn(32, 64)
    trained.refresh()
    used = layer(torch.eye(64)).T
    (value,) = trained.values().values()
    tensors = gptq_format.pack(value, scale, zero, bits) | {"g_idx": g_idx.int()}
    assert torch.equal(gptq_format.dequantize(tensors, bits), used)
    assert 0 <= int(value.min()) < int(value.max()) <= 2**bits - 1, "never out of the range"


@pytest.mark.parametrize("shuffled", [False, True])
def test_latents_begin_inside_their_cells(shuffled: bool) -> None:
    layer, codes, scale, zero, g_idx = layer_of(4, symmetric=False, shuffled=shuffled)
    residual = torch.rand(32, 64) * 2 - 1  # error correction moves codes by more than half a step
    weight = (codes.float() - zero[:, g_idx] + residual) * scale[:, g_idx]
    begun = latents.latent_of(layer.codes, weight)
    order = torch.argsort(g_idx, stable=True)
    assert torch.equal(begun.round(), codes[:, order].float())
    wanted = residual.clamp(-latents.EDGE, latents.EDGE)[:, order]
    torch.testing.assert_close(begun - codes[:, order].float(), wanted, rtol=0, atol=1e-4)
    for unknown in (None, torch.ones(3, 3)):
        assert torch.equal(latents.latent_of(layer.codes, unknown), codes[:, order].float()), "the middle"


def test_a_code_at_the_end_of_the_range_can_come_back() -> None:
    """A clipped weight lies outside of the grid: its latent is held in the last cell, and keeps its gradient."""
    layer, codes, scale, zero, g_idx = layer_of(4)
    trained = student.train_codes("x", layer, (codes.float() + 40 - zero[:, g_idx]) * scale[:, g_idx])
    for step in (9.0, -1.0):
        with torch.no_grad():
            trained.offset += step
        trained.refresh()
    assert int(layer.codes.integers().max()) == 14
    layer(torch.randn(3, 64)).sum().backward()
    assert bool((trained.offset.grad != 0).all())


# --- files ---


def changed_codes(before: Path, after: Path) -> float:
    """The share of codes that differ, from the files."""
    a, b = open_quantized(before), open_quantized(after)
    differ = torch.cat([(a.unpack(n)[0] != b.unpack(n)[0]).flatten() for n in sorted(a.quantized)])
    return float(differ.float().mean())


def same_but_for(before: Path, after: Path, *suffixes: str) -> None:
    """The same tensors at the same places; only those of these suffixes have other bytes."""
    a, b = Checkpoint(before), Checkpoint(after)
    assert [(n, i.offset, i.shape, i.dtype) for n, i in a.items()] == [
        (n, i.offset, i.shape, i.dtype) for n, i in b.items()
    ]
    changed = {n.rpartition(".")[2] for n in a if not torch.equal(a.read(n), b.read(n))}
    assert changed == set(suffixes)


def test_codes_and_scales_change_and_nothing_else(pair: tuple[Path, Path], tmp_path: Path) -> None:
    before = {f.name: f.read_bytes() for f in pair[1].iterdir()}
    told = run(pair, tmp_path / "out", CODES)
    merged, source = pair
    assert told["healed"]
    assert told["tuned"] == ["scales", "codes"]
    same_but_for(source, tmp_path / "out", "qweight", "scales")
    changes = told["changed_codes"]
    assert changes["share"] == pytest.approx(changed_codes(source, tmp_path / "out"))
    assert 0 < changes["share"] < 0.5
    assert sum(changes["by"].values()) == round(changes["share"] * changes["codes"])
    assert changes["most"] == max(map(int, changes["by"]))
    assert told["kl_best"] == pytest.approx(divergence(tmp_path / "out", merged, sample().windows[-16:]), rel=1e-3), (
        "what the file decodes to is what was trained"
    )
    assert {f.name: f.read_bytes() for f in source.iterdir()} == before, "the unhealed file is never touched"


def test_codes_give_more_than_scales_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    both = run(pair, tmp_path / "both", replace(CODES, steps=40))
    alone = run(pair, tmp_path / "alone", replace(SETTINGS, steps=40))
    assert both["kl_best"] < alone["kl_best"] < both["kl_start"]


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (4, False), (8, True)])
def test_codes_alone_at_other_widths(tmp_path: Path, bits: int, symmetric: bool) -> None:
    both = quantized(tmp_path, grid=Grid(bits, 32, symmetric=symmetric))
    told = run(both, tmp_path / "out", replace(CODES, tune=("codes",)))
    if told["healed"]:
        same_but_for(both[1], tmp_path / "out", "qweight")
    else:
        assert bits == 8, "there is nearly nothing to gain"
    after = divergence(tmp_path / "out", both[0], sample().windows[-16:])
    assert after <= divergence(both[1], both[0], sample().windows[-16:]) * (1 + 1e-4)


def test_a_rate_that_ruins_the_codes_leaves_the_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    told = run(pair, tmp_path / "out", replace(CODES, code_lr=1.0, steps=6))
    assert not told["healed"]
    assert told["changed_codes"] is None
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (pair[1] / "model.safetensors").read_bytes()


def test_killed_it_goes_on_to_the_same_bytes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    settings = replace(CODES, steps=12)
    armed = [True]

    def progress(done: int, *_: Any) -> None:
        if armed and done == 7:
            raise Killed

    run(pair, tmp_path / "a", settings)
    with pytest.raises(Killed):
        run(pair, tmp_path / "b", settings, progress=progress)
    shutil.rmtree(tmp_path / "b")
    armed.clear()
    run(pair, tmp_path / "b", settings, progress=progress)
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "b")
    told = run(pair, tmp_path / "b", settings, plan=replace(WHOLE, codes=False))
    assert told["tuned"] == ["scales"], "a state with codes is none of scales alone"
    same_but_for(pair[1], tmp_path / "b", "scales")


def of_gptqmodels_kind(pair: tuple[Path, Path], other: Path) -> Path:
    """The checkpoint with columns of a group apart (desc_act), and zero points and scales as another tool chooses."""
    merged, source = pair
    shutil.copytree(source, other)
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"] |= {"desc_act": True, "meta": {"quantizer": ["gptqmodel:7.7.0"]}}
    (other / "config.json").write_text(json.dumps(config))
    reader, change, generator = open_quantized(source), {}, torch.Generator().manual_seed(0)
    for name in sorted(reader.quantized):
        stem = name.removesuffix("weight")
        weight, tensors = Checkpoint(merged).read(name).float(), reader.tensors(name)
        g_idx = tensors["g_idx"][torch.randperm(weight.shape[1], generator=generator)]
        _, scale, _, _ = reader.unpack(name)
        scale = (scale * 1.1).half().float()
        codes = (weight / scale[:, g_idx.long()] + 4).round().clamp(0, 7).to(torch.uint8)
        packed = gptq_format.pack(codes, scale, torch.full_like(scale, 4), 3) | {"g_idx": g_idx}
        change |= {stem + suffix: (lambda _, value=value: value) for suffix, value in packed.items()}
    pico.edit_tensors(other / "model.safetensors", change=change)
    return other


def test_a_file_of_gptqmodels_kind(pair: tuple[Path, Path], tmp_path: Path) -> None:
    merged, other = pair[0], of_gptqmodels_kind(pair, tmp_path / "other")
    told = run((merged, other), tmp_path / "out", CODES)
    assert told["healed"]
    same_but_for(other, tmp_path / "out", "qweight", "scales")
    assert told["kl_best"] == pytest.approx(divergence(tmp_path / "out", merged, sample().windows[-16:]), rel=1e-3)


# --- text, choice, plan ---


def documents(count: int, start: int = 0, length: int = 20) -> list[TokenDocument]:
    """Documents of running numbers."""
    return [
        TokenDocument(tuple(range(start + i * length, start + (i + 1) * length)), (True,) * length, length)
        for i in range(count)
    ]


def test_each_text_is_read_once_before_any_twice() -> None:
    once = documents(40)
    entries = [("a", [*once, *once[:20]], 0.5), ("b", documents(400, start=10_000), 0.5)]
    text = healing_text.pack(entries, train=160, held_out=8, length=10, seed=0, bos=None, eos=None)
    read = sorted(t for t in text.windows[: text.train].flatten().tolist() if t < 10_000)
    assert len(read) == 800
    assert len(set(read)) == 800 - text.held_out // 2 * 10, (
        "all of a that is not held out, though much of it stands twice"
    )
    assert text.names == ("a", "b")
    assert text.reads[0] == pytest.approx(800 / 760, rel=0.01)
    assert text.reads[1] < 0.2
    assert sorted(set(text.held_out_sources)) == [0, 1]
    held = text.windows[text.train :, 0] >= 10_000
    assert held.int().tolist() == list(text.held_out_sources)


def look(steps: int, kl: float, *losses: float, noise: float = 0.0) -> curve.Look:
    """A look at eight windows of two sources."""
    sources = (0,) * 4 + (1,) * 4
    loss = torch.tensor([value for value in losses or (0.0, 0.0) for _ in range(4)], dtype=torch.float64)
    loss += noise * torch.tensor([1.0, -1.0, -1.0, 1.0] * 2, dtype=torch.float64)
    return curve.Look(steps, curve.Windows(torch.full((8,), kl, dtype=torch.float64), loss, sources))


def test_the_step_is_chosen_by_kl_and_loss() -> None:
    """At 4 bits the rate 0.005 ended at KL 0.0497 and losses of 0.0213 and 0.0135, 0.01 at 0.0556, 0.0163 and 0.0042."""
    start, slow, fast = look(0, 0.06, 0.05, 0.05), look(1, 0.0497, 0.0213, 0.0135), look(2, 0.0556, 0.0163, 0.0042)
    assert curve.LossCurve([], [start, slow, fast]).best is fast
    assert curve.LossCurve([], [start, fast, slow]).best is fast, "whatever was seen first"
    noisy = look(2, 0.0556, 0.0163, 0.0042, noise=0.02)
    assert curve.LossCurve([], [start, slow, noisy]).best is slow, "a loss that may be chance does not choose"
    below = look(3, 0.0556, -0.5, -0.5)
    assert below.score == pytest.approx(0.0556), "a loss below the teacher's is chance, or learned by heart: no merit"
    above = look(4, 0.0601, 0.0, 0.0)
    assert curve.LossCurve([], [start, above]).best is start, "no step has a higher KL than the start"


def test_a_kl_that_rises_by_its_noise_keeps_no_file() -> None:
    """Of one source it rose by 0.0001 on eight windows that differ by 0.002, while the whole gained."""
    sources, flat = [0] * 8 + [1] * 8, torch.ones(16).double()
    noise = 0.002 * torch.tensor([1.0, -1.0] * 8).double()
    risen = torch.tensor(sources).double()
    start = curve.Windows(0.05 * flat, 0.03 * flat, sources)
    lower = start.kl - 0.01 * (1 - risen)
    for kl, better in ((lower + noise + 1e-4 * risen, True), (lower + noise + 5e-3 * risen, False)):
        moved = replace(start, kl=kl, loss=start.loss - 0.02)
        assert curve.Judgement.of(start, moved, 9).better is better
        assert (curve.LossCurve([], [curve.Look(0, start), curve.Look(9, moved)]).best.steps == 9) is better
    dearer = replace(start, kl=start.kl + noise + 1e-4, loss=start.loss - 0.02)
    assert curve.LossCurve([], [curve.Look(0, start), curve.Look(9, dearer)]).best.steps == 0, "no mean KL above it"
    few = [curve.Windows(w.kl[:12:3], w.loss[:12:3], w.sources[:12:3]) for w in (start, dearer)]
    assert curve.Judgement.of(*few, 9).worse, "of few windows the noise is not known: none may rise"


def test_a_source_that_becomes_worse_keeps_the_file() -> None:
    other = torch.tensor([0] * 8 + [1] * 8)
    flat = torch.ones(16).double()
    start, noise = curve.Windows(0.10 * flat, 0.05 * flat, other.tolist()), torch.tensor([0.01, -0.01] * 8).double()
    gained = replace(start, kl=start.kl - 0.05, loss=start.loss + noise)
    assert curve.Judgement.of(start, gained, 9).better, "a loss that differs by its noise"
    dearer = replace(gained, loss=start.loss + noise / 10 + 0.02 * other)
    farther = replace(gained, kl=torch.where(other == 1, start.kl + 0.001, start.kl - 0.05))
    for worse in (dearer, farther):
        judged = curve.Judgement.of(start, worse, 9)
        assert judged.worse == (1,)
        assert not judged.better
    few = [curve.Windows(w.kl[4:12], w.loss[4:12], w.sources[4:12]) for w in (start, dearer)]
    assert curve.Judgement.of(*few, 9).better, "of four windows a source the noise is not known"


def test_training_stops_when_held_out_text_turns() -> None:
    rising = [look(n, kl) for n, kl in ((0, 0.5), (10, 0.7), (20, 0.8), (30, 0.9))]
    assert not curve.LossCurve([], rising).turned(100), "at the high rate of the first half it may rise"
    late = [look(n, kl) for n, kl in ((0, 0.6), (50, 0.4), (60, 0.5), (70, 0.5), (80, 0.5))]
    assert curve.LossCurve([], late).turned(100)
    assert not curve.LossCurve([], late[:4]).turned(100)
    stored = curve.LossCurve.from_json(curve.LossCurve([], late).to_json())
    assert [(x.steps, x.kl, x.loss) for x in stored.held_out] == [(x.steps, x.kl, x.loss) for x in late]


def test_codes_that_do_not_fit_stay_and_the_plan_says_so(pair: tuple[Path, Path]) -> None:
    from heal.test_stage import size_8b

    asked: dict[str, Any] = {"device": torch.device("cuda"), "rate": 5e14, "mode": "whole"}
    settings = replace(CODES, batch=16, length=512)
    text = healing_text.HealingText(torch.zeros(2432, 512, dtype=torch.int64), 32)
    large, small = (choose_plan(size_8b(), settings, text, free=gb * 10**9, **asked) for gb in (200, 80))
    assert large.codes
    assert large.bytes > 16 * size_8b().quantized
    assert not small.codes
    assert "; codes stay: with them 1" in str(small)
    with pytest.raises(InputError, match=r"healing needs at least .* \(whole\), .* heal\.mode: auto, or set heal: off"):
        choose_plan(size_8b(), replace(settings, tune=("codes",)), text, free=80 * 10**9, **asked)


def test_the_summary_says_how_many_codes_changed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    told: Any = run(pair, tmp_path / "out", CODES)
    assert f"{told['changed_codes']['share']:.2%} of the codes changed" in heal.summary(told)


def test_a_state_knows_what_it_is_of(pair: tuple[Path, Path]) -> None:
    pupil = student.load(pair[1], device=CPU, dtype=torch.float32, tune=("codes",), original=pair[0])
    assert {v.unit_of_rate for v in pupil.trainable} == {"code"}
    assert set(pupil.values()) == {n for n in Checkpoint(pair[1]) if n.endswith(".qweight")}
    assert (
        pico.relative(pico.logits(pupil.model, pico.ids(2, LENGTH)), pico.logits(pupil.model, pico.ids(2, LENGTH))) == 0
    )


def test_a_large_state_is_written_seldom(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents and moments are 12 bytes a weight: written after every look they would cost more than the training."""
    clock, written = [0.0], []
    monkeypatch.setattr(trainer.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(trainer.Trainer, "save", lambda self, *_: written.append(len(self.curve.train)) or due(self))

    def due(trained: trainer.Trainer) -> None:
        trained._saved_at = clock[0]

    def tick(done: int, *_: object) -> None:
        clock[0] = float(done)

    run(pair, tmp_path / "small", progress=tick)
    assert written == [5, 10, 15, 20], "a small one after every look"
    written.clear()
    clock[0] = 0.0
    monkeypatch.setattr(trainer, "SMALL_STATE", 0)
    monkeypatch.setattr(trainer, "STATE_BYTES_A_SECOND", 12 * sum(p.numel() for p in _weights(pair)) / 0.4)
    run(pair, tmp_path / "large", progress=tick)
    assert written == [10, 20], "writing takes 0.4 s, of which 8 s of training are worth it"


def _weights(pair: tuple[Path, Path]) -> list[Tensor]:
    """The weights of the quantized linears, and their scales."""
    pupil = student.load(pair[1], device=CPU, dtype=torch.float32, tune=CODES.tune)
    return [v.offset for v in pupil.trainable]
