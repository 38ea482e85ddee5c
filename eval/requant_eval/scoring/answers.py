"""Greedy answers to prompts of different lengths in batches, for checks and side by side.

The prompts of a batch are padded on the left, with positions that begin at each prompt's first token. A model that
reads padding otherwise is found by the shortest prompt, asked alone too; its prompts are then answered one by one.

On a GPU a small model waits for launches more than for what is launched, so a step may be captured (`fixed_steps`).
What its steps gave the shortest prompt and the longest is then compared with one pass over a prompt and its answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from requant_eval.errors import EvaluationError
from requant_eval.scoring.canaries import DAMAGED, LOOKED_AT, best_token

if TYPE_CHECKING:
    from requant_eval.scoring.fixed_steps import Capture, Over

log = logging.getLogger(__name__)
BATCH_TOKENS = {"cpu": 2**13, "cuda": 2**16}  # of prompts and answers, padded: what a cache holds at a time
AGREE = 0.1  # of the logits' spread: so much padding may change them, as sums in another order do in 16 bits
ASTRAY = 0.4  # of it: how far below its best one pass may put a token that a step chose
COMPARED = 64  # tokens of an answer, evenly spread over it
LEAST_CAPTURED = 8  # tokens of an answer: a capture takes the time of some steps, and runs as many
UNFIT = (TypeError, ValueError, LookupError, AttributeError, RuntimeError)  # of a model that is not asked so


def answer(
    model: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    stops: Collection[int],
    device: torch.device | str,
    on_progress: Callable[[int, int], None] | None = None,
    capture: Capture | None = None,
    over: Over | None = None,
    uncaptured: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """The argmax continuation of every prompt: at most `new_tokens` ids, the last a stop token where one came.

    on_progress: (done, of), in prompts. capture: makes one launch of a step, for models and lengths that allow it.
    over: whether the ids of an answer are all that is wanted of it; asked now and then, so some more may follow.
    uncaptured: called where steps cannot be captured, and would not be another time.
    Raises EvaluationError for NaN or infinity in logits.
    """
    model.eval()
    asker = _Asker(model=model, new_tokens=new_tokens, stops=stops, device=device, over=over, uncaptured=uncaptured)
    asker.capture = capture if new_tokens >= LEAST_CAPTURED else None
    told, answers = on_progress or (lambda done, of: None), list[list[int]]()
    apart = False
    for some in batches(prompts, new_tokens, BATCH_TOKENS[torch.device(device).type]):
        before = len(answers)
        found = None

        def progress(done: int, _: int, before: int = before) -> None:
            told(before + done, len(prompts))

        if len(some) > 1 and not apart:
            found = asker.together(some, progress)
            apart = found is None
        if found is None:
            found = []
            for prompt in some:
                found.append(asker.alone(prompt))
                progress(len(found), 0)
        answers += found
    return answers


def batches(prompts: Sequence[Sequence[int]], new_tokens: int, most: int) -> Iterator[Sequence[Sequence[int]]]:
    """Neighbouring prompts whose padded tokens, with those of their answers, are at most `most`; one at least."""
    some: list[Sequence[int]] = []
    for prompt in prompts:
        longest = max(map(len, [*some, prompt])) + new_tokens
        if some and longest * (len(some) + 1) > most:
            yield some
            some = []
        some.append(prompt)
    if some:
        yield some


@dataclass(kw_only=True)
class _Asker:
    """A model and how long it may answer. capture: None from the first batch on whose steps are not to be captured."""

    model: Any
    new_tokens: int
    stops: Collection[int]
    device: torch.device | str
    capture: Capture | None = None
    over: Over | None = None
    uncaptured: Callable[[], None] = lambda: None

    def together(self, prompts: Sequence[Sequence[int]], told: Callable[[int, int], None]) -> list[list[int]] | None:
        """All answers from one batch; None where the model does not take one."""
        try:
            return self._batched(prompts, told)
        except UNFIT as error:  # also out of memory
            log.info("answers one by one: %s: %s", type(error).__name__, error)
            return None

    @torch.inference_mode()
    def _batched(self, prompts: Sequence[Sequence[int]], told: Callable[[int, int], None]) -> list[list[int]] | None:
        model, device = self.model, self.device
        ids, mask = _padded(prompts, device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        made = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
        logits, cache = made.logits[:, -1], made.past_key_values
        shortest = min(range(len(prompts)), key=lambda i: len(prompts[i]))
        if not self._agrees(logits[shortest], prompts[shortest]):
            return None
        if self.capture is not None:
            found = self._captured(prompts, made, mask, told)
            del logits, cache, made  # before the prompts are read again
            return found or self._batched(prompts, told)
        out: list[list[int]] = [[] for _ in prompts]
        places = positions[:, -1:]
        for _ in range(self.new_tokens):
            left = [i for i, said in enumerate(out) if not self._ended(said)]
            if not left:
                break
            best = _best_tokens(logits, left)
            for i in left:
                out[i].append(best[i])
            told(len(prompts) - len(left), len(prompts))
            step, places = torch.tensor(best, device=device)[:, None], places + 1
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
            made = model(
                input_ids=step, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True
            )
            logits, cache = made.logits[:, -1], made.past_key_values
        told(len(prompts), len(prompts))
        return out

    def _ended(self, said: list[int]) -> bool:
        """Whether an answer ends here: by a stop token, or as `over` says every few tokens."""
        if not said:
            return False
        return said[-1] in self.stops or (self.over is not None and len(said) % LOOKED_AT == 0 and self.over(said))

    def _agrees(self, logits: Tensor, ids: Sequence[int]) -> bool:
        """Whether the logits that a batch gave after `ids` are those of `ids` alone, but for rounding."""
        step = torch.tensor([list(ids)], device=self.device)
        alone = self.model(input_ids=step, use_cache=True, logits_to_keep=1).logits[0, -1].float()
        return bool((logits.float() - alone).std() < AGREE * alone.std())

    def _follows(self, prompt: Sequence[int], said: Tensor, last: Tensor) -> bool:
        """Whether one pass over a prompt and its answer chooses these tokens too, but for rounding.

        last: the logits that chose the last token. All steps are looked at where there are few, as some go astray that
        the last one does not show: a mask that counts from the end of the room, say.
        """
        ids = torch.tensor([list(prompt)], device=self.device)
        ids = torch.cat([ids, said[None, :-1]], dim=1)
        kept = torch.linspace(0, len(said) - 1, min(len(said), COMPARED), device=self.device).round().long()
        logits = self.model(input_ids=ids, logits_to_keep=kept + len(prompt) - 1, use_cache=True).logits[0]
        if len(logits) != len(kept):
            logits = logits[kept + len(prompt) - 1]  # of all positions: the model leaves none out
        logits = logits.float()
        chosen, spread = logits.gather(1, said[kept, None])[:, 0], logits.std(-1)
        near = logits.amax(-1) - chosen <= ASTRAY * spread
        return bool(near.all() & ((last.float() - logits[-1]).std() < AGREE * spread[-1]))

    def _captured(
        self,
        prompts: Sequence[Sequence[int]],
        made: Any,
        seen: Tensor,
        told: Callable[[int, int], None],
    ) -> list[list[int]] | None:
        """The answers by captured steps; None, now and for later batches, where they are not to be had."""
        from requant_eval.scoring.fixed_steps import FixedSteps, NotFixedError

        try:
            steps = FixedSteps(self.model, made, seen, self.new_tokens, self.stops)
            count = steps.run(self.capture, lambda ended: told(ended, len(prompts)), self.over)
            by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
            for i in (by_length[0], by_length[-1]):
                if not self._follows(prompts[i], steps.said[i, :count], steps.logits[i]):
                    raise RuntimeError("its steps do not give what one pass does")
        except UNFIT as error:
            self.capture = None
            self.uncaptured()
            level = logging.INFO if isinstance(error, NotFixedError) else logging.WARNING
            log.log(
                level, "answers without captured steps: %s: %s", type(error).__name__, str(error).partition("\n")[0]
            )
            return None
        told(len(prompts), len(prompts))
        return steps.answers(count)

    @torch.inference_mode()
    def alone(self, prompt: Sequence[int]) -> list[int]:
        """The answer to one prompt; all is read again for each token of a model that returns no key-value cache."""
        step, cache, out = torch.tensor([list(prompt)], device=self.device), None, list[int]()
        for _ in range(self.new_tokens):
            made = _last(self.model, step, cache)
            best, cache = best_token(made.logits[0, -1]), getattr(made, "past_key_values", None)
            out.append(best)
            if self._ended(out):
                break
            step = torch.tensor([[best] if cache is not None else [*prompt, *out]], device=self.device)
        return out


def _best_tokens(logits: Tensor, rows: Sequence[int]) -> list[int]:
    """The argmax of `rows` of logits [batch, vocabulary], 0 of those that have ended; EvaluationError for NaN.

    The host waits for the device once.
    """
    found = torch.stack((logits.float().argmax(-1), torch.isfinite(logits).all(-1).long())).tolist()
    best = [0] * len(logits)
    for i in rows:
        best[i], finite = found[0][i], found[1][i]
        if not finite:
            raise EvaluationError(DAMAGED)
    return best


def _padded(prompts: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(ids, attention mask), int64 [prompts, longest], padded on the left with token 0."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(p)) + list(p) for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _last(model: Any, step: Tensor, cache: Any) -> Any:
    """The output with the logits of the last position, of all positions where the model cannot leave others out."""
    options = {} if cache is None else {"past_key_values": cache}
    try:
        return model(input_ids=step, use_cache=True, logits_to_keep=1, **options)
    except TypeError:
        return model(input_ids=step, use_cache=True, **options)
