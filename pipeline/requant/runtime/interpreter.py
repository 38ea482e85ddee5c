"""Process-global interpreter state while a GPU works: switch interval, garbage collector."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from requant.runtime import library_imports

SWITCH = 2e-4  # seconds that a thread keeps the interpreter while another wants it
_inside = 0  # of how many blocks with a GPU's settings


@contextmanager
def gpu_interpreter_settings(device: torch.device) -> Iterator[None]:
    """Set the interpreter up for a GPU inside the block, and restore it afterwards.

    Also after an error. Nothing is changed for a CPU.
    Threads switch after 0.2 ms. With Python's own 5 ms the thread that launches kernels waits too long for the
    interpreter while others compile, read, pack and write, and the GPU idles. Objects that exist now are excluded from
    garbage collection, and later those that `freeze_garbage_collector` excludes.
    """
    if device.type != "cuda":
        yield
        return
    global _inside
    interval = sys.getswitchinterval()
    frozen_before = _inside or (gc.get_freeze_count() and not library_imports.froze())
    _inside += 1
    try:
        sys.setswitchinterval(SWITCH)
        gc.freeze()
        yield
    finally:
        _inside -= 1
        sys.setswitchinterval(interval)
        if not frozen_before:  # Python cannot unfreeze some objects and leave others
            gc.unfreeze()


def freeze_garbage_collector(device: torch.device) -> None:
    """On a GPU: collect garbage once, then exclude all remaining objects from collection.

    A full collection visits the objects of all libraries: 0.2 s in which no other thread runs, and every rank waits for
    each rank's. It would come whenever the number of objects has grown by a quarter.
    """
    if device.type == "cuda":
        gc.collect()
        gc.freeze()
