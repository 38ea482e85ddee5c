"""`requant_eval.metrics.loss_by_change`: groups, shares taken back, what is not defined."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from requant_eval.metrics import statistics as st
from requant_eval.metrics.loss_by_change import GROUPS, deciles, reverted, tails
from requant_eval.scoring.token_scores import TokenScores

DOCUMENTS, LENGTH = 30, 50
N = DOCUMENTS * LENGTH


def scores(nll: np.ndarray, kl: np.ndarray | None = None) -> TokenScores:
    document = np.repeat(np.arange(DOCUMENTS, dtype=np.int32), LENGTH)
    agree = None if kl is None else kl < 0.05
    return TokenScores(
        nll=nll, document=document, top1=nll < 1, kl=kl, agree=agree, nonfinite=0, digest="d" * 64, seconds=0.0
    )


def world(back: float, noise: float) -> tuple[dict[str, TokenScores], np.ndarray]:
    """Scores of an adapter that changes tokens by very different amounts, and of a variant.

    The variant takes the share `back` of each change back and adds noise.
    """
    rng = np.random.default_rng(0)
    adapter, change = 5 + rng.gamma(2.0, size=N), rng.normal(size=N) * rng.gamma(1.0, size=N)
    variant = adapter + back * change + noise * rng.normal(size=N)
    kl = np.abs(variant - adapter)
    return {"base": scores(adapter + change), "adapter": scores(adapter), "gptq": scores(variant, kl)}, change


def test_deciles_are_ranks_in_ten_equal_parts() -> None:
    size = np.random.default_rng(0).permutation(1003).astype(float)
    got = deciles(size)
    slow = [sum(other < value for other in size) * 10 // 1003 for value in size]
    assert got.tolist() == slow
    assert sorted(np.bincount(got)) == [100] * 7 + [101] * 3
    assert np.bincount(deciles(np.zeros(100))).tolist() == [10] * 10, "equal changes: still ten groups"


@pytest.mark.parametrize("back", [0.0, 0.2, 1.0, -0.1])
def test_reverted_is_the_share_of_the_change_that_was_taken_back(back: float) -> None:
    made, change = world(back, noise=0.05)
    found: dict[str, Any] = tails(made)["variants"]["gptq"]["reverted"]  # type: ignore[index]
    assert found["value"] == pytest.approx(back, abs=0.01)
    assert found["low"] < found["value"] < found["high"]
    lost = made["gptq"].nll - made["adapter"].nll
    assert found["value"] == pytest.approx(np.linalg.lstsq(change[:, None], lost, rcond=None)[0][0])


def test_nothing_lost_and_the_base_again_are_exact() -> None:
    made, _ = world(0.0, noise=0.0)
    document = made["base"].document
    change = made["base"].nll - made["adapter"].nll
    none, whole = reverted(0 * change, change, document), reverted(change, change, document)
    assert none is not None
    assert whole is not None
    assert (none.value, none.se, whole.value) == (0.0, 0.0, 1.0)
    assert whole.se == pytest.approx(0, abs=1e-12)
    assert reverted(change, 0 * change, document) is None, "an adapter that changed nothing"


def test_groups_add_up_to_the_loss_and_are_sorted_by_change() -> None:
    made, change = world(0.3, noise=0.1)
    found: Any = tails(made)
    groups, own = found["groups"], found["variants"]["gptq"]
    assert sum(g["n"] for g in groups) == N
    assert len(groups) == len(own["loss"]) == len(own["kl"]) == len(own["disagreement"]) == GROUPS
    assert all(a["high"] <= b["low"] for a, b in pairwise(groups))
    assert (groups[0]["low"], groups[-1]["high"]) == pytest.approx((np.abs(change).min(), np.abs(change).max()))
    lost = made["gptq"].nll - made["adapter"].nll
    assert sum(g["n"] * e["value"] for g, e in zip(groups, own["loss"], strict=True)) == pytest.approx(lost.sum())
    kl, agree = made["gptq"].kl, made["gptq"].agree
    assert kl is not None
    assert agree is not None
    assert sum(g["n"] * e["value"] for g, e in zip(groups, own["kl"], strict=True)) == pytest.approx(kl.sum())
    shares = zip(groups, own["disagreement"], strict=True)
    assert sum(g["n"] * e["value"] for g, e in shares) == pytest.approx((~agree).sum())


def test_erased_learning_is_in_the_last_group_and_noise_in_all() -> None:
    made, change = world(0.0, noise=0.0)
    learned = np.clip(change, 0, None)  # tokens that the adapter made likelier
    erased = tails(made | {"gptq": scores(made["adapter"].nll + 0.3 * learned)})
    noisy = tails(made | {"gptq": scores(made["adapter"].nll + 0.05)})
    assert erased is not None
    assert noisy is not None
    by_group = [e["value"] for e in erased["variants"]["gptq"]["loss"]]
    assert by_group[-1] > 10 * by_group[2]
    share = erased["variants"]["gptq"]["last_share"]
    assert share["value"] == pytest.approx(by_group[-1] / sum(by_group))
    assert share["value"] > 0.3
    assert noisy["variants"]["gptq"]["last_share"]["value"] == pytest.approx(0.1)
    none = tails(made | {"gptq": scores(made["adapter"].nll - 0.05)})
    assert none is not None
    assert none["variants"]["gptq"]["last_share"] is None, "a gain is no loss to share out"
    assert [e["value"] for e in noisy["variants"]["gptq"]["loss"]] == pytest.approx([0.05] * GROUPS)


def test_the_interval_of_a_group_is_clustered_by_its_documents() -> None:
    """Slow and obvious: the sums of the documents that have a token in the group."""
    made, change = world(0.3, noise=0.1)
    found: Any = tails(made)
    group = deciles(np.abs(change))
    lost = made["gptq"].nll - made["adapter"].nll
    document = made["gptq"].document
    for number, got in enumerate(found["variants"]["gptq"]["loss"]):
        rows = [
            (lost[at].sum(), at.sum()) for d in range(DOCUMENTS) if (at := (document == d) & (group == number)).any()
        ]
        expected = st.ratio(np.array([r[0] for r in rows]), np.array([float(r[1]) for r in rows]))
        assert (got["value"], got["se"]) == pytest.approx((expected.value, expected.se))


def test_without_base_or_adapter_there_are_no_tails() -> None:
    made, _ = world(0.1, noise=0.1)
    assert tails({k: v for k, v in made.items() if k != "base"}) is None
    assert tails({k: v for k, v in made.items() if k != "adapter"}) is None
    without_kl: Any = tails(made | {"gptq": scores(made["gptq"].nll)})
    assert without_kl["variants"]["gptq"]["kl"] is None
    assert without_kl["variants"]["gptq"]["disagreement"] is None


def test_few_tokens_make_fewer_groups() -> None:
    tiny = {
        name: TokenScores(
            nll=np.array(nll),
            document=np.array([0, 1, 2], np.int32),
            top1=np.zeros(3, bool),
            kl=None,
            agree=None,
            nonfinite=0,
            digest="d",
            seconds=0.0,
        )
        for name, nll in {"base": [3.0, 2.0, 1.0], "adapter": [1.0, 1.0, 1.0], "gptq": [1.5, 1.0, 1.0]}.items()
    }
    found: Any = tails(tiny)
    assert [g["n"] for g in found["groups"]] == [1, 1, 1]
    assert len(found["variants"]["gptq"]["loss"]) == 3
