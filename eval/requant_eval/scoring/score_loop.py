"""Scores of every token of an evaluation set: log-likelihood, KL and top-1 of a causal LM.

Every variant takes the same code path. Windows of about one length share a batch, padded on the right (`batches`),
which changes nothing but rounding. Logits are computed in fp32 from the final hidden states, a chunk of positions at a
time: peak memory is `logit_bytes`, whatever the window. The host waits for the device once for each batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from requant_eval.errors import EvaluationError
from requant_eval.scoring import batches
from requant_eval.scoring.batches import BatchSize
from requant_eval.scoring.kl import FAR, kl_divergence, near_kl_divergence
from requant_eval.scoring.lm_head import PROOF_POSITIONS, Head, HeadTap, model_type, prove_head
from requant_eval.scoring.reference_states import Reference, ReferenceWriter
from requant_eval.scoring.token_scores import TokenScores
from requant_eval.scoring.windows import EvalSet, Window

__all__ = ["Reference", "TokenScores", "logit_bytes", "score"]

# Logits that exist at a time: enough for a matrix product at full speed.
CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**26}
# Those that softmax and KL go over at a time. On a CPU few enough for its cache, and for malloc to reuse their memory.
PASS_LOGITS = {"cpu": 2**19, "cuda": 2**26}


def logit_bytes(device_type: str) -> int:
    """Bytes of logits at a time: two models' of a chunk, and four temporaries of a pass over them."""
    return 4 * (2 * CHUNK_LOGITS[device_type] + 4 * PASS_LOGITS[device_type])


