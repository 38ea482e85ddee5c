"""`requant.heal`: gradients and losses against slow references, files, resuming, refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import pico
from helpers.devices import set_profile
from torch import Tensor, nn

from requant import quantize
from requant.checkpoint.reader import Checkpoint
from requant.data import duplicates, healing_text, overlap
from requant.data.documents import TokenDocument
from requant.data.healing_text import HealingText
from requant.errors import InputError, StageError
from requant.evaluate import variants
from requant.formats import gptq as gptq_format
from requant.heal import block_streams, blockwise, curve, end_to_end, kl_loss, student, teacher, trainer
from requant.heal import stage as heal
from requant.heal.job import HealJob
from requant.heal.model_size import ModelSize
from requant.heal.plan import HealPlan, choose_plan
from requant.heal.settings import HealSettings
from requant.modeling import skeleton
from requant.numerics.grid import Grid, deployable
from requant.quantize.plan import Settings
from requant_eval.scoring.lm_head import Head

CPU = torch.device("cpu")
LENGTH = 24
WHOLE = HealPlan(mode="whole", teacher_resident=True, recompute=False, micro_batch=4)
SETTINGS = HealSettings(steps=12, batch=4, length=LENGTH, lr=5e-3, tune=("scales",))


def quantized(path: Path, kind: str = "llama", *, grid: Grid = Grid(3, 32), **changes: Any) -> tuple[Path, Path]:  # noqa: B008
    """(a 16-bit pico model, our GPTQ of it)."""
    merged, out = path / "merged", path / "gptq"
    out.mkdir(parents=True)
    pico.save(pico.model(kind, **changes), merged)
    settings = Settings(grid=grid)
    quantize.quantize(merged, out, pico.ids(8, LENGTH), settings, dtype=torch.bfloat16, device=CPU)
    return merged, out


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return quantized(tmp_path_factory.mktemp("pair"), tie_word_embeddings=True)


def sample() -> HealingText:
    """48 windows to train on, 8 to choose by, 6 to judge by."""
    return HealingText(
        torch.cat([pico.ids(48, LENGTH, seed=1), pico.ids(8, LENGTH, seed=2), pico.ids(6, LENGTH, seed=3)]), 8, 6
    )


def model_of(merged: Path) -> Any:
    return variants.load("merged", variants.VariantSources.of_checkpoint(merged), device=CPU, dtype=torch.float32)


def run(pair: tuple[Path, Path], out: Path, settings: HealSettings = SETTINGS, **changes: Any) -> dict[str, Any]:
    """Heal on random text; `out` is made."""
    merged, source = pair
    out.mkdir()
    options = {name: changes.pop(name) for name in ("meta", "progress") if name in changes}
    job = HealJob(
        source=source,
        teacher=merged,
        load_teacher=lambda _: model_of(merged),
        text=changes.pop("text", None) or sample(),
        settings=settings,
        plan=changes.pop("plan", WHOLE),
        device=CPU,
        work=out.with_name(out.name + "-work"),
        key="k",
    )
    assert not changes
    return dict(heal.heal(job, out, **options))


def dense(path: Path) -> Any:
    """The checkpoint as an ordinary fp32 model."""
    return variants.quantized(path, device=CPU, dtype=torch.float32)


def divergence(path: Path, merged: Path, ids: Tensor) -> float:
    """Mean KL(merged || checkpoint), from all logits at once, in fp64."""
    p, q = (pico.logits(m, ids).log_softmax(-1) for m in (model_of(merged), dense(path)))
    return float((p.exp() * (p - q)).sum(-1).mean())


# --- the loss ---


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [7, 10**6])
def test_the_divergence_and_its_gradient_are_autograds(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None, chunk: int
) -> None:
    set_profile(monkeypatch, kl_chunk_logits=chunk * 40)
    weight, theirs_weight = torch.randn(40, 16), torch.randn(40, 16)
    head = Head(weight, torch.randn(40), 0.5, softcap)
    other = Head(theirs_weight, None, 2.0, None)
    hidden, theirs = torch.randn(33, 16, requires_grad=True), torch.randn(33, 16)
    ours = kl_loss.divergence(hidden, head, theirs, other, torch.float32)
    (gradient,) = torch.autograd.grad(3 * ours, hidden)
    twin = hidden.detach().double().requires_grad_()
    z = (twin @ weight.double().T + head.bias.double()) * 0.5
    z = z if softcap is None else torch.tanh(z / softcap) * softcap
    q, p = z.log_softmax(-1), (2.0 * theirs.double() @ theirs_weight.double().T).log_softmax(-1)
    expected = (p.exp() * (p - q)).sum()
    (wanted,) = torch.autograd.grad(3 * expected, twin)
    assert float(ours.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [1e-4, 1e-3, 1e-2])
def test_small_divergences_are_exact(change: float) -> None:
    """As those of 8-bit checkpoints: a plain fp32 sum is negative for some tokens at 1e-7."""
    width, vocabulary = 16, 5000
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, width, generator=generator)
    theirs = torch.randn(64, width, generator=generator)
    hidden = theirs + change * torch.randn(64, width, generator=generator)
    head = Head(weight)
    for row in range(0, 64, 16):
        ours = kl_loss.divergence(hidden[row : row + 1], head, theirs[row : row + 1], head, torch.float32)
        q, p = ((x[row : row + 1] @ weight.T).double().log_softmax(-1) for x in (hidden, theirs))
        assert float(ours) == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)


def test_a_model_does_not_diverge_from_itself() -> None:
    head, hidden = Head(torch.randn(40, 16)), torch.randn(9, 16, requires_grad=True)
    loss = kl_loss.divergence(hidden, head, hidden.detach(), head, torch.float32)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert abs(float(loss.detach())) < 1e-6
    assert float(gradient.abs().max()) < 1e-6


# --- the student ---


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_rebuild_the_weight(bits: int, symmetric: bool) -> None:
    codes = torch.randint(0, 2**bits, (32, 64), dtype=torch.uint8)
    scale = deployable(torch.rand(32, 2) + 0.5)
    zero = torch.full((32, 2), 2.0 ** (bits - 1)) if symmetric else torch.randint(1, 2**bits, (32, 2)).float()
    tensors = gptq_format.pack(codes, scale, zero, bits)
    stored = student.Codes.of(*gptq_format.unpack(tensors, bits), bits=bits, where="x")
    rebuilt = (stored.centred(torch.float32) * stored.scale[..., None]).flatten(1)
    assert torch.equal(rebuilt, gptq_format.dequantize(tensors, bits))
    assert stored.packed.numel() == (codes.numel() if bits == 8 else codes.numel() // 2)


def test_columns_in_any_order_of_groups() -> None:
    """desc_act: the columns of a group are not adjacent."""
    codes, scale = torch.randint(0, 16, (32, 64), dtype=torch.uint8), deployable(torch.rand(32, 2) + 0.5)
    g_idx = torch.randperm(64) // 32
    zero = torch.full((32, 2), 8.0)
    layer = student.ScaledLinear(
        student.Codes.of(codes, scale, zero, g_idx, bits=4, where="x"), torch.randn(32), torch.float32
    )
    x = torch.randn(5, 64)
    weight = (codes.float() - zero[:, g_idx]) * scale[:, g_idx]
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias), rtol=1e-5, atol=1e-4)


def test_groups_of_unequal_size_are_refused() -> None:
    g_idx = torch.arange(64) // 48
    with pytest.raises(InputError, match=r"x\.g_idx: its groups are not of equal size"):
        student.Codes.of(
            torch.zeros(32, 64, dtype=torch.uint8), torch.ones(32, 2), torch.ones(32, 2), g_idx, bits=4, where="x"
        )


def test_gradients_of_scales_and_inputs_are_autograds() -> None:
    codes, scale = torch.randint(0, 16, (32, 64), dtype=torch.uint8), deployable(torch.rand(32, 2) * 0.1 + 0.05)
    zero, g_idx = torch.full((32, 2), 8.0), torch.arange(64) // 32
    layer = student.ScaledLinear(student.Codes.of(codes, scale, zero, g_idx, bits=4, where="x"), None, torch.float32)
    moving = student.trainable_scales({"x": layer}, torch.float32)
    x, weights = torch.randn(7, 64, requires_grad=True), torch.randn(7, 32)
    (layer(x) * weights).sum().backward()
    twin, d = x.detach().double().requires_grad_(), torch.zeros(32, 2, dtype=torch.float64, requires_grad=True)
    weight = ((codes.double() - 8).view(32, 2, 32) * (scale.double() * (1 + d))[..., None]).flatten(1)
    ((twin @ weight.T) * weights).sum().backward()
    torch.testing.assert_close(x.grad.double(), twin.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moving.view(moving.offset.grad, "x.scales").double(), d.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes"), [("llama", {"attention_bias": True}), ("opt", {}), ("qwen3", {}), ("gpt2", {})]
)
def test_an_unmoved_student_is_the_checkpoint(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    """Biases, tied heads, norms without rounding: the same logits as the dequantized model."""
    _, source = quantized(tmp_path, kind, grid=Grid(4, 32), **changes)
    pupil = student.load(source, device=CPU, dtype=torch.float32, tune=("scales", "norms"))
    assert pico.relative(pico.logits(pupil.model), pico.logits(dense(source))) < 1e-5
    assert {n for n in pupil.values() if n.endswith(".scales")} == {
        n for n in Checkpoint(source) if n.endswith(".scales")
    }


def test_moved_values_are_those_that_a_file_can_hold(pair: tuple[Path, Path]) -> None:
    pupil = student.load(pair[1], device=CPU, dtype=torch.float32, tune=("scales", "norms"))
    before = pupil.values()
    for m in pupil.trainable:
        m.offset.copy_(torch.randn_like(m.offset) * 0.1)
    pupil.refresh()
    stored = Checkpoint(pair[1])
    for name, value in pupil.values().items():
        assert torch.equal(value.to(stored[name].dtype).float(), value)
        if name.endswith(".scales"):
            assert torch.equal(value.bfloat16().float(), value)
        assert not torch.equal(value, before[name])
    for m in pupil.trainable:
        m.offset.zero_()
    pupil.refresh()
    assert all(torch.equal(value, before[name]) for name, value in pupil.values().items()), "offset 0 is the file"


# --- healing ---


@pytest.mark.slow
def test_healing_brings_the_divergence_down(pair: tuple[Path, Path], tmp_path: Path) -> None:
    told = run(pair, tmp_path / "out", replace(SETTINGS, steps=40, lr=1e-2))
    merged, source = pair
    fresh = pico.ids(16, LENGTH, seed=3)
    before, after = divergence(source, merged, fresh), divergence(tmp_path / "out", merged, fresh)
    assert told["healed"]
    assert after < 0.95 * before, "on text that neither training nor the choice of the step has seen"
    assert told["kl_best"] == told["judged"][1] < told["judged"][0] == told["kl_start"]
    assert (told["held_windows"], told["judge_windows"]) == (8, 6)
    assert told["kl_best"] == pytest.approx(divergence(tmp_path / "out", merged, sample().windows[-6:]), rel=1e-3)
    assert told["kl_start"] == pytest.approx(divergence(source, merged, sample().windows[-6:]), rel=1e-3)
    assert 0 < told["moved"]["mean"] < 0.5
    assert len(told["train"]) == 40


def test_only_scales_change_in_the_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    run(pair, tmp_path / "out", meta={"healer": ["x"]})
    before, after = Checkpoint(pair[1]), Checkpoint(tmp_path / "out")
    assert list(before) == list(after)
    assert [i.offset for i in before.values()] == [i.offset for i in after.values()]
    changed = {n for n in before if not torch.equal(before.read(n), after.read(n))}
    assert changed
    assert all(n.endswith(".scales") for n in changed)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["meta"] == {"healer": ["x"]}
    del config["quantization_config"]["meta"]
    original = json.loads((pair[1] / "config.json").read_text())
    del original["quantization_config"]["meta"]
    assert config == original


def test_meta_that_is_no_object_is_replaced(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Another tool's checkpoint: loaders ignore it, so it may be anything."""
    shutil.copytree(pair[1], tmp_path / "foreign")
    config = json.loads((tmp_path / "foreign" / "config.json").read_text())
    config["quantization_config"]["meta"] = ["gptqmodel"]
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(config))
    run((pair[0], tmp_path / "foreign"), tmp_path / "out", meta={"healer": ["x"]})
    healed = json.loads((tmp_path / "out" / "config.json").read_text())
    assert healed["quantization_config"]["meta"] == {"healer": ["x"]}


