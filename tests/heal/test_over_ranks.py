"""Healing over two ranks: the numbers of one, also resumed, however windows divide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from heal.test_stage import CPU, SETTINGS, WHOLE, Killed, quantized, sample
from helpers.ranks import two_ranks

from requant.evaluate.variant_sources import VariantSources
from requant.heal import stage
from requant.heal.job import HealJob
from requant.run import heal_stage
from requant.runtime.ranks import SINGLE_PROCESS, DistributedRanks, Ranks

ALL = replace(SETTINGS, tune=("scales", "codes", "norms"), code_lr=0.01)
STORED = replace(WHOLE, teacher_resident=False)
BLOCKS_FIRST = replace(STORED, mode="blocks", then=replace(STORED, codes=False))


@pytest.fixture(scope="module")
def two() -> Iterator[DistributedRanks]:
    with two_ranks() as joined:
        yield joined


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return quantized(tmp_path_factory.mktemp("ranks"), tie_word_embeddings=True)


def heal(pair: tuple[Path, Path], out: Path, ranks: Ranks, *, progress: Any = None, **changes: Any) -> dict[str, Any]:
    """As `run` does it; `out` is made."""
    merged, source = pair
    out.mkdir(exist_ok=True)
    job = HealJob(
        source=source, teacher=merged, text=sample(), device=CPU, key="k", work=out.with_name(f"{out.name}-work"),
        load_teacher=partial(heal_stage._teacher, "merged", VariantSources.of_checkpoint(merged), None),
        **{"settings": ALL, "plan": WHOLE} | changes,
    )  # fmt: skip
    return dict(stage.heal(job, out, ranks=ranks, progress=progress))


def same(two: dict[str, Any], one: dict[str, Any]) -> None:
    assert two["train"] == pytest.approx(one["train"], rel=1e-3)
    assert [steps for steps, _ in two["held"]] == [steps for steps, _ in one["held"]]
    assert [kl for _, kl in two["held"]] == pytest.approx([kl for _, kl in one["held"]], rel=1e-3)
    assert two["judged"] == pytest.approx(one["judged"], rel=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"plan": STORED},
        {"settings": replace(ALL, batch=5), "plan": replace(WHOLE, micro_batch=2)},
        {"settings": replace(ALL, batch=1, steps=6), "plan": replace(WHOLE, micro_batch=1)},
        {"settings": replace(ALL, steps=6), "plan": BLOCKS_FIRST},
    ],
    ids=["resident", "stored", "uneven", "fewer windows than ranks", "after blocks on the first rank"],
)
def test_two_ranks_heal_as_one_does(
    pair: tuple[Path, Path], tmp_path: Path, two: DistributedRanks, changes: dict[str, Any]
) -> None:
    same(heal(pair, tmp_path / "two", two, **changes), heal(pair, tmp_path / "one", SINGLE_PROCESS, **changes))


@pytest.mark.slow
def test_two_ranks_go_on_where_one_was_killed(pair: tuple[Path, Path], tmp_path: Path, two: DistributedRanks) -> None:
    """The other rank gets what the first one restores: values, moments and curve."""
    armed, steps = [True], []

    def progress(done: int, of: int, note: str) -> None:
        steps.append(done)
        if armed and done == 7:
            raise Killed

    whole = heal(pair, tmp_path / "whole", SINGLE_PROCESS)
    with pytest.raises(Killed):
        heal(pair, tmp_path / "killed", SINGLE_PROCESS, progress=progress)
    armed.clear()
    steps.clear()
    same(heal(pair, tmp_path / "killed", two, progress=progress), whole)
    assert steps == list(range(7, 13))
