"""`requant.evaluate.width_losses`: losses are the KL of the model with that unit quantized."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico
from helpers.e2e import one_thread, recipe

from requant import merge
from requant.checkpoint.reader import Checkpoint
from requant.evaluate import planned_merge, unit_solver, width_losses
from requant.evaluate.planned_merge import Device
from requant.evaluate.unit_solver import BlockSolver, Solving
from requant.evaluate.width_losses import Texts, Unit
from requant.modeling import skeleton
from requant.modeling.block_walk import Walk
from requant.modeling.blocks import block_linears
from requant.modeling.moe import FLOOR, split_experts
from requant.numerics import gptq
from requant.numerics.grid import Grid, nearest_rows
from requant.run import bit_budget, budget_widths, prepare
from requant.run.prepared import Prepared
from requant_eval.scoring.batches import BatchSize

CPU = Device(torch.device("cpu"), torch.float32, BatchSize(windows=4))
WIDTHS = (2, 3, 4, 8)


def prepared_of(project: Path, out: Path) -> Prepared:
    return prepare.prepare(recipe(project, out, {"quantize": {"budget": 3.5, "group_size": 32}, "heal": "off"}))


def measured(prepared: Prepared, text: Texts, width: int) -> list[dict[int, float]]:
    walk = planned_merge.walk_of(prepared.merge.plan, CPU, trust_remote_code=False, pieces={})
    units = budget_widths.units_of(prepared.quantize.plan)
    with one_thread():
        return width_losses.measure(walk, units, text, WIDTHS, width, Solving())


def texts_of(prepared: Prepared) -> Texts:
    text = bit_budget.texts_of(prepared, "cpu")
    return dataclasses.replace(text, measured=text.measured[:3])


def merged_model(prepared: Prepared, folder: Path) -> Any:
    if not folder.exists():
        folder.mkdir()
        merge.merge(prepared.merge.plan, folder, dtype="float32")
    return pico.reload(folder)


def test_the_loss_at_the_measured_width_is_the_kl_of_the_solved_model(project: Path, tmp_path: Path) -> None:
    """The weights are found another way: Hessians from the inputs of the whole model, the solver called directly."""
    prepared = prepared_of(project, tmp_path)
    text = texts_of(prepared)
    found, units = measured(prepared, text, 3), budget_widths.units_of(prepared.quantize.plan)
    hessians = hessians_of(
        merged_model(prepared, tmp_path / "merged"), [n for u in units for n in u.grids], text.learned
    )
    for unit, own in zip(units, found, strict=True):
        model = merged_model(prepared, tmp_path / "merged")
        before = log_probabilities(model, text.measured)
        for name, grid in unit.grids.items():
            module: Any = model.get_submodule(name)
            h = hessians[name]
            factor = gptq.factorize(h, gptq.column_order(h.diagonal(), "activation", grid.group_size), 0.05)
            solution = gptq.quantize_weight(module.weight.data, h, factor, dataclasses.replace(grid, bits=3))
            module.weight.data = solution.weight()
        after = log_probabilities(model, text.measured)
        kl = float((before.exp() * (before - after)).sum(-1).mean())
        assert kl > 1e-5
        assert own[3] == pytest.approx(kl, rel=2e-2), unit.pattern
        assert own[2] > own[3] > own[4] > own[8] > 0


@torch.no_grad()
def hessians_of(model: Any, names: list[str], windows: Any) -> dict[str, Any]:
    """X'X / tokens of the input of each linear."""
    found: dict[str, Any] = {}

    def watch(name: str) -> Any:
        def hook(_: Any, args: Any) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            found[name] = (x.T @ x) / len(x)

        return hook

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(watch(name))
    model(input_ids=windows)
    return found


@torch.no_grad()
def log_probabilities(model: Any, windows: Any) -> Any:
    return model(input_ids=windows).logits.double().log_softmax(-1)


def test_other_widths_are_near_what_they_would_measure(project: Path, tmp_path: Path) -> None:
    """The ratio of output errors stands for the ratio of KLs: within a factor of two on a random model."""
    prepared = prepared_of(project, tmp_path)
    text = texts_of(prepared)
    by_ratio, itself = measured(prepared, text, 3), measured(prepared, text, 4)
    for one, other in zip(by_ratio, itself, strict=True):
        assert 0.5 < one[4] / other[4] < 2


def test_measured_and_learned_windows_are_spread_and_apart() -> None:
    windows = torch.arange(40 * 300).reshape(40, 300)
    text = width_losses.texts(windows, "cpu", 64)
    assert text.measured.shape == (4, 128)
    assert text.measured[:, 0].tolist() == [0, 3000, 6000, 9000]
    assert text.learned.shape == (2, 300), "eight tokens for each of 64 inputs"
    assert width_losses.texts(windows, "cpu", 10**6).learned[:, 0].tolist() == [n * 300 for n in range(40) if n % 10], (
        "all that is not measured"
    )
    few = width_losses.texts(windows[:4, :20], "cpu", 64)
    assert (few.measured.shape, few.learned.shape) == ((1, 20), (3, 20))


