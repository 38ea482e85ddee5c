"""Stage heal: distil scales, codes or norms of a GPTQ checkpoint towards its 16-bit model.

The files keep format and size. One part of the held-out windows of the healing text chooses the step, another one
judges it. By neither is the result worse than the start, on any source of the text: when nothing was gained, the start
is copied byte for byte.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from requant.checkpoint.atomic_write import copy_file, make_directory, read_state
from requant.checkpoint.model_files import files_of, write_json
from requant.checkpoint.reader import Checkpoint, TensorInfo, quantization_in, read_json
from requant.checkpoint.writer import overwrite
from requant.errors import InputError, StageError
from requant.formats import gptq
from requant.formats.bit_stream import pack_rows
from requant.formats.gptq_reader import GptqReader
from requant.formats.registry import open_quantized
from requant.heal import blockwise, student
from requant.heal.blockwise import HealedValues
from requant.heal.captured_steps import CapturedSteps
from requant.heal.changes import CodeChanges, ScaleChanges, code_changes, scale_changes
from requant.heal.curve import LossCurve
from requant.heal.curve_facts import CurveFacts, PassFacts, curve_facts, joined
from requant.heal.end_to_end import EndToEndLoss, recompute_in_backward
from requant.heal.job import HealJob, Progress
from requant.heal.settings import HealSettingsFacts
from requant.heal.teacher import ResidentTeacher, StoredTeacher, Teacher, product_dtype, store_teacher
from requant.heal.trainer import Trainer
from requant.modeling import skeleton, stacked_experts
from requant.numerics.finite import all_finite
from requant.runtime.device import free_memory
from requant.runtime.ranks import SINGLE_PROCESS, Ranks
from requant_eval.scoring.reference_states import prove

log = logging.getLogger(__name__)
STATE = "state.safetensors"
SAME = 0.2  # relative difference of unquantized tensors from which two models are not the same one
ALIKE = 0.5  # least cosine between a quantized weight and the teacher's


class BlockFacts(TypedDict, total=False):
    """Of a healing block by block. blocks: the errors of each. passes: of two, what each did."""

    blocks: list[blockwise.BlockErrors]
    passes: list[PassFacts]


class HealResult(BlockFacts, ScaleChanges, CurveFacts):
    """Facts of a healing, for the report. tuned: what was trained. changed_codes: None where none were trained."""

    mode: str
    tuned: list[str]
    changed_codes: CodeChanges | None
    teacher_resident: bool
    windows: int
    held_windows: int
    judge_windows: int
    length: int
    tokens: int
    digest: str
    settings: HealSettingsFacts


def heal(
    job: HealJob,
    out: str | Path,
    *,
    meta: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> HealResult:
    """Heal the GPTQ checkpoint `job.source` into the existing, empty directory `out`; the first rank calls this.

    Returns facts for the report.
    meta: added to `meta` of the quantization config of a checkpoint that was changed. ranks: end to end they share the
    windows of every step; block by block the first one heals alone.

    Raises:
        InputError: `job.source` is no GPTQ checkpoint, or of another model than `job.teacher`.
        StageError: the checkpoint gives NaN or infinity.
    """
    out = Path(out)
    check_same(job.source, job.teacher, trust_remote_code=job.trust_remote_code)
    make_directory(job.work)
    values, blocks, facts = _passes(job, progress, ranks)
    healed = facts["healed"]
    if not healed:
        log.warning("healing gained nothing on held-out text: the checkpoint stays as it was")
    changes: ScaleChanges = scale_changes(job.source, values) if healed else {}
    write(job.source, out, values, dict(meta or {}))
    return {
        **blocks,
        **changes,
        "changed_codes": code_changes(job.source, values) if healed else None,
        **facts,
        "mode": job.plan.name,
        "tuned": list(job.tune),
        "teacher_resident": (job.plan.then or job.plan).teacher_resident,
        "windows": job.plan.windows or job.text.train,
        "held_windows": job.text.choosing,
        "judge_windows": job.text.judging,
        "length": job.text.length,
        "tokens": (2 if job.plan.then else 1) * job.settings.steps * job.settings.batch * job.text.length,
        "digest": job.text.digest,
        "settings": cast(HealSettingsFacts, asdict(job.settings)),
    }


def _passes(job: HealJob, progress: Progress | None, ranks: Ranks) -> tuple[HealedValues, BlockFacts, CurveFacts]:
    """The values of every pass that gained, each judged on its own; none is worse than what it began with."""
    values, blocks = HealedValues(), BlockFacts()
    if job.plan.mode == "whole":
        found, curve = ranks.call(heal_whole, job, first_rank_only={"progress": progress})
        values.put(found if curve.gained else {})
    else:
        in_files, curve, blocks["blocks"] = blockwise.heal_blocks(job, progress)
        values = in_files if curve.gained else values
        free_memory(job.device)
    facts = curve_facts(job.text, curve)
    second = job.second
    if second:
        found, curve = ranks.call(heal_whole, second, start=values, first_rank_only={"progress": progress})
        values.put(found if curve.gained else {})
        later = curve_facts(job.text, curve)
        blocks["passes"] = [_pass_facts(job, facts), _pass_facts(second, later)]
        facts = joined(facts, later, job.settings.steps)
    return values, blocks, facts


def _pass_facts(job: HealJob, facts: CurveFacts) -> PassFacts:
    return {
        "mode": job.plan.mode,
        "tuned": list(job.tune),
        "healed": facts["healed"],
        "best_step": facts["best_step"],
        "kl_start": facts["kl_start"],
        "kl_best": facts["kl_best"],
    }


def heal_whole(
    job: HealJob,
    *,
    start: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> tuple[dict[str, Tensor], LossCurve]:
    """Heal end to end, on every rank; returns the best values by stored name, the same on all of them.

    start: as of `student.load`.
    """
    job = replace(job, device=ranks.device_of(job.device))
    teacher = _teacher(job, progress, ranks)
    trained = student.load(
        job.source,
        device=job.device,
        dtype=product_dtype(job.device),
        tune=job.tune,
        original=job.teacher,
        start=start,
        trust_remote_code=job.trust_remote_code,
    )
    if job.plan.recompute:
        recompute_in_backward(trained.model)
    loss = EndToEndLoss(trained, teacher, job.text, job.device)
    trainer = Trainer(
        trained,
        loss,
        loss.measure,
        job.settings,
        train=job.text.train,
        choosing=job.text.choosing,
        judging=job.text.judging,
        sources=job.text.held_out_sources,
        micro_batch=job.plan.micro_batch,
        captured=CapturedSteps(loss) if job.plan.captured else None,
        ranks=ranks,
    )
    curve = trainer.run(job.work / STATE, job.state_key, progress)
    return trained.values(), curve


def _teacher(job: HealJob, progress: Progress | None, ranks: Ranks) -> Teacher:
    """The resident teacher, or a stored one.

    A stored teacher's hidden states are in `job.work`, written by the first rank; its model is released after that.
    """
    windows, device = job.text.windows, job.device
    if job.plan.teacher_resident:
        return ResidentTeacher(job.load_teacher(device), windows, device)
    file, digest = job.work / "teacher.safetensors", f"{job.key}:{job.text.digest}"
    if ranks.first and not read_state(file, functools.partial(prove, digest=digest)):
        resident = ResidentTeacher(job.load_teacher(device), windows, device)
        store_teacher(resident, file, digest=digest, batch=job.plan.micro_batch, progress=progress)
        del resident
        free_memory(device)
    ranks.all(holds=True)  # all wait for the first one
    return StoredTeacher(file, length=job.text.length, digest=digest, device=device)


def check_same(source: Path, teacher: Path, *, trust_remote_code: bool = False) -> None:
    """Raise InputError when `source` cannot be a quantization of the model in `teacher`, which is in 16 bit and whole.

    Compares the structure of both, and a few tensors.
    """
    if Checkpoint(teacher).quantization:
        raise InputError(f"{teacher}: is quantized itself: give the 16-bit model that was quantized")
    quantized = open_quantized(source)
    if not isinstance(quantized, GptqReader):
        raise InputError(
            f"{source}: is no GPTQ checkpoint, and healing writes no other: `requant convert --to gptq` makes one of it"
        )
    teacher_model, original = stacked_experts.open_split(teacher, trust_remote_code=trust_remote_code)
    whole = bool(stacked_experts.stored_pieces(teacher_model, tuple(quantized)))  # experts that stayed in one tensor
    models: list[Any] = [
        skeleton.open_model(source, trust_remote_code=trust_remote_code),
        skeleton.open_model(teacher, trust_remote_code=trust_remote_code) if whole else teacher_model,
    ]
    shapes = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in models]
    for name in {**shapes[0], **shapes[1]}:
        if shapes[0].get(name) != shapes[1].get(name):
            raise _not_same(source, teacher, name, f"{[s.get(name) for s in shapes]} by their config.json")
    names = [skeleton.tensor_names(models[0], quantized), skeleton.tensor_names(models[1], original)]
    if missing := [n for n in shapes[1] if n not in {*names[1], *(skeleton.tied_pair(models[1]) or ())}]:
        raise InputError(f"{teacher}: {len(missing)} of the model's tensors are missing, e.g. {missing[0]}")
    both = [n for n in shapes[0] if n in names[0] and n in names[1]]
    packed = [n for n in both if names[0][n] in quantized.quantized]
    plain = [n for n in both if names[0][n] not in quantized.quantized]
    for name in {*plain[:1], *plain[-1:]}:
        a, b = quantized.read(names[0][name]).float(), original.read(names[1][name]).float()
        if a.shape != b.shape or float((a - b).norm() / b.norm().clamp_min(1e-30)) > SAME:
            raise _not_same(source, teacher, name, "different values")
    for name in packed[:1]:
        codes = student.read_linear(quantized, names[0][name].removesuffix(".weight"))
        rebuilt = (codes.centred(torch.float32) * codes.scale[..., None]).flatten(1)
        weight = original.read(names[1][name]).float()
        weight = weight.T if name.removesuffix(".weight") in skeleton.conv1d_modules(models[1]) else weight
        if weight.shape != rebuilt.shape:
            raise _not_same(source, teacher, name, f"{[list(rebuilt.shape), list(weight.shape)]} in the files")
        weight = weight if codes.order is None else weight[:, codes.order]
        likeness = float(torch.nn.functional.cosine_similarity(rebuilt.flatten(), weight.flatten(), dim=0))
        if likeness < ALIKE:
            raise _not_same(source, teacher, name, f"weights of a cosine of {likeness:.2f}")


def _not_same(source: Path, teacher: Path, name: str, found: str) -> InputError:
    return InputError(
        f"{source} and {teacher} are not the same model: {name} has {found}: give the 16-bit model that was quantized"
    )


def _as_stored(name: str, value: Tensor, info: TensorInfo) -> Tensor:
    """A healed value in the layout of the file: scales are [groups, out] there, codes packed along the inputs."""
    if name.endswith(".qweight"):
        return pack_rows(value.T, gptq.bits_of(info.shape, value.shape[1])).contiguous()
    return (value.T if name.endswith(".scales") else value).to(info.dtype).contiguous()


def write(source: Path, out: Path, values: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Copy a checkpoint with new values of some tensors.

    Every other byte of the weights is the same. values: by stored name.
    Raises StageError when a value cannot be stored in the tensor's dtype, or a write fails.
    """
    checkpoint = Checkpoint(source)
    for file in files_of(source):
        if not file.name.startswith(".") and file.name not in ("README.md", "manifest.json"):
            copy_file(file, out / file.relative_to(source))
    for name, value in values.items():
        info = checkpoint[name]
        stored = _as_stored(name, value.cpu(), info)
        if tuple(stored.shape) != info.shape or stored.dtype != info.dtype or not all_finite(stored):
            raise StageError(f"{name}: its healed values cannot be stored as {info.dtype} {info.shape}")
        overwrite(out / info.file.name, info.offset, stored)
    for name in ("config.json", "quantize_config.json"):
        if (out / name).exists():
            config = read_json(out / name, constants=True)
            if values:
                _add_meta(quantization_in(config, out / name) or config, meta)
            write_json(out / name, config)


def _add_meta(settings: dict[str, Any], meta: Mapping[str, Any]) -> None:
    """Add entries to `meta` of quantization settings.

    Loaders ignore `meta`, whatever another tool wrote there: only an object can be added to.
    """
    given = settings.get("meta")
    settings["meta"] = {**(given if isinstance(given, Mapping) else {}), **meta}


def summary(result: HealResult) -> str:
    """The result of a healing in one line."""
    start, best = result["kl_start"], result["kl_best"]
    if not result["healed"]:
        return "healing gained nothing on held-out text; the checkpoint is unchanged"
    codes = result["changed_codes"]
    changed = f"; {codes['share']:.2%} of the codes changed" if codes else ""
    kl = f"{start:.4f} -> {best:.4f} ({best / start:.2f} x)"
    return f"KL on held-out healing text {kl} at step {result['best_step']}{changed}"
