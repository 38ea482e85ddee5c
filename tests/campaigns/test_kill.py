"""SIGKILL at random moments: the resumed run is the undisturbed one, byte for byte."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from campaigns import interruptions
from campaigns.verdicts import Tally


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_bytes(interrupt: Callable[..., Tally]) -> None:
    tally = interrupt("kill", interruptions.killed, whole=130, sample=1)  # one to three kills each: 200
    assert not tally.faults, tally.summary()
