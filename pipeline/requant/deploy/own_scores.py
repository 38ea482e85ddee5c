"""Scores and tokens by our own decoding in fp32, which engines are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from requant.deploy import engine_processes
from requant.deploy.check_headers import HeaderCheck
from requant.deploy.scored_sample import Sample
from requant.deploy.verification import Verification
from requant.errors import library_call
from requant.evaluate import variants
from requant.formats.quantized_format import Finding
from requant.modeling import skeleton
from requant.modeling.embedding_rows import refuse_unknown_ids
from requant.numerics.grid import Grid
from requant.runtime.device import free_bytes, free_memory

PROMPT, NEW_TOKENS = 8, 8
LONGEST = 512  # tokens of the default text
SAMPLE = """\
The lighthouse keeper wrote the date at the top of the page, as he had done every evening for thirty years, and then sat
for a while without writing anything. Outside, the wind had turned to the north and the rain came in short, hard bursts
against the glass. He counted the seconds between the flashes of his own lamp, out of habit, and found them right. Two
ships had passed since noon: a freighter low in the water, and a small sailing boat that should not have been out in
such weather at all. He had watched the boat until it rounded the point. If the forecast was correct, the storm would be
over by morning, and the supply launch would bring flour, paraffin, letters and, with luck, a new pair of boots.

def count_words(text):
    words = {}
    for word in text.lower().split():
        words[word] = words.get(word, 0) + 1
    return words
"""
"""What engines score when no other text is given: prose and a little code, written for this."""
OF_ANOTHER_MODEL = "the tokenizer is another model's: copy the model's own tokenizer files"


def score_checkpoint(
    done: Verification,
    headers: HeaderCheck,
    *,
    sample: Sample | None,
    text: str | None,
    device: torch.device,
    trust_remote_code: bool,
    ends: Mapping[str, Grid] = MappingProxyType({}),
) -> tuple[Sample, list[list[float]]] | None:
    """Score a sample and generate, filling in `done`; (the sample, -ln p of its tokens).

    ends: token embeddings and head that are rounded first. sample: a run's own documents, else `text`, else `SAMPLE`.
    None when there is not enough memory, or when logits are not finite.
    """
    path = headers.checkpoint.path
    need = 4 * sum(p.numel() for p in headers.model.parameters())
    memory = _free(device)
    if need > memory and device.type == "cuda":
        memory = _free(device := torch.device("cpu"))
    if need > memory:
        done.skipped.append(
            f"generation and engines: fp32 weights are {need / 1e9:.1f} GB, {memory / 1e9:.1f} GB are free"
        )
        return None
    tokenizer, ids = tokenized(path, text or SAMPLE, trust_remote_code=trust_remote_code)
    config: Any = headers.model.config
    longest = (skeleton.positions(config) or 512) - NEW_TOKENS
    if sample is None:
        sample = Sample((tuple(ids[: min(longest, LONGEST)]),), (0,))
    rows = [row[:longest] for row in sample.rows]
    known, texts = _embeddings(headers.model), [torch.tensor(row) for row in rows if row]
    refuse_unknown_ids({f"{path / 'tokenizer.json'}: the sample": texts}, known, tokenizer, OF_ANOTHER_MODEL)
    model = variants.quantized(path, device=device, dtype=torch.float32, trust_remote_code=trust_remote_code, ends=ends)
    nll, finite = score_rows(model, rows, device)
    done.sample_tokens, done.sample_set, done.sample_digest = sum(map(len, nll)), sample.set, sample.digest
    if finite:
        done.perplexity = engine_processes.perplexity(nll)
        with library_call(
            f"{path / 'config.json'}: transformers cannot generate with it",
            "look at config.json and generation_config.json of the base",
            passing=(torch.OutOfMemoryError,),
        ):
            done.generated = _generate(model, rows[0][:PROMPT], device)
        done.text = tokenizer.decode(done.generated) if tokenizer is not None else None
    else:
        done.findings.append(Finding("model", "its logits hold NaN or infinity on the sample"))
    del model
    free_memory(device)
    return (replace(sample, rows=tuple(rows)), nll) if finite else None


def _embeddings(model: Any) -> int:
    """How many tokens a model has an embedding for."""
    return int(model.get_input_embeddings().weight.shape[0])


def _free(device: torch.device) -> float:
    """Bytes that a model may take."""
    if device.type == "cuda":
        free_memory(device)
    return 0.9 * free_bytes(device)


def tokenized(path: Path, text: str, *, trust_remote_code: bool) -> tuple[Any, list[int]]:
    """(tokenizer of a checkpoint, ids of the text); InputError where its files do not serve."""
    from transformers import AutoTokenizer

    with library_call(f"{path / 'tokenizer.json'}: transformers cannot load the tokenizer", "copy its files again"):
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        return tokenizer, list(tokenizer(text)["input_ids"])


def score_rows(model: Any, rows: Sequence[Sequence[int]], device: torch.device) -> tuple[list[list[float]], bool]:
    """-ln p of every token after the first, row by row, and whether all logits are finite."""
    out: list[list[float]] = []
    for row in rows:
        ids = torch.tensor([list(row)], device=device)
        logits = model(input_ids=ids).logits[0, :-1].float()
        if not torch.isfinite(logits).all():
            return out, False
        out.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist())
    return out, True


def _generate(model: Any, prompt: Sequence[int], device: torch.device) -> list[int]:
    ids = torch.tensor([list(prompt)], device=device)
    made: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    new: list[int] = made[0, ids.shape[1] :].tolist()
    return new
