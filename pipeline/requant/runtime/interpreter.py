"""Thread switch interval and garbage collector while a GPU works."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SWITCH = 2e-4  # seconds that a thread keeps the interpreter while another wants it


@contextmanager
def quick_switches(device: torch.device) -> Iterator[None]:
    """On a GPU threads let each other run sooner inside; Python's own 5 ms add up.

    A compiler reads hundreds of files and gives the interpreter away for each; whoever starts the GPU's work, while other
    threads read, pack and write, gets it back too late to keep the GPU busy. Python's collector looks at nothing that was there
    before, nor at what was set aside inside.
    """
    before, others = sys.getswitchinterval(), gc.get_freeze_count()
    if device.type == "cuda":
        sys.setswitchinterval(SWITCH)
        gc.freeze()
    try:
        yield
    finally:
        sys.setswitchinterval(before)
        if not others:
            gc.unfreeze()


def set_aside(device: torch.device) -> None:
    """On a GPU: Python's collector is done with all that there is now, and looks at what is new only.

    To look at everything, libraries too, takes it a fifth of a second in which nothing else runs, whenever there is a quarter
    more than the last time; where several ranks wait for each other, all of them wait for each one's.
    """
    if device.type == "cuda":
        gc.collect()
        gc.freeze()
