"""`requant.evaluate.stage`: the same scores whole and streamed; out of memory is handled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.e2e import ALL, one_thread, recipe

from requant.data.prompts import Prompt, Prompts
from requant.errors import StageError
from requant.evaluate import peft_runtime, streamed, trained_base, variants
from requant.evaluate import stage as evaluate
from requant.evaluate.memory import VariantSize
from requant.evaluate.scores import Scores
from requant.run import prepare
from requant.runtime import device
from requant_eval.scoring import score_loop
from requant_eval.scoring.batches import BatchSize
from requant_eval.scoring.score_loop import logit_bytes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def given(project: Path, finished: Path) -> tuple[variants.VariantSources, Scores]:
    """What the finished run evaluated, and its scores."""
    p = prepare.prepare(recipe(project, finished.parent))
    sources = variants.VariantSources(
        base=p.sources.base,
        adapter=p.sources.adapter,
        merged=finished / "merged",
        gptq=finished / "gptq",
        grids=p.quantize.plan.grids,
        original=p.merge.onto_original,
        plan=p.merge.plan,
    )
    keys = {name: name for name in ALL}
    return sources, Scores(
        cache=finished / ".cache", sets=p.texts.sets, keys=keys, device=CPU, dtype=torch.float32, kl=True
    )


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def scores(given: tuple[variants.VariantSources, Scores], tmp_path: Path) -> Scores:
    return replace(given[1], cache=tmp_path)


def kept(finished: Path, name: str, variant: str) -> Any:
    from requant_eval.scoring.token_scores import TokenScores

    (file,) = (finished / ".cache").glob(f"{variant}-{name}-*.safetensors")
    return TokenScores.load(file)


@pytest.mark.slow
def test_streamed_scores_are_the_whole_models(
    given: tuple[variants.VariantSources, Scores], scores: Scores, finished: Path
) -> None:
    """Every variant against the scores of the finished run; KL against the streamed reference."""
    steps: list[tuple[int, int, str]] = []
    told = evaluate.evaluate(
        scores, given[0], batch=8, stream="always", progress=lambda done, total, note: steps.append((done, total, note))
    )
    assert (told["variants"], told["notes"]) == (told["streamed"], [])
    assert sorted(told["streamed"]) == sorted(ALL)
    assert steps[-1][0] == steps[-1][1]
    assert [s[0] for s in steps] == sorted(s[0] for s in steps)
    assert "gptq, block 2 of 2" in [s[2] for s in steps]
    for name, by_variant in scores.load().items():
        for variant, ours in by_variant.items():
            theirs = kept(finished, name, variant)
            np.testing.assert_allclose(ours.nll, theirs.nll, atol=2e-5)
            assert (ours.top1 != theirs.top1).sum() <= 2, "where the two best logits are the same but for rounding"
            assert ours.runtime == streamed.RUNTIMES[variant]
            assert theirs.runtime == variants.RUNTIMES[variant]
            if variant != "adapter":
                np.testing.assert_allclose(ours.kl, theirs.kl, rtol=1e-3, atol=1e-7)


@pytest.mark.slow
def test_what_fits_stays_whole_and_what_does_not_is_streamed(
    given: tuple[variants.VariantSources, Scores], scores: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = replace(scores, keys={n: n for n in ("adapter", "merged")}, sets=scores.sets[:1])
    tokens = 8 * two.sets[0].window
    need = {n: VariantSize.of(n, given[0]).resident(4, tokens, logit_bytes("cpu")) for n in two.keys}
    assert need["adapter"] < need["merged"], "4 bits take less than 32"
    between = sum(need.values()) / 2 / device.USABLE
    monkeypatch.setattr(evaluate, "free_bytes", lambda _: between)
    assert evaluate.evaluate(two, given[0], batch=8)["streamed"] == ["merged"]


@pytest.mark.slow
def test_the_references_head_is_kept_once_and_where_it_is_damaged_its_states_are_lost(
    given: tuple[variants.VariantSources, Scores], scores: Scores
) -> None:
    two = replace(scores, keys={n: n for n in ("adapter", "merged")})
    evaluate.evaluate(two, given[0], batch=8)
    assert len(two.sets) == 2
    assert two.missing() == {}
    head, score_file = two.reference_head, two.file("merged", two.sets[0])
    assert set(two.cache.glob("reference-*")) == {head, *(two.reference(s) for s in two.sets)}
    assert set(two.files) == set(two.cache.iterdir())
    whole, before = head.read_bytes(), two.read("merged", two.sets[0])
    assert not any(b'"weight"' in two.reference(s).read_bytes()[:2000] for s in two.sets)
    head.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    score_file.unlink()
    assert two.missing() == {"adapter": list(two.sets), "merged": [two.sets[0]]}
    assert not head.exists()
    evaluate.evaluate(two, given[0], batch=8)
    assert head.read_bytes() == whole
    assert np.array_equal(two.read("merged", two.sets[0]).kl, before.kl)


def test_answers_read_weights_that_were_decoded_once(
    given: tuple[variants.VariantSources, Scores], scores: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU."""
    kept: list[tuple[str, bool]] = []
    weight = trained_base._AsTrained.weight
    decoded: list[str] = []

    def told(layer: Any, dtype: torch.dtype) -> torch.Tensor:
        decoded.append("weight")
        return weight(layer, dtype)

    def ask(asked: Prompts, model: Any, on: torch.device, on_progress: Any) -> list[Any]:
        layers = [m.forward for m in model.modules() if isinstance(m.forward, trained_base._AsTrained)]
        kept.append((asked.kind, bool(layers) and all(layer.kept is not None for layer in layers)))
        decoded.clear()
        model(input_ids=torch.tensor([[3, 4]]))
        assert decoded == []
        return [("x", True)]

    monkeypatch.setattr(trained_base._AsTrained, "weight", told)
    monkeypatch.setattr(Prompts, "ask", ask)
    item = Prompt(row=1, shown="?", text="?", ids=(3,), own="")
    questions = (Prompts(set_name="s", items=(item,), new_tokens=2, decode=str, asked=("adapter",)),)
    asked = replace(scores, keys={"adapter": "adapter"}, sets=scores.sets[:1], questions=questions)
    monkeypatch.setattr(trained_base, "KEPT_ON", ("cpu",))
    evaluate.evaluate(asked, given[0], batch=8)
    assert kept == [("answers", True)]


