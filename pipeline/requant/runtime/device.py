"""Choice of device, its free memory and its measured matrix product rate."""

from __future__ import annotations

import gc
import time
from contextlib import suppress

import torch

USABLE = 0.85  # share of free memory that a plan may fill
BUSY = {"cpu": 0.6, "cuda": 0.35}  # share of the matrix product rate that a whole step reaches


def pick_device(asked: str) -> torch.device:
    """`auto` is the first GPU, else the CPU."""
    if asked == "auto":
        asked = "cuda:0" if torch.cuda.is_available() else "cpu"
    return torch.device(asked)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 16 * 2**30  # nothing tells: a common size


def hold(device: torch.device, nbytes: int) -> None:
    """Let torch take so much of a GPU's memory in one piece, where it can be had, to hand out from. Its peak begins anew."""
    with suppress(torch.OutOfMemoryError):
        torch.empty(nbytes, dtype=torch.uint8, device=device)
    torch.cuda.reset_peak_memory_stats(device)  # that was no use of it


def free_memory(device: torch.device) -> None:
    """Give back what no tensor holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def product_rate(device: torch.device) -> float:
    """Flops a second of one large matrix product, measured on the spot (some 50 ms on a CPU)."""
    n, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.ones(n, n, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * n**3 / best
