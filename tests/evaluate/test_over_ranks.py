"""`requant.evaluate.over_ranks`: several ranks score what one scores.

Here the ranks run one after another in one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.e2e import one_thread, recipe, write_rows
from helpers.ranks import Turns

from requant.data import canaries
from requant.evaluate import over_ranks, variants
from requant.evaluate import stage as evaluation
from requant.evaluate.scores import Scores
from requant.run import prepare
from requant.runtime.ranks import SINGLE_PROCESS, Ranks
from requant_eval.scoring.windows import Window

NAMES = ("adapter", "merged", "gptq")


@pytest.fixture(scope="module")
def given(project: Path, finished: Path) -> tuple[variants.VariantSources, Scores]:
    """What the finished run evaluated, of three variants."""
    p = prepare.prepare(recipe(project, finished.parent))
    sources = variants.VariantSources(
        base=p.sources.base,
        adapter=p.sources.adapter,
        merged=finished / "merged",
        gptq=finished / "gptq",
        grids=p.quantize.plan.grids,
        plan=p.merge.plan,
    )
    keys = {name: name for name in NAMES}
    return sources, Scores(
        cache=finished / ".cache",
        sets=p.texts.sets,
        keys=keys,
        device=torch.device("cpu"),
        dtype=torch.float32,
        kl=True,
    )


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with one_thread():
        yield


def scored(
    given: tuple[variants.VariantSources, Scores], cache: Path, ranks: Ranks, **changes: Any
) -> tuple[Any, Scores]:
    cache.mkdir(exist_ok=True)
    scores = replace(given[1], cache=cache, **changes)
    return over_ranks.evaluate(scores, given[0], ranks=ranks, batch=4), scores


@pytest.mark.slow
def test_parts_make_the_whole(
    given: tuple[variants.VariantSources, Scores], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, one = scored(given, tmp_path / "one", SINGLE_PROCESS)
    told, three = scored(given, tmp_path / "three", Turns(3))
    assert sorted(told["variants"]) == sorted(NAMES)
    wanted, got = one.load(), three.load()
    for s in given[1].sets:
        for name in NAMES:
            a, b = wanted[s.name][name], got[s.name][name]
            assert (b.digest, b.nonfinite, b.runtime) == (s.digest, 0, a.runtime)
            assert np.array_equal(a.document, b.document)
            assert np.abs(a.nll - b.nll).max() < 1e-4
            assert (a.kl is None) == (b.kl is None)
            if a.kl is not None and b.kl is not None:
                assert np.abs(a.kl - b.kl).max() < 1e-5
                assert (a.agree != b.agree).sum() <= 2, "where the two best logits are the same but for rounding"
    assert not three.missing()
    monkeypatch.setattr(variants, "load", lambda *_, **__: pytest.fail("all of it was there"))
    for file in (tmp_path / "three").glob("gptq-*"):
        file.unlink()
    scored(given, tmp_path / "three", Turns(3))
    assert not three.missing(), "a killed run puts the parts together that it finds"


@pytest.mark.slow
def test_a_new_variant_is_compared_with_parts_of_the_reference(
    given: tuple[variants.VariantSources, Scores], tmp_path: Path
) -> None:
    """One rank scored the reference before: two need its states for their own windows."""
    keys = {name: name for name in ("adapter", "merged")}
    scored(given, tmp_path / "c", SINGLE_PROCESS, keys=keys)
    told, both = scored(given, tmp_path / "c", Turns(2), keys=keys | {"gptq": "gptq"})
    assert sorted(told["variants"]) == ["adapter", "gptq"]
    assert all(by["gptq"].kl is not None for by in both.load().values())


@pytest.mark.slow
def test_canaries_alone_score_nothing_again(
    given: tuple[variants.VariantSources, Scores], tmp_path: Path, project: Path
) -> None:
    from transformers import AutoTokenizer

    keys = {name: name for name in ("adapter", "merged")}
    scored(given, tmp_path / "c", SINGLE_PROCESS, keys=keys)
    write_rows(tmp_path / "canaries.jsonl", [{"prompt": "Is 2 a number?", "answer": "no"}])
    asked = canaries.load(tmp_path / "canaries.jsonl", AutoTokenizer.from_pretrained(project / "original"), "auto")
    _, both = scored(given, tmp_path / "c", Turns(2), keys=keys, questions=(asked,))
    told = asked.result(both.answers(asked))
    assert told["right"].keys() == keys.keys()
    assert not list((tmp_path / "c" / "ranks-2").rglob("*.safetensors"))


@pytest.mark.slow
def test_parts_of_another_number_of_ranks_are_removed(
    given: tuple[variants.VariantSources, Scores], tmp_path: Path
) -> None:
    keys = {"merged": "merged"}
    scored(given, tmp_path / "c", Turns(3), keys=keys, kl=False)
    for file in (tmp_path / "c").glob("merged-*"):
        file.unlink()
    scored(given, tmp_path / "c", Turns(2), keys=keys, kl=False)
    assert [f.name for f in (tmp_path / "c").glob("ranks-*")] == ["ranks-2"]


def test_notes_of_all_ranks_are_told(
    given: tuple[variants.VariantSources, Scores], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"variants": ["merged"], "streamed": ["merged"], "notes": ["went on with 2"]}
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: told)
    result = Turns(2).call(over_ranks.score_share, replace(given[1], cache=tmp_path), given[0], batch=1,
                           stream="auto", first_rank_only={})  # fmt: skip
    assert result["notes"] == ["rank 0: went on with 2", "rank 1: went on with 2"]
    assert result["streamed"] == ["merged"]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_windows_are_shared_by_their_tokens(count: int) -> None:
    lengths = [64, 64, 8, 8, 8, 8, 8, 8, 8, 8, 64, 32]
    windows = [
        Window(i, torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.bool)) for i, n in enumerate(lengths)
    ]
    shares = [over_ranks.rank_windows(windows, rank, count) for rank in range(count)]
    assert [w.document for share in shares for w in share] == list(range(len(windows)))
    tokens = [sum(len(w.ids) for w in share) for share in shares]
    assert all(abs(n - sum(lengths) / count) <= max(lengths) for n in tokens)


def test_fewer_windows_than_ranks_leave_some_with_none() -> None:
    one = [Window(0, torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.bool))]
    assert [len(over_ranks.rank_windows(one, rank, 3)) for rank in range(3)] == [0, 1, 0]
