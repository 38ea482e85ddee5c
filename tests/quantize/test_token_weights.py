"""Tokens weighted by the gradient of the end loss, against autograd's Jacobians."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico
from helpers.quantizing import GRID, model_dir, run, windows
from helpers.stagewise import Step, recorded
from torch import Tensor

from requant.checkpoint.reader import file_digest
from requant.errors import StageError
from requant.modeling.linear_groups import LinearGroup
from requant.quantize import token_weights
from requant.quantize.plan import Settings
from requant.quantize.token_weights import TokenWeights, effective_share, squared_gradients, tempered

QKV = tuple(f"model.layers.0.self_attn.{n}_proj" for n in "qkv")
CORRECTED = Settings(grid=GRID, correct=0.5, sweeps=1)


def linears() -> list[str]:
    return [
        name for name, m in pico.model().named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name
    ]


def random_weights(count: int = 8, length: int = 32) -> dict[str, Tensor]:
    torch.manual_seed(5)
    return tempered({name: torch.rand(count, length) ** 4 for name in linears()})


def fisher(model: Any, ids: Tensor, name: str) -> Tensor:
    """Trace over outputs of the Fisher's block at a linear's output, a token: sum_s J_s' (diag(p_s) - p_s p_s') J_s."""

    def logits(change: Tensor) -> Tensor:
        handle = model.get_submodule(name).register_forward_hook(lambda _, __, out: out + change)
        try:
            return model(input_ids=ids).logits[0]
        finally:
            handle.remove()

    at = torch.zeros(1, ids.shape[1], model.get_submodule(name).out_features)
    jacobian = torch.autograd.functional.jacobian(logits, at)[:, :, 0]  # [s, vocab, t, out]
    p = logits(at).detach().softmax(-1)
    mean = torch.einsum("sv,svto->sto", p, jacobian)
    return (torch.einsum("sv,svto->to", p, jacobian.square()) - mean.square().sum(0)).mean(-1)


@pytest.mark.parametrize("labels", ["signs", "sampled"])
def test_squared_gradients_are_the_fisher_information_of_the_model(labels: token_weights.Labels) -> None:
    model, ids = pico.model(), pico.ids(1, 6)
    name = "model.layers.0.mlp.gate_proj"
    exact = fisher(model, ids, name)
    found = squared_gradients(model, ids.expand(400, 6), [name], labels=labels, batch=100)[name]
    error = found.std(0) / 400**0.5
    assert ((found.mean(0) - exact).abs() < 5 * error).all()
    assert (error < 0.1 * exact).all()
    assert exact.max() > 1.5 * exact.min(), "tokens differ in what they count"
    assert all(p.requires_grad for p in model.parameters())


def test_the_texts_own_tokens_give_the_gradient_of_the_loss() -> None:
    model, ids = pico.model(), pico.ids(2, 8)
    name, caught = "model.layers.1.self_attn.o_proj", list[Tensor]()
    handle = model.get_submodule(name).register_forward_hook(lambda _, __, out: caught.append(out))
    loss = torch.nn.functional.cross_entropy(
        model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    )
    handle.remove()
    (gradient,) = torch.autograd.grad(loss, caught)
    found = squared_gradients(model, ids, [name], labels="text", batch=1)[name]
    torch.testing.assert_close(found, gradient.square().mean(-1), rtol=1e-4, atol=1e-9)


def test_signs_vary_less_than_drawn_labels() -> None:
    model, ids, name = pico.model(), pico.ids(1, 8).expand(200, 8), "model.layers.1.mlp.up_proj"
    spread = [
        float(squared_gradients(model, ids, [name], labels=one, batch=100)[name].std(0).mean())
        for one in ("signs", "sampled")
    ]
    assert spread[0] < spread[1]


@pytest.mark.parametrize("shared", [True, False])
def test_equal_weights_change_no_byte(tmp_path: Path, shared: bool) -> None:
    source = model_dir(tmp_path)
    ones = {name: torch.ones(8, 32) for name in linears()}
    for name, weights in (("plain", None), ("ones", TokenWeights(by_linear=ones, shared=shared))):
        run(source, tmp_path / name, CORRECTED, token_weights=weights)
    assert file_digest(tmp_path / "plain" / "model.safetensors") == file_digest(tmp_path / "ones" / "model.safetensors")


def test_the_hessian_is_weighted_token_by_token(tmp_path: Path) -> None:
    """Of the first linears, whose inputs no earlier rounding changes."""
    source, steps = model_dir(tmp_path), dict[str, Step]()
    weights = random_weights()
    run(
        source, tmp_path / "out", CORRECTED, function=lambda *a, **o: recorded(*a, steps=steps, **o),
        token_weights=TokenWeights(by_linear=weights),
    )  # fmt: skip
    model = pico.reload(source).float()
    caught = list[Tensor]()
    model.get_submodule(QKV[0]).register_forward_pre_hook(lambda _, args: caught.append(args[0].detach()))
    model(input_ids=windows())
    mean = torch.stack([weights[name] for name in QKV]).mean(0)
    wanted = torch.einsum("btn,btm,bt->nm", caught[0].double(), caught[0].double(), mean.double()) / mean.numel()
    found = steps[QKV[0]].moments.hessian.double()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


def test_linears_with_hessians_of_their_own(tmp_path: Path) -> None:
    source, steps = model_dir(tmp_path), dict[str, Step]()
    own = TokenWeights(by_linear=random_weights(), shared=False)
    run(source, tmp_path / "out", CORRECTED, function=lambda *a, **o: recorded(*a, steps=steps, **o), token_weights=own)
    assert set(steps) == set(linears())
    q, k = (steps[name].moments.hessian for name in QKV[:2])
    assert float((q - k).norm() / q.norm()) > 0.01
    assert own.groups([LinearGroup(("a", "b"))]) == [LinearGroup(("a",)), LinearGroup(("b",))]


def test_a_power_below_one_evens_weights_out() -> None:
    squares = {"a": torch.tensor([[1.0, 1.0, 1.0, 97.0]])}
    whole, root = tempered(squares)["a"], tempered(squares, 0.5)["a"]
    assert float(whole.mean()) == pytest.approx(1)
    assert effective_share(torch.ones(4)) == pytest.approx(1)
    assert 0.25 < effective_share(whole) < effective_share(root) < 1


def test_experts_inputs_are_no_rows_of_tokens() -> None:
    weights = TokenWeights(by_linear={"a": torch.ones(2, 4)})
    with pytest.raises(StageError, match="not one row for each calibration token"):
        list(weights.weigh(["a"], slice(0, 2), iter([(torch.zeros(5, 3), None)])))
