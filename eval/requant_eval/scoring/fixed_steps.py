"""Steps of greedy answers on tensors that keep their place: a device replays one as a graph.

The keys and values of prompts that were read move to tensors with room for the answers. A step reads and writes these
tensors alone and never waits for the device; the host looks at them every few steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from requant_eval.errors import EvaluationError
from requant_eval.scoring.batches import padded_up_to
from requant_eval.scoring.canaries import DAMAGED, LOOKED_AT

ALIGNED = 8  # kernels of attention copy a mask of another length
IMPLEMENTATIONS = ("sdpa", "eager")  # of attention, which take a mask of a value for each query and key
LAYER_TYPES = {"full_attention", "sliding_attention"}  # whose masks are built here
Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""A step as one launch. It may have run some times before this returns; RuntimeError where it cannot be."""


Over = Callable[[list[int]], bool]


class NotFixedError(ValueError):
    """This model keeps something else than keys and values, or needs another mask."""


class FixedSteps:
    """A batch of prompts that was read, and the steps of its answers.

    `said`, int64 [prompts, tokens]: the answers so far, and what follows their ends.
    """

    def __init__(self, model: Any, made: Any, seen: Tensor, new_tokens: int, stops: Collection[int]) -> None:
        """made: the model's output for the prompts, padded on the left; its cache is emptied.

        seen: their attention mask, int64 [prompts, longest]. Raises NotFixedError.
        """
        count, device = len(seen), seen.device
        length = -(-(seen.shape[1] + new_tokens) // ALIGNED) * ALIGNED
        self.model, self.new_tokens = model, new_tokens
        self.at = torch.full((1,), seen.shape[1], device=device)  # of the next token
        self.layers = _layers(made.past_key_values, self.at, seen.shape[1], length)
        self.cache = Cache(layers=self.layers)
        self.windows = _windows(model, self.layers, length)
        self.columns = torch.arange(length, device=device)
        self.seen = torch.zeros(count, length, dtype=torch.bool, device=device)
        self.seen[:, : seen.shape[1]] = seen.bool()
        self.places = seen.sum(-1, keepdim=True) - 1  # of the last token, among those of its prompt and answer
        self.stops = torch.tensor([*stops], dtype=torch.int64, device=device)
        self.said = torch.zeros(count, new_tokens, dtype=torch.int64, device=device)
        self.token = torch.zeros(count, 1, dtype=torch.int64, device=device)
        self.chosen = torch.zeros(1, dtype=torch.int64, device=device)  # tokens of each answer so far
        self.ended = torch.zeros(count, dtype=torch.bool, device=device)
        self.damaged = torch.zeros(count, dtype=torch.bool, device=device)  # NaN or infinity before its end
        self.logits = made.logits[:, -1].clone()
        self._choose()

    def run(self, capture: Capture | None, told: Callable[[int], None], over: Over | None = None) -> int:
        """Answer all prompts; returns the number of tokens of `said`. told: of answers that have ended.

        capture: how a step becomes one launch; None: kernel by kernel. over: whether an answer has ended but for a stop
        token; asked every `LOOKED_AT` steps. Raises EvaluationError for NaN or infinity.
        """
        launch = self.step if capture is None else self._captured(capture)
        chosen = 1
        while chosen < self.new_tokens:
            if (chosen - 1) % LOOKED_AT == 0:
                if over:
                    found = [over(ids) for ids in self.said[:, :chosen].tolist()]
                    self.ended.logical_or_(torch.tensor(found, device=self.ended.device))
                ended = int(self.ended.sum())
                if ended == len(self.ended):
                    break
                told(ended)
            launch()
            chosen += 1
        if bool(self.damaged.any()):
            raise EvaluationError(DAMAGED)
        return chosen

    def step(self) -> None:
        """Read the last token of every answer and choose the next."""
        self.places.add_(1)
        self.seen.index_fill_(1, self.at, True)
        made = self.model(
            input_ids=self.token,
            attention_mask=self._mask(),
            position_ids=self.places,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.logits.copy_(made.logits[:, -1])
        self.at.add_(1)
        self._choose()

    def _choose(self) -> None:
        best = self.logits.float().argmax(-1, keepdim=True)
        self.damaged.logical_or_(~torch.isfinite(self.logits).all(-1) & ~self.ended)
        self.said.index_copy_(1, self.chosen, best)
        self.token.copy_(best)
        self.ended.logical_or_((best == self.stops).any(-1))
        self.chosen.add_(1)

    def _captured(self, capture: Capture) -> Callable[[], None]:
        """The step as one launch; what the runs before the capture have changed is put back."""
        state = [self.at, self.seen, self.places, self.said, self.token, self.chosen]
        state += [self.ended, self.damaged, self.logits]
        before = [value.clone() for value in state]
        launch = capture(self.step)
        for value, kept in zip(state, before, strict=True):
            value.copy_(kept)
        return launch

    def _mask(self) -> Any:
        """What the token may attend to, [prompts, 1, 1, length]; by type of layer where these differ."""
        masks = {}
        for kind, window in self.windows.items():
            mask = self.seen if window is None else self.seen & (self.columns > self.at - window)
            masks[kind] = self._in_form(mask[:, None, None, :])
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _in_form(self, mask: Tensor) -> Tensor:
        """As the model's attention takes it: `sdpa` a choice, `eager` what is added to scores."""
        if _text_config(self.model)._attn_implementation == "sdpa":
            return mask
        dtype = self.layers[0].dtype
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)

    def answers(self, count: int) -> list[list[int]]:
        """The first `count` tokens of each answer, up to its stop token."""
        stops, cut = set(self.stops.tolist()), list[list[int]]()
        for ids in self.said[:, :count].tolist():
            end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
            cut.append(ids[: end + 1])
        return cut


class _FixedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer [prompts, heads, length, width]: the next go to the place `at`, first to `end`."""

    def __init__(self, found: Any, at: Tensor, end: int, length: int) -> None:
        super().__init__()
        self.at, self.window = at, getattr(found, "sliding_window", None)
        self.is_initialized = found.is_initialized
        if self.is_initialized:
            self.dtype, self.device = found.keys.dtype, found.keys.device
            self.keys, self.values = (_with_room(v, end, length) for v in (found.keys, found.values))
            found.keys = found.values = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **given: Any) -> tuple[Tensor, Tensor]:
        """Put one token's keys and values; all are returned, also those whose turn is still to come."""
        if not self.is_initialized or key_states.shape[2] != 1:
            raise NotFixedError("a layer that held nothing after the prompts, or more than a token")
        self.keys.index_copy_(2, self.at, key_states)
        self.values.index_copy_(2, self.at, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Refuse: a graph would keep the number that it was captured with."""
        raise NotFixedError("the model counts the tokens of its cache")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Refuse, for the same reason."""
        raise NotFixedError("the model builds a mask of its own")


def _with_room(held: Tensor, end: int, length: int) -> Tensor:
    """`held` [prompts, heads, tokens, width], which ends at `end`, in zeros for `length` tokens."""
    room = held.new_zeros(*held.shape[:2], length, held.shape[3])
    room[:, :, end - held.shape[2] : end] = held
    return room


def _layers(cache: Any, at: Tensor, end: int, length: int) -> list[_FixedLayer]:
    """The layers of a cache that grows, moved one by one, so that both are not in memory."""
    layers = getattr(cache, "layers", None) or ()
    if not layers or not {type(layer) for layer in layers} <= {DynamicLayer, DynamicSlidingWindowLayer}:
        raise NotFixedError(f"its cache is {', '.join(sorted({type(x).__name__ for x in layers or [cache]}))}")
    return [_FixedLayer(layer, at, end, length) for layer in layers]


def _text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def _windows(model: Any, layers: Sequence[_FixedLayer], length: int) -> dict[str, int | None]:
    """Type of layer -> how many tokens it sees, None: all. One entry where all see the same."""
    config = _text_config(model)
    if config._attn_implementation not in IMPLEMENTATIONS:
        raise NotFixedError(f"its attention is {config._attn_implementation}")
    if padded_up_to(model.config) is not None:
        raise NotFixedError("its rotary tables depend on the longest position")
    if not set(getattr(config, "layer_types", None) or ()) <= LAYER_TYPES:
        raise NotFixedError(f"its layers are {', '.join(sorted(set(config.layer_types)))}")
    windows = {layer.window if layer.window and layer.window < length else None for layer in layers}
    if windows == {None} and (getattr(config, "sliding_window", None) or length) < length:
        raise NotFixedError("its window is not its cache's")
    if len(windows) == 1:
        return {"full_attention": windows.pop()}
    if len(windows) > 2 or None not in windows:
        raise NotFixedError("layers of several windows")
    (window,) = windows - {None}
    return {"full_attention": None, "sliding_attention": window}