@pytest.mark.slow
def test_base_is_the_adapters_model_with_its_adapters_off(
    given: tuple[variants.VariantSources, Scores],
    scores: Scores,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    finished: Path,
) -> None:
    """Loaded once for both, with the base's own numbers; loaded again where the adapter's model is another one."""
    loaded: list[str] = []
    load = variants.load
    monkeypatch.setattr(variants, "load", lambda name, *a, **k: (loaded.append(name), load(name, *a, **k))[1])
    both = replace(scores, keys={n: n for n in ("base", "merged", "adapter")}, sets=scores.sets[:1])
    evaluate.evaluate(both, given[0], batch=8)
    assert loaded == ["adapter", "merged"]
    assert evaluate.evaluate(both, given[0], batch=8)["variants"] == [], "nothing is left"
    alone = replace(both, keys={"base": "base"}, kl=False, cache=tmp_path / "alone")
    evaluate.evaluate(alone, given[0], batch=8)
    assert loaded == ["adapter", "merged", "base"]
    (by_variant,), (own,) = (list(s.load().values()) for s in (both, alone))
    np.testing.assert_allclose(by_variant["base"].nll, own["base"].nll, atol=1e-6)
    assert np.abs(by_variant["base"].nll - by_variant["adapter"].nll).max() > 1e-3
    assert by_variant["base"].runtime == own["base"].runtime == variants.RUNTIMES["base"]
    plan = given[0].plan
    assert plan is not None
    wider = replace(given[0], plan=replace(plan, vocab_size=plan.embedding_rows))
    assert not peft_runtime.leaves_the_base_alone(wider.plan)


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["never", "always"])
def test_out_of_memory_halves_the_batch(
    given: tuple[variants.VariantSources, Scores],
    scores: Scores,
    monkeypatch: pytest.MonkeyPatch,
    finished: Path,
    stream: Any,
) -> None:
    score = score_loop.score

    def limited(model: Any, s: Any, *, batch: BatchSize, **options: Any) -> Any:
        assert batch.windows is not None
        if batch.windows > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(model, s, batch=batch, **options)

    monkeypatch.setattr(score_loop, "score", limited)
    one = replace(scores, keys={"adapter": "adapter"}, kl=False)
    told = evaluate.evaluate(one, given[0], batch=8, stream=stream)
    assert told["notes"] == [
        "adapter on in-domain: out of memory with 8 windows at a time, went on with 4",
        "adapter on in-domain: out of memory with 4 windows at a time, went on with 2",
    ]
    for name, by_variant in one.load().items():
        np.testing.assert_allclose(by_variant["adapter"].nll, kept(finished, name, "adapter").nll, atol=2e-5)


@pytest.mark.slow
def test_what_turns_out_not_to_fit_is_streamed(
    given: tuple[variants.VariantSources, Scores],
    scores: Scores,
    monkeypatch: pytest.MonkeyPatch,
    finished: Path,
    tmp_path: Path,
) -> None:
    """And the variant after it is loaded by itself."""
    whole = variants.load

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(variants, "load", full)
    one = replace(scores, keys={"adapter": "adapter"}, sets=scores.sets[1:])
    told = evaluate.evaluate(one, given[0], batch=4)
    assert told["notes"] == ["adapter: out of memory with one window at a time, went on block by block"]
    assert told["streamed"] == ["adapter"]
    np.testing.assert_allclose(
        one.load()["general"]["adapter"].nll, kept(finished, "general", "adapter").nll, atol=2e-5
    )
    monkeypatch.setattr(variants, "load", lambda name, *a, **k: full() if name == "adapter" else whole(name, *a, **k))
    both = replace(one, keys={"adapter": "adapter", "base": "base"}, cache=tmp_path / "both")
    told = evaluate.evaluate(both, given[0], batch=4)
    assert told["notes"] == ["adapter: out of memory with one window at a time, went on block by block"]
    assert both.load()["general"]["base"].runtime == variants.RUNTIMES["base"]
    monkeypatch.setattr(variants, "load", full)
    with pytest.raises(StageError, match=r"variant merged: out of memory on cpu .* or set evaluate.stream to auto"):
        evaluate.evaluate(replace(scores, keys={"merged": "m", "adapter": "adapter"}, kl=False, sets=scores.sets[1:]),
                          given[0], batch=4, stream="never")  # fmt: skip
