"""`requant.runtime.device`: one profile a device type."""

from __future__ import annotations

import pytest
import torch

from requant.errors import InputError
from requant.runtime.device import PROFILES, compute_dtype, free_bytes, limit_host_threads, pick_device, profile_of


def test_a_device_is_one_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more entry is all that is asked of a new device type."""
    device = torch.device("xpu")
    with pytest.raises(InputError, match="device xpu: expected one of cpu, cuda"):
        profile_of(device)
    monkeypatch.setitem(PROFILES, "xpu", PROFILES["cuda"])
    assert profile_of(device) is PROFILES["cuda"]
    assert compute_dtype(device, torch.bfloat16) == torch.bfloat16


def test_a_cpu_computes_in_fp32() -> None:
    assert compute_dtype(torch.device("cpu"), torch.float16) == torch.float32
    assert compute_dtype(torch.device("cuda", 1), torch.float16) == torch.float16


def test_host_memory_without_meminfo_is_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", missing)
    assert free_bytes(torch.device("cpu")) == 16 * 2**30


def test_a_gpu_that_is_asked_for_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures and Triton's kernels go to the current GPU: without it a graph for another one is empty."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]
    for asked in ("cpu", "cuda", "cuda:0"):  # of several ranks each has made its own the current one
        pick_device(asked)
    assert len(current) == 1


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("cuda") == torch.device("cuda")
    assert pick_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(InputError, match="device cuda:1: torch finds 1 GPUs here: use auto or cpu"):
        pick_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="device cuda: torch finds 0 GPUs here"):
        pick_device("cuda")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("kind", "said", "now", "threads"),
    [("cuda", None, 32, [8]), ("cuda", None, 4, []), ("cuda", "16", 16, []), ("cpu", None, 32, [])],
)
def test_beside_a_gpu_few_threads_work_on_the_cpu(
    kind: str, said: str | None, now: int, threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: now)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    limit_host_threads(torch.device(kind))
    assert taken == threads