def score(
    model: Any,
    eval_set: EvalSet,
    *,
    batch: BatchSize | int,
    device: torch.device | str,
    reference: str | Path | Reference | None = None,
    write_reference: str | Path | None = None,
    reference_head: Path | None = None,
    chunk_tokens: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> TokenScores:
    """Scores of a model on every scored token of `eval_set`.

    model: a transformers or PEFT causal LM; it is put in eval mode. batch: windows per forward pass. device: of the
    token ids. reference: the file of an earlier call, or it opened; fills `kl` and `agree`. write_reference: write this
    model's hidden states there as a reference; reference_head: and its head there, unless it is there already; None:
    into the reference. chunk_tokens: positions whose logits exist at a time. on_progress: (windows done, windows).
    on_note: what a reader of the scores should know, in words.

    Raises:
        EvaluationError: NaN/inf in logits, infinite KL, a head that can't be read, a reference of another set or
            vocabulary.
    """
    started = time.perf_counter()
    windows, done = eval_set.windows, 0
    columns = _Columns.of(eval_set, compared=reference is not None)
    model.eval()
    tap = HeadTap(model)
    with torch.inference_mode(), ExitStack() as stack:
        head = prove_head(model, tap, _proof(model, windows[0]).to(device))
        scorer = _TokenScorer.of(head, _open(reference, eval_set, head), torch.device(device), chunk_tokens)
        written = partial(ReferenceWriter, rows=columns.n, digest=eval_set.digest, head_file=reference_head)
        sink: ReferenceWriter | None = None
        forward = _Forward(model, tap, windows, torch.device(device), on_note)
        for numbers, hidden in forward.batches(BatchSize.of(batch)):
            if write_reference is not None and sink is None:
                sink = stack.enter_context(written(Path(write_reference), like=hidden, head=head))
            rows, targets = _scored_rows(hidden, [windows[i] for i in numbers])
            spans = [slice(columns.starts[i], columns.starts[i + 1]) for i in numbers]
            if sink is not None:
                sink.write_all(spans, rows)
            columns.fill(spans, scorer.score(rows, targets, spans))
            _check_finite(columns, numbers, eval_set)
            done += len(numbers)
            if on_progress is not None:
                on_progress(done, len(windows))
    return columns.scores(eval_set, time.perf_counter() - started)


@dataclass(frozen=True)
class _Forward:
    """Runs windows through a model, batch by batch."""

    model: Any
    tap: HeadTap
    windows: Sequence[Window]
    device: torch.device
    on_note: Callable[[str], None] | None

    def batches(self, size: BatchSize) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """(numbers of the windows, final hidden states [n, longest, hidden]) of every batch.

        The batch with most padding comes first: where it shows that padding changes the model's states, windows of
        different lengths run apart.
        """
        lengths = [len(w.ids) for w in self.windows]
        plan = batches.plan(lengths, size, padded_up_to=batches.padded_up_to(self.model.config))
        left = list(plan.batches)
        if plan.widest is not None and not hasattr(self.model, "forward_padded"):  # which has proven it itself
            first = left.pop(plan.widest)
            hidden, alone = self.states(first), self.states(first[-1:])
            if batches.padding_changes(hidden[-1], alone[0]):
                left = list(batches.plan(lengths, size, padded_up_to=0).batches)
                if self.on_note is not None:
                    self.on_note(batches.APART.format(model_type(self.model)))
            else:
                yield first, hidden
        for numbers in left:
            yield numbers, self.states(numbers)

    def states(self, numbers: Sequence[int]) -> Tensor:
        """Final hidden states [n, longest, hidden] of some windows, the longest first."""
        rows = [self.windows[i].ids for i in numbers]
        ids, run = batches.padded(rows).to(self.device), self.model
        if hasattr(run, "forward_padded"):
            run = partial(self.model.forward_padded, lengths=[len(row) for row in rows])
        return self.tap.run(run, ids)[0]


@dataclass(kw_only=True)
class _Columns:
    """Per-token results, filled in any order. starts: first token of every window, then n."""

    n: int
    starts: list[int]
    nll: Tensor
    top1: Tensor
    finite: Tensor
    kl: Tensor | None
    agree: Tensor | None

    @classmethod
    def of(cls, eval_set: EvalSet, *, compared: bool) -> _Columns:
        starts = [0, *np.cumsum([int(w.scored.sum()) for w in eval_set.windows]).tolist()]
        n = starts[-1]
        real, flag = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.bool)
        return cls(
            n=n,
            starts=starts,
            nll=real,
            top1=flag,
            finite=flag.clone(),
            kl=real.clone() if compared else None,
            agree=flag.clone() if compared else None,
        )

    def fill(self, spans: Sequence[slice], numbers: Tensor) -> None:
        """Fill the tokens of `spans` from `_TokenScorer.score`."""
        at = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        self.nll[at], self.top1[at] = numbers[0], numbers[1].bool()
        # log_softmax spreads one NaN or +inf logit over its whole row, so the target's entry shows it.
        self.finite[at] = numbers[[0, 2] if self.kl is not None else [0]].isfinite().all(0)
        if self.kl is not None and self.agree is not None:
            self.kl[at], self.agree[at] = numbers[2], numbers[3].bool()

    def scores(self, eval_set: EvalSet, seconds: float) -> TokenScores:
        document = np.repeat(np.array([w.document for w in eval_set.windows], dtype=np.int32), np.diff(self.starts))
        return TokenScores(
            nll=self.nll.numpy(),
            document=document,
            top1=self.top1.numpy(),
            kl=None if self.kl is None else self.kl.numpy(),
            agree=None if self.agree is None else self.agree.numpy(),
            nonfinite=int((~self.finite).sum()),
            digest=eval_set.digest,
            seconds=seconds,
        )