def test_norms_move_when_asked(pair: tuple[Path, Path], tmp_path: Path) -> None:
    run(pair, tmp_path / "out", replace(SETTINGS, tune=("norms",)))
    before, after = Checkpoint(pair[1]), Checkpoint(tmp_path / "out")
    changed = {n for n in before if not torch.equal(before.read(n), after.read(n))}
    assert changed
    assert all("norm" in n for n in changed)


@pytest.mark.slow
def test_a_stored_teacher_recomputed_blocks_and_small_batches_change_nothing(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    plain = run(pair, tmp_path / "a")
    lean = run(pair, tmp_path / "b", plan=replace(WHOLE, teacher_resident=False, recompute=True, micro_batch=2))
    assert lean["held"] == [[n, pytest.approx(v, rel=1e-3)] for n, v in plain["held"]]
    assert (tmp_path / "b-work" / "teacher.safetensors").exists()


@pytest.mark.slow
def test_block_by_block_comes_near_end_to_end(pair: tuple[Path, Path], tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=40, lr=1e-2)
    told = run(pair, tmp_path / "out", settings, plan=replace(WHOLE, mode="blocks", teacher_resident=False))
    merged, source = pair
    fresh = pico.ids(16, LENGTH, seed=3)
    assert told["healed"]
    assert divergence(tmp_path / "out", merged, fresh) < 0.97 * divergence(source, merged, fresh)
    assert told["kl_best"] == pytest.approx(divergence(tmp_path / "out", merged, sample().windows[-6:]), rel=5e-3)
    assert told["kl_start"] == pytest.approx(divergence(source, merged, sample().windows[-6:]), rel=5e-3), (
        "merged's final norm"
    )
    assert all(b["best"] <= b["start"] for b in told["blocks"])


def test_what_gains_nothing_is_the_start_byte_for_byte(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """With a rate that ruins the model every validation is worse than the first."""
    told = run(pair, tmp_path / "out", replace(SETTINGS, lr=1.0))
    assert not told["healed"]
    assert told["best_step"] == 0
    assert "gained nothing" in heal.summary(told)
    for file in pair[1].glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert (tmp_path / "out" / "config.json").read_text() == (pair[1] / "config.json").read_text()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(pair, tmp_path / name, replace(SETTINGS, seed=seed))
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]


class Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["whole", "blocks"])
def test_a_killed_healing_goes_on_with_the_same_numbers(pair: tuple[Path, Path], tmp_path: Path, mode: Any) -> None:
    plan = replace(WHOLE, mode=mode, teacher_resident=False)
    armed, steps = [True], []

    def progress(done: int, total: int, note: str) -> None:
        steps.append((note == "windows of the teacher's hidden states", done))
        if armed and steps[-1] == (False, 7 if mode == "whole" else 1):
            raise Killed

    whole = run(pair, tmp_path / "a", plan=plan)
    with pytest.raises(Killed):
        run(pair, tmp_path / "b", plan=plan, progress=progress)
    shutil.rmtree(tmp_path / "b")
    armed.clear()
    steps.clear()
    again = run(pair, tmp_path / "b", plan=plan, progress=progress)
    assert again["held"] == whole["held"]
    assert again["train"] == whole["train"]
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()
    assert steps == [(False, n) for n in (range(7, 13) if mode == "whole" else (1, 2))], (
        "the last validation was at step 6"
    )


