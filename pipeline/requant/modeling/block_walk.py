"""Runs a causal LM one block at a time: one block resident, the next one being loaded.

Which modules the blocks are: `blocks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from requant.checkpoint.device_loader import load_onto
from requant.checkpoint.reader import Weights
from requant.errors import InputError, StageError
from requant.modeling import skeleton
from requant.modeling.blocks import block_list, waits_for_an_encoder
from requant.modeling.hidden_state_store import HiddenStateStore
from requant.runtime.pinned_memory import use_stream

BlockArguments = tuple[tuple[Any, ...], dict[str, Any]]  # besides hidden states: by position, by name


@dataclass
class BlockInput:
    """One batch's input of the blocks: hidden states, and the other arguments of every block."""

    hidden: Tensor  # [batch, length, width]
    arguments: list[BlockArguments | None] = field(default_factory=list)  # None: this block is skipped on text
    _: KW_ONLY
    unquantized: Tensor | None = None  # `hidden` in the unquantized model, for batches that also run there
    passed: int = 0  # blocks that `hidden` has gone through
    unquantized_passed: int = 0

    def half(self) -> int:
        """The larger half of its windows, at least one."""
        return larger_half(len(self.hidden))


def larger_half(count: int) -> int:
    """The larger half of `count` windows, at least one."""
    return max(1, -(-count // 2))


class _Captured(Exception):
    """Ends a forward once the first block's input is known."""


class Walk:
    """A model's weights as a sequence of blocks, of which one at a time is in memory.

    device, dtype: where and in what precision blocks run (fp32 on the CPU). names: parameter -> stored name, where the
    caller knows better than `skeleton.tensor_names` (then of both ends of a tie). Parameters that have values already,
    such as an adapter's, keep them.
    """

    def __init__(
        self, checkpoint: Weights, model: nn.Module, *, device: torch.device, dtype: torch.dtype,
        names: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.checkpoint, self.model, self.device, self.dtype = checkpoint, model, device, dtype
        self.own = {id(p): p for p in model.parameters() if not p.is_meta}
        self.filled = False  # whether everything outside the blocks has its weights
        self.tail: tuple[Any, ...] | None = None  # what a block returns besides hidden states, where it returns a tuple
        self.prefix, self.blocks = block_list(model)
        self._reader = ThreadPoolExecutor(1) if device.type == "cuda" else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.states = HiddenStateStore(device)
        self._coming: dict[int, Future[dict[str, Tensor]]] = {}
        self.explicit = names is not None
        self.names = skeleton.tensor_names(model, checkpoint) if names is None else names
        lost = [n for n in skeleton.unstored(model, self.names) if model.get_parameter(n).is_meta]
        if lost:
            raise InputError(f"{checkpoint.path}: {len(lost)} of the model's tensors are missing, e.g. {lost[0]}")
        skeleton.buffers_to(model, device, checkpoint)

    def __len__(self) -> int:
        return len(self.blocks)

    def load(self, index: int, *, read_next: bool = True) -> nn.Module:
        """Load the weights of block `index`; read_next: on a GPU, start to load the next too."""
        block = self.blocks[index]
        if _filled(block):
            return block
        coming = self._coming.pop(index, None)
        if coming:
            tensors = coming.result()
            for tensor in tensors.values():  # made on another stream: not to be reused there while this one needs it
                tensor.record_stream(torch.cuda.current_stream(self.device))
        else:
            tensors = self._read(block, f"{self.prefix}.{index}.")
        skeleton.place(block, tensors)
        if read_next:
            self.read_soon(index + 1)
        return block

    def read_soon(self, index: int) -> None:
        """Start to load a block's weights in a thread, on a GPU, unless the block has them."""
        if self._reader and index < len(self) and index not in self._coming and not _filled(self.blocks[index]):
            self._coming[index] = self._reader.submit(self._read_ahead, index)

    def no_reading_ahead(self) -> None:
        """Read no block before it is loaded."""
        self._reader = None

    def forget(self, index: int) -> None:
        """Release a block and what was read ahead after it."""
        self.release(self.blocks[index])
        self._coming.pop(index + 1, None)

    def _read_ahead(self, index: int) -> dict[str, Tensor]:
        """A block's tensors, copied to the device beside what it computes."""
        with use_stream(self._stream):
            tensors = self._read(self.blocks[index], f"{self.prefix}.{index}.")
            torch.cuda.current_stream(self.device).synchronize()
        return tensors

    def release(self, module: nn.Module) -> None:
        """Release the weights of a module; its parameters are on the meta device again."""
        for sub in module.modules():
            for name, parameter in sub._parameters.items():
                if parameter is not None and id(parameter) not in self.own:
                    sub._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def _read(self, module: nn.Module, prefix: str, *, recurse: bool = True) -> dict[str, Tensor]:
        """A module's parameters by their names inside it, on the device; recurse: those of modules in it too."""
        return {
            name: self._stored(self._name(prefix + name))
            for name, parameter in module.named_parameters(recurse=recurse)
            if id(parameter) not in self.own
        }

    def _name(self, parameter: str) -> str:
        """The stored name of a parameter."""
        if parameter not in self.names:
            raise InputError(f"{self.checkpoint.path}: {parameter} of {type(self.model).__name__} is not stored")
        return self.names[parameter]

    def _stored(self, name: str) -> Tensor:
        """A stored tensor on the device, in the dtype that blocks have."""
        return load_onto(self.checkpoint, name, self.device, self.dtype)

    def embed(self, windows: Tensor, batch: int) -> list[BlockInput]:
        """Run what precedes the blocks; windows int64 [n, length] -> one BlockInput a batch."""
        return self.embed_all(torch.split(windows, batch))

    def embed_all(self, batches: Sequence[Tensor]) -> list[BlockInput]:
        """Run what precedes the blocks on batches int64 [n, length] of any size each.

        The other arguments (rotary tables, masks) are recorded for every block, once per size.
        """
        self.read_soon(0)
        outside = [] if self.filled else self._outside()
        try:
            for name, module in outside:
                skeleton.place(module, self._read(module, name + ".", recurse=False))
        except BaseException:
            self._coming.pop(0, None)  # it holds memory, and the error may be a lack of memory
            raise
        first = self.load(0)
        recorded: dict[torch.Size, list[BlockArguments | None]] = {}
        inputs = []
        for ids in batches:
            ids = ids.to(self.device)
            hidden, arguments = self._capture(ids)
            if ids.shape not in recorded:
                recorded[ids.shape] = self._record(ids, first, hidden, arguments)
            inputs.append(BlockInput(self.states.put(hidden), recorded[ids.shape]))
        for _, module in outside:
            self.release(module)
        return inputs

    def halved(self, items: Sequence[BlockInput]) -> list[BlockInput]:
        """The same windows and states in batches of half the size; single windows stay."""
        parts: list[BlockInput] = []
        for item in items:
            hidden = torch.split(item.hidden, item.half())
            both = [None] * len(hidden) if item.unquantized is None else torch.split(item.unquantized, item.half())
            parts += [
                BlockInput(h, [], unquantized=u, passed=item.passed, unquantized_passed=item.unquantized_passed)
                for h, u in zip(hidden, both, strict=True)
            ]
        shapes = list(dict.fromkeys(part.hidden.shape[:2] for part in parts))
        kept, self.states = self.states, HiddenStateStore(self.device)
        lent = not _filled(self.blocks[0])
        samples = self.embed_all([torch.zeros(shape, dtype=torch.int64) for shape in shapes])
        if lent:
            self.forget(0)
        self.states = kept
        found = {shape: sample.arguments for shape, sample in zip(shapes, samples, strict=True)}
        for part in parts:
            part.arguments = found[part.hidden.shape[:2]]
        return parts

    def fill_rest(self) -> None:
        """Give everything outside the blocks its weights, the output embedding too."""
        for name, module in self._outside():
            skeleton.place(module, self._read(module, name + ".", recurse=False))
        if not self.explicit:
            self.model.tie_weights()  # type: ignore[operator]
        self.filled = True
        for name, parameter in list(self.model.named_parameters()):
            if parameter.is_meta and not name.startswith(self.prefix + "."):
                owner = name.rpartition(".")[0]
                module = self.model.get_submodule(owner)
                skeleton.place(module, self._read(module, owner + ".", recurse=False))

    def _outside(self) -> list[tuple[str, nn.Module]]:
        """Modules with weights of their own that are neither in a block nor the output embedding."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        inside = {id(m) for block in self.blocks for m in block.modules()} | ({id(head)} if head is not None else set())
        return [
            (name, m)
            for name, m in self.model.named_modules()
            if id(m) not in inside and any(p is not None for p in m._parameters.values())
        ]

    def _capture(self, ids: Tensor) -> tuple[Tensor, BlockArguments]:
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
        if not args:
            return kwargs["hidden_states"], (args, _without_hidden(kwargs))
        return args[0], (args[1:], kwargs)

    def _record(self, ids: Tensor, first: nn.Module, hidden: Tensor, arguments: Any) -> list[BlockArguments | None]:
        """The arguments of every block, seen while each is replaced by one that passes its input on."""
        output = first(hidden, *arguments[0], **arguments[1])
        self.tail = tuple(output[1:]) if isinstance(output, tuple | list) else None
        recorded, calls = dict[int, BlockArguments](), list[int]()

        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(id(block))
            recorded[id(block)] = (args[1:], kwargs) if args else (args, _without_hidden(kwargs))

        head = self.model.get_output_embeddings()  # type: ignore[operator]
        handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in self.blocks]
        handles += [head.register_forward_pre_hook(_stop)] if head is not None else []
        try:
            with self.instead(lambda x=None, *_, hidden_states=None, **__: hidden_states if x is None else x):
                self.model(input_ids=ids, use_cache=False)
        except _Captured:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if calls != [id(b) for b in self.blocks if id(b) in recorded or not waits_for_an_encoder(b)]:
            raise StageError(
                f"{type(self.model).__name__} called {len(recorded)} of its {len(self.blocks)} blocks on the "
                f"calibration text, {len(calls)} times: only models that call each block once, in turn, are quantized"
            )
        return [recorded.get(id(block)) for block in self.blocks]

    @contextmanager
    def instead(self, function: Callable[..., Tensor]) -> Iterator[None]:
        """Replace every block's forward by `function` inside the context."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = function(*args, **kwargs)
            return hidden if self.tail is None else (hidden, *self.tail)

        before = [block.__dict__.get("forward") for block in self.blocks]
        try:
            for block in self.blocks:
                block.forward = forward
            yield
        finally:
            for block, own in zip(self.blocks, before, strict=True):
                if own is None:
                    del block.forward
                else:
                    block.forward = own

    def run(self, index: int, item: BlockInput) -> Tensor:
        """One block on one batch: the next hidden states."""
        return self.forward(self.blocks[index], item.hidden.to(self.device), item.arguments[index])

    @staticmethod
    def forward(block: Any, hidden: Any, others: BlockArguments | None) -> Tensor:
        """A block's hidden states out of hidden states in, however it wraps them; a skipped one's are the same."""
        out = hidden if others is None else block(hidden, *others[0], **others[1])
        result: Tensor = out[0] if isinstance(out, tuple | list) else out
        return result


def _filled(block: nn.Module) -> bool:
    """Whether a block has its weights."""
    return all(not p.is_meta for p in block.parameters())


def _without_hidden(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A block's arguments by name but for its hidden states."""
    return {name: value for name, value in kwargs.items() if name != "hidden_states"}


def _stop(*_: Any) -> None:
    raise _Captured
