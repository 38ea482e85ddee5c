"""One command on all ranks that a launcher such as torchrun started: joining, serving, and ending together.

Rank 0 runs the command, as if alone; the others wait until they are called. What fails on one rank ends all, and rank 0
is the one who says why.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from requant.errors import InputError, RequantError
from requant.runtime.ranks import ALONE, Ranks, Several

log = logging.getLogger(__name__)
WAIT = timedelta(days=7)  # the others wait while rank 0 merges, evaluates and writes
GRACE = 1.0  # seconds in which the first rank may see the same failure by itself
HEARD = 10.0  # seconds for the first rank to say what failed elsewhere
LAST = 3.0  # seconds for the others to leave before the first rank does
FAILED, SAID, LEFT = "failed", "said", "left"
_here: Ranks = ALONE


def here() -> Ranks:
    """The ranks that this process belongs to: alone, except inside of `join`."""
    return _here


def idle_gpus(device: str, recipe: object) -> str:
    """One line that says how to start on all GPUs of this machine; empty where they are in use or not wanted."""
    gpus = torch.cuda.device_count()
    if _here.count > 1 or gpus < 2 or device not in ("auto", "cuda"):
        return ""
    return f"1 of {gpus} GPUs is used; for all: torchrun --standalone --nproc-per-node {gpus} -m requant run {recipe}"


@contextmanager
def join() -> Iterator[Several]:
    """Meet the other ranks as the environment says: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.

    Raises InputError when there are more ranks than GPUs on a machine that has GPUs.
    """
    global _here
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    started = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), local + 1)
    if gpus:
        if started > gpus:
            raise InputError(
                f"{started} ranks were started where there are {gpus} GPUs: start {gpus}, or hide them all with "
                "CUDA_VISIBLE_DEVICES= to run on the CPU"
            )
        torch.cuda.set_device(local)
        if os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's own choice: what is left to the CPU would crawl
            torch.set_num_threads(max(1, _cores() // started))
    store, rank, count = next(rendezvous("env://", timeout=WAIT))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpus else "gloo", store=PrefixStore("group", store), rank=rank, world_size=count,
        timeout=WAIT,
    )  # fmt: skip
    # What waits in a store holds up all that ask through the same, and NCCL waits there for its others.
    own = store.clone() if hasattr(store, "clone") else store
    ranks = _here = Several(local, PrefixStore("requant", own))
    try:
        yield ranks
    finally:
        _here = ALONE
        ranks.part()
        dist.destroy_process_group()


def _cores() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def together(command: Callable[[], None], hushed: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
    """Run `command` on the first rank and serve it on the others; each leaves with its own exit code.

    hushed: inside of it the others print nothing, for the first rank speaks for all.
    """
    try:
        with join() as ranks:
            ranks.watching = threading.Thread(target=_watch, args=(ranks,), daemon=True)
            ranks.watching.start()
            if ranks.first:
                _lead(ranks, command)
            else:
                _follow(ranks, hushed)
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def _lead(ranks: Several, command: Callable[[], None]) -> None:
    try:
        command()
    except BaseException as error:
        if ranks.called:
            code = _described(error)[1]
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            ranks.store.set(SAID, "")
            _fail(ranks, "", code)
            _leave(ranks, code)
        raise
    finally:
        ranks.dismiss()


def _follow(ranks: Several, hushed: Callable[[], AbstractContextManager[None]]) -> None:
    logging.getLogger("requant").addHandler(logging.NullHandler())  # the first rank logs for all
    try:
        with hushed():
            ranks.serve()
    except BaseException as error:  # noqa: BLE001 - whatever it is, the others must not wait for this rank
        text, code = _described(error)
        _fail(ranks, text, code)
        _await_said(ranks, text)
        _leave(ranks, code)


def _described(error: BaseException) -> tuple[str, int]:
    """What to say of an error, and the exit code."""
    if isinstance(error, SystemExit):
        return "", error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return "", 130
    if isinstance(error, RequantError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        return f"{error.filename or ''}: {error.strerror or error}", 1
    return "".join(traceback.format_exception(error)), 1


def _fail(ranks: Several, text: str, code: int) -> None:
    """Tell all that it is over, unless somebody did before."""
    with suppress(dist.DistError):  # the store went with the first rank
        ranks.store.compare_set(FAILED, "", json.dumps({"rank": ranks.rank, "text": text, "code": code}))


def _await_said(ranks: Several, text: str) -> None:
    """Stay until the first rank has said why: its own calls fail once this one has left. Else say it here."""
    until = time.monotonic() + HEARD
    with suppress(dist.DistError):
        while time.monotonic() < until:
            if ranks.store.check([SAID]):
                return
            time.sleep(0.1)
        print(f"error: rank {ranks.rank}: {text}", file=sys.stderr, flush=True)


def _watch(ranks: Several) -> None:
    """End this process when another has failed: it may be waiting for one that never comes."""
    while not ranks.over.wait(0.2):
        try:
            known = ranks.store.check([FAILED])
        except dist.DistError:
            _leave(ranks, 1)  # the store was the first rank's own, and that is gone
        if known:
            return _end_with(ranks, json.loads(ranks.store.get(FAILED)))


def _end_with(ranks: Several, failed: Mapping[str, Any]) -> None:
    """End as the rank that has failed does."""
    if failed["rank"] == ranks.rank:
        return
    time.sleep(GRACE)
    if ranks.first:
        if not ranks.failing.acquire(blocking=False):
            return  # the main thread is failing too, and says why
        if failed["text"]:
            log.error("stopped: rank %d: %s", failed["rank"], failed["text"])
            print(f"error: rank {failed['rank']}: {failed['text']}", file=sys.stderr, flush=True)
        ranks.store.set(SAID, "")
    _leave(ranks, failed["code"])


def _leave(ranks: Several, code: int) -> NoReturn:
    """End at once, from any thread: a collective that waits for others cannot be interrupted. As good as a kill to the files.

    The first rank goes last, for the store may be its own.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    until = time.monotonic() + LAST
    with suppress(dist.DistError):
        gone = ranks.store.add(LEFT, 0 if ranks.first else 1)
        while ranks.first and gone < ranks.count - 1 and time.monotonic() < until:
            time.sleep(0.05)
            gone = ranks.store.add(LEFT, 0)
    os._exit(code)