def windows_of(*kl: float, loss: float = 0.0) -> curve.Windows:
    """Held-out windows of one source."""
    values = torch.tensor(kl, dtype=torch.float64)
    return curve.Windows(values, torch.full_like(values, loss), (0,) * len(kl))


@pytest.mark.parametrize("mode", ["whole", "blocks"])
def test_a_step_that_the_judging_windows_refuse_is_not_taken(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    """The choosing windows are looked at up to eleven times: their least value says too much."""
    plan = replace(WHOLE, mode=mode, teacher_resident=False)
    better = run(pair, tmp_path / "better", plan=plan)
    assert better["healed"]
    if mode == "whole":
        judged = iter(windows_of(value) for value in (0.1, 0.1 + 1e-3))
        monkeypatch.setattr(trainer.Trainer, "_judged", lambda *_: next(judged))
    else:
        compare = block_streams.Streams.compare_with_teacher

        def worse(*given: Any) -> tuple[curve.Windows, curve.Windows]:
            start, end = compare(*given)
            return start, replace(end, kl=torch.cat((end.kl[:8], start.kl[8:] + 1e-3)))

        monkeypatch.setattr(block_streams.Streams, "compare_with_teacher", worse)
    told = run(pair, tmp_path / "out", plan=plan)
    assert not told["healed"]
    assert told["chosen_step"] == better["chosen_step"] > 0 == told["best_step"]
    assert told["kl_best"] == told["kl_start"]
    assert told["judged"] == [told["kl_start"], pytest.approx(told["kl_start"] + 1e-3)]
    for file in pair[1].glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["whole", "blocks"])
