"""Devices: a profile for each type, choice of device, free memory and product rate."""

from __future__ import annotations

import gc
import os
import time
from contextlib import suppress
from dataclasses import dataclass

import torch

from requant.errors import InputError

USABLE = 0.85  # share of free memory that a plan may fill
HOST_THREADS = 8  # of torch on the CPU beside a GPU: its work there is small, and more threads wait for each other


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """What the code needs to know of a device type.

    A new device is one more entry of `PROFILES`.

    busy_share: share of the matrix product rate that a whole forward and backward pass reaches.
    product_size, product_dtype: of the product that measures the rate.
    start_seconds: to load its libraries and kernels.
    computes_fp32: blocks compute in fp32, whatever dtype is served; elsewhere in the serving dtype.
    batch_tokens: of a calibration batch: enough to fill the processor, few enough to keep in memory.
    scoring_tokens: the same of an evaluation batch, with the padding of its windows; scoring_padding: of these at most.
    kl_chunk_logits: logits of one model in memory at a time.
    commits_later: a block is committed while the next one is being solved.
    least_unquantized_tokens: at least these also run through the unquantized block; more is better where it costs
    little.
    corrects_by_drift: error correction may solve for the drift in place of the rows. blocked_solve: by our blocked
    substitution, where the library's is slower.
    gptq_block: columns that GPTQ rounds one after another.
    gptq_outer: columns whose feedback to all others is one product.
    hessian_panel: columns of the Hessian added in one product.
    search_elements: weights whose scales are searched at once.
    """

    busy_share: float
    product_size: int
    product_dtype: torch.dtype
    start_seconds: float
    computes_fp32: bool
    batch_tokens: int
    scoring_tokens: int
    scoring_padding: int
    kl_chunk_logits: int
    commits_later: bool
    least_unquantized_tokens: int
    corrects_by_drift: bool
    blocked_solve: bool
    gptq_block: int
    gptq_outer: int
    hessian_panel: int
    search_elements: int


PROFILES: dict[str, DeviceProfile] = {
    "cpu": DeviceProfile(
        busy_share=0.6,
        product_size=1024,
        product_dtype=torch.float32,
        start_seconds=0.0,
        computes_fp32=True,
        batch_tokens=2048,
        scoring_tokens=2048,
        scoring_padding=16,
        kl_chunk_logits=2**22,
        commits_later=False,
        least_unquantized_tokens=0,
        corrects_by_drift=False,
        blocked_solve=False,
        gptq_block=128,
        gptq_outer=128,
        hessian_panel=512,
        search_elements=2**17,  # the working set stays in the cache
    ),
    "cuda": DeviceProfile(
        busy_share=0.35,
        product_size=4096,
        product_dtype=torch.bfloat16,
        start_seconds=1.0,
        computes_fp32=False,
        batch_tokens=8192,
        scoring_tokens=16384,
        scoring_padding=1024,
        kl_chunk_logits=2**26,
        commits_later=True,
        least_unquantized_tokens=2**17,
        corrects_by_drift=True,
        blocked_solve=True,
        gptq_block=256,  # one launch
        gptq_outer=512,
        hessian_panel=2048,
        search_elements=2**26,
    ),
}


def profile_of(device: torch.device) -> DeviceProfile:
    """The profile of a device's type; raises InputError for a type without one."""
    try:
        return PROFILES[device.type]
    except KeyError:
        raise InputError(f"device {device}: expected one of {', '.join(PROFILES)}") from None


def compute_dtype(device: torch.device, serving: torch.dtype) -> torch.dtype:
    """The dtype in which blocks compute on the device.

    fp32 on a CPU, the serving dtype elsewhere.
    """
    return torch.float32 if profile_of(device).computes_fp32 else serving


def limit_host_threads(device: torch.device) -> None:
    """Beside a GPU, let torch use at most HOST_THREADS of the CPU, unless OMP_NUM_THREADS says how many."""
    if device.type == "cuda" and not os.environ.get("OMP_NUM_THREADS") and torch.get_num_threads() > HOST_THREADS:
        torch.set_num_threads(HOST_THREADS)


def pick_device(asked: str) -> torch.device:
    """`auto` is the first GPU, else the CPU. Another GPU than the first becomes the current one.

    CUDA graphs and Triton's kernels are launched on the current GPU, wherever their tensors are.
    """
    if asked == "auto":
        asked = "cuda:0" if torch.cuda.is_available() else "cpu"
    device = torch.device(asked)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise InputError(
            f"device {asked}: torch finds {found} GPUs here: use auto or cpu, or install a CUDA build of torch"
        )
    if device.index:
        torch.cuda.set_device(device)
    return device


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 16 * 2**30  # unknown: a common size


def reserve_memory(device: torch.device, nbytes: int) -> None:
    """Reserve `nbytes` of GPU memory as one block of torch's allocator, if available.

    Resets the peak statistics.
    """
    with suppress(torch.OutOfMemoryError):
        torch.empty(nbytes, dtype=torch.uint8, device=device)
    torch.cuda.reset_peak_memory_stats(device)  # what is only reserved is not counted


def free_memory(device: torch.device) -> None:
    """Free the memory that no tensor uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def product_rate(device: torch.device) -> float:
    """Flops a second of one large matrix product, measured on the spot (some 50 ms on a CPU)."""
    n, dtype = profile_of(device).product_size, profile_of(device).product_dtype
    a = torch.ones(n, n, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * n**3 / best
