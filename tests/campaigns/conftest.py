"""Fixtures of the campaigns: one workshop a session; what to try, from the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from campaigns import interruptions
from campaigns.verdicts import Tally
from campaigns.workshop import Workshop


@pytest.fixture(scope="session")
def shop(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """The project, its finished run and the fork server."""
    made = Workshop(tmp_path_factory.mktemp("campaigns"), project)
    yield made
    made.close()


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--campaign-seed"))


@pytest.fixture(scope="session")
def only(request: pytest.FixtureRequest) -> str:
    """The one trial to repeat, "" for all."""
    return str(request.config.getoption("--campaign-only"))


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> int:
    """The campaign's size in per cent of the whole; 0 is the sample that `make test` runs."""
    return int(request.config.getoption("--campaign-size"))


@pytest.fixture
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where failing inputs stay."""
    folder = request.config.getoption("--campaign-keep")
    return Path(folder) / request.node.name if folder else tmp_path / "kept"


@pytest.fixture
def interrupt(shop: Workshop, seed: int, size: int, only: str, kept: Path) -> Callable[..., Tally]:
    """Run a campaign of interruptions and show its figures. whole, sample: numbers of trials."""

    def run(name: str, attempt: interruptions.Attempt, *, whole: int, sample: int) -> Tally:
        numbers = [int(only)] if only else list(range(whole * size // 100 or sample))
        tally = interruptions.campaign(shop, name, seed, numbers, attempt, kept)
        print(f"\n{tally.summary()}\nkept: {kept}")
        return tally

    return run
