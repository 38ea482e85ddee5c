"""A stranger's program in a process of its own: what it gives back, and what ends it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from requant.runtime import guarded_process
from requant.runtime.guarded_process import LimitError, call_guarded, guarded


def test_results_come_in_order_and_change_nothing_here() -> None:
    seen: list[int] = []

    def square(n: int) -> tuple[int, str]:
        seen.append(n)
        return n * n, str(os.getpid())

    results = list(guarded(square, range(100)))
    assert [n for n, _ in results] == [n * n for n in range(100)]
    assert seen == []
    assert {pid for _, pid in results} != {str(os.getpid())}
    assert list(guarded(square, [])) == []


def test_what_it_raises_is_raised_here_after_what_came_before() -> None:
    def inverse(n: int) -> float:
        return 1 / n

    results = guarded(inverse, [2, 1, 0])
    assert [next(results), next(results)] == [0.5, 1.0]
    with pytest.raises(ZeroDivisionError):
        next(results)


class Strange(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def test_an_exception_that_cannot_be_sent_is_told() -> None:
    def fail() -> None:
        raise Strange(1, 2)

    with pytest.raises(RuntimeError, match="Strange: 1 and 2"):
        call_guarded(fail)


def forever() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (forever, "runs without an end"),
        (lambda: "a" * 10**10, "takes more than 512 MB of memory"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "crashes .SIGSEGV"),
        (lambda: os._exit(3), "ends before it is done"),
    ],
)
def test_limits(work: Callable[[], Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded_process, "SECONDS", 0.1)
    with pytest.raises(LimitError, match=message):
        call_guarded(work)


def test_no_process_is_left_when_nobody_wants_the_rest() -> None:
    def answer(n: int) -> int:
        if n:
            forever()
        return os.getpid()

    results = guarded(answer, [0, 1])
    pid = next(results)
    results.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
