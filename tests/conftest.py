"""Settings of all tests: no network, one thread, fixed seeds, GPU tests skipped without one."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: two threads take twice the time
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as `requant.cli.main` sets it, before torch is loaded
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # bitsandbytes compiles its CPU quantizer: 10 s for nothing here
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from requant.numerics import triton_kernels

pytest_plugins = ("helpers.e2e",)

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
settings.register_profile(
    "requant",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("requant")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of tests/campaigns: what is drawn, how much, and one trial to repeat."""
    group = parser.getgroup("campaigns")
    group.addoption("--campaign-seed", type=int, default=0, help="What all trials are drawn from.")
    group.addoption("--campaign-size", type=int, default=0, help="Per cent of the whole campaign; 0: a small sample.")
    group.addoption("--campaign-only", default="", metavar="KIND[:NUMBER]", help="One kind of trials, or one trial.")
    group.addoption("--campaign-keep", default="", metavar="DIR", help="Where failing inputs stay.")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `gpu` if fewer GPUs are there (count=1).

    interpreted: Triton's interpreter is enough.
    """
    for mark in item.iter_markers("gpu"):
        wanted, interpreted = mark.kwargs.get("count", 1), mark.kwargs.get("interpreted", False)
        may_interpret = interpreted and os.environ.get("TRITON_INTERPRET") == "1"
        if interpreted and triton_kernels.triton is None:
            pytest.skip("needs Triton")
        if torch.cuda.device_count() < wanted and not may_interpret:
            pytest.skip(
                f"needs {wanted} GPU{'s' if wanted > 1 else ''}{' or TRITON_INTERPRET=1' if interpreted else ''}"
            )


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
