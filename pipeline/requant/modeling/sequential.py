"""Every batch of a block in step, stage by stage: a stage is the linears that receive the same input tensor.

Stages are found from one forward, in the order in which their linears are called. Between stages weights can be
replaced, so that each stage sees what the quantized ones before it give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from requant.errors import StageError
from requant.modeling.block_walk import BlockInput, Walk
from requant.modeling.moe import unfollow

Inputs = Iterator[tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Stage:
    """Linears of a block (names inside it) that share their input."""

    linears: tuple[str, ...]


def find_stages(walk: Walk, index: int, item: BlockInput, linears: Sequence[str]) -> list[Stage]:
    """Group `linears` of a block by the input they receive, in call order, from one forward of one batch.

    Raises StageError when a linear is not called: nothing would be known about its input.
    """
    block = walk.blocks[index]
    groups: dict[tuple[int, ...], list[str]] = {}
    keep: list[Tensor] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            keep.append(args[0])  # alive until the end, so that no address is used twice
            same = (args[0].data_ptr(), args[0]._version) if args[0].numel() else (id(args[0]),)  # no rows, no address
            groups.setdefault(same, []).append(name)

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
    reach: Callable[[Stage, Inputs], None],
    *,
    twin: nn.Module | None = None,
    hold: bool = True,
) -> None:
    """Run one block on every batch, all of them to one stage before any goes on; `hidden` becomes the block's output.

    reach(stage, inputs) is called once a stage with an iterator over the batches' (input, exact input), each
    [batch, length, in]; it may replace the weights of the stage's linears before the batches go on. `twin` is the block
    with its original weights: it runs in step on the batches that have `exact` and gives their exact inputs; for the
    others, and without it, the exact input is None. An expert's inputs are [rows, in]: see `linears.SplitExperts`.

    hold: each batch's forward waits at the stage with all that it has in memory, and nothing runs twice. Otherwise each
    stage runs the block anew from its start: about twice the work, but no memory beyond a batch's, and hidden states may
    wait on the host.
    """
    block = walk.blocks[index]
    run = _held if hold and stages else _again
    run(walk, block, twin, items, [item.arguments[index] for item in items], stages, reach)


def _again(
    walk: Walk,
    block: nn.Module,
    twin: nn.Module | None,
    items: Sequence[BlockInput],
    others: Sequence[Any],
    stages: Sequence[Stage],
    reach: Callable[[Stage, Inputs], None],
) -> None:
    def inputs(stage: Stage) -> Inputs:
        hidden = walk.shelf.take([item.hidden for item in items])
        exact = walk.shelf.take([item.exact for item in items if twin is not None and item.exact is not None])
        for item, start, other in zip(items, hidden, others, strict=True):
            x = _until(block, start, other, stage)  # first: the twin's experts take the same rows
            compared = twin is not None and item.exact is not None
            was = _until(twin, next(exact), other, stage) if twin is not None and compared else None
            yield x, _comparable(x, was)

    for stage in stages:
        reach(stage, inputs(stage))
    if twin is not None:
        unfollow(twin)
        pass_on(walk, twin, items, others, exact=True)
    pass_on(walk, block, items, others)


def pass_on(
    walk: Walk, block: nn.Module, items: Sequence[BlockInput], others: Sequence[Any], *, exact: bool = False
) -> None:
    """Run a block on every batch: its output becomes `hidden`, or `exact` where there is one."""
    chosen = [(i, o) for i, o in zip(items, others, strict=True) if not exact or i.exact is not None]
    kept = [item.exact if exact else item.hidden for item, _ in chosen]
    for (item, other), x in zip(chosen, walk.shelf.take([k for k in kept if k is not None]), strict=True):
        out = Walk.forward(block, x, other)
        if exact:
            item.exact = walk.shelf.put(out, item.exact)
            item.exact_passed += 1
        else:
            item.hidden = walk.shelf.put(out, item.hidden)
            item.passed += 1


def _comparable(x: Tensor, exact: Tensor | None) -> Tensor | None:
    """The rows of the exact input that belong to those of `x`: an expert's own rows in the twin come after them."""
    return None if exact is None else exact[: len(x)]


class _Reached(Exception):
    """Ends a forward at the stage that was asked for."""


def _until(block: nn.Module, hidden: Tensor, others: Any, stage: Stage) -> Tensor:
    """What the stage's linears receive, from a forward that goes no further."""
    caught: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        caught.append(args[0])
        raise _Reached

    handle = block.get_submodule(stage.linears[0]).register_forward_pre_hook(hook)
    try:
        Walk.forward(block, hidden, others)
    except _Reached:
        pass
    finally:
        handle.remove()
    if not caught:
        raise StageError(f"{stage.linears[0]} was not called on every batch of the calibration text")
    return caught[0]


def _held(
    walk: Walk,
    block: nn.Module,
    twin: nn.Module | None,
    items: Sequence[BlockInput],
    others: Sequence[Any],
    stages: Sequence[Stage],
    reach: Callable[[Stage, Inputs], None],
) -> None:
    """Each batch's forward is a greenlet that pauses at the first linear of each stage."""
    alive = [True]
    handles = [h for m in (block, twin) if m is not None for h in _pauses(m, stages, alive)]
    runs = [greenlet(Walk.forward) for _ in items]
    seconds = [greenlet(Walk.forward) if twin is not None and item.exact is not None else None for item in items]

    def inputs(stage: Stage, starting: bool) -> Inputs:
        for run, second, item, other in zip(runs, seconds, items, others, strict=True):
            x = _advance(run, (block, item.hidden, other) if starting else (), stage)
            exact = None if second is None else _advance(second, (twin, item.exact, other) if starting else (), stage)
            yield x, _comparable(x, exact)

    try:
        for position, stage in enumerate(stages):
            reach(stage, inputs(stage, position == 0))
        for run, second, item in zip(runs, seconds, items, strict=True):
            item.hidden = walk.shelf.put(run.switch())
            item.passed += 1
            if second is not None:
                item.exact = walk.shelf.put(second.switch())
                item.exact_passed += 1
    finally:
        alive[0] = False
        for handle in handles:
            handle.remove()


def compared(walk: Walk, items: Sequence[BlockInput]) -> None:
    """Have these batches also run unquantized."""
    for item in items:
        item.exact = walk.shelf.put(item.hidden.to(walk.device))


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
