"""Module swap: the gain of restoring one merged weight at a time in a quantized model.

Each swap is scored on a small sample of the calibration text, paired with
the quantized model on the same tokens. The gain is the KL divergence from the merged model that disappears, in nats a
token. On text like the merged model's own this is the gain in ln perplexity. The evaluation sets take no part in the
choice.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from requant.evaluate import variants
from requant.modeling import skeleton, stacked_experts
from requant.run.stage_results import Distance, EstimateFacts

if TYPE_CHECKING:
    from requant_eval.scoring.batches import BatchSize
    from requant_eval.scoring.token_scores import TokenScores
    from requant_eval.scoring.windows import EvalSet

log = logging.getLogger(__name__)
WINDOWS, LENGTH = 24, 192  # of the sample: about 4600 tokens
Progress = Callable[[int, int, str], None]


def sample(calibration: Tensor, windows: int = WINDOWS, length: int = LENGTH) -> EvalSet:
    """Evenly spaced calibration windows as an evaluation set, each cut to `length` tokens.

    calibration: int64 [n, tokens]. Each window is a document.
    """
    from requant_eval.scoring.windows import Document, make_set

    count = min(windows, len(calibration))
    chosen = calibration[torch.arange(count) * len(calibration) // count, :length]
    documents = [Document(tuple(row)) for row in chosen.tolist()]
    return make_set("calibration sample", documents, window=length, bos_id=None)


def measure(
    units: Sequence[Sequence[str]],
    weights: Mapping[str, str],
    sources: variants.VariantSources,
    text: EvalSet,
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch: BatchSize | int,
    progress: Progress | None = None,
) -> tuple[Distance, list[Distance]]:
    """(distance of the quantized model from the merged one, gain of each unit of modules).

    weights: module -> name of its weight in the merged checkpoint. Both are {"kl": ..., "nll": ...}, each an estimate
    with its interval; gains are positive where the swap helps.
    """
    from requant_eval.scoring.score_loop import score

    total = len(units) + 2

    def run(model: Any, done: int, note: str, **reference: Any) -> TokenScores:
        if progress:
            progress(done, total, note)
        return score(model, text, batch=batch, device=device, **reference)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "merged.safetensors"
        merged = run(variants.load("merged", sources, device=device, dtype=dtype), 0, "merged", write_reference=file)
        model = variants.load("gptq", sources, device=device, dtype=dtype)
        before = run(model, 1, "gptq", reference=file)
        _, checkpoint = stacked_experts.open_split(sources.merged, trust_remote_code=sources.trust_remote_code)
        gains: list[Distance] = []
        for number, unit in enumerate(units):
            with swapped(model, {m: checkpoint.read(weights[m]) for m in unit}):
                after = run(model, 2 + number, "swapping", reference=file)
            gains.append(_gain(before, after))
            log.info("swapped %s: %.6f nats a token less", ", ".join(unit), gains[-1]["kl"]["value"])
    zero = torch.zeros(len(merged.nll), dtype=torch.float64).numpy()
    return {"kl": _difference(before.kl, zero, before), "nll": _difference(before.nll, merged.nll, before)}, gains


@contextmanager
def swapped(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Context in which some modules of the model have other weights.

    weights: module -> weight as a 16-bit checkpoint stores it.
    """
    old = {f"{m}.weight": model.get_submodule(m)._parameters["weight"] for m in weights}
    new = {}
    for name, parameter in old.items():
        assert parameter is not None
        new[name] = weights[name.removesuffix(".weight")].to(parameter.device, parameter.dtype)
    skeleton.place(model, new)
    try:
        yield
    finally:
        for name, parameter in old.items():
            model.get_submodule(name.removesuffix(".weight"))._parameters["weight"] = parameter


def _gain(before: TokenScores, after: TokenScores) -> Distance:
    return {"kl": _difference(before.kl, after.kl, before), "nll": _difference(before.nll, after.nll, before)}


def _difference(a: Any, b: Any, scores: TokenScores) -> EstimateFacts:
    """Mean of a - b a token, clustered by window."""
    from requant_eval.metrics import statistics as st

    return cast(EstimateFacts, asdict(st.mean(a - b, scores.document)))
