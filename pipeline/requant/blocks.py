"""Run a causal LM one block at a time, one block resident; every batch of a block in step, stage by stage.

Structure is found, not tabulated: the blocks are the largest list of like modules, the stages are the linears that
receive the same input tensor, in the order in which they are called. Each batch's forward runs in a greenlet that
pauses at the first linear of a stage, so that weights can be replaced between stages and nothing runs twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from requant import linears, skeleton
from requant.checkpoint import Checkpoint
from requant.errors import InputError, StageError


@dataclass(frozen=True)
class Stage:
    """Linears of a block (names inside it) that share their input."""

    linears: tuple[str, ...]


@dataclass
class BlockInput:
    """What the model passes to its blocks for one batch: hidden states, and the other arguments of every block."""

    hidden: Tensor  # [batch, length, width]
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    exact: Tensor | None = None  # what `hidden` would be had no earlier block been quantized, where that is wanted


def block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, blocks) of the largest ModuleList whose items are of one class; raises InputError when there is none."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(m) for m in module}) == 1
    ]
    if not lists:
        raise InputError(f"{type(model).__name__}: no list of transformer blocks found")
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def block_linears(block: nn.Module) -> dict[str, Any]:
    """Every Linear of a block by its name inside the block."""
    return {name: m for name, m in block.named_modules() if linears.is_linear(m)}


class _Captured(Exception):
    """Ends a forward once the first block's input is known."""


class Walk:
    """A model directory as a sequence of blocks, of which one at a time holds weights.

    device, dtype: where and in what precision blocks run (fp32 on the CPU).
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module, *, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint, self.model, self.device, self.dtype = checkpoint, model, device, dtype
        self.prefix, self.blocks = block_list(model)
        self.names = skeleton.tensor_names(model, checkpoint)
        lost = [n for n, _ in model.named_parameters() if n not in self.names]
        if lost:
            raise InputError(f"{checkpoint.path}: {len(lost)} of the model's tensors are missing, e.g. {lost[0]}")
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)

    def __len__(self) -> int:
        return len(self.blocks)

    def load(self, index: int) -> nn.Module:
        """Give block `index` its weights."""
        block = self.blocks[index]
        self._fill(block, f"{self.prefix}.{index}.")
        return block

    def release(self, module: nn.Module) -> None:
        """Take the weights away again."""
        for sub in module.modules():
            for name, parameter in sub._parameters.items():
                if parameter is not None:
                    sub._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def _fill(self, module: nn.Module, prefix: str) -> None:
        tensors = {
            name: self.checkpoint.read(self.names[prefix + name]).to(self.device, self.dtype)
            for name, _ in module.named_parameters()
        }
        skeleton.place(module, tensors)

    def embed(self, windows: Tensor, batch: int) -> list[BlockInput]:
        """Run what comes before the blocks; windows int64 [n, length] -> one BlockInput for each batch.

        The other arguments (rotary tables, masks) are recorded for every block, once per batch size.
        """
        outside = self._outside()
        for name, module in outside:
            self._fill(module, name + ".")
        first = self.load(0)
        recorded: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        inputs = []
        for ids in torch.split(windows, batch):
            ids = ids.to(self.device)
            hidden, arguments = self._capture(ids)
            if len(ids) not in recorded:
                recorded[len(ids)] = self._record(ids, first, hidden, arguments)
            inputs.append(BlockInput(hidden, recorded[len(ids)]))
        for _, module in outside:
            self.release(module)
        return inputs

    def _outside(self) -> list[tuple[str, nn.Module]]:
        """Modules with weights of their own that are neither in a block nor the output embedding."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        inside = {id(m) for block in self.blocks for m in block.modules()} | ({id(head)} if head is not None else set())
        return [
            (name, m)
            for name, m in self.model.named_modules()
            if id(m) not in inside and any(p is not None for p in m._parameters.values())
        ]

    def _capture(self, ids: Tensor) -> tuple[Tensor, tuple[tuple[Any, ...], dict[str, Any]]]:
        """The first block's hidden states and other arguments."""
        caught: list[Any] = []

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append((args, kwargs))
            raise _Captured

        handle = self.blocks[0].register_forward_pre_hook(hook, with_kwargs=True)
        try:
            self.model(input_ids=ids, use_cache=False)
        except _Captured:
            pass
        finally:
            handle.remove()
        if not caught:
            raise StageError(f"{type(self.model).__name__} never called its first block")
        args, kwargs = caught[0]
        if not args and "hidden_states" in kwargs:
            kwargs = dict(kwargs)
            args = (kwargs.pop("hidden_states"),)
        return args[0], (args[1:], kwargs)

    def _record(
        self, ids: Tensor, first: nn.Module, hidden: Tensor, arguments: Any
    ) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The arguments of every block, seen while each is replaced by one that passes its input on."""
        output = first(hidden, *arguments[0], **arguments[1])
        recorded: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def passing(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            recorded.append((args, kwargs))
            return (x, *output[1:]) if isinstance(output, tuple) else x

        head = self.model.get_output_embeddings()  # type: ignore[operator]
        forwards = [(m, m.forward) for m in self.blocks]
        if head is not None:
            head.register_forward_pre_hook(_stop)
        try:
            for block in self.blocks:
                block.forward = passing
            self.model(input_ids=ids, use_cache=False)
        except _Captured:
            pass
        finally:
            for block, forward in forwards:
                block.forward = forward
            if head is not None:
                head._forward_pre_hooks.clear()
        if len(recorded) != len(self.blocks):
            raise StageError(f"{type(self.model).__name__} called {len(recorded)} of its {len(self.blocks)} blocks")
        return recorded

    def run(self, index: int, item: BlockInput) -> Tensor:
        """One block on one batch: the next hidden states."""
        return self.forward(self.blocks[index], item.hidden, item.arguments[index])

    @staticmethod
    def forward(block: Any, hidden: Tensor | None, others: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
        """A block's hidden states out of hidden states in, whichever way it wraps them."""
        out = block(hidden, *others[0], **others[1])
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result