def test_a_damaged_state_is_no_state(
    pair: tuple[Path, Path], tmp_path: Path, mode: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Empty, cut, of another program, with other shapes, one bit changed: one line, and that part is healed again."""
    plan = replace(WHOLE, mode=mode, teacher_resident=False)
    whole = run(pair, tmp_path / "out", plan=plan)
    (state,) = tmp_path.rglob("state.safetensors" if mode == "whole" else "block-0000")
    kept = state.read_bytes()
    other = safetensors.torch.save({"offset.0": torch.ones(1)}, {"key": "k", "curve": "{}"})
    changed = kept[:-1] + bytes([kept[-1] ^ 1])
    for content in (b"", kept[:-50], b"something else", other, changed):
        state.write_bytes(content)
        shutil.rmtree(tmp_path / "out")
        caplog.clear()
        again = run(pair, tmp_path / "out", plan=plan)
        assert (again["held"], again["train"]) == (whole["held"], whole["train"])
        assert [m for m in caplog.messages if f"{state}: not readable" in m and "is made again" in m], content[:20]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_best(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = trainer.Trainer.step, []

    def breaks(self: trainer.Trainer, number: int, chosen: Any) -> float:
        calls.append(number)
        return float("nan") if number == 8 else step(self, number, chosen)

    monkeypatch.setattr(trainer.Trainer, "step", breaks)
    told = run(pair, tmp_path / "out")
    assert calls == list(range(9))
    assert told["stopped"] == "the loss was not finite at step 9"
    assert told["best_step"] <= 6
    assert told["kl_best"] <= told["kl_start"]
    assert told["kl_best"] == pytest.approx(divergence(tmp_path / "out", pair[0], sample().windows[-6:]), rel=1e-3)


# --- what cannot be healed ---


def damaged(source: Path, out: Path, **changes: Any) -> Path:
    shutil.copytree(source, out)
    pico.edit_tensors(out / "model.safetensors", **changes)
    return out


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_bad_scales_are_refused(pair: tuple[Path, Path], tmp_path: Path, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.scales"

    def spoil(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[0, 3] = value
        return tensor

    source = damaged(pair[1], tmp_path / "bad", change={name: spoil})
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.scales: holds zeros, NaN or infinity"):
        run((pair[0], source), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_another_models_teacher_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = pico.save(pico.model("llama", seed=5, tie_word_embeddings=True), tmp_path / "other")
    with pytest.raises(InputError, match=r"not the same model: .* has different values: give the 16-bit model"):
        run((other, pair[1]), tmp_path / "out")
    wider = pico.save(pico.model("llama", intermediate_size=160, tie_word_embeddings=True), tmp_path / "wider")
    with pytest.raises(InputError, match=r"not the same model: .* by their config\.json"):
        run((wider, pair[1]), tmp_path / "out2")


def test_a_teacher_is_in_16_bit_and_whole(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Else its linears would be random: weights in another form are not read."""
    with pytest.raises(InputError, match=r"gptq: is quantized itself: give the 16-bit model"):
        run((pair[1], pair[1]), tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj.weight"
    less = damaged(pair[0], tmp_path / "less", drop=[name])
    with pytest.raises(InputError, match=rf"less: 1 of the model's tensors are missing, e\.g\. {name}"):
        run((less, pair[1]), tmp_path / "out2")
    short = damaged(pair[0], tmp_path / "short", change={name: lambda t: t[:32]})
    with pytest.raises(InputError, match=rf"not the same model: {name} has .* in the files"):
        run((short, pair[1]), tmp_path / "out3")


def test_a_16_bit_model_is_no_checkpoint_to_heal(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"quant_method is None, expected one of gptq, compressed-tensors"):
        run((pair[0], pair[0]), tmp_path / "out")


def test_a_checkpoint_that_gives_nan_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source = damaged(
        pair[1], tmp_path / "bad", change={"model.layers.0.input_layernorm.weight": lambda t: t * float("nan")}
    )
    with pytest.raises(StageError, match=r"healing: .*NaN"):
        run((pair[0], source), tmp_path / "out")


# --- text ---


def documents(*lengths: int, start: int = 0) -> list[TokenDocument]:
    """Documents of running numbers: each token shows its document and position."""
    out = []
    for n in lengths:
        out.append(TokenDocument(tuple(range(start, start + n)), (True,) * n, n))
        start += n
    return out


def test_held_out_windows_share_no_text_with_the_others() -> None:
    entries = [("a", documents(100, 300, 50), 0.5), ("b", documents(500, start=1000), 0.5)]
    text = healing_text.pack(entries, train=80, held_out=6, length=10, seed=0, bos=None, eos=None)
    packed = text.windows
    assert packed.shape == (80 + text.held_out, 10)
    assert (text.train, text.length) == (80, 10)
    seen, judged = set(packed[:80].flatten().tolist()), set(packed[80:].flatten().tolist())
    assert not seen & judged
    assert sum(t < 1000 for t in packed[:80, 0].tolist()) == 40, "equal shares, though one is read more often"
    again = healing_text.pack(entries, train=80, held_out=6, length=10, seed=0, bos=None, eos=None)
    assert torch.equal(packed, again.windows)


def test_little_text_gives_few_held_out_windows() -> None:
    entries = [("a", documents(90), 0.5), ("b", documents(1000, start=1000), 0.5)]
    text = healing_text.pack(entries, train=8, held_out=16, length=10, seed=0, bos=None, eos=None)
    assert text.held_out == 2 + 8, "one that chooses and one that judges at least"
    assert len(text.windows) == 8 + text.held_out


def slices(text: HealingText) -> list[Tensor]:
    """The windows to train on, to choose by, to judge by."""
    return list(torch.split(text.windows, [text.train, text.choosing, text.judging]))


def runs_in(windows: Tensor, other: Tensor) -> float:
    """Share of the windows' 13-token runs that stand in `other`."""
    return overlap.overlap(other, windows.tolist())


def random_documents(count: int, length: int = 60, seed: int = 0) -> list[TokenDocument]:
    ids = pico.ids(count, length, seed=seed).tolist()
    return [TokenDocument(tuple(row), (True,) * length, length) for row in ids]


@pytest.mark.parametrize("how", ["twice", "nearly", "in another source"])
def test_copies_of_held_out_text_are_not_trained_on(how: str) -> None:
    """68 % of the held-out 13-token runs were trained on where each document stood twice."""
    once = random_documents(40)
    copies = [TokenDocument((*d.ids[:50], 1, *d.ids[51:]), d.scored, 60) if how == "nearly" else d for d in once]
    entries = [("a", once, 1.0), ("b", copies, 1.0)] if how == "in another source" else [("a", [*once, *copies], 1.0)]
    notes: list[str] = []
    text = healing_text.pack(entries, train=200, held_out=8, length=32, seed=0, bos=None, eos=2, notes=notes)
    training, choosing, judging = slices(text)
    assert len(choosing) == len(judging) > 1
    assert runs_in(choosing, training) == runs_in(judging, training) == 0.0
    assert runs_in(judging, choosing) == 0.0
    (note,) = notes
    assert note.startswith("healing: 80 of 80 documents stand in the text more than once, the same or nearly; ")
    assert " copies of what is held out are not trained on" in note


def test_documents_that_stand_once_are_all_used() -> None:
    """A prompt that most documents begin with makes no copies of them."""
    prompt = tuple(range(100, 160))
    several = [TokenDocument((*prompt, *d.ids), (True,) * 120, 1) for d in random_documents(40)]
    notes: list[str] = []
    text = healing_text.pack(
        [("a", several, 1.0)], train=400, held_out=8, length=32, seed=0, bos=None, eos=2, notes=notes
    )
    assert notes == []
    used = {t for window in text.windows.tolist() for t in window}
    assert used >= {t for d in several for t in d.ids}
    assert duplicates.same_text([d.ids for d in several]) == list(range(40))


def test_text_of_two_windows_is_not_judged_and_says_so() -> None:
    notes: list[str] = []
    text = healing_text.pack(
        [("a", documents(29), 1.0)], train=4, held_out=8, length=10, seed=0, bos=None, eos=None, notes=notes
    )
    assert (text.train, text.choosing, text.judging) == (4, 1, 0)
    assert len(notes) == 1
    assert "too short for windows that judge the chosen step" in notes[0]
    three = healing_text.pack([("a", documents(30), 1.0)], train=4, held_out=8, length=10, seed=0, bos=None, eos=None)
    assert (three.train, three.choosing, three.judging) == (4, 1, 1)
    assert three.digest != HealingText(three.windows, 2, 0).digest, "what a window is for is part of a stage's key"


def test_text_that_is_all_copies_is_refused() -> None:
    once = random_documents(1, length=25)
    with pytest.raises(InputError, match=r"healing: a has 25 tokens beside 39 copies of documents, .* need 40"):
        healing_text.pack([("a", once * 40, 1.0)], train=4, held_out=2, length=20, seed=0, bos=None, eos=None)


def test_text_shorter_than_two_windows_is_refused() -> None:
    with pytest.raises(InputError, match=r"healing: a has 19 tokens, .* need 20: lower heal\.length"):
        healing_text.pack([("a", documents(19), 1.0)], train=4, held_out=2, length=10, seed=0, bos=None, eos=None)


def test_every_epoch_has_its_own_order() -> None:
    order = trainer.batches(10, HealSettings(steps=6, batch=5))
    flat = [n for batch in order for n in batch]
    assert [sorted(flat[i : i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert flat[:10] != flat[10:20]


def test_the_rate_warms_up_and_ends_at_nothing() -> None:
    s = HealSettings(steps=100, lr=0.5)
    rates = [s.share_of_rate(n) for n in range(100)]
    assert max(rates) == rates[9] == 1
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert s.validation_steps() == {0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100}


# --- fitting a machine ---


def size_8b() -> ModelSize:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=False,
    )  # fmt: skip
    model = skeleton.build(config)
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear and "lm_head" not in n]
    return ModelSize.of(model, dict.fromkeys(names, Grid(4, 128)))


def test_the_mode_follows_the_memory() -> None:
    size = size_8b()
    assert size.quantized == 6_979_321_856
    text = HealingText(torch.zeros(2432, 512, dtype=torch.int64), 32)
    asked: dict[str, Any] = {"device": torch.device("cuda"), "rate": 5e14}
    scales = HealSettings(tune=("scales",))
    found = [choose_plan(size, scales, text, free=gb * 10**9, **asked) for gb in (160, 78, 23, 9)]
    assert [f.mode for f in found] == ["whole", "whole", "whole", "blocks"]
    assert [f.teacher_resident for f in found] == [True, True, False, False]
    assert all(f.bytes <= 0.85 * gb * 10**9 for f, gb in zip(found, (160, 78, 23, 9), strict=True))
    with pytest.raises(InputError, match=r"healing needs at least [0-9.]+ GB \(blocks\), cuda has 0\.5 GB free"):
        choose_plan(size, scales, text, free=5 * 10**8, **asked)
    assert "block by block" in str(found[3])


def test_teacher_and_student_find_their_heads_in_mixed_precision(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: bfloat16 products, fp32 residual stream; the loss stays near that of fp32."""
    text = sample()
    unquantized = _start(pair, text)
    for module in (teacher, end_to_end, block_streams, blockwise, heal):
        monkeypatch.setattr(module, "product_dtype", lambda _: torch.bfloat16)
    for module in (teacher, end_to_end, block_streams):
        monkeypatch.setattr(module, "precision", lambda _: torch.autocast("cpu", torch.bfloat16))
    assert _start(pair, text) == pytest.approx(unquantized, rel=0.02)


def _start(pair: tuple[Path, Path], text: HealingText) -> float:
    pupil = student.load(pair[1], device=CPU, dtype=teacher.product_dtype(CPU), tune=("scales",))
    taught = teacher.ResidentTeacher(model_of(pair[0]), text.windows, CPU)
    loss = end_to_end.EndToEndLoss(pupil, taught, text, CPU)
    trained = trainer.Trainer(pupil, loss, loss.measure, SETTINGS, train=text.train, choosing=text.choosing)
    return float(trained.look(range(48, 56)).kl.mean())
