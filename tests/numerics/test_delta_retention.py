"""`requant.numerics.delta_retention` and `requant.merge.deltas`: identities, real adapters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico
from torch import Tensor

from requant.adapters import peft_directory
from requant.checkpoint.reader import Checkpoint
from requant.formats.registry import load_quantized
from requant.merge.deltas import deltas
from requant.merge.plan import MergePlan
from requant.numerics.delta_retention import Delta, DeltaRetention, delta_retention
from requant.numerics.grid import Grid
from requant.quantize.module_results import ModuleResult
from requant.quantize.plan import Settings
from requant.quantize.stage import quantize
from requant.run import prepare

ROWS, COLUMNS, RANK = 24, 40, 4


def factors(seed: int = 0) -> Delta:
    draw = torch.Generator().manual_seed(seed)
    return Delta(torch.randn(ROWS, RANK, generator=draw), torch.randn(RANK, COLUMNS, generator=draw))


def moments(seed: int = 1, n: int = COLUMNS) -> Tensor:
    x = torch.randn(3 * n, n, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.2, 3, n)
    return x.T @ x / len(x)


def noise(error: Tensor, hessian: Tensor) -> float:
    return float(torch.trace(error.double() @ hessian.double() @ error.double().T))


def of(delta: Delta, error: Tensor, hessian: Tensor) -> DeltaRetention:
    return delta_retention(delta, error, hessian, noise(error, hessian))


# --- identities ---


def test_exact_weights_keep_everything() -> None:
    kept = of(factors(), torch.zeros(ROWS, COLUMNS), moments())
    assert kept.retention == kept.output_retention == 1
    assert kept.signal_to_noise is None, "there is no noise to divide by"
    assert kept.signal > 0


def test_no_delta_no_signal() -> None:
    """Of an adapter that was never trained (B = 0) nothing can be lost."""
    delta = Delta(torch.zeros(ROWS, RANK), torch.ones(RANK, COLUMNS))
    assert of(delta, torch.ones(ROWS, COLUMNS), moments()) == DeltaRetention(
        delta_norm=0.0, signal=0.0, signal_to_noise=0.0, retention=None, output_retention=None
    )


@pytest.mark.parametrize("lost", [1.0, 0.25])
def test_a_share_of_the_delta_taken_back_is_that_much_lost(lost: float) -> None:
    """E = -lost * dW: at lost = 1 what is stored is the base itself."""
    delta = factors()
    kept = of(delta, -lost * delta.dense(), moments())
    assert kept.retention == pytest.approx(1 - lost, abs=1e-6)
    assert kept.output_retention == pytest.approx(1 - lost, abs=1e-6)
    assert kept.signal_to_noise == pytest.approx(lost**-2, rel=1e-5)


def test_errors_that_know_nothing_of_the_delta_leave_it_whole() -> None:
    """Noise of 100 times the delta, orthogonal to it: retention 1, signal to noise tiny."""
    delta = factors()
    dense = delta.dense()
    error = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)) * 100
    error -= dense * (float((error * dense).sum()) / float((dense * dense).sum()))
    kept = of(delta, error, torch.eye(COLUMNS))
    assert kept.retention == pytest.approx(1, abs=1e-4)
    assert kept.signal_to_noise is not None
    assert kept.signal_to_noise < 0.01


@pytest.mark.parametrize("factored", [True, False])
def test_against_fp64(factored: bool) -> None:
    """The definitions at the top of the file, written out; both forms of a delta."""
    delta, hessian = factors(), moments()
    error = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(5)) * 0.3
    d, h, e = (delta.left.double() @ factors().right.double()), hessian.double(), error.double()  # type: ignore[union-attr]
    got = of(delta if factored else Delta(delta.dense()), error, hessian)
    q_minus_d = e + d
    assert got.delta_norm == pytest.approx(float(d.norm()), rel=1e-5)
    assert got.signal == pytest.approx(float(torch.trace(d @ h @ d.T)), rel=1e-5)
    assert got.signal_to_noise == pytest.approx(got.signal / float(torch.trace(e @ h @ e.T)), rel=1e-5)
    assert got.retention == pytest.approx(float((q_minus_d * d).sum() / (d * d).sum()), rel=1e-4)
    assert got.output_retention == pytest.approx(float(torch.trace(q_minus_d @ h @ d.T)) / got.signal, rel=1e-4)


def test_rows_of_a_delta() -> None:
    which = torch.tensor([3, 0, 11])
    torch.testing.assert_close(factors().rows(which).dense(), factors().dense()[which])
    whole = Delta(factors().dense())
    assert torch.equal(whole.rows(which).dense(), whole.dense()[which])


# --- real adapters ---


def planned(tmp: Path, **lora: Any) -> MergePlan:
    """A pico llama and a 'trained' adapter on it, and the plan of their merge."""
    pico.save(pico.model(), tmp / "base", torch.float32)
    pico.train(pico.reload(tmp / "base"), tmp / "adapter", **lora)
    return prepare.plan_merge(tmp / "base", peft_directory.load(tmp / "adapter"), None, trust_remote_code=False)[0]


KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "replaced": {"target_modules": ["q_proj"], "modules_to_save": ["v_proj"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_base_and_delta_make_the_merged_weight(tmp_path: Path, kind: str) -> None:
    """Against PEFT's own merge of the same files; what the adapter leaves alone has no delta."""
    pico.save(pico.model(), tmp_path / "base", torch.float32)
    tuned = pico.train(pico.reload(tmp_path / "base"), tmp_path / "adapter", **KINDS[kind])
    plan = prepare.plan_merge(
        tmp_path / "base", peft_directory.load(tmp_path / "adapter"), None, trust_remote_code=False
    )[0]
    delta = deltas(plan)
    before = Checkpoint(tmp_path / "base")
    theirs = dict(tuned.merge_and_unload().named_parameters())
    touched = []
    for name in before:
        change = delta(name)
        if change is None:
            assert torch.equal(theirs[name], before.read(name)), name
            continue
        touched.append(name)
        merged = before.read(name) + change.dense()
        assert pico.relative(merged, theirs[name].detach()) < 1e-6, name
        assert (change.right is None) == (kind == "DoRA" or (kind == "replaced" and "v_proj" in name))
    assert len(touched) == 4