def _stop(*_: Any) -> None:
    raise _Captured


def find_stages(walk: Walk, index: int, item: BlockInput, linears: Sequence[str]) -> list[Stage]:
    """Group `linears` of a block by the input they receive, in call order, from one forward of one batch.

    Raises StageError when a linear is not called: nothing would be known about its input.
    """
    block = walk.blocks[index]
    groups: dict[tuple[int, int], list[str]] = {}
    keep: list[Tensor] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            keep.append(args[0])  # alive until the end, so that no address is used twice
            groups.setdefault((args[0].data_ptr(), args[0]._version), []).append(name)

        return hook

    handles = [block.get_submodule(n).register_forward_pre_hook(watch(n)) for n in linears]
    try:
        walk.run(index, item)
    finally:
        for handle in handles:
            handle.remove()
    seen = {n for group in groups.values() for n in group}
    if seen != set(linears):
        raise StageError(
            f"{walk.prefix}.{index}: {', '.join(sorted(set(linears) - seen))} was never called on the calibration text"
        )
    return [Stage(tuple(dict.fromkeys(names))) for names in groups.values()]


def step(
    walk: Walk,
    index: int,
    items: Sequence[BlockInput],
    stages: Sequence[Stage],
    reach: Callable[[Stage, Iterator[tuple[Tensor, Tensor | None]]], None],
    twin: nn.Module | None = None,
) -> None:
    """Run one block on every batch, pausing all of them before each stage; `hidden` becomes the block's output.

    reach(stage, inputs) is called once a stage with an iterator over the batches' (input, exact input), each
    [batch, length, in]; it may replace the weights of the stage's linears before the batches go on. `twin` is the block
    with its original weights: it runs in step on the batches that have `exact` and gives their exact inputs; for the
    others, and without it, the exact input is None.
    """
    block = walk.blocks[index]
    alive = [True]
    handles = [h for m in (block, twin) if m is not None for h in _pauses(m, stages, alive)]
    runs = [greenlet(walk.forward) for _ in items]
    exact = [greenlet(walk.forward) if twin is not None and item.exact is not None else None for item in items]

    def inputs(stage: Stage, starting: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
        for run, other, item in zip(runs, exact, items, strict=True):
            others = item.arguments[index]
            x = _advance(run, (block, item.hidden, others) if starting else (), stage)
            yield x, None if other is None else _advance(other, (twin, item.exact, others) if starting else (), stage)

    try:
        for position, stage in enumerate(stages):
            reach(stage, inputs(stage, position == 0))
        for run, other, item in zip(runs, exact, items, strict=True):
            others = item.arguments[index]
            item.hidden = run.switch() if stages else walk.forward(block, item.hidden, others)
            if other is not None:
                item.exact = other.switch() if stages else walk.forward(twin, item.exact, others)
    finally:
        alive[0] = False
        for handle in handles:
            handle.remove()


def _pauses(block: nn.Module, stages: Sequence[Stage], alive: list[bool]) -> list[Any]:
    """Hooks that hand the input of each stage's first linear to whoever runs the greenlet, and wait."""

    def pause(stage: Stage) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            parent = getcurrent().parent
            if alive[0] and parent is not None:
                parent.switch(stage, args[0])

        return hook

    return [block.get_submodule(s.linears[0]).register_forward_pre_hook(pause(s)) for s in stages]


def _advance(run: Any, arguments: tuple[Any, ...], expected: Stage) -> Tensor:
    """Let one batch run to its next pause, which must be at `expected`."""
    stage, inputs = run.switch(*arguments)
    if stage is not expected:
        raise StageError(f"batches call their linears in different orders: {stage.linears} before {expected.linears}")
    result: Tensor = inputs
    return result
