"""A causal LM run block by block, one resident, for models that do not fit on the device.

All windows are run through one block after the other. Afterwards the model is called like a whole one: embedding and
head are resident, and the blocks return the hidden states computed before. `base` is decoded by our own decoder (bit
for bit bitsandbytes' values), `adapter` is the base with PEFT's adapter, unmerged; the others are plain models.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from requant.errors import MemoryLackError
from requant.evaluate import peft_runtime, variant_weights
from requant.evaluate.variant_sources import VariantSources
from requant.evaluate.variants import PLAIN, plain
from requant.merge.base_checkpoint import open_base_checkpoint
from requant.modeling import skeleton
from requant.modeling.block_walk import BlockInput, Walk, larger_half
from requant.modeling.hidden_state_store import HiddenStateStore
from requant.runtime.device import free_bytes, free_memory
from requant_eval.scoring import batches
from requant_eval.scoring.batches import BatchSize

log = logging.getLogger(__name__)
OnBlock = Callable[[int, int], None]  # (blocks done, blocks)
RUNTIMES = {
    "base": "requant's decoder, block by block",
    "adapter": "requant's decoder and PEFT, unmerged, block by block",
} | dict.fromkeys(PLAIN, "torch, block by block")
RUNTIMES_16_BIT = RUNTIMES | {
    "base": "torch, block by block",
    "adapter": "torch and PEFT, unmerged, block by block",
}
NOT_STREAMED = ("nf4-merge", "nf4-again")
MEMORY_SHARE = 0.25  # of free device memory for hidden states; larger ones are kept on the host


class StreamedModel:
    """The model of `walk`, callable like a model that is resident as a whole.

    Windows that were `run` are answered at once, others block by block. notes: smaller batches than asked for, for the
    report.
    """

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        self.model: Any = walk.model
        self.config: Any = self.model.config
        self.notes: list[str] = []
        self._cached: dict[tuple[bool, bytes], tuple[BlockInput, int]] = {}
        self._without_adapter = False
        with torch.no_grad():
            walk.fill_rest()

    def eval(self) -> StreamedModel:
        return self

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()

    @torch.no_grad()
    def run(self, windows: Sequence[Tensor], batch: BatchSize | int, on_block: OnBlock | None = None) -> None:
        """Run windows through all blocks and cache their last hidden states.

        windows: int64 [length], of any lengths; those of about one length share a batch, padded. A window that also
        runs alone shows whether padding changes the states; then all run again, each length apart. Out of memory halves
        the batch, down to one window, and continues with the first unfinished batch.
        """
        unique = list({_key(w): w for w in windows}.values())
        lengths, size = [len(w) for w in unique], BatchSize.of(batch)
        plan = batches.plan(lengths, size, padded_up_to=batches.padded_up_to(self.config))
        if plan.widest is None:
            self._run([[unique[i] for i in numbers] for numbers in plan.batches], on_block)
            return
        witness = unique[plan.batches[plan.widest][-1]]  # the window that is padded most
        alone = self._run([*([unique[i] for i in numbers] for numbers in plan.batches), [witness]], on_block)
        if batches.padding_changes(self._hidden(witness), alone):
            self.notes.append(batches.APART.format(getattr(self.config, "model_type", type(self.model).__name__)))
            apart = batches.plan(lengths, size, padded_up_to=0)
            self._run([[unique[i] for i in numbers] for numbers in apart.batches], on_block)

    def _run(self, rows: Sequence[Sequence[Tensor]], on_block: OnBlock | None) -> Tensor:
        """Run batches of windows and cache the states; of a window that comes twice, the first.

        Returns the last window's [length, width].
        """
        ids = [batches.padded(many) for many in rows]
        self.walk.states = HiddenStateStore(self.walk.device, on_host=self._on_host(sum(b.numel() for b in ids)))
        in_flight = _BatchesInFlight(self.walk, ids, self.notes)
        for index in range(len(self.walk)):
            in_flight.block(index)
            if on_block:
                on_block(index + 1, len(self.walk))
        windows = [window for many in rows for window in many]
        at = len(windows)
        for item in reversed(in_flight.items):
            at -= len(item.hidden)
            self.set_hidden_states(windows[at : at + len(item.hidden)], item)
        return in_flight.items[-1].hidden[-1][: len(windows[-1])]

    def set_hidden_states(self, windows: Sequence[Tensor] | Tensor, item: BlockInput) -> None:
        """Cache the hidden states of `item` as the last block's output for some windows.

        windows: int64 [length] each, without the padding that `item` may have.
        """
        self._cached |= {(self._without_adapter, _key(row)): (item, at) for at, row in enumerate(windows)}

    def _hidden(self, window: Tensor) -> Tensor:
        """The cached hidden states [length, width] of a window."""
        item, at = self._cached[self._without_adapter, _key(window)]
        return item.hidden[at][: len(window)]

    def __call__(self, input_ids: Tensor, use_cache: bool = False, past_key_values: Any = None) -> Any:
        """The output of a transformers model; its `past_key_values` are the token ids so far."""
        ids = input_ids if past_key_values is None else torch.cat((past_key_values, input_ids), dim=1)
        output = self.forward_padded(ids, lengths=[ids.shape[1]] * len(ids))
        if use_cache:
            output.past_key_values = ids
        return output

    def forward_padded(self, input_ids: Tensor, *, lengths: Sequence[int], use_cache: bool = False) -> Any:
        """The output on windows of `lengths` tokens, each padded on the right to a row of `input_ids`."""
        rows = [row[:length] for row, length in zip(input_ids.cpu(), lengths, strict=True)]
        new = [row for row in rows if (self._without_adapter, _key(row)) not in self._cached]
        if new:
            self.run(new, len(new))
        found = [self._hidden(row).to(self.walk.device) for row in rows]
        states = torch.nn.utils.rnn.pad_sequence(found, batch_first=True)
        for row in new:
            self._cached.pop((self._without_adapter, _key(row)), None)
        with self.walk.instead(lambda *_, **__: states):
            return self.model(input_ids=input_ids, use_cache=use_cache)

    @torch.no_grad()
    def last_logits(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        """Logits [vocabulary] after each sequence, from one pass through all blocks.

        sequences: int64 [length].
        """
        cached = dict(self._cached)
        self.run(sequences, len(sequences))
        logits = [self(ids[None].to(self.walk.device)).logits[0, -1] for ids in sequences]
        self._cached = cached
        return logits

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Context in which the model is the base without its adapters.

        Windows are `run` separately for the base.
        """
        with self.model.disable_adapter():
            self._without_adapter = True
            try:
                yield
            finally:
                self._without_adapter = False

    def _on_host(self, tokens: int) -> bool:
        if self.walk.device.type != "cuda":
            return False
        width = self.config.get_text_config().hidden_size
        return bool(tokens * width * self.walk.dtype.itemsize > MEMORY_SHARE * free_bytes(self.walk.device))


