"""How a test starts several ranks on this machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.e2e import forks
from requant.runtime import launch
from requant.runtime.ranks import DistributedRanks, Ranks

ROOT = Path(__file__).resolve().parents[2]


def environment(rank: int, port: int, count: int = 2) -> dict[str, str]:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return where | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def second(port: int) -> None:
    """The other rank's process."""
    os.environ.update(environment(1, port))
    torch.set_num_threads(1)
    launch.run_on_all_ranks(lambda: None)


class Turns(Ranks):
    """`count` ranks in one process, run one after another, the last one first.

    The functions they call must not wait for each other.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.gathered: list[Any] = []

    def call(self, function: Callable[..., Any], *args: Any, first_rank_only: Mapping[str, Any], **kwargs: Any) -> Any:
        for rank in reversed(range(self.count)):
            self.rank = rank
            result = function(*args, **kwargs, **(first_rank_only if self.first else {}), ranks=self)
        return result

    def all_gather_objects(self, value: Any) -> list[Any]:
        self.gathered.insert(0, value)
        return self.gathered


@contextmanager
def two_ranks() -> Iterator[DistributedRanks]:
    """This process and one more, waiting to be called."""
    port = free_port()
    child = forks().Process(target=second, args=(port,))
    child.start()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment(0, port).items():
            patch.setenv(key, value)
        with launch.join_ranks() as joined:
            yield joined
            joined.dismiss()
    child.join(60)
    assert child.exitcode == 0
