"""Scores of every token of an evaluation set: log-likelihood, KL and top-1 of a causal LM.

Every variant takes the same code path. A batch has windows of equal length, so there is no padding and the batch size
changes nothing but rounding. Logits are computed in fp32 from the final hidden states, a chunk of positions at a time:
peak memory is a few times CHUNK_LOGITS * 4 bytes, whatever the window.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from requant_eval.errors import EvaluationError
from requant_eval.scoring.kl import kl_divergence
from requant_eval.scoring.lm_head import Head, HeadTap, prove_head
from requant_eval.scoring.reference_states import Reference, ReferenceWriter
from requant_eval.scoring.token_scores import TokenScores
from requant_eval.scoring.windows import EvalSet, Window

__all__ = ["CHUNK_LOGITS", "Reference", "TokenScores", "score"]

# Logits that exist at a time. On a CPU few enough for malloc to reuse their memory.
CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**26}


def score(
    model: Any,
    eval_set: EvalSet,
    *,
    batch: int,
    device: torch.device | str,
    reference: str | Path | None = None,
    write_reference: str | Path | None = None,
    chunk_tokens: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> TokenScores:
    """Scores of a model on every scored token of `eval_set`.

    model: a transformers or PEFT causal LM; it is put in eval mode. batch: windows per forward pass. device: of the
    token ids. reference: the file of an earlier call; fills `kl` and `agree`. write_reference: write this model's
    hidden states there as a reference. chunk_tokens: positions whose logits exist at a time. on_progress: (windows
    done, windows).

    Raises:
        EvaluationError: NaN/inf in logits, infinite KL, a head that can't be read, a reference of another set or
            vocabulary.
    """
    started = time.perf_counter()
    windows = eval_set.windows
    columns = _Columns.of(eval_set, compared=reference is not None)
    model.eval()
    done = 0
    tap = HeadTap(model)
    with torch.inference_mode(), ExitStack() as stack:
        head = prove_head(model, tap, windows[0].ids[None].to(device))
        chunk = chunk_tokens or max(16, CHUNK_LOGITS[torch.device(device).type] // head.vocab)
        scorer = _TokenScorer(head, _open(reference, eval_set, head), chunk)
        sink: ReferenceWriter | None = None
        for numbers in _batches(windows, batch):
            hidden, _ = tap.run(model, torch.stack([windows[i].ids for i in numbers]).to(device))
            if write_reference is not None and sink is None:
                writer = ReferenceWriter(
                    Path(write_reference), rows=columns.n, like=hidden, head=head, digest=eval_set.digest
                )
                sink = stack.enter_context(writer)
            for row, number in enumerate(numbers):
                rows, targets = _scored_rows(hidden[row], windows[number])
                if sink is not None:
                    sink.write(columns.starts[number], rows)
                scorer.score(columns, columns.starts[number], rows, targets)
                _check_finite(columns, number, eval_set)
            done += len(numbers)
            if on_progress is not None:
                on_progress(done, len(windows))
    return columns.scores(eval_set, time.perf_counter() - started)


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
    """Computes the columns of tokens from their hidden states."""

    head: Head
    reference: Reference | None
    chunk_tokens: int

    def score(self, columns: _Columns, start: int, hidden: Tensor, targets: Tensor) -> None:
        """Fills tokens start.. from `hidden` [n, hidden] and `targets` int64 [n], chunk by chunk."""
        for at in range(0, len(hidden), self.chunk_tokens):
            rows, expected = hidden[at : at + self.chunk_tokens], targets[at : at + self.chunk_tokens]
            part = slice(start + at, start + at + len(rows))
            log_p = self.head.logits(rows).log_softmax(-1)
            nll = -log_p.gather(-1, expected[:, None])[:, 0]
            best = log_p.argmax(-1)
            columns.nll[part] = nll.double().cpu()
            columns.top1[part] = (best == expected).cpu()
            # log_softmax spreads one NaN or +inf logit over its whole row, so the target's entry shows it.
            columns.finite[part] = torch.isfinite(nll).cpu()
            if self.reference is None or columns.kl is None or columns.agree is None:
                continue
            reference_rows = self.reference.hidden(part.start, part.stop).to(rows.device)
            log_r = self.reference.head.logits(reference_rows).log_softmax(-1)
            columns.agree[part] = (log_r.argmax(-1) == best).cpu()
            kl = kl_divergence(log_r, log_p)
            columns.kl[part] = kl.cpu()
            columns.finite[part] &= torch.isfinite(kl).cpu()


def _batches(windows: Sequence[Window], batch: int) -> Iterator[list[int]]:
    """Window numbers, up to `batch` of one length at a time."""
    if batch < 1:
        raise EvaluationError(f"batch is {batch}, needs at least 1")
    by_length: defaultdict[int, list[int]] = defaultdict(list)
    for number, window in enumerate(windows):
        by_length[len(window.ids)].append(number)
    for numbers in by_length.values():
        for at in range(0, len(numbers), batch):
            yield numbers[at : at + batch]


def _scored_rows(hidden: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """The hidden states that predict the scored tokens [n, hidden], and those tokens int64 [n]."""
    at = window.scored.nonzero()[:, 0]
    return hidden[(at - 1).to(hidden.device)], window.ids[at].to(hidden.device)


def _open(path: str | Path | None, eval_set: EvalSet, head: Head) -> Reference | None:
    if path is None:
        return None
    reference = Reference(Path(path), digest=eval_set.digest, device=head.weight.device)
    if reference.head.vocab != head.vocab:
        raise EvaluationError(
            f"{path}: the reference has {reference.head.vocab} vocabulary entries, this model {head.vocab}: "
            "KL is not defined; merge the adapter's added tokens, or score without a reference"
        )
    return reference


def _check_finite(columns: _Columns, number: int, eval_set: EvalSet) -> None:
    part = slice(columns.starts[number], columns.starts[number + 1])
    finite = columns.finite[part]
    if bool(finite.all()):
        return
    document, bad = eval_set.windows[number].document, int((~finite).sum())
    where = f"set '{eval_set.name}', window {number} (document {document}), {bad} of {len(finite)} scored tokens"
    if columns.kl is not None and bool(columns.nll[part].isfinite().all()):
        raise EvaluationError(
            f"KL from the reference is not finite: {where}: this model excludes tokens (logits of -inf) that the "
            "reference predicts; score it without KL (evaluate.kl: false), or give both the same excluded tokens"
        )
    raise EvaluationError(f"NaN/inf in logits: {where}: the checkpoint is damaged or overflows in its dtype")
