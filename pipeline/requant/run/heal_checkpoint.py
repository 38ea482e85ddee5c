"""Healing of any GPTQ checkpoint towards its 16-bit model, without a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from requant import __version__, heal
from requant.checkpoint.artifact import new_directory, require_new
from requant.checkpoint.reader import Checkpoint
from requant.checkpoint.run_directory import key_of
from requant.data import healing_text
from requant.data import tokenizer as tokenizer_files
from requant.data.documents import TextSource, tokenize
from requant.errors import InputError
from requant.evaluate import variants
from requant.formats.registry import open_quantized
from requant.heal.job import HealJob, Progress
from requant.heal.model_size import ModelSize
from requant.heal.plan import choose_plan
from requant.heal.settings import HealSettings
from requant.heal.stage import HealResult, check_same
from requant.modeling import skeleton
from requant.modeling.embedding_rows import refuse_unknown_ids
from requant.numerics.grid import Grid
from requant.recipe.heal_section import too_long


class HealCheckpointResult(HealResult):
    """Facts of a healing without a recipe. way: the plan, in words."""

    way: str


def heal_checkpoint(
    checkpoint: str | Path,
    teacher: str | Path,
    files: Sequence[str | Path],
    out: str | Path,
    settings: HealSettings,
    *,
    device: torch.device,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> HealCheckpointResult:
    """Heal `checkpoint` towards `teacher` into the new directory `out`.

    files: text, each in an equal share. warn: receives what was left out of them.
    Raises InputError: `out` exists, the models are not the same, there is not enough text or not enough memory.
    """
    checkpoint, teacher, out = Path(checkpoint), Path(teacher), Path(out)
    require_new(out)
    if problem := too_long(settings.steps, settings.batch, settings.length):
        raise InputError(f"healing: {problem}")
    check_same(checkpoint, teacher, trust_remote_code=trust_remote_code)
    tokenizer = tokenizer_files.load(checkpoint, trust_remote_code=trust_remote_code)
    text = _text([Path(file) for file in files], tokenizer, settings, warn)
    model: Any = skeleton.open_model(checkpoint, trust_remote_code=trust_remote_code)
    rows, advice = model.get_input_embeddings().weight.shape[0], "copy the tokenizer that belongs to the model"
    refuse_unknown_ids({f"{checkpoint}: the text": [text.windows]}, rows, tokenizer, advice)
    plan = choose_plan(_model_size(checkpoint, model), settings, text, device=device)
    sources = variants.VariantSources.of_checkpoint(teacher, trust_remote_code=trust_remote_code)
    with new_directory(out) as partial:
        job = HealJob(
            source=checkpoint,
            teacher=teacher,
            load_teacher=lambda on: variants.teacher("merged", sources, device=on, stored=_dtype(teacher)),
            text=text,
            settings=settings,
            plan=plan,
            device=device,
            work=partial / "work",
            key=key_of(text.digest),
            trust_remote_code=trust_remote_code,
        )
        facts = heal.heal(job, partial / "out", meta={"healer": [f"requant:{__version__}"]}, progress=progress)
    return {**facts, "way": str(plan)}


def _text(
    files: Sequence[Path], tokenizer: Any, settings: HealSettings, warn: Callable[[str], None]
) -> healing_text.HealingText:
    """Windows of the files' text, each in an equal share. warn: receives what was left out."""
    notes: list[str] = []
    entries = [(f.name, tokenize(TextSource(path=f), tokenizer, completions=False, notes=notes), 1.0) for f in files]
    text = healing_text.healing_windows(
        entries,
        tokenizer,
        steps=settings.steps,
        batch=settings.batch,
        length=settings.length,
        seed=settings.seed,
        notes=notes,
    )
    for note in dict.fromkeys(notes):
        warn(note)
    return text


def _dtype(path: Path) -> torch.dtype | None:
    """The dtype that config.json names, if it names one of torch's."""
    config = Checkpoint(path).config
    found = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return found if isinstance(found, torch.dtype) else None


def _model_size(path: Path, model: nn.Module) -> ModelSize:
    """What memory and time depend on, from the checkpoint's headers."""
    reader = open_quantized(path)
    grids = {}
    for parameter, name in skeleton.tensor_names(model, reader).items():
        if name in reader.quantized:
            grids[parameter.removesuffix(".weight")] = Grid(*reader.bits_and_group_size(name))
    if not grids:
        raise InputError(f"{path}: no quantized linear found: nothing to heal")
    return ModelSize.of(model, grids)
