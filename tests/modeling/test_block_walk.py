"""`requant.modeling.block_walk`: groups see the inputs of the whole model's forward."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico
from torch import Tensor, nn

from requant.checkpoint.reader import Checkpoint
from requant.errors import InputError, StageError
from requant.modeling import skeleton
from requant.modeling.block_walk import BlockInput, Walk
from requant.modeling.blocks import block_linears, block_list
from requant.modeling.linear_groups import Inputs, LinearGroup, find_linear_groups
from requant.modeling.sequential import run_block, start_unquantized

GROUPS = {
    "llama": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
              ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]],
    "gpt_neox": [["attention.query_key_value"], ["attention.dense"], ["mlp.dense_h_to_4h"], ["mlp.dense_4h_to_h"]],
    "opt": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.out_proj"], ["fc1"], ["fc2"]],
}  # fmt: skip
GROUPS |= dict.fromkeys(("gemma2", "qwen2", "qwen3"), GROUPS["llama"])
KINDS = list(GROUPS)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def walk_of(tmp: Path, kind: str = "llama", **changes: Any) -> tuple[Any, Walk]:
    made = pico.model(kind, **changes)
    checkpoint = Checkpoint(pico.save(made, tmp / "model"))
    built = skeleton.open_model(tmp / "model")
    return made, Walk(checkpoint, built, device=torch.device("cpu"), dtype=torch.float32)


def seen_by_model(made: Any, tokens: Tensor) -> list[Tensor]:
    """The output of every block in an ordinary forward."""
    outputs: list[Tensor] = []

    def hook(_m: nn.Module, _a: Any, out: Any) -> None:
        outputs.append((out[0] if isinstance(out, tuple) else out).clone())

    handles = [b.register_forward_hook(hook) for b in block_list(made)[1]]
    made(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_alone_give_the_models_hidden_states(tmp_path: Path, kind: str) -> None:
    made, walk = walk_of(tmp_path, kind)
    tokens = pico.ids(5, 24)
    expected = seen_by_model(made, tokens)
    items = walk.embed(tokens, 2)  # batches of 2, 2 and 1
    assert [len(i.hidden) for i in items] == [2, 2, 1]
    for index in range(len(walk)):
        walk.load(index)
        for item in items:
            item.hidden = walk.run(index, item)
        walk.release(walk.blocks[index])
        got = torch.cat([i.hidden for i in items])
        assert torch.allclose(got, expected[index], rtol=1e-5, atol=1e-5), index


@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_linears_that_share_their_input(tmp_path: Path, kind: str) -> None:
    _, walk = walk_of(tmp_path, kind)
    (item,) = walk.embed(pico.ids(), 2)
    block = walk.load(0)
    groups = find_linear_groups(walk, 0, item, tuple(block_linears(block)))
    assert [list(s.linears) for s in groups] == GROUPS[kind]


@pytest.mark.parametrize("paused", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gemma2"])
def test_replacing_weights_between_groups_is_running_the_replaced_model(
    tmp_path: Path, kind: str, paused: bool
) -> None:
    """Each group receives what the replaced groups before it give, paused or rerun."""
    made, walk = walk_of(tmp_path, kind)
    tokens = pico.ids(4, 16)
    items = walk.embed(tokens, 3)
    seen: dict[str, Tensor] = {}
    for index in range(len(walk)):
        block = walk.load(index)
        groups = find_linear_groups(walk, index, items[0], tuple(block_linears(block)))

        def on_group(group: LinearGroup, inputs: Inputs, index: int = index, block: Any = block) -> None:
            seen[f"{index}.{group.linears[0]}"] = torch.cat([x for x, _ in inputs])
            for name in group.linears:
                block.get_submodule(name).weight.mul_(0.5)

        run_block(walk, index, items, groups, on_group, paused=paused)
        walk.release(block)
    blocks = block_list(made)[1]
    expected: dict[str, Tensor] = {}
    for index, block in enumerate(blocks):
        for name, linear in block_linears(block).items():
            linear.weight.mul_(0.5)
            linear.register_forward_pre_hook(
                lambda _m, args, key=f"{index}.{name}": expected.update({key: args[0].clone()})
            )
    final = seen_by_model(made, tokens)[-1]
    assert torch.allclose(torch.cat([i.hidden for i in items]), final, rtol=1e-5, atol=1e-5)
    assert len(seen) == 4 * len(walk)
    for key, value in seen.items():
        assert torch.allclose(value, expected[key].reshape(value.shape), rtol=1e-5, atol=1e-5), key


def test_one_block_is_resident(tmp_path: Path) -> None:
    _, walk = walk_of(tmp_path, num_hidden_layers=3)

    def resident() -> list[int]:
        return [i for i, b in enumerate(walk.blocks) if any(not p.is_meta for p in b.parameters())]

    walk.embed(pico.ids(), 2)
    assert resident() == [0]
    walk.release(walk.blocks[0])
    walk.load(2)
    assert resident() == [2]
    assert all(p.is_meta for n, p in walk.model.named_parameters() if ".layers." not in n), "nor embeddings and head"


@pytest.mark.parametrize("paused", [True, False])
def test_the_reference_block_runs_beside_the_block(tmp_path: Path, paused: bool) -> None:
    """The reference block keeps the unquantized inputs while the block's weights are halved."""
    made, walk = walk_of(tmp_path, "llama")
    tokens = pico.ids(4, 16)
    expected: dict[str, Tensor] = {}
    for name, linear in block_linears(block_list(made)[1][0]).items():
        linear.register_forward_pre_hook(lambda _m, args, key=name: expected.update({key: args[0].clone()}))
    final = seen_by_model(made, tokens)
    items = walk.embed(tokens, 4)
    start_unquantized(walk, items)
    block = walk.load(0)
    reference_block = copy.deepcopy(block)
    groups = find_linear_groups(walk, 0, items[0], tuple(block_linears(block)))

    def on_group(group: LinearGroup, inputs: Inputs) -> None:
        ((_, exact),) = inputs
        assert exact is not None
        assert torch.allclose(exact, expected[group.linears[0]], rtol=1e-5, atol=1e-5)
        for name in group.linears:
            block.get_submodule(name).weight.mul_(0.5)

    run_block(walk, 0, items, groups, on_group, reference_block=reference_block, paused=paused)
    assert items[0].unquantized is not None
    assert torch.allclose(items[0].unquantized, final[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(items[0].hidden, final[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("paused", [True, False])
def test_a_failing_group_leaves_no_hooks(tmp_path: Path, paused: bool) -> None:
    _, walk = walk_of(tmp_path)
    (item,) = walk.embed(pico.ids(), 2)
    block = walk.load(0)
    groups = find_linear_groups(walk, 0, item, tuple(block_linears(block)))

    def fail(group: LinearGroup, inputs: Inputs) -> None:
        next(inputs)
        raise StageError("stop")

    with pytest.raises(StageError, match="stop"):
        run_block(walk, 0, [item], groups, fail, paused=paused)
    assert all(not m._forward_pre_hooks for m in block.modules())
    assert torch.isfinite(walk.run(0, item)).all()


def test_a_linear_that_is_never_called_is_an_error(tmp_path: Path) -> None:
    _, walk = walk_of(tmp_path)
    (item,) = walk.embed(pico.ids(), 2)
    block = walk.load(0)
    block.idle = nn.Linear(4, 4)
    with pytest.raises(StageError, match=r"model.layers.0: idle was never called on the calibration text"):
        find_linear_groups(walk, 0, item, (*block_linears(walk.blocks[1]), "idle"))


def test_structure_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Linear: no list of transformer blocks found"):
        block_list(nn.Linear(2, 2))
    path = pico.save(pico.model(), tmp_path / "model")
    pico.edit_tensors(path / "model.safetensors", drop=["model.layers.1.mlp.up_proj.weight"])
    built = skeleton.open_model(path)
    with pytest.raises(
        InputError, match=r"1 of the model's tensors are missing, e.g. model.layers.1.mlp.up_proj.weight"
    ):
        Walk(Checkpoint(path), built, device=torch.device("cpu"), dtype=torch.float32)


def test_arguments_differ_by_block_where_the_model_makes_them_differ(tmp_path: Path) -> None:
    """Gemma 2 alternates sliding and full attention: a window of 8 in 24 tokens matters."""
    _, walk = walk_of(tmp_path, "gemma2")
    item: BlockInput
    (item,) = walk.embed(pico.ids(), 2)
    assert len(item.arguments) == 2
    hidden = item.hidden
    walk.load(0)
    own = walk.run(0, item)
    swapped = walk.run(0, BlockInput(hidden, item.arguments[::-1]))
    assert not torch.allclose(own, swapped)


def read_ahead(walk: Walk, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let a walk on the CPU read ahead as for a GPU; lists the blocks that it starts to read."""
    begun: list[int] = []

    def read(index: int) -> dict[str, Tensor]:
        begun.append(index)
        return walk._read(walk.blocks[index], f"{walk.prefix}.{index}.")

    monkeypatch.setattr(walk, "_reader", ThreadPoolExecutor(1))
    monkeypatch.setattr(walk, "_read_ahead", read)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: None)
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    return begun


@torch.no_grad()
def test_every_block_is_read_once_ahead_of_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, walk = walk_of(tmp_path, num_hidden_layers=4)
    begun, tokens = read_ahead(walk, monkeypatch), pico.ids(4, 16)
    expected = seen_by_model(made, tokens)
    items = walk.embed(tokens, 4)
    for index in range(4):
        walk.load(index)
        for item in items:
            item.hidden = walk.run(index, item)
        assert torch.allclose(torch.cat([i.hidden for i in items]), expected[index], atol=1e-5)
        walk.release(walk.blocks[index])
    assert begun == [0, 1, 2, 3]
    assert not walk._coming


@torch.no_grad()
def test_an_embedding_that_fails_leaves_no_block_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, walk = walk_of(tmp_path)
    read_ahead(walk, monkeypatch)
    read = walk._read

    def failing(module: nn.Module, prefix: str, *, recurse: bool = True) -> dict[str, Tensor]:
        if "embed" in prefix:
            raise torch.OutOfMemoryError("no room")
        return read(module, prefix, recurse=recurse)

    monkeypatch.setattr(walk, "_read", failing)
    with pytest.raises(torch.OutOfMemoryError):
        walk.embed(pico.ids(2, 8), 2)
    assert not walk._coming
    monkeypatch.setattr(walk, "_read", read)
    hidden = walk.embed(pico.ids(2, 8), 2)[0].hidden
    assert torch.allclose(hidden, made.model.embed_tokens(pico.ids(2, 8)))
