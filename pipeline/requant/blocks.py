"""Run a causal LM one block at a time, one block resident, the next one on its way.

Structure is found, not tabulated: the blocks are the largest list of like modules.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from requant import linears, skeleton
from requant.checkpoint import Checkpoint
from requant.errors import InputError, StageError
from requant.shelf import Shelf


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
        self._reader = ThreadPoolExecutor(1) if device.type == "cuda" else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.shelf = Shelf(device)
        self._coming: dict[int, Future[dict[str, Tensor]]] = {}
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
        """Give block `index` its weights; on a device the next block's begin their journey."""
        block = self.blocks[index]
        coming = self._coming.pop(index, None)
        if coming:
            tensors = coming.result()
            for tensor in tensors.values():  # made on another stream: not to be reused there while this one needs it
                tensor.record_stream(torch.cuda.current_stream(self.device))
        else:
            tensors = self._read(block, f"{self.prefix}.{index}.")
        skeleton.place(block, tensors)
        if self._reader and index + 1 < len(self):
            self._coming[index + 1] = self._reader.submit(self._read_ahead, index + 1)
        return block

    def _read_ahead(self, index: int) -> dict[str, Tensor]:
        """A block's tensors, copied to the device beside what it computes."""
        with torch.cuda.stream(self._stream):
            tensors = self._read(self.blocks[index], f"{self.prefix}.{index}.")
            torch.cuda.current_stream(self.device).synchronize()
        return tensors

    def release(self, module: nn.Module) -> None:
        """Take the weights away again."""
        for sub in module.modules():
            for name, parameter in sub._parameters.items():
                if parameter is not None:
                    sub._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def _read(self, module: nn.Module, prefix: str) -> dict[str, Tensor]:
        """A module's parameters by their names inside it, on the device."""
        return {
            name: self.checkpoint.read(self.names[prefix + name]).to(self.device, self.dtype)
            for name, _ in module.named_parameters()
        }

    def embed(self, windows: Tensor, batch: int) -> list[BlockInput]:
        """Run what comes before the blocks; windows int64 [n, length] -> one BlockInput for each batch.

        The other arguments (rotary tables, masks) are recorded for every block, once per batch size.
        """
        outside = self._outside()
        for name, module in outside:
            skeleton.place(module, self._read(module, name + "."))
        first = self.load(0)
        recorded: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        inputs = []
        for ids in torch.split(windows, batch):
            ids = ids.to(self.device)
            hidden, arguments = self._capture(ids)
            if len(ids) not in recorded:
                recorded[len(ids)] = self._record(ids, first, hidden, arguments)
            inputs.append(BlockInput(self.shelf.put(hidden), recorded[len(ids)]))
        for _, module in outside:
            self.release(module)
        return inputs

    def fill_rest(self) -> None:
        """Give everything outside the blocks its weights, the output embedding too."""
        for name, module in self._outside():
            skeleton.place(module, self._read(module, name + "."))
        self.model.tie_weights()  # type: ignore[operator]
        for name, parameter in list(self.model.named_parameters()):
            if parameter.is_meta and not name.startswith(self.prefix + "."):
                owner = name.rpartition(".")[0]
                module = self.model.get_submodule(owner)
                skeleton.place(module, self._read(module, owner + "."))

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
        return self.forward(self.blocks[index], item.hidden.to(self.device), item.arguments[index])

    @staticmethod
    def forward(block: Any, hidden: Tensor | None, others: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
        """A block's hidden states out of hidden states in, whichever way it wraps them."""
        out = block(hidden, *others[0], **others[1])
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result


def _stop(*_: Any) -> None:
    raise _Captured
