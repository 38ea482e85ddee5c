"""`quantize.engine: gptqmodel`: that library behind the signature of `quantize`.

It gets the same calibration windows and grid, its own defaults for the rest. Its tensors are then laid out as ours and
its errors measured like ours, so that report and verify do not know the difference. Not resumable inside the stage.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from requant.checkpoint.atomic_write import make_directory, remove, write_text
from requant.checkpoint.reader import Checkpoint, read_json
from requant.checkpoint.writer import CheckpointWriter
from requant.errors import InputError, MemoryLackError, StageError, lacks_memory, one_line
from requant.formats import gptq as gptq_format
from requant.formats.quantized_format import PackError
from requant.modeling import skeleton
from requant.modeling.block_walk import Walk
from requant.modeling.blocks import block_linears
from requant.modeling.linear_groups import Inputs, LinearGroup, find_linear_groups
from requant.modeling.sequential import run_block
from requant.numerics import gptq
from requant.numerics.delta_retention import Deltas, delta_retention
from requant.numerics.grid import find_scales, nearest
from requant.numerics.hessian import gather
from requant.quantize.calibration_plan import batch_size
from requant.quantize.gptq_files import write_small_files
from requant.quantize.module_results import ModuleResult
from requant.quantize.plan import Plan, Settings, convert, plan
from requant.runtime.device import compute_dtype

Progress = Callable[[int, int, str], None]
DAMP = 0.05
"""What we write as damp_percent when it used its own default."""


def check(settings: Settings) -> None:
    """Raise InputError when the library is not installed or cannot do what is asked."""
    check_installed("quantize.engine")
    if settings.grid.signed:
        raise InputError("quantize.engine: gptqmodel has no signed scales: set quantize.signed_scales to false")


@torch.no_grad()
def quantize(
    source: Path,
    out: Path,
    windows: Tensor,
    settings: Settings,
    *,
    dtype: torch.dtype,
    device: torch.device,
    batch: int | None = None,
    trust_remote_code: bool = False,
    max_shard: int = 5 * 10**9,
    meta: Mapping[str, Any] | None = None,
    deltas: Deltas | None = None,
    progress: Progress | None = None,
) -> tuple[Plan, list[ModuleResult]]:
    """As `quantize.quantize`, with grid, overrides and damp of `settings`; raises StageError."""
    check(settings)
    batch = batch or batch_size(device, windows)
    checkpoint = Checkpoint(source)
    model = skeleton.open_model(source, trust_remote_code=trust_remote_code)
    layout = plan(checkpoint, model, settings, dtype, where=source)
    computed = compute_dtype(device, dtype)
    theirs = out / ".gptqmodel"
    remove(theirs)  # of a link, the link
    make_directory(theirs)
    _run(source, theirs, windows, settings, layout, computed, device, batch, trust_remote_code=trust_remote_code)
    walk = Walk(checkpoint, model, device=device, dtype=computed)
    with CheckpointWriter(out, layout.slots, max_bytes=max_shard) as writer:
        _rewrite(Checkpoint(theirs), checkpoint, layout, walk.names, writer)
        writer.close()
    remove(theirs)
    damp = settings.damp or DAMP
    judge = Judge(walk=walk, written=Checkpoint(out), layout=layout, damp=damp, deltas=deltas or (lambda _: None))
    results = judge.measure(windows, batch, progress)
    write_small_files(source, out, layout, settings, dtype=dtype, damp=damp, meta=meta or {})
    return layout, results


def check_installed(key: str) -> None:
    """Raise InputError when the library is not installed. key: of the recipe, which asks for it."""
    if importlib.util.find_spec("gptqmodel") is None:
        raise InputError(f"{key} is gptqmodel, which is not installed: pip install gptqmodel optimum")


@torch.no_grad()
def quantize_by_defaults(
    source: Path,
    out: Path,
    windows: Tensor,
    *,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
) -> None:
    """The library's own checkpoint of `source` in `out`: its defaults for all but bits and group size.

    windows: int64 [samples, length], the calibration text. dtype: in which it loads, and saves what it leaves. Paths of
    this machine are taken out of its config files. Raises StageError when the library fails.
    """
    options: dict[str, Any] = {"bits": bits, "group_size": group_size}
    if group_size == -1:
        options["act_group_aware"] = False  # its default order needs groups
    batch = batch_size(device, windows)
    _run_library(source, out, windows, options, dtype, device, batch, trust_remote_code=trust_remote_code)
    for name in ("config.json", "quantize_config.json"):
        if (out / name).is_file():
            found = read_json(out / name)
            for section in (found, found.get("quantization_config") or {}):
                (section.get("meta") or {}).pop("offload_to_disk_path", None)
            write_text(out / name, json.dumps(found, indent=2) + "\n")


def _run(
    source: Path,
    out: Path,
    windows: Tensor,
    settings: Settings,
    layout: Plan,
    dtype: torch.dtype,
    device: torch.device,
    batch: int,
    *,
    trust_remote_code: bool,
) -> None:
    """Let the library quantize `source` as the recipe says, and save to `out`."""
    grid = settings.grid
    options: dict[str, Any] = {"bits": grid.bits, "group_size": grid.group_size, "sym": grid.symmetric}
    options |= {"desc_act": False} | ({} if settings.damp is None else {"damp_percent": settings.damp})
    if any(g.group_size == -1 for g in layout.grids.values()):
        options["act_group_aware"] = False  # its default order needs groups
    rules = _dynamic(layout, settings)
    if rules:
        options["dynamic"] = rules
    try:
        _run_library(source, out, windows, options, dtype, device, batch, trust_remote_code=trust_remote_code)
    except StageError as error:
        raise type(error)(f"{error}; quantize.engine: requant does not use it") from error


def _run_library(
    source: Path,
    out: Path,
    windows: Tensor,
    options: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    batch: int,
    *,
    trust_remote_code: bool,
) -> None:
    """Let the library quantize `source` and save to `out`. options: of its QuantizeConfig."""
    with _silent(), _working_in(out / ".work") as folder:
        from gptqmodel import GPTQModel, QuantizeConfig

        rows = [{"input_ids": w[None], "attention_mask": torch.ones_like(w[None])} for w in windows]
        try:
            with torch.enable_grad():
                config = QuantizeConfig(device=device.type, offload_to_disk_path=str(folder), **options)
                made = GPTQModel.load(str(source), config, dtype=dtype, trust_remote_code=trust_remote_code)
                restore_rotary_settings(made.model.config)
                made.quantize(rows, batch_size=batch)
                made.save(str(out))
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, KeyError, OSError) as error:
            kind = MemoryLackError if lacks_memory(error) else StageError
            raise kind(f"gptqmodel could not quantize {source.name}: {one_line(error)}") from error


def restore_rotary_settings(config: Any) -> None:
    """Take out what the library adds to rotary settings that a model has for each kind of layer, as Gemma 3 does.

    It sets `rope_type` and `rope_theta` beside the kinds; transformers reads them as kinds and refuses to save.
    """
    for own in (config, config.get_text_config()):
        settings = getattr(own, "rope_parameters", None) or {}
        if kinds := {name: of for name, of in settings.items() if isinstance(of, dict) and "rope_type" in of}:
            own.rope_parameters = kinds


def _dynamic(layout: Plan, settings: Settings) -> dict[str, Any]:
    """Overrides and skipped linears in the library's words."""
    own: dict[str, Mapping[str, Any] | None] = dict.fromkeys(layout.left)
    for name, grid in layout.grids.items():
        if grid != settings.grid:
            own[name] = {"bits": grid.bits, "group_size": grid.group_size, "sym": grid.symmetric}
    made = gptq_format.quantization_config(
        bits=4, group_size=128, symmetric=True, damp=DAMP, overrides=own, quantized=(), meta={}
    )
    rules: dict[str, Any] = made.get("dynamic", {})
    return rules


