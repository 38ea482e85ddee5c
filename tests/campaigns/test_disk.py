"""A disk that is full from the n-th byte on, or fails once: told, and the run resumes."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from campaigns import syscall_layer
from campaigns.verdicts import End, Tally, fault_of
from campaigns.workshop import Workshop

REASONS = {
    errno.ENOSPC: "No space left",
    errno.EIO: "Input/output error",
    errno.EFBIG: "File too large",
    errno.EDQUOT: "quota",
}


def filled(shop: Workshop, rng: Random, runs: Path) -> tuple[End, str, str]:
    """One run on a bad disk, one on a good one. Without the layer: a limit on every file's size."""
    kind = rng.choice(("full", "full", "full", "fails", "limit")) if shop.record else "limit"
    code = {"full": errno.ENOSPC, "limit": errno.EFBIG}.get(kind) or rng.choice((errno.ENOSPC, errno.EIO, errno.EDQUOT))
    if kind == "limit":
        nbytes = int(10 ** rng.uniform(3.3, 5.8))  # the command's output is a file too
        end, label = shop.requant.run(shop.run_of(runs), file_bytes=nbytes), f"files of at most {nbytes} bytes"
    elif kind == "full":
        assert shop.record is not None
        nbytes = rng.randrange(sum(len(e.data) for e in shop.record.events))
        end, label = shop.layered(runs, syscall_layer.full_after(nbytes)), f"full after {nbytes} bytes"
    else:
        assert shop.record is not None
        number = rng.randrange(1, len(shop.record.events))
        end, label = (
            shop.layered(runs, syscall_layer.failing_at(number, code)),
            f"call {number} fails: {errno.errorcode[code]}",
        )
    cause = fault_of(end) or _untold(end, shop, runs, code)
    if cause:
        return end, cause, label
    return *shop.resumed(runs), label


def _untold(end: End, shop: Workshop, runs: Path, code: int) -> str:
    """What the message lacks; a call may fail unnoticed where nothing depends on it."""
    if end.code == 0:
        return ""
    message = " ".join(end.text.split())
    if REASONS[code] not in message:
        return "the reason is not told"
    places = (str(runs), str(shop.folder / "tmp"))  # what is written: the run, and temporary copies
    return "" if any(place in message for place in places) else "the file is not named"


@pytest.mark.slow
def test_a_bad_disk_is_told_and_the_run_resumes(interrupt: Callable[..., Tally]) -> None:
    tally = interrupt("disk", filled, whole=60, sample=1)
    assert not tally.faults, tally.summary()
