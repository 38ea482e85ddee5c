"""Held-out loss of merges onto two bases, neither of them written.

Both are scored on the same part of every evaluation set, block by block, one block of one of them in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from requant.errors import StageError
from requant.evaluate import planned_merge
from requant.evaluate.planned_merge import Device
from requant.evaluate.streamed import StreamedModel
from requant.merge.plan import MergePlan
from requant.runtime.device import free_memory

if TYPE_CHECKING:
    from requant_eval.scoring.token_scores import TokenScores
    from requant_eval.scoring.windows import EvalSet

Onto = Literal["dequantized", "original"]
WORDS: dict[Onto, str] = {"dequantized": "the 4-bit values that training saw", "original": "the 16-bit original"}
TOKENS = {"cpu": 2**11, "cuda": 2**14}  # of each set: seconds of a model that such a device is used for
FEWEST = 2  # windows of a set


def measure(
    plans: Mapping[Onto, MergePlan],
    parts: Sequence[EvalSet],
    where: Device,
    *,
    trust_remote_code: bool = False,
    doing: Callable[[str], None] = lambda _: None,
) -> dict[Onto, list[TokenScores]]:
    """The scores of both merges on every set. Raises StageError for NaN or infinity in logits."""
    from requant_eval.errors import EvaluationError
    from requant_eval.scoring.score_loop import score

    windows = [w.ids for s in parts for w in s.windows]
    scores: dict[Onto, list[TokenScores]] = {}
    for onto, plan in plans.items():
        doing(f"held-out loss of the merge onto {WORDS[onto]}, {sum(map(len, windows))} tokens")
        model = StreamedModel(planned_merge.walk_of(plan, where, trust_remote_code=trust_remote_code))
        model.run(windows, where.batch)
        try:
            scores[onto] = [score(model, s, batch=where.batch, device=where.device) for s in parts]
        except EvaluationError as error:
            raise StageError(f"merge onto {WORDS[onto]}: {error}") from error
        del model
        free_memory(where.device)
    return scores


def part(s: EvalSet, tokens: int) -> EvalSet:
    """Windows of a set, evenly spread, of about `tokens` tokens; a set as small is taken whole."""
    from requant_eval.scoring.windows import digest

    mean = sum(len(w.ids) for w in s.windows) / len(s.windows)
    count = min(len(s.windows), max(FEWEST, int(tokens / mean)))
    chosen = [s.windows[i * len(s.windows) // count] for i in range(count)]
    numbers = {document: i for i, document in enumerate(dict.fromkeys(w.document for w in chosen))}
    windows = tuple(replace(w, document=numbers[w.document]) for w in chosen)
    scored = sum(int(w.scored.sum()) for w in windows)
    return replace(
        s, windows=windows, digest=digest(windows), n_documents=len(numbers), n_scored=scored, n_bytes=0, dropped=0
    )
