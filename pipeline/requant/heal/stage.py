"""Stage: give back what quantization took. Distils the group scales (and norms) of a written GPTQ checkpoint.

The codes stay, so the file keeps its format and size. What is written is never worse than the start on held-out
windows of the healing text: when nothing was gained it is the start, byte for byte.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from requant.checkpoint.model_files import write_json
from requant.checkpoint.reader import Checkpoint, read_json
from requant.data import packing
from requant.errors import InputError, StageError
from requant.formats import gptq as gptq_format
from requant.heal import blockwise, student
from requant.heal.plan import Fit
from requant.heal.teacher import Progress, Resident, Stored, Teacher, product_dtype, store
from requant.heal.trainer import Curve, EndToEnd, Settings, Trainer, thrifty
from requant.modeling import skeleton
from requant.runtime.device import free_memory

log = logging.getLogger(__name__)
STATE = "state.safetensors"
SAME = 0.2  # relative difference of unquantized tensors from which two models are not the same one
ALIKE = 0.5  # least cosine between a quantized weight and the teacher's
WORST = 10


def heal(
    source: Path, out: Path, windows: Tensor, held: int, settings: Settings, fit: Fit, *,
    teacher: Callable[[], Any], teacher_path: Path, key: str, work: Path, device: torch.device,
    trust_remote_code: bool = False, meta: Mapping[str, Any] | None = None, progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Heal the GPTQ checkpoint `source` into the existing, empty directory `out`; returns what a report tells of it.

    windows: int64 [n, length], the last `held` of them judge. teacher: makes the model to imitate; block by block it is
    the 16-bit model in `teacher_path`. work: a directory for what a killed run goes on from; `key` is the digest of all
    that the result depends on.

    Raises:
        InputError: `source` is no GPTQ checkpoint, or of another model than `teacher_path`.
        StageError: the checkpoint gives NaN or infinity.
    """
    check_same(source, teacher_path, trust_remote_code)
    work.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {}
    if fit.mode == "whole":
        values, curve = _whole(
            source, windows, held, settings, fit, teacher, key, work, device, trust_remote_code, progress
        )
    else:
        values, curve, told["blocks"] = blockwise.heal_blocks(
            source, teacher_path, windows, held, settings, device=device, micro=fit.micro, state=work, key=key,
            trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
    best, after = curve.best
    kept = best > 0
    if not kept:
        log.warning("healing gained nothing on held-out text: the checkpoint stays as it was")
    told |= movement(source, values) if kept else {}
    write(source, out, values if kept else {}, dict(meta or {}))
    return told | {
        "healed": kept, "mode": fit.mode, "teacher_resident": fit.resident, "best_step": best, "kl_start": curve.held[0][1],
        "kl_best": after, "held": [list(point) for point in curve.held], "train": curve.train, "stopped": curve.stopped,
        "windows": len(windows) - held, "held_windows": held, "length": windows.shape[1],
        "tokens": settings.steps * settings.batch * windows.shape[1], "digest": packing.digest(windows),
        "settings": asdict(settings),
    }  # fmt: skip


def _whole(
    source: Path, windows: Tensor, held: int, settings: Settings, fit: Fit, make: Callable[[], Any], key: str, work: Path,
    device: torch.device, trust: bool, progress: Progress | None,
) -> tuple[dict[str, Tensor], Curve]:  # fmt: skip
    """End to end; returns the best values by stored name."""
    taught: Teacher = _teacher(windows, fit, make, key, work, device, progress)
    pupil = student.load(
        source, device=device, dtype=product_dtype(device), tune=settings.tune, trust_remote_code=trust
    )
    if fit.recompute:
        thrifty(pupil.model)
    loss = EndToEnd(pupil, taught, windows, held, device)
    trainer = Trainer(pupil, loss, len(windows) - held, held, settings, micro=fit.micro)
    curve = trainer.run(work / STATE, key, progress)
    return pupil.values(), curve


def _teacher(
    windows: Tensor,
    fit: Fit,
    make: Callable[[], Any],
    key: str,
    work: Path,
    device: torch.device,
    progress: Progress | None,
) -> Teacher:
    """Resident, or stored in `work` by a teacher that is gone again."""
    if fit.resident:
        return Resident(make(), windows, device)
    file, digest = work / "teacher.safetensors", f"{key}:{packing.digest(windows)}"
    if file.exists():
        try:
            return Stored(file, windows.shape[1], digest, device)
        except StageError:
            file.unlink()  # of other settings
    store(Resident(make(), windows, device), file, digest=digest, batch=fit.micro, progress=progress)
    free_memory(device)
    return Stored(file, windows.shape[1], digest, device)


def check_same(source: Path, teacher: Path, trust_remote_code: bool = False) -> None:
    """Raise InputError when `source` cannot be a quantization of the model in `teacher`: structure, and a few tensors."""
    v2 = gptq_format.is_v2(source)
    models: list[Any] = [skeleton.open_model(p, trust_remote_code=trust_remote_code) for p in (source, teacher)]
    shapes = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in models]
    differing = [n for n in {**shapes[0], **shapes[1]} if shapes[0].get(n) != shapes[1].get(n)]
    _refuse(source, teacher, differing[:1], f"{[s.get(n) for s in shapes for n in differing[:1]]} by their config.json")
    ours, theirs = Checkpoint(source), Checkpoint(teacher)
    names = [skeleton.tensor_names(m, c) for m, c in zip(models, (gptq_format.stored_names(ours), theirs), strict=True)]
    both = [n for n in shapes[0] if n in names[0] and n in names[1]]
    packed = [n for n in both if names[0][n] not in ours]
    plain = [n for n in both if names[0][n] in ours]
    for name in {*plain[:1], *plain[-1:]}:
        a, b = ours.read(names[0][name]).float(), theirs.read(names[1][name]).float()
        differs = a.shape != b.shape or float((a - b).norm() / b.norm().clamp_min(1e-30)) > SAME
        _refuse(source, teacher, [name] if differs else [], "different values")
    for name in packed[:1]:
        codes = student.read_linear(ours, names[0][name].removesuffix(".weight"), v2)
        rebuilt = (codes.centred(torch.float32) * codes.scale[..., None]).flatten(1)
        wanted = theirs.read(names[1][name]).float()
        wanted = wanted if codes.order is None else wanted[:, codes.order]
        likeness = torch.nn.functional.cosine_similarity(rebuilt.flatten(), wanted.flatten(), dim=0)
        _refuse(
            source, teacher, [name] if float(likeness) < ALIKE else [], f"weights of a cosine of {float(likeness):.2f}"
        )


