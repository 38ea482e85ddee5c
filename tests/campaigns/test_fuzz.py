"""Mutated inputs: a documented code and a message, and no success that others refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from campaigns import fuzzing
from campaigns.workshop import Workshop

WHOLE, SAMPLE = 10_000, 1  # of every kind at least one


@pytest.mark.slow
def test_mutated_inputs_are_refused_or_read_right(shop: Workshop, seed: int, size: int, only: str, kept: Path) -> None:
    inputs = fuzzing.drawn(seed, WHOLE * size // 100 or SAMPLE)
    if only:
        kind, _, number = only.partition(":")
        inputs = [(kind, int(number))] if number else [(k, n) for k, n in inputs if k == kind]
    tally = fuzzing.campaign(shop, seed, inputs, kept)
    print(f"\n{tally.summary()}\nkept: {kept}")
    if only and len(inputs) == 1:
        print("\n".join(f.read_text() for f in kept.glob("*.txt")))
    assert not tally.faults, tally.summary()
