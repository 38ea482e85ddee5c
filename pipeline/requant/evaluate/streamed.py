"""A causal LM that does not fit on the device, as one that can be scored: run block by block, one block resident.

All windows go through block after block together; then the model answers for them as if it were whole: its embedding
and head are there, and its blocks say what they said. `base` is our own decoder's (bit for bit bitsandbytes' values) and
`adapter` that with the real PEFT on top, unmerged; the others are plain models.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from requant.checkpoint.reader import Checkpoint
from requant.errors import StageError
from requant.evaluate import peft_runtime, variant_weights
from requant.evaluate.variants import PLAIN, VariantSources, plain
from requant.modeling import skeleton
from requant.modeling.block_walk import BlockInput, Walk, larger_half
from requant.modeling.hidden_state_store import Shelf
from requant.runtime.device import free_bytes, free_memory

log = logging.getLogger(__name__)
Tell = Callable[[int, int], None]
RUNTIMES = {
    "base": "requant's decoder, block by block",
    "adapter": "requant's decoder and PEFT, unmerged, block by block",
} | dict.fromkeys(PLAIN, "torch, block by block")
SHELF = 0.25  # share of free device memory that hidden states may take before they wait on the host


class Streamed:
    """Answers like the model of `walk`: at once for windows that were `run`, for other inputs block by block.

    notes: what went otherwise than asked, for the report.
    """

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        self.model: Any = walk.model
        self.config: Any = self.model.config
        self.notes: list[str] = []
        self._known: dict[tuple[bool, bytes], tuple[BlockInput, int]] = {}
        self._plain = False
        with torch.no_grad():
            walk.fill_rest()

    def eval(self) -> Streamed:
        return self

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()

    @torch.no_grad()
    def run(self, windows: Sequence[Tensor], batch: int, tell: Tell | None = None) -> None:
        """Take windows int64 [length] of any lengths through all blocks. tell: (blocks done, blocks).

        Out of memory halves the batch, down to one window, and goes on where it was.
        """
        batches = list(_batches(list({_key(w): w for w in windows}.values()), batch))
        self.walk.shelf = Shelf(self.walk.device, on_host=self._on_host(sum(b.numel() for b in batches)))
        flow = _Flow(self.walk, batches, self.notes)
        for index in range(len(self.walk)):
            flow.block(index)
            if tell:
                tell(index + 1, len(self.walk))
        for ids, item in zip(flow.batches, flow.items, strict=True):
            self.assume(ids, item)

    def assume(self, ids: Tensor, item: BlockInput) -> None:
        """Take the hidden states of `item` for what comes out of the last block for windows int64 [n, length]."""
        self._known |= {(self._plain, _key(row)): (item, at) for at, row in enumerate(ids)}

    def __call__(self, input_ids: Tensor, use_cache: bool = False, past_key_values: Any = None) -> Any:
        """Like a transformers model's; `past_key_values` of its answer are the token ids so far."""
        ids = input_ids if past_key_values is None else torch.cat((past_key_values, input_ids), dim=1)
        rows = [row.cpu() for row in ids]
        new = [row for row in rows if (self._plain, _key(row)) not in self._known]
        if new:
            self.run(new, len(new))
        found = [self._known[self._plain, _key(row)] for row in rows]
        given = torch.stack([item.hidden[at] for item, at in found]).to(self.walk.device)
        for row in new:
            self._known.pop((self._plain, _key(row)), None)
        with self.walk.instead(lambda *_, **__: given):
            answer = self.model(input_ids=ids, use_cache=False)
        if use_cache:
            answer.past_key_values = ids
        return answer

    @torch.no_grad()
    def last_logits(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        """What follows each of some sequences int64 [length]: logits [vocabulary], from one way through all blocks."""
        known = dict(self._known)
        self.run(sequences, len(sequences))
        answers = [self(ids[None].to(self.walk.device)).logits[0, -1] for ids in sequences]
        self._known = known
        return answers

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Be the base without its adapters; windows are `run` for it apart."""
        with self.model.disable_adapter():
            self._plain = True
            try:
                yield
            finally:
                self._plain = False

    def _on_host(self, tokens: int) -> bool:
        if self.walk.device.type != "cuda":
            return False
        width = self.config.get_text_config().hidden_size
        return bool(tokens * width * self.walk.dtype.itemsize > SHELF * free_bytes(self.walk.device))


class _Flow:
    """All batches on their way through the blocks."""

    def __init__(self, walk: Walk, batches: list[Tensor], notes: list[str]) -> None:
        self.walk, self.batches, self.notes = walk, batches, notes
        self.items: list[BlockInput] = []
        while not self._embedded():
            self._smaller("the embedding")

    def block(self, index: int) -> None:
        """One block on every batch; those that were done before memory ran out are not done again."""
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
        """Run a block from batch `done` on; returns where it ended, by itself or out of memory."""
        walk, left = self.walk, self.items[done:]
        try:
            for item, x in zip(left, walk.shelf.take([i.hidden for i in left]), strict=True):
                out = walk.forward(walk.blocks[index], x, item.arguments[index])
                item.hidden = walk.shelf.put(out, item.hidden)
                done += 1
        except torch.OutOfMemoryError:
            pass  # what the failed forward holds goes with its frames: the caller cleans up
        return done

    def _halve(self, index: int, done: int) -> int:
        """Cut every batch in two; returns how many of the new ones are done."""
        ahead = sum(-(-len(item.hidden) // item.half()) for item in self.items[:done])
        self._smaller(f"{self.walk.prefix}.{index}")
        self.items = self.walk.halved(self.items)
        return ahead

    def _smaller(self, where: str) -> None:
        largest = max(len(b) for b in self.batches)
        if largest == 1:
            raise StageError(
                f"{where}: out of memory on {self.walk.device} with one window at a time: shorten evaluate.window"
            )
        self.batches = [part for b in self.batches for part in torch.split(b, larger_half(len(b)))]
        self.notes.append(
            f"{where}: out of memory with {largest} windows at a time, went on with {larger_half(largest)}"
        )
        log.warning("%s", self.notes[-1])
        free_memory(self.walk.device)


def possible(name: str, sources: VariantSources) -> bool:
    """Whether a variant can be streamed: PEFT does not find LoRA on stacked experts in a model that has them one by one."""
    return name != "adapter" or sources.plan is None or not any(a.expert_pairs for a in sources.plan.adapters)


def walk_of(name: str, sources: VariantSources, *, device: torch.device, dtype: torch.dtype) -> Walk:
    """The walk over one variant's blocks."""
    if name not in ("base", "adapter"):
        structure, stored = plain(name, sources, device)
        return Walk(stored, structure, device=device, dtype=dtype)
    trust, plan = sources.trust_remote_code, sources.plan if name == "adapter" else None
    config = skeleton.load_config(sources.base, trust_remote_code=trust)
    checkpoint, rows = Checkpoint(sources.base), None
    if plan is not None and plan.vocab_size is not None:
        rows = config.get_text_config().vocab_size = plan.vocab_size
    model: Any = skeleton.build(config, trust_remote_code=trust)
    base = variant_weights.open_base(checkpoint, model, sources.simulate)
    names = skeleton.tensor_names(model, base.weights)
    ends = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    stored_as = {id(p): names[n] for n, p in model.named_parameters(remove_duplicate=False) if n in names}
    resized = {stored_as[id(m.weight)]: rows for m in ends if rows is not None}
    source = variant_weights.Decoded(base, device, resized)
    if name == "base":
        return Walk(source, model, device=device, dtype=dtype)
    tuned, own_names = _tuned(model, stored_as, sources, device)
    return Walk(source, tuned, device=device, dtype=dtype, names=own_names)


def _tuned(
    model: Any, stored_as: Mapping[int, str], sources: VariantSources, device: torch.device
) -> tuple[Any, dict[str, str]]:
    """(the PEFT model on a skeleton, parameter -> stored name). stored_as: the same by the id of the parameter.

    PEFT moves adapters to where the base's weights are: while it works these are one zero each, seen in full shape.
    """
    zeros = {id(p): nn.Parameter(_zeros(p, device), requires_grad=False) for p in model.parameters()}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[leaf] = zeros[id(parameter)]
    stored_as = {id(zeros[old]): name for old, name in stored_as.items()}
    tuned = peft_runtime.attach(model, sources.plan or sources.adapter, structure=True).eval()
    names = {n: stored_as[id(p)] for n, p in tuned.named_parameters(remove_duplicate=False) if id(p) in stored_as}
    skeleton.place(tuned, {n: tuned.get_parameter(n).detach().to("meta") for n in names}, turn=False)
    return tuned, names


def _zeros(like: Tensor, device: torch.device) -> Tensor:
    return torch.zeros((), device=device).expand(like.shape)


def _batches(windows: list[Tensor], batch: int) -> Iterator[Tensor]:
    """Windows of one length each, int64 [up to batch, length]."""
    lengths: dict[int, list[Tensor]] = {}
    for window in windows:
        lengths.setdefault(len(window), []).append(window)
    for many in lengths.values():
        yield from torch.split(torch.stack(many), batch)


def _key(ids: Tensor) -> bytes:
    return ids.cpu().numpy().tobytes()
