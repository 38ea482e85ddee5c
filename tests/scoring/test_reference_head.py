"""The reference's head in a file of its own: written once, shared, damaged, another one."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from safetensors import safe_open
from scoring.test_score_loop import VOCAB, pico
from torch import nn

from requant_eval.errors import EvaluationError
from requant_eval.scoring import reference_head
from requant_eval.scoring.lm_head import Head
from requant_eval.scoring.reference_states import Reference, prove
from requant_eval.scoring.score_loop import score
from requant_eval.scoring.windows import Document, EvalSet, make_set

CPU = torch.device("cpu")


@pytest.fixture
def sets() -> list[EvalSet]:
    rng = np.random.default_rng(0)
    documents = [Document(tuple(rng.integers(3, VOCAB, size=n).tolist())) for n in (40, 16, 7, 33)]
    return [make_set(name, documents[i:], window=16, bos_id=1) for i, name in enumerate(("a", "b"))]


def names_in(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def written(model: nn.Module, sets: list[EvalSet], folder: Path) -> list[Path]:
    """Reference files of a model, whose head is in `folder`/head."""
    paths = [folder / s.name for s in sets]
    for s, path in zip(sets, paths, strict=True):
        score(model, s, batch=2, device="cpu", write_reference=path, reference_head=folder / "head")
    return paths


def test_the_head_is_written_once_and_gives_the_same_numbers(sets: list[EvalSet], tmp_path: Path) -> None:
    model = pico("gemma2")
    first = written(model, sets[:1], tmp_path)
    before = (tmp_path / "head").stat()
    paths = written(model, sets, tmp_path)
    after = (tmp_path / "head").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert first == paths[:1]
    assert [names_in(path) for path in paths] == [{"hidden"}] * 2
    for s, path in zip(sets, paths, strict=True):
        score(model, s, batch=2, device="cpu", write_reference=tmp_path / "whole")
        assert prove(path, digest=s.digest) == prove(tmp_path / "whole", digest=s.digest) == s.n_scored
        found, wanted = (
            score(pico("gemma2", seed=1), s, batch=2, device="cpu", reference=r) for r in (path, tmp_path / "whole")
        )
        assert found.kl is not None
        assert wanted.kl is not None
        assert np.array_equal(found.kl, wanted.kl)


def test_opened_sets_share_the_head_that_was_read_once(
    sets: list[EvalSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = written(pico(), sets, tmp_path)
    one = Reference(paths[0], digest=sets[0].digest, device=CPU)
    monkeypatch.setattr(reference_head, "head_in", None)
    two = Reference(paths[1], digest=sets[1].digest, device=CPU, beside=[one])
    assert two.head is one.head


def test_a_flipped_bit_of_the_head_is_seen(sets: list[EvalSet], tmp_path: Path) -> None:
    (path,) = written(pico("gemma2"), sets[:1], tmp_path)
    head = tmp_path / "head"
    assert reference_head.prove(head)
    whole, random = head.read_bytes(), Random(0)
    start = 8 + int.from_bytes(whole[:8], "little")
    for at in [*random.choices(range(start), k=100), *random.choices(range(start, len(whole)), k=50)]:
        changed = bytearray(whole)
        changed[at] ^= 1 << random.randrange(8)
        head.write_bytes(changed)
        with pytest.raises(EvaluationError):
            reference_head.prove(head)
    head.write_bytes(whole[:-2])
    with pytest.raises(EvaluationError):
        reference_head.prove(head)
    head.unlink()
    for use in (lambda: prove(path, digest=sets[0].digest), lambda: Reference(path, digest=sets[0].digest, device=CPU)):
        with pytest.raises(EvaluationError, match="score the reference first"):
            use()


@pytest.mark.parametrize("content", [b"", b"no head"])
def test_what_is_no_head_is_replaced(sets: list[EvalSet], tmp_path: Path, content: bytes) -> None:
    (tmp_path / "head").write_bytes(content)
    (path,) = written(pico(), sets[:1], tmp_path)
    assert prove(path, digest=sets[0].digest) == sets[0].n_scored


def test_another_models_head_stays_and_its_states_too(sets: list[EvalSet], tmp_path: Path) -> None:
    """A model that ran in another dtype half way through: what was written before must stay readable."""
    (first,) = written(pico(), sets[:1], tmp_path)
    other = pico(seed=1)
    (second,) = written(other, sets[1:], tmp_path)
    assert names_in(second) == {"hidden", "weight"}
    opened = [Reference(path, digest=s.digest, device=CPU) for s, path in zip(sets, (first, second), strict=True)]
    assert torch.equal(opened[0].head.weight, pico().lm_head.weight)
    assert torch.equal(opened[1].head.weight, other.lm_head.weight)
    other_head = tmp_path / "of another"
    reference_head.keep(other_head, Head(other.lm_head.weight.detach()))
    other_head.replace(tmp_path / "head")
    with pytest.raises(EvaluationError, match="has another head than the hidden states"):
        Reference(first, digest=sets[0].digest, device=CPU)


@pytest.mark.parametrize("change", ["scale", "softcap", "bias", "dtype", "rows", "value"])
def test_every_difference_is_another_head(tmp_path: Path, change: str) -> None:
    weight = torch.randn(50, 8)
    changed = {
        "scale": Head(weight, None, 0.5),
        "softcap": Head(weight, None, 1.0, 30.0),
        "bias": Head(weight, torch.zeros(50)),
        "dtype": Head(weight.half()),
        "rows": Head(weight[:-1]),
        "value": Head(weight + (torch.arange(50) == 17)[:, None]),
    }
    checksum = reference_head.keep(tmp_path / "head", Head(weight))
    assert (
        checksum
        == reference_head.keep(tmp_path / "head", Head(weight.clone()))
        == reference_head.prove(tmp_path / "head")
    )
    assert reference_head.keep(tmp_path / "head", changed[change]) is None
