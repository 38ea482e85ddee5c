"""`requant.run.suggest` and `module_swap`: candidates, the recipe's patch, what swaps gain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.e2e import recipe, run

from requant.checkpoint.reader import Checkpoint
from requant.evaluate import variants
from requant.modeling.families import fused_patterns
from requant.numerics.grid import Grid
from requant.quantize.plan import Plan, Settings
from requant.run import module_swap, prepare, suggest
from requant.run.prepared import Prepared
from requant.run.suggest import Candidate, candidates, patch_text, patched, pattern

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
         "mlp.up_proj", "mlp.down_proj")  # fmt: skip


# --- what is lifted ---


@pytest.mark.parametrize(
    ("module", "covered", "apart"),
    [
        ("model.layers.1.self_attn.q_proj", ["model.layers.1.self_attn.v_proj"], ["model.layers.11.self_attn.q_proj"]),
        ("model.layers.1.mlp.up_proj", ["model.layers.1.mlp.gate_proj"], ["model.layers.1.mlp.down_proj"]),
        ("model.layers.1.mlp.down_proj", [], ["model.layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj"]),
        (
            "model.layers.1.mlp.experts.3.up_proj",
            ["model.layers.1.mlp.experts.0.down_proj"],
            ["model.layers.1.mlp.gate"],
        ),
        ("transformer.h.0.attn.c_attn", [], ["transformer.h.0.attn.c_proj"]),
    ],
)
def test_a_pattern_covers_what_engines_fuse_and_nothing_else(module: str, covered: list[str], apart: list[str]) -> None:
    fused = fused_patterns(
        [module, *covered, *apart, *(f"model.layers.{i}.{kind}" for i in (0, 1, 11) for kind in KINDS)]
    )
    settings = Settings(grid=Grid(4, 32), overrides=((pattern(module, fused), {"bits": 8}),))
    for name in (module, *covered):
        assert settings.grid_of(name) == Grid(8, 32), name
        assert pattern(name, fused) == pattern(module, fused)
    for name in apart:
        assert settings.grid_of(name) == Grid(4, 32), name


def results(prepared: Prepared, errors: dict[str, float]) -> list[dict[str, Any]]:
    """Module results with made-up errors, all outputs of power 1."""
    return [
        {"name": n, "loss": errors.get(n, 0.01) ** 2, "relative_error": errors.get(n, 0.01), "signal": 0.5}
        for n in prepared.quantize.plan.grids
    ]


def prepared(project: Path, changes: dict[str, Any] | None = None) -> Prepared:
    return prepare.prepare(recipe(project, Path("runs"), changes))


def test_candidates_are_units_worst_first(project: Path) -> None:
    p = prepared(project)
    found = candidates(
        results(p, {"model.layers.1.mlp.down_proj": 0.4, "model.layers.0.self_attn.k_proj": 0.3}), p.quantize.plan
    )
    assert len(found) == 8, "two layers of qkv, o, gate and up, down"
    assert [c.pattern for c in found[:2]] == ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.[qkv]_proj"]
    assert found[1].modules == tuple(f"model.layers.0.self_attn.{x}_proj" for x in "qkv")
    assert found[1].relative_error == pytest.approx(((0.3**2 + 2 * 0.01**2) / 3) ** 0.5)
    assert found[0].signal_to_noise == pytest.approx(0.5 / 0.4**2)
    assert candidates(results(p, {}), p.quantize.plan, count=3) == candidates(results(p, {}), p.quantize.plan)[:3]


def test_the_growth_is_what_the_files_would_hold(project: Path) -> None:
    """Every candidate lifted: the larger plan is larger by the sum of what they said."""
    p = prepared(project)
    found = candidates(results(p, {}), p.quantize.plan)
    changes = patched({}, found, p.quantize.settings.grid)
    after = prepared(project, {"quantize.overrides": changes})
    sizes = [sum(s.nbytes for s in plan.slots) for plan in (p.quantize.plan, after.quantize.plan)]
    assert sizes[1] - sizes[0] == sum(c.bytes for c in found) > 0
    assert {g.bits for g in after.quantize.plan.grids.values()} == {8}


@pytest.mark.parametrize(("bits", "to"), [(3, 4), (3, 8), (8, 4)])
def test_the_growth_of_a_module_is_of_its_own_tensors(project: Path, bits: int, to: int) -> None:
    plans = {b: prepared(project, {"quantize.bits": b}).quantize.plan for b in (bits, to)}
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        sizes = {b: sum(s.nbytes for s in p.slots if s.name.startswith(f"{name}.")) for b, p in plans.items()}
        assert suggest._growth(plans[bits], name, to) == sizes[to] - sizes[bits] != 0


@pytest.mark.parametrize(("bits", "expected"), [(2, 4), (3, 4), (4, 8), (8, None)])
def test_only_bits_that_engines_load(project: Path, bits: int, expected: int | None) -> None:
    p = prepared(project, {"quantize.bits": bits})
    found = candidates(results(p, {}), p.quantize.plan)
    assert {c.bits for c in found} == ({expected} if expected else set())


def test_skipped_modules_are_no_candidates(project: Path) -> None:
    p = prepared(project, {"quantize.overrides": {"*.0.*": {"skip": True}, "*.1.mlp.*": {"bits": 8}}})
    assert [c.pattern for c in candidates(results(p, {}), p.quantize.plan)] == [
        "model.layers.1.self_attn.[qkv]_proj",
        "model.layers.1.self_attn.o_proj",
    ]


# --- the patch ---


def test_the_patch_is_a_recipe_and_keeps_what_was_there(project: Path) -> None:
    """Own overrides stay, groups of lifted modules stay, and the last match wins."""
    own = {"*.mlp.*": {"group_size": 64}, "*.1.self_attn.o_proj": {"skip": True}}
    p = prepared(project, {"quantize.overrides": own})
    lifted = [c for c in candidates(results(p, {}), p.quantize.plan) if ".0.mlp." in c.pattern]
    assert [c.pattern for c in lifted] == ["model.layers.0.mlp.[gu]*_proj", "model.layers.0.mlp.down_proj"]
    patch = patched(own, lifted, p.quantize.settings.grid)
    after = prepared(project, {"quantize.overrides": patch}).quantize.plan
    assert {n: (g.bits, g.group_size) for n, g in after.grids.items() if ".0." in n and "mlp" in n} == {
        f"model.layers.0.mlp.{x}_proj": (8, 64) for x in ("gate", "up", "down")
    }
    assert after.grids["model.layers.1.mlp.up_proj"] == Grid(4, 64)
    assert after.left == ("model.layers.1.self_attn.o_proj",)
    again = patched(patch, [lifted[0]], p.quantize.settings.grid)
    assert list(again)[-1] == "model.layers.0.mlp.[gu]*_proj", "a pattern that is there already moves to the end"
    assert len(again) == len(patch)


def test_the_patch_reads_back(project: Path) -> None:
    from ruamel.yaml import YAML

    made = Candidate(
        pattern="model.layers.0.self_attn.[qkv]_proj",
        modules=(),
        grid=Grid(4, 64, symmetric=False),
        bits=8,
        bytes=1,
        signal_to_noise=None,
        relative_error=0.1,
    )
    overrides = patched({"*.down_proj": {"skip": True}}, [made], Grid(4, 32))
    read = YAML(typ="safe").load(patch_text(overrides))
    assert read == {"quantize": {"overrides": overrides}}
    assert overrides[made.pattern] == {"bits": 8, "group_size": 64, "symmetric": False}


# --- the swap ---


def sources(project: Path, finished: Path) -> tuple[variants.VariantSources, Plan]:
    p = prepared(project)
    made = variants.VariantSources(
        base=p.sources.base,
        adapter=p.sources.adapter,
        merged=finished / "merged",
        gptq=finished / "gptq",
        grids=p.quantize.plan.grids,
    )
    return made, p.quantize.plan


def test_what_a_swap_gains(project: Path, finished: Path) -> None:
    """A merged module gains nothing, all modules all of the loss; the model is restored."""
    where, layout = sources(project, finished)
    text = module_swap.sample(prepared(project).texts.calibration, 8, 48)
    every = tuple(layout.grids)
    before, gains = module_swap.measure(
        [(), every, every[-1:], every[-1:]], layout.weights, where, text, device=torch.device("cpu"),
        dtype=torch.float32, batch=4,
    )  # fmt: skip
    nothing, everything, some, again = gains
    assert nothing["kl"]["value"] == nothing["nll"]["value"] == 0
    assert before["kl"]["value"] > 0
    assert everything["kl"]["value"] == pytest.approx(before["kl"]["value"], rel=0.01), "the rest was cast to bfloat16"
    assert everything["nll"]["value"] == pytest.approx(before["nll"]["value"], abs=0.02 * before["kl"]["value"])
    assert some["kl"]["value"] != 0
    assert some["kl"]["value"] < before["kl"]["value"]
    assert again == some, "and the model was put back in between"


def test_swapping_the_weights_it_has_changes_nothing(project: Path, finished: Path) -> None:
    where, layout = sources(project, finished)
    model = variants.load("merged", where, device=torch.device("cpu"), dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = model(ids).logits
        merged = Checkpoint(where.merged)
        with module_swap.swapped(model, {m: merged.read(n) for m, n in layout.weights.items()}):
            assert torch.equal(model(ids).logits, expected)
        name = next(iter(layout.weights))
        with module_swap.swapped(model, {name: torch.zeros_like(merged.read(f"{name}.weight"))}):
            assert not torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)


def test_the_sample_is_spread_over_the_calibration_windows() -> None:
    windows = torch.arange(20 * 64).reshape(20, 64)
    text = module_swap.sample(windows, 5, 32)
    assert [int(w.ids[0]) for w in text.windows] == [0, 256, 512, 768, 1024]
    assert all(len(w.ids) == 32 for w in text.windows)
    assert text.n_scored == 5 * 31
    assert len(module_swap.sample(windows[:3], 5, 128).windows) == 3


# --- the command ---


def test_a_finished_run_is_advised(project: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suggest, "COUNT", 3)
    first = run(project, ran, suggest=True)
    assert first.ran == ["suggest", "report"]
    told = first.report["facts"]["suggestion"]
    assert len(told["units"]) == 8
    values = [u["gain"]["kl"]["value"] for u in told["units"]]
    assert values == sorted(values, reverse=True)
    chosen = [u["pattern"] for u in told["units"] if u["helps"]]
    assert [u["pattern"] for u in told["units"] if u["gain"]["kl"]["low"] > 0] == chosen
    assert all(f'"{c}": {{bits: 8}}' in told["patch"] for c in chosen)
    text = (ran / "pico" / "report.md").read_text()
    assert "More bits where they count" in text
    assert told["patch"].rstrip() in text
    assert json.loads((ran / "pico" / "report.json").read_text())["facts"]["suggestion"] == told
    assert run(project, ran, suggest=True).ran == [], "measured once"
    assert run(project, ran).report["facts"]["suggestion"] == told, "and kept"
