"""What every test of the pipeline shares: no network, two threads, fixed seeds, reproducible hypothesis."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # bitsandbytes compiles its CPU quantizer: 10 s for nothing here
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

pytest_plugins = ("helpers.e2e",)

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
settings.register_profile(
    "requant",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("requant")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
