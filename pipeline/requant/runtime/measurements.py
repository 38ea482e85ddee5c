"""Measurements for a report: versions, hardware, seconds and peak memory of a stage."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NotRequired, TypedDict

PACKAGES = (
    "requant",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "safetensors",
    "tokenizers",
    "datasets",
    "gptqmodel",
)


@dataclass
class Cost:
    """Wall seconds, peak resident bytes and peak bytes on the GPU of a stage."""

    seconds: float = 0.0
    peak_rss: int = 0
    peak_device: int = 0

    @property
    def facts(self) -> dict[str, float | int]:
        """The facts that a stage's result keeps; peak_device only if a GPU was used."""
        known: dict[str, float | int] = {"seconds": self.seconds, "peak_rss": self.peak_rss}
        return known | ({"peak_device": self.peak_device} if self.peak_device else {})


@contextmanager
def measured(device: str = "cpu") -> Iterator[Cost]:
    """Measure a stage.

    On Linux the peak is the stage's own; elsewhere the process's so far. device: the GPU whose memory is measured.
    """
    cost, started = Cost(), time.monotonic()
    reset_peak()
    gpu = _gpu(device)
    if gpu:
        gpu.reset_peak_memory_stats(device)
    try:
        yield cost
    finally:
        cost.seconds = time.monotonic() - started
        cost.peak_rss = peak()
        cost.peak_device = gpu.max_memory_allocated(device) if gpu else 0


def _gpu(device: str) -> Any:
    """torch.cuda where the device is one, else None."""
    if not device.startswith("cuda"):
        return None
    import torch

    torch.cuda.init()  # type: ignore[no-untyped-call]
    return torch.cuda


def reset_peak() -> int:
    """Reset the peak, and return freed memory to the system, where possible.

    Returns the bytes resident now.
    """
    with suppress(OSError, AttributeError):  # glibc keeps freed memory in the process
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Most bytes that were resident since `reset_peak`."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def versions() -> dict[str, str]:
    """Python and every package whose version can change a number."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class Hardware(TypedDict):
    """The machine of a run. cores: a number. gpu: its name, on a GPU."""

    device: str
    cores: str
    processor: str
    gpu: NotRequired[str]


def hardware(device: str) -> Hardware:
    """The device the run computed on, cores and processor."""
    facts: Hardware = {"device": device, "cores": str(os.cpu_count()), "processor": _processor()}
    if device.startswith("cuda"):
        import torch

        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
