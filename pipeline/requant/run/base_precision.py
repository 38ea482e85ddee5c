"""The base's precision in training: `base.nf4` against what the base's files hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from requant.errors import InputError, RecipeError
from requant.merge.base_checkpoint import DecodedCheckpoint, open_base_checkpoint
from requant.merge.base_weights import Nf4Settings
from requant.merge.packed_parts import STATE
from requant.merge.plan import MergePlan
from requant.modeling import skeleton
from requant.recipe import Recipe
from requant.recipe.model_sections import Nf4
from requant.recipe.template import FOUR_BIT_NAME


def check_base(recipe: Recipe, base: Path) -> None:
    """Refuse a base whose files do not go with `base.nf4`, read from headers.

    Raises RecipeError for a 16-bit base without a word on how training held it, and for `none` on a 4-bit one;
    InputError for a quantized format that is not read.
    """
    checkpoint = open_base_checkpoint(base)
    nf4, name = recipe.base.nf4, Path(recipe.base.model).name
    if isinstance(checkpoint, DecodedCheckpoint):
        _check_decoded(recipe, checkpoint, name)
        return
    if any(tensor.endswith((".SCB", ".weight_format")) for tensor in checkpoint):
        return  # 8 bit: refused with its own words when it is opened
    if any(STATE in tensor for tensor in checkpoint):
        if nf4 == "none":
            raise RecipeError(
                f"{recipe.place('base', 'nf4')}: none says that training did not quantize the base, but {name} is a "
                "4-bit checkpoint: remove nf4 or write nf4: auto (its files say how it was quantized), or name the "
                "16-bit model"
            )
        return
    if isinstance(nf4, str) and checkpoint.quantization:
        raise InputError(
            f"{checkpoint.path / 'config.json'}: quantization_config says bitsandbytes, but no tensor is stored in 4 "
            "bits: the files do not belong together. Remove quantization_config if the weights are 16-bit"
        )
    if nf4 == "auto":
        raise RecipeError(
            f"{recipe.place('base', 'nf4')}: auto, the default, reads a 4-bit checkpoint, but {name} is a 16-bit "
            "model, and it would be merged as if training had not quantized it. Did training load it in 4 bits "
            "(BitsAndBytesConfig, QLoRA)? Give its settings as a section, as `requant init` writes it: "
            "nf4: {quant_type: nf4, double_quant: true}. Was it trained in 16 bit (plain LoRA)? Write nf4: none"
        )


def _check_decoded(recipe: Recipe, checkpoint: DecodedCheckpoint, name: str) -> None:
    """Raise RecipeError unless the recipe says that training did not hold an encoded base in NF4."""
    if recipe.base.nf4 == "none":
        return
    said = "auto, the default, reads" if recipe.base.nf4 == "auto" else "a section describes"
    raise RecipeError(
        f"{recipe.place('base', 'nf4')}: {said} a base that training held in bitsandbytes' 4 bits, but {name} "
        f"is stored in {checkpoint.format_name}, which is decoded and not quantized again: write nf4: none. "
        "Was it trained in 4 bits after all? Name the 16-bit or 4-bit model that training loaded"
    )


def unloadable(plan: MergePlan, model: Any, simulate: Nf4Settings | None) -> str | None:
    """Why transformers 5 cannot hold the base as training did; None when it can."""
    able = skeleton.quantizable(model, ("^$",))
    stored = skeleton.tensor_names(model, plan.base.weights)
    held = {p.removesuffix(".weight") for p, n in stored.items() if plan.base.weights[n].kind == "packed"} - able
    if simulate is not None:
        held |= skeleton.quantizable(model, simulate.skip, version=simulate.version) - able
    if not held:
        return None
    return (
        f"the base holds {len(held)} modules in 4 bits that transformers 5 cannot, e.g. {min(held)}: base and adapter "
        "are measured block by block, on our own decoder's values"
    )


def nf4_settings(nf4: Nf4 | str) -> Nf4Settings | None:
    """How a 16-bit base was quantized for training; None for auto and none."""
    if isinstance(nf4, str):
        return None
    return Nf4Settings(
        quant_type=nf4.quant_type,
        double_quant=nf4.double_quant,
        blocksize=nf4.blocksize,
        load_dtype=nf4.load_dtype,
        compute_dtype=nf4.compute_dtype,
        skip=nf4.skip,
        version=nf4.transformers,
    )


def hints(recipe: Recipe, trained_on: Sequence[str | None]) -> list[str]:
    """What the recipe leaves unused, and what is odd about `base.nf4: none`.

    Which is `merge.onto: original` or `auto`, and an adapter whose base was in 4 bits by its name. trained_on: the base
    that each adapter records.
    """
    found: list[str] = []
    if recipe.base.original and recipe.merge.onto == "dequantized" and "original" not in recipe.evaluate.variants:
        found.append(
            "base.original is set and not measured: the variant original says which base is the better one "
            "to merge onto"
        )
    if recipe.merge.onto == "auto" and recipe.base.sixteen_bit is None:
        found.append(
            "merge.onto: auto has one base to choose from, the 4-bit one: base.original, the 16-bit model behind it, "
            "lets it measure both"
        )
    if recipe.base.nf4 != "none":
        return found
    if recipe.merge.onto == "auto":
        found.append(
            "merge.onto: auto has nothing to choose from: with base.nf4: none there is only the 16-bit base, and the "
            "adapter is merged onto it: leave merge.onto out"
        )
    if recipe.merge.onto == "original":
        found.append(
            "merge.onto: original is the same as dequantized here: with base.nf4: none there is only the 16-bit base, "
            "and the adapter is merged onto it"
        )
    names = [Path(name).name for name in trained_on if name]
    if four_bit := next((name for name in names if FOUR_BIT_NAME.search(name)), None):
        found.append(
            f"base.nf4: none, but the adapter was trained on {four_bit}, a 4-bit model by its name: write that as "
            "base.model, or in nf4 how it was quantized"
        )
    return found
