"""Forecast of each stage on this machine: seconds, host memory, device memory.

It adds up pieces that were timed here (`rehearsal`) and sizes from headers, for one rank. bench/stream.py compares it
with real runs.
Not included: other load on the machine, and files that are read from slower storage than the sample was.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from requant.evaluate.memory import BYTES_PER_NF4_WEIGHT, VariantSize
from requant.evaluate.scores import REFERENCE
from requant.evaluate.stage import Stream, should_stream
from requant.evaluate.variant_sources import VariantSources
from requant.merge.deltas import deltas
from requant.modeling import skeleton
from requant.modeling.blocks import block_list
from requant.modeling.layer_configs import layer_configs
from requant.numerics import nf4
from requant.quantize.calibration_plan import batch_size
from requant.run.check.forecast_asking import Asking
from requant.run.check.forecast_formats import Rates, converting
from requant.run.check.forecast_merge import PROBED, Disk, Need, merged_in, merging
from requant.run.check.rehearsal import Rehearsal, cost_of
from requant.run.prepared import Prepared
from requant.runtime import measurements
from requant.runtime.device import PROFILES, USABLE, free_bytes, free_memory, product_rate, profile_of
from requant_eval.scoring.batches import BatchSize, plan

__all__ = ["Need", "forecast"]

if TYPE_CHECKING:
    from requant_eval.scoring.windows import EvalSet

LIBRARIES = 40 * 2**20  # bytes that PEFT, bitsandbytes and a model's module add to the process on first use
LONGEST_REHEARSAL = 20.0  # seconds that the products of a rehearsed block may take
TRIED = 256  # tokens of a rehearsed batch on a CPU, where a larger one is no faster
BATCHES = 2  # that are rehearsed: the first of a set, and what one more takes
TEXT = 512  # tokens at most, scored in the last check of a written checkpoint
SAMPLE = TEXT + 8 * 8  # tokens' worth of work there: the text, and a few tokens alone


def forecast(
    p: Prepared, sources: VariantSources, device: torch.device, dtype: torch.dtype, batch: BatchSize
) -> list[Need]:
    """Merge, quantize (by our own engine), the other formats, and evaluate, nothing being finished.

    dtype, batch: of the evaluation.
    Only the merge where the blocks take too long to rehearse on this processor.
    """
    free_memory(device)
    rate = product_rate(device)  # on a GPU also what its libraries take of the host
    started = measurements.reset_peak()
    trust = p.recipe.trust_remote_code
    began = time.perf_counter()
    model: Any = skeleton.open_model(p.sources.base, trust_remote_code=trust, split=True)
    rehearsal, build = Rehearsal(model, device), time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        disk = Disk.probed(Path(folder), device)
        needs = [merging(p, device, started, disk)]
        if rehearsal.effort / rate > LONGEST_REHEARSAL:
            return needs
        started += 0 if {"peft", "bitsandbytes"} <= sys.modules.keys() else LIBRARIES
        scored = _Scoring(p, sources, dtype, batch, rehearsal, Path(folder), build)
    if device.type == "cuda":  # its libraries stay on the host once they were used
        free_memory(device)
        started = max(started, measurements.reset_peak())
    if p.recipe.quantize.engine == "requant":
        needs.append(_quantizing(p, rehearsal, scored, started))
    needs += converting(p, scored.rates(disk), started)
    return [*needs, scored.need(started), *scored.asking().needs(started)]


def _quantizing(p: Prepared, rehearsal: Rehearsal, scored: _Scoring, started: int) -> Need:
    device, windows, size = rehearsal.device, p.texts.calibration, scored.size
    batch = batch_size(device, windows, block_list(rehearsal.model)[1])
    pieces = p.quantize.plan.pieces
    stored = skeleton.tensor_names(rehearsal.model, [*p.merge.plan.base.weights, *pieces])
    added = deltas(p.merge.plan, pieces)
    parts = rehearsal.quantizing(p.quantize.plan, p.quantize.settings, windows, batch, lambda name: added(stored[name]))
    batches, unquantized = len(parts.calibration.batches), len(parts.calibration.unquantized)
    rest = parts.more * (batches - max(1, unquantized)) + parts.unquantized * max(0, unquantized - 1)
    again: float = 2 * (size.total - size.outside)
    if device.type == "cuda":  # blocks are read during the work: only verification and embeddings remain
        again = 3 * size.outside + 2 * p.quantize.settings.grid.bits / 16 * (size.total - size.outside)
    host_bytes, device_bytes = scored.checked()
    seconds = parts.one.seconds + rest.seconds + scored.reading * again
    seconds += scored.check(on_device=device_bytes > 0)
    seconds += 4 * scored.build + profile_of(device).start_seconds
    item = 4 if device.type == "cpu" else 2
    states = windows.numel() * size.width * item * (1 + unquantized / batches)
    working = size.block * item * (1 if device.type == "cpu" else 2) + parts.one.bytes
    working += int(rest.bytes + states) if parts.calibration.inside_block else 0
    if device.type == "cpu":
        return Need("quantize", seconds, started + max(working, host_bytes))
    waiting = 0 if parts.calibration.inside_block else int(states)
    merged = merged_in(p)
    each = p.quantize.dtype.itemsize + (merged.itemsize if merged != p.quantize.dtype else 0)  # while it is cast
    ends = 2 * size.vocabulary * size.width  # embeddings to compute and to write
    beginning = each * (ends + size.block)
    host = max(waiting + beginning, 0 if device_bytes else host_bytes)
    return Need("quantize", seconds, started + host, max(working, device_bytes))


class _Scoring:
    """Cost of scoring by token, weight and variant, and its forecast."""

    def __init__(
        self,
        p: Prepared,
        sources: VariantSources,
        dtype: torch.dtype,
        batch: BatchSize,
        rehearsal: Rehearsal,
        folder: Path,
        build: float,
    ) -> None:
        self.p, self.sources, self.dtype, self.device = p, sources, dtype, rehearsal.device
        self.batch = batch
        self.model: Any = rehearsal.model
        self.plans = [plan([len(w.ids) for w in s.windows], batch) for s in p.texts.sets]
        self.build = build  # seconds to make a model's structure
        self.size = VariantSize.of_model(rehearsal.model)
        self.sizes: dict[str, VariantSize] = {}  # of variants that hold weights in 4 bits
        alike = _alike(p.texts.sets)
        length = len(alike.windows[0].ids)
        rows = batch.rows(length)
        self.rows = rows if self.device.type == "cuda" else max(1, min(rows, TRIED // length))
        self.tokens = self.rows * length
        self.sample = replace(alike, windows=alike.windows[: BATCHES * self.rows])
        self.parts = rehearsal.scoring(self.sample, self.rows, dtype, folder)
        self.token = self.parts.token.seconds
        self.reading, self.decoding = self.on_host = _rates(folder, self.device, dtype)
        if self.device.type == "cuda":
            self.on_host = _rates(folder, torch.device("cpu"), torch.float32)

    def checked(self) -> tuple[int, int]:
        """Peak bytes, of host and device, to verify a written checkpoint; 0 where it does not fit."""
        size = self.size
        peak = 4 * (size.total + size.vocabulary * (size.width + 4 * TEXT))  # its model, what it reads, its logits
        free_memory(self.device)
        host, device = (peak if peak < USABLE * free_bytes(d) else 0 for d in (torch.device("cpu"), self.device))
        return host, device

    def rates(self, disk: Disk) -> Rates:
        """What the format stages take beside their codes."""
        host, device = self.checked()
        check = self.check(on_device=device > 0)
        on_gpu = self.device.type == "cuda"
        checked = (0 if on_gpu and device else host, device if on_gpu else 0)
        return Rates(disk=disk, read=self.on_host[0] / 2, build=self.build, check=check, checked=checked)

    def check(self, *, on_device: bool) -> float:
        """Seconds to verify a written checkpoint: a text in fp32, every weight decoded.

        on_device: else on the host.
        """
        text, (reading, decoding) = self.token * SAMPLE / 8, (self.reading, self.decoding)
        if self.device.type == "cuda" and not on_device:
            text = 2.0 * self.size.total * TEXT / (PROFILES["cpu"].busy_share * product_rate(torch.device("cpu")))
            reading, decoding = self.on_host
        return text + (reading + 2 * decoding) * self.size.total

    def need(self, started: int) -> Need:
        """All variants, one after another."""
        free_memory(self.device)
        seconds, worst = 0.0, 0
        asking, asked = self.asking(), {name for q in self.p.questions if q.kind == "answers" for name in q.asked}
        for name in self.p.variants:
            seconds += self.seconds(name) + (asking.of_prompts(name) if name in asked else 0.0)
            worst = max(worst, self.bytes(name) + (asking.bytes_of_prompts(name) if name in asked else 0))
        if self.device.type == "cpu":
            return Need("evaluate", seconds, started + worst)
        whole = not self.streams("merged")
        loaded = 2 * self.size.total if whole else 4 * self.size.block  # by transformers: its file is mapped
        return Need("evaluate", seconds, started + loaded, worst)

    def asking(self) -> Asking:
        """What answers, tasks and roads take, from what was timed."""
        configs = layer_configs(self.model.config)
        cached = sum(self._cached(c) for c in configs) // len(configs) * self.size.layers
        batch = self.sample.windows[: self.rows]
        return Asking(
            p=self.p, scoring=self, batch=self.batch, device=self.device.type,
            token=self.parts.forward.seconds / self.parts.tokens, step=self.token,
            scored=self.parts.head[0].seconds / max(1, sum(int(w.scored.sum()) for w in batch)),
            weight=self.reading, decoded=self.decoding,
            cached=cached, item=self.dtype.itemsize,
        )  # fmt: skip

    def _cached(self, config: Any) -> int:
        """Bytes of a token's keys and values in one layer."""
        heads = int(getattr(config, "num_attention_heads", 1))
        wide = int(getattr(config, "head_dim", None) or self.size.width // heads)
        keys = int(getattr(config, "num_key_value_heads", None) or heads)
        return 2 * keys * wide * self.dtype.itemsize

    def seconds(self, name: str) -> float:
        """Loading, blocks, and the head on what is scored."""
        size = self.size_of(name)
        per_token = self.parts.forward.seconds / self.parts.tokens
        tokens = sum(len(w.ids) for s in self.p.texts.sets for w in s.windows)
        kind = int(name != REFERENCE and self.p.recipe.evaluate.kl)
        in_batch = sum(int(w.scored.sum()) for w in self.sample.windows[: self.rows])
        again, first = self.parts.head[kind].seconds, self.parts.first[kind].seconds
        heads = again * sum(s.n_scored for s in self.p.texts.sets) / in_batch
        heads += max(0.0, first - again)  # the reference's head is written once, and read once for all sets
        made = {"merged": 1, "original": 4, "rtn": 4, "gptq": 4, "healed": 4}.get(name, 1)
        load = 2 * self.build + (self.reading + (made - 1) * self.decoding) * size.total
        if not size.packed and not size.adapter:
            return load + tokens * per_token + heads
        extra = 3 * size.adapter / 4 / max(1, size.total - size.outside)  # two thin products for a wide one, and copies
        times = 1 if self.streams(name) else sum(len(one.batches) for one in self.plans)
        return load + tokens * per_token * (1 + extra) + heads + size.packed * self.decoding * times

    def bytes(self, name: str) -> int:
        """Peak bytes while a variant is scored."""
        size = self.size_of(name)
        forward = self.parts.forward.bytes * max(one.tokens for one in self.plans) // self.tokens
        item, work = self.dtype.itemsize, max(forward, *(c.bytes for c in self.parts.first))
        if self.streams(name):
            ahead = 2 if self.device.type == "cuda" else 1
            states = sum(len(w.ids) for s in self.p.texts.sets for w in s.windows) * size.width * item
            return int((size.block * ahead + size.outside) * item + size.adapter + states + work)
        held = (size.total - size.packed) * item + size.packed * BYTES_PER_NF4_WEIGHT + size.adapter + work
        mapped = 2 * size.total if name == "merged" and self.device.type == "cpu" else 0  # its file, while it is cast
        return int(held + (size.largest * (item + 4) if size.packed else 0) + mapped)

    def streams(self, name: str, stream: Stream | None = None) -> bool:
        """Whether a variant is scored block by block. stream: in place of the recipe's."""
        return should_stream(
            name,
            self.sources,
            lambda: self.size_of(name),
            stream=stream or self.p.recipe.evaluate.stream,
            device=self.device,
            dtype=self.dtype,
            tokens=max(one.tokens for one in self.plans),
        )

    def size_of(self, name: str) -> VariantSize:
        """Size of a variant before its files exist."""
        if name not in ("base", "adapter"):
            return self.size
        if name not in self.sizes:
            self.sizes[name] = VariantSize.of(name, self.sources)
        return self.sizes[name]


def _alike(sets: Sequence[EvalSet]) -> EvalSet:
    """Windows of the length that most tokens are in, from the set that has most of them."""
    lengths = Counter[int]()
    for window in (w for s in sets for w in s.windows):
        lengths[len(window.ids)] += len(window.ids)
    length = lengths.most_common(1)[0][0]
    fullest = max(sets, key=lambda s: sum(len(w.ids) == length for w in s.windows))
    return replace(fullest, windows=tuple(w for w in fullest.windows if len(w.ids) == length))


def _rates(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds a weight to copy it to the device, read in 16 bit or decoded from 4 bits.

    (to read it in 16 bit and copy it, to decode it on the device).
    """
    count = PROBED // 2
    with (folder / "probe").open("rb", buffering=0) as file:
        raw = bytearray(PROBED)
        read = cost_of(torch.device("cpu"), lambda: file.readinto(raw))
    half = torch.frombuffer(raw, dtype=torch.float16)
    half.to(device, dtype)
    cast = cost_of(device, lambda: half.to(device, dtype))
    packed = torch.zeros(count // 2, dtype=torch.uint8, device=device)
    state = nf4.QuantState(quant_type="nf4", blocksize=64, shape=(count,), dtype="float32")
    scales = torch.ones(state.blocks, device=device)
    nf4.decode(packed, scales, state)
    decoded = cost_of(device, lambda: nf4.decode(packed, scales, state).to(dtype))
    return (read.seconds + cast.seconds) / count, decoded.seconds / count
