"""What a report says of the machine and of time: versions, hardware, seconds and peak memory of a stage."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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
    """Wall seconds and peak resident bytes of a stage."""

    seconds: float = 0.0
    peak_rss: int = 0


@contextmanager
def measured() -> Iterator[Cost]:
    """Measure a stage. On Linux the peak is the stage's own; elsewhere the process's so far."""
    cost, started = Cost(), time.monotonic()
    _reset_peak()
    try:
        yield cost
    finally:
        cost.seconds = time.monotonic() - started
        cost.peak_rss = _peak()


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak() -> int:
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


def hardware(device: str) -> dict[str, str]:
    """The device the run computed on, cores and processor."""
    facts = {"device": device, "cores": str(os.cpu_count()), "processor": _processor()}
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