def _refuse(source: Path, teacher: Path, names: list[str], found: str) -> None:
    if names:
        raise InputError(
            f"{source} and {teacher} are not the same model: {names[0]} has {found}: give the 16-bit model that was quantized"
        )


def movement(source: Path, values: Mapping[str, Tensor]) -> dict[str, Any]:
    """How far values moved from the file's, relative: quantiles over all scales, and the modules that moved most."""
    checkpoint = Checkpoint(source)
    means, every = {}, []
    for name, value in values.items():
        before = _oriented(name, checkpoint.read(name).float())
        moved = (value.cpu() / before - 1).abs()
        if name.endswith(".scales"):
            every.append(moved.flatten())
            means[name.removesuffix(".scales")] = float(moved.mean())
    if not every:
        return {"moved": None, "moved_most": []}
    flat = torch.cat(every).sort().values
    at = {q: float(flat[min(len(flat) - 1, math.floor(q * len(flat)))]) for q in (0.5, 0.9, 0.99)}
    most = sorted(means, key=lambda n: -means[n])[:WORST]
    return {
        "moved": {
            "mean": float(flat.mean()), "median": at[0.5], "p90": at[0.9], "p99": at[0.99], "max": float(flat[-1]),
            "unchanged": float((flat == 0).float().mean()),
        },
        "moved_most": [{"name": name, "mean": means[name]} for name in most],
    }  # fmt: skip


def _oriented(name: str, tensor: Tensor) -> Tensor:
    """Scales lie [groups, out] in the file and [out, groups] in a student."""
    return tensor.T if name.endswith(".scales") else tensor


def write(source: Path, out: Path, values: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Copy a checkpoint, with new values of some tensors in the same places: every other byte of the weights stays."""
    checkpoint = Checkpoint(source)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(".") and file.name not in ("README.md", "manifest.json"):
            try:
                shutil.copyfile(file, out / file.name)
            except OSError as error:
                raise StageError(f"{out / file.name}: write failed ({error.strerror}): free disk space") from error
    for name, value in values.items():
        info = checkpoint[name]
        stored = _oriented(name, value.cpu()).to(info.dtype).contiguous()
        if tuple(stored.shape) != info.shape or not bool(torch.isfinite(stored).all()):
            raise StageError(f"{name}: its healed values cannot be stored as {info.dtype} {info.shape}")
        with (out / info.file.name).open("r+b") as handle:
            handle.seek(info.offset)
            handle.write(stored.view(-1).view(torch.uint8).numpy().data)
    for name in ("config.json", "quantize_config.json"):
        if (out / name).exists():
            write_json(out / name, _marked(read_json(out / name), meta, bool(values)))


def _marked(config: dict[str, Any], meta: Mapping[str, Any], healed: bool) -> dict[str, Any]:
    """A note in the quantization settings' `meta`, which loaders ignore."""
    if not healed:
        return config
    target = config.get("quantization_config", config)
    target["meta"] = {**(target.get("meta") or {}), **meta}
    return config


def summary(result: Mapping[str, Any]) -> str:
    """One line for people."""
    if not result["healed"]:
        return "healing gained nothing on held-out text; the checkpoint is unchanged"
    start, best = result["kl_start"], result["kl_best"]
    return f"KL on held-out healing text {start:.4f} -> {best:.4f} ({best / start:.2f} x) at step {result['best_step']}"