@dataclass(frozen=True)
class _TokenScorer:
    """Computes the columns of tokens from their hidden states.

    chunk_tokens: whose logits exist at a time. pass_tokens: of these, what is gone over at a time.
    """

    head: Head
    reference: Reference | None
    chunk_tokens: int
    pass_tokens: int

    @classmethod
    def of(cls, head: Head, reference: Reference | None, device: torch.device, chunk: int | None) -> _TokenScorer:
        """A scorer of `chunk` tokens at a time; None: as many as suit the device."""
        chunk = chunk or max(16, CHUNK_LOGITS[device.type] // head.vocab)
        return cls(head, reference, chunk, max(1, PASS_LOGITS[device.type] // head.vocab))

    def score(self, hidden: Tensor, targets: Tensor, spans: Sequence[slice]) -> Tensor:
        """float64 [2 or 4, n] on the host: -ln p, top-1, KL, agreement of n tokens, computed chunk by chunk.

        hidden: [n, hidden]. targets: int64 [n]. spans: where these tokens are in the set.
        """
        others = None
        if self.reference is not None:
            others = torch.cat([self.reference.hidden(s.start, s.stop) for s in spans]).to(hidden.device)
        found = self._chunks(hidden, targets, others, near_kl_divergence).cpu()
        if others is not None and not bool((found[4] <= FAR).all()):
            found = self._chunks(hidden, targets, others, lambda *of: (kl_divergence(*of), of[0][:, 0])).cpu()
        return found[:4]

    def _chunks(self, hidden: Tensor, targets: Tensor, others: Tensor | None, divergence: Any) -> Tensor:
        heads = [self.head, *([] if others is None or self.reference is None else [self.reference.head])]
        states = [hidden, *([] if others is None else [others])]
        room = [self._room(len(hidden), head) for head in heads]
        found = []
        for at in range(0, len(hidden), self.chunk_tokens):
            rows = slice(at, at + self.chunk_tokens)
            logits = [h.logits(x[rows], out) for h, x, out in zip(heads, states, room, strict=True)]
            parts = [torch.split(t, self.pass_tokens) for t in (targets[rows], *logits)]
            found += [_numbers(divergence, *part) for part in zip(*parts, strict=True)]
        return torch.cat(found, dim=1)

    def _room(self, tokens: int, head: Head) -> Tensor | None:
        """Memory for the logits of a chunk, on a CPU, whose allocator would map and clear it anew for each."""
        if head.weight.device.type != "cpu":
            return None
        return torch.empty(min(tokens, self.chunk_tokens), head.vocab, dtype=torch.float32)


def _numbers(divergence: Any, targets: Tensor, logits: Tensor, others: Tensor | None = None) -> Tensor:
    """float64 [2 or 5, n] of n tokens: also what `divergence` says of how far the two models are apart.

    logits, others: fp32 [n, vocab] of the model and of the reference.
    """
    log_p = logits.log_softmax(-1)
    best = log_p.argmax(-1)
    columns = [-log_p.gather(-1, targets[:, None])[:, 0], best == targets]
    if others is not None:
        log_r = others.log_softmax(-1)
        kl, furthest = divergence(log_r, log_p)
        columns += [kl, log_r.argmax(-1) == best, furthest]
    return torch.stack([column.double() for column in columns])


def _proof(model: Any, window: Window) -> Tensor:
    """Token ids int64 [1, length] on which the head is proven: the first of a window.

    All of them where a model has computed its windows already.
    """
    return window.ids[None, : None if hasattr(model, "forward_padded") else PROOF_POSITIONS]


def _scored_rows(hidden: Tensor, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """The hidden states that predict the scored tokens [n, hidden], and those tokens int64 [n].

    hidden: [windows, longest, hidden].
    """
    length = hidden.shape[1]
    at = torch.cat([w.scored.nonzero()[:, 0] - 1 + row * length for row, w in enumerate(windows)])
    targets = torch.cat([w.ids[w.scored] for w in windows])
    return hidden.flatten(0, 1)[at.to(hidden.device)], targets.to(hidden.device)


def _open(given: str | Path | Reference | None, eval_set: EvalSet, head: Head) -> Reference | None:
    if given is None:
        return None
    if isinstance(given, Reference) and given.digest == eval_set.digest:
        reference = given
    else:
        path = given.path if isinstance(given, Reference) else Path(given)
        reference = Reference(path, digest=eval_set.digest, device=head.weight.device)
    if reference.head.vocab != head.vocab:
        raise EvaluationError(
            f"{reference.path}: the reference has {reference.head.vocab} vocabulary entries, this model {head.vocab}: "
            "KL is not defined; merge the adapter's added tokens, or score without a reference"
        )
    return reference


def _check_finite(columns: _Columns, numbers: Sequence[int], eval_set: EvalSet) -> None:
    parts = {number: slice(columns.starts[number], columns.starts[number + 1]) for number in numbers}
    number = next((i for i in sorted(parts) if not bool(columns.finite[parts[i]].all())), None)
    if number is None:
        return
    part, finite = parts[number], columns.finite[parts[number]]
    document, bad = eval_set.windows[number].document, int((~finite).sum())
    where = f"set '{eval_set.name}', window {number} (document {document}), {bad} of {len(finite)} scored tokens"
    if columns.kl is not None and bool(columns.nll[part].isfinite().all()):
        raise EvaluationError(
            f"KL from the reference is not finite: {where}: this model excludes tokens (logits of -inf) that the "
            "reference predicts; score it without KL (evaluate.kl: false), or give both the same excluded tokens"
        )
    raise EvaluationError(f"NaN/inf in logits: {where}: the checkpoint is damaged or overflows in its dtype")