@pytest.mark.parametrize(("device", "most"), [("cpu", 4), ("cuda", 16)])
def test_most_windows_are_left_to_learn_from(device: str, most: int) -> None:
    """17 windows on a GPU were 16 to measure on and one to learn from."""
    windows = torch.arange(100 * 300).reshape(100, 300)
    for count in range(width_losses.MIN_WINDOWS, 100):
        text = width_losses.texts(windows[:count], device, 10**6)
        assert len(text.measured) == min(most, count // 4)
        assert len(text.learned) == count - len(text.measured) >= 3 * len(text.measured)
        assert not set(text.measured[:, 0].tolist()) & set(text.learned[:, 0].tolist())


def test_gptq_makes_up_for_what_rounding_loses_most_where_inputs_are_alike(project: Path, tmp_path: Path) -> None:
    """Inputs of rank one: GPTQ moves the error where no input goes, and rounding cannot."""
    prepared = prepared_of(project, tmp_path)
    walk = planned_merge.walk_of(prepared.merge.plan, CPU, trust_remote_code=False, pieces={})
    unit = budget_widths.units_of(prepared.quantize.plan)[0]
    name, grid = next((n, dataclasses.replace(g, bits=3)) for n, g in unit.grids.items())
    walk.fill_rest()
    items = walk.embed(texts_of(prepared).learned, 4)
    for item in items:
        item.hidden = item.hidden[:1, :1].expand_as(item.hidden).clone()
    walk.load(0)
    module: Any = walk.model.get_submodule(name)
    seen: list[Any] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, 0]))
    solver = unit_solver.BlockSolver(walk, 0, items, list(unit.grids), Solving())
    handle.remove()
    exact = module.weight @ seen[0]
    lost = {
        kind: float((weight @ seen[0] - exact).square().sum())
        for kind, weight in (
            ("gptq", solver.weight(name, module.weight, grid)), ("nearest", nearest_rows(module.weight, grid)),
        )
    }  # fmt: skip
    assert lost["gptq"] < 0.2 * lost["nearest"]
    eight = dataclasses.replace(grid, bits=8)
    assert solver.weight(name, module.weight, eight).equal(nearest_rows(module.weight, eight))


def test_experts_learn_from_as_many_rows_as_in_the_run_and_what_all_of_them_hold_is_foreseen(tmp_path: Path) -> None:
    """No token is routed to the last expert; in the run it gets a quarter of an even share, and so here."""
    made = pico.model("qwen3_moe", num_experts=5, num_hidden_layers=1)
    router = made.model.layers[0].mlp.gate.weight.data
    router[:] = router[0] * torch.tensor([1.0, 2.0, -1.0, -2.0, 0.0])[:, None]
    checkpoint = Checkpoint(pico.save(made, tmp_path / "model"))
    walk = Walk(checkpoint, skeleton.open_model(tmp_path / "model", split=True), device=CPU.device, dtype=torch.float32)
    with torch.no_grad():
        walk.fill_rest()
        items = walk.embed(torch.arange(40).reshape(2, 20), 2)
        block: Any = walk.load(0)
        shapes = {f"model.layers.0.{name}": tuple(m.weight.shape) for name, m in block_linears(block).items()}
        shapes = {name: shape for name, shape in shapes.items() if shape[0] > 5}  # the router stays
        solver = BlockSolver(walk, 0, items, list(shapes), Solving())
        last = "model.layers.0.mlp.experts.4.down_proj"
        assert solver._of[last].tokens == -(-int(FLOOR * 40 * 2) // 5) == 4
        assert walk.run(0, items[0]).isfinite().all()
        assert sum(expert.floor for _, expert in split_experts(block)) == 0, "scoring runs the routed rows alone"
        grids = dict.fromkeys(shapes, Grid(3, 32))
        for name, grid in grids.items():
            solver.weight(name, block.get_submodule(name.removeprefix("model.layers.0.")).weight, grid)
    moments = {id(one): one for one in solver._of.values()}.values()
    held = sum(one.hessian.numel() for one in moments) + sum(one.lower.numel() for one in solver._factors.values())
    parts = {
        "[qkv]": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",), "experts.*": ("gate_proj", "up_proj", "down_proj"),
    }  # fmt: skip
    units = [
        Unit(pattern=key, grids={n: grid for n, grid in grids.items() if n.endswith(of)}, weights=0)
        for key, of in parts.items()
    ]
    assert held == 2 * (64**2 + 64**2 + 5 * (64**2 + 32**2))
    assert width_losses.solver_numbers(units, shapes) == held + 64**2