@contextmanager
def _silent() -> Iterator[None]:
    """Discard the library's output, and set what it needs on a machine without a compiler."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield
    sys.stdout.flush()


@contextmanager
def _working_in(folder: Path) -> Iterator[Path]:
    """A directory for what the library writes while it works; its logs would go to where requant was started."""
    from gptqmodel.looper import loop_processor

    make_directory(folder)
    before = getattr(loop_processor, "_PROJECT_LOG_DIR", None)
    loop_processor._PROJECT_LOG_DIR = folder
    try:
        yield folder
    finally:
        loop_processor._PROJECT_LOG_DIR = before
        remove(folder)


def _rewrite(
    theirs: Checkpoint, source: Checkpoint, layout: Plan, names: Mapping[str, str], writer: CheckpointWriter
) -> None:
    """Write the library's packed tensors in our layout (v1 zeros, fp16 scales), and all others."""
    v2 = gptq_format.is_v2(theirs.quantization)
    packed = set()
    for module, grid in layout.grids.items():
        stem = names[f"{module}.weight"].removesuffix(".weight")
        missing = [s for s in gptq_format.SUFFIXES if f"{stem}.{s}" not in theirs]
        if missing:
            raise StageError(f"gptqmodel did not quantize {module} (no {missing[0]}): give it an override or skip it")
        tensors = {s: theirs.read(f"{stem}.{s}") for s in gptq_format.SUFFIXES}
        codes, scale, zero, g_idx = gptq_format.unpack(tensors, grid.bits, v2=v2)
        if not torch.equal(g_idx, torch.arange(codes.shape[1]) // (codes.shape[1] // scale.shape[1])):
            raise StageError(f"gptqmodel wrote {module} with a permuted g_idx although desc_act is false")
        try:
            ours = gptq_format.pack(codes, scale.half().float(), zero, grid.bits)
        except PackError as error:
            raise StageError(f"gptqmodel wrote {module} in a way that format v1 cannot hold: {error}") from error
        for suffix, tensor in ours.items():
            writer.write(f"{stem}.{suffix}", tensor)
            packed.add(f"{stem}.{suffix}")
    for slot in layout.slots:
        if slot.name not in packed:
            writer.write(slot.name, convert(slot.name, source.read(slot.name), slot.dtype))


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Measures written weights as `quantize` does, on the inputs in the quantized model."""

    walk: Walk
    written: Checkpoint
    layout: Plan
    damp: float
    deltas: Deltas

    def measure(self, windows: Tensor, batch: int, progress: Progress | None) -> list[ModuleResult]:
        """One walk over the model, whose weights are replaced on the way."""
        items = self.walk.embed(windows, batch)
        results: list[ModuleResult] = []
        for index in range(len(self.walk)):
            block: Any = self.walk.load(index)
            prefix = f"{self.walk.prefix}.{index}."
            linears = tuple(n for n in block_linears(block) if prefix + n in self.layout.grids)
            groups = find_linear_groups(self.walk, index, items[0], linears) if linears else []

            def on_group(group: LinearGroup, inputs: Inputs, block: Any = block, prefix: str = prefix) -> None:
                n = block.get_submodule(group.linears[0]).in_features
                hessian = gather(inputs, n, self.walk.device).hessian
                results.extend(self.cost(prefix + n, block.get_submodule(n), hessian) for n in group.linears)

            run_block(self.walk, index, items, groups, on_group, paused=False)
            self.walk.release(block)
            if progress:
                progress(index + 1, len(self.walk), "measuring")
        return results

    def cost(self, name: str, linear: Any, hessian: Tensor) -> ModuleResult:
        """One linear's losses; its quantized weight takes the original's place."""
        grid = self.layout.grids[name]
        stored = self.walk.names[f"{name}.weight"]
        weight = linear.weight.float()
        packed = {s: self.written.read(f"{stored.removesuffix('weight')}{s}") for s in gptq_format.SUFFIXES}
        decoded = gptq_format.dequantize(packed, grid.bits).to(weight.device)
        plain = replace(grid, search="minmax", signed=False)
        scales = find_scales(weight, hessian.diagonal(), plain)
        rounded = nearest(weight, scales, plain)
        whole = max(gptq.output_error(weight, hessian), torch.finfo(torch.float32).tiny)
        loss, control = (max(gptq.output_error(weight - q, hessian), 0.0) for q in (decoded, rounded))
        delta = self.deltas(stored)
        adapted: dict[str, Any] = {}
        if delta is not None:
            adapted = asdict(delta_retention(delta.to(weight.device), decoded - weight, hessian, loss))
        linear.weight.copy_(decoded.to(self.walk.dtype))
        return ModuleResult(
            name=name,
            bits=grid.bits,
            group_size=grid.group_size,
            loss=loss,
            relative_error=(loss / whole) ** 0.5,
            rtn_error=(control / whole) ** 0.5,
            damp=self.damp,
            order="gptqmodel",
            fallback=False,
            **adapted,
        )