class _BatchesInFlight:
    """The hidden states of all batches between two blocks."""

    def __init__(self, walk: Walk, batches: list[Tensor], notes: list[str]) -> None:
        self.walk, self.batches, self.notes = walk, batches, notes
        self.items: list[BlockInput] = []
        while not self._embedded():
            self._halve_batches("the embedding")

    def block(self, index: int) -> None:
        """Run one block on every batch; batches finished before memory ran out are not repeated."""
        self.walk.load(index)
        done = self._advance(index, 0)
        while done < len(self.items):
            done = self._advance(index, self._halve(index, done))
        self.walk.release(self.walk.blocks[index])

    def _embedded(self) -> bool:
        try:
            self.items = self.walk.embed_all(self.batches)
        except torch.OutOfMemoryError:
            return False
        return True

    def _advance(self, index: int, done: int) -> int:
        """Run a block on the batches from `done` on; the number of finished batches.

        It is less than the number of batches when memory ran out.
        """
        walk, left = self.walk, self.items[done:]
        try:
            for item, x in zip(left, walk.states.take([i.hidden for i in left]), strict=True):
                out = walk.forward(walk.blocks[index], x, item.arguments[index])
                item.hidden = walk.states.put(out, item.hidden)
                done += 1
        except torch.OutOfMemoryError:
            pass  # the failed forward's memory is released with its frames, by the caller
        return done

    def _halve(self, index: int, done: int) -> int:
        """Split every batch in two; returns how many of the new ones are finished."""
        finished = sum(-(-len(item.hidden) // item.half()) for item in self.items[:done])
        self._halve_batches(f"{self.walk.prefix}.{index}")
        self.items = self.walk.halved(self.items)
        return finished

    def _halve_batches(self, where: str) -> None:
        largest = max(len(b) for b in self.batches)
        if largest == 1:
            raise MemoryLackError(
                f"{where}: out of memory on {self.walk.device} with one window at a time: shorten evaluate.window"
            )
        self.batches = [part for b in self.batches for part in torch.split(b, larger_half(len(b)))]
        self.notes.append(
            f"{where}: out of memory with {largest} windows at a time, went on with {larger_half(largest)}"
        )
        log.warning("%s", self.notes[-1])
        free_memory(self.walk.device)


def can_stream(name: str, sources: VariantSources) -> bool:
    """Whether a variant can be streamed; roads in bitsandbytes' 4 bits and LoRA on stacked experts cannot.

    A streamed model has its experts as separate modules, and PEFT does not find stacked ones there.
    """
    if name in NOT_STREAMED:
        return False
    return name != "adapter" or sources.plan is None or not any(a.expert_pairs for a in sources.plan.adapters)


def walk_of(
    name: str, sources: VariantSources, *, device: torch.device, dtype: torch.dtype, rows: int | None = None
) -> Walk:
    """The walk over one variant's blocks.

    rows: of the embeddings of `base`, where an adapter has a larger vocabulary; the new ones are zero.
    """
    if name not in ("base", "adapter"):
        structure, stored = plain(name, sources, device)
        return Walk(stored, structure, device=device, dtype=dtype)
    trust, plan = sources.trust_remote_code, sources.plan if name == "adapter" else None
    config, checkpoint = skeleton.load_config(sources.base, trust_remote_code=trust), open_base_checkpoint(sources.base)
    rows = plan.vocab_size if plan is not None else rows
    if rows is not None:
        config.get_text_config().vocab_size = rows
    model: Any = skeleton.build(config, trust_remote_code=trust, stored=lambda: checkpoint)
    base = variant_weights.open_base(checkpoint, model, sources.simulate)
    skeleton.load_buffers(model, checkpoint)  # here they have the names of the checkpoint: PEFT changes them
    names = skeleton.tensor_names(model, base.weights)
    ends = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    stored_as = {id(p): names[n] for n, p in model.named_parameters(remove_duplicate=False) if n in names}
    resized = {stored_as[id(m.weight)]: rows for m in ends if rows is not None}
    source = variant_weights.Decoded(base, device, resized, variant_weights.replaced_tables(model, names, plan))
    if name == "base":
        return Walk(source, model, device=device, dtype=dtype)
    tuned, own_names = _tuned(model, stored_as, sources, device)
    return Walk(source, tuned, device=device, dtype=dtype, names=own_names)


def _tuned(
    model: Any, stored_as: Mapping[int, str], sources: VariantSources, device: torch.device
) -> tuple[Any, dict[str, str]]:
    """(the PEFT model on a skeleton, parameter -> stored name).

    stored_as: id of the parameter -> stored name. PEFT moves adapters to the device of the base's weights: meanwhile
    each is a single zero expanded to the full shape.
    """
    zeros = {id(p): nn.Parameter(_zeros(p, device), requires_grad=False) for p in model.parameters()}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[leaf] = zeros[id(parameter)]
    stored_as = {id(zeros[old]): name for old, name in stored_as.items()}
    tuned = peft_runtime.attach(model, sources.plan or sources.adapter, structure=True).eval()
    names = {n: stored_as[id(p)] for n, p in tuned.named_parameters(remove_duplicate=False) if id(p) in stored_as}
    parameters = dict(tuned.named_parameters(remove_duplicate=False))
    skeleton.place(tuned, {n: parameters[n].detach().to("meta") for n in names}, transpose=False)
    return tuned, names


def _zeros(like: Tensor, device: torch.device) -> Tensor:
    return torch.zeros((), device=device).expand(like.shape)


def _key(ids: Tensor) -> bytes:
    return ids.cpu().numpy().tobytes()
