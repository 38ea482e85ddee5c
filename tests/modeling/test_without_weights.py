"""`requant.modeling.without_weights`: what is made on the meta device, and what is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from requant.modeling import skeleton
from requant.modeling import without_weights as module
from requant.modeling.without_weights import LARGE, without_weights

MADE = {
    "zeros": torch.zeros,
    "ones": lambda size: torch.ones(size, dtype=torch.bool),
    "empty": lambda size: torch.empty((2, size // 2)),
    "full": lambda size: torch.full((size,), 1.5),
    "named": lambda size: torch.zeros(size=(size,)),
    "drawn": lambda size: torch.randn(size, generator=torch.Generator().manual_seed(1)),
}


class Model(nn.Module):
    """Keeps the device on which each tensor was made, before it became a parameter."""

    def __init__(self, size: int) -> None:
        super().__init__()
        made = {name: make(size) for name, make in MADE.items()}
        self.devices = {name: tensor.device.type for name, tensor in made.items()}
        self.experts = nn.Parameter(made["zeros"])
        self.register_buffer("frequencies", torch.arange(4.0) * torch.full((4,), 2.0))


def test_large_tensors_are_never_on_the_cpu() -> None:
    with without_weights():
        model = Model(LARGE + 2)
    assert set(model.devices.values()) == {"meta"}
    assert model.experts.shape == (LARGE + 2,)


def test_small_ones_have_their_values() -> None:
    with without_weights():
        model = Model(8)
    assert set(model.devices.values()) == {"cpu"}
    assert model.experts.device.type == "meta"  # a parameter all the same
    assert model.frequencies.tolist() == [0, 2, 4, 6]


def test_nothing_changes_outside() -> None:
    with without_weights():
        pass
    assert torch.zeros(LARGE + 1, dtype=torch.bool).device.type == "cpu"


def test_a_large_buffer_has_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """StarCoder computes its mask of 8192 x 8192 positions with torch.ones."""
    from transformers import GPTBigCodeConfig

    monkeypatch.setattr(module, "LARGE", 1000)
    config = GPTBigCodeConfig(n_positions=64, n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    model = skeleton.build(config)
    assert torch.equal(model.transformer.bias, torch.ones(64, 64).tril().bool())
    assert {p.device.type for p in model.parameters()} == {"meta"}