def test_what_the_quantizer_measures(tmp_path: Path) -> None:
    """Every module's numbers recomputed from the files and the model's own inputs."""
    plan = planned(tmp_path, target_modules=["q_proj", "o_proj"])
    source = tmp_path / "merged"
    pico.merged(tmp_path / "base", tmp_path / "adapter", source)
    (tmp_path / "out").mkdir()
    ids = pico.ids(8, 32, seed=3)
    _, results = quantize(
        source, tmp_path / "out", ids, Settings(grid=Grid(4, 32)), dtype=torch.float16, device=torch.device("cpu"), batch=2,
        deltas=deltas(plan),
    )  # fmt: skip
    by_name = {r.name: r for r in results}
    assert [n for n, r in by_name.items() if r.signal is None] == [
        n for n in by_name if not n.endswith(("q_proj", "o_proj"))
    ]
    module = "model.layers.0.self_attn.q_proj"  # its inputs have no quantized layer before them
    weight = Checkpoint(source).read(f"{module}.weight").double()
    base = Checkpoint(tmp_path / "base").read(f"{module}.weight").double()
    stored = dict(load_quantized(tmp_path / "out"))[f"{module}.weight"].double()
    hessian = inputs_moment(pico.reload(source), module, ids)
    d, e, got = weight - base, stored - weight, by_name[module]
    signal = float(torch.trace(d @ hessian @ d.T))
    assert got.signal == pytest.approx(signal, rel=1e-4)
    assert got.delta_norm == pytest.approx(float(d.norm()), rel=1e-4)
    assert got.signal_to_noise == pytest.approx(signal / noise(e, hessian), rel=1e-3)
    assert got.retention == pytest.approx(1 + float((e * d).sum() / (d * d).sum()), abs=1e-3)
    assert got.output_retention == pytest.approx(1 + float(torch.trace(e @ hessian @ d.T)) / signal, abs=1e-3)
    assert all(math.isfinite(r.signal_to_noise) for r in results if r.signal_to_noise is not None)


@torch.no_grad()
def inputs_moment(model: Any, module: str, ids: Tensor) -> Tensor:
    """Mean of x x' over the tokens that reach one linear, fp64."""
    seen: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(ids)
    handle.remove()
    x = torch.cat(seen).reshape(-1, seen[0].shape[-1]).double()
    return x.T @ x / len(x)


def test_without_deltas_nothing_is_said(tmp_path: Path) -> None:
    source = pico.save(pico.model(), tmp_path / "merged", torch.float16)
    (tmp_path / "out").mkdir()
    _, results = quantize(
        source, tmp_path / "out", pico.ids(8, 32), Settings(grid=Grid(4, 32)), dtype=torch.float16,
        device=torch.device("cpu"), batch=2,
    )  # fmt: skip
    assert all(isinstance(r, ModuleResult) and r.signal is None and r.retention is None for r in results)
