"""Windows longer than the positions that a model has: refused where it has a table of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from requant.errors import InputError
from requant.modeling import skeleton
from requant.run.heal_recipe import Healing
from requant.run.prepared import Texts

_OFFSETS = (0, 2)  # OPT's table begins with two rows that no position uses


def has_table(model: Any, positions: int) -> bool:
    """Whether a position beyond the last has no entry: learned positions, masks and biases of one size."""
    inputs = model.get_input_embeddings()
    tables = (m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m is not inputs)
    if any(rows - positions in _OFFSETS for rows in tables):
        return True
    if any(b.ndim >= 2 and positions in b.shape for b in model.buffers()):
        return True
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) is None  # MPT's biases


def fitted(model: Any, texts: Texts, healing: Healing | None, warnings: list[str]) -> Texts:
    """The texts with rows that the model has positions for.

    Raises InputError for longer windows where it has a table of positions, else adds a warning.
    """
    positions = skeleton.positions(model.config)
    if positions is None:
        return texts
    lengths = {"calibration.length": texts.calibration.shape[1]}
    lengths["evaluate.window"] = max((len(w.ids) for s in texts.sets for w in s.windows), default=0)
    if healing is not None:
        lengths["heal.length"] = healing.text.length
    longer = {key: length for key, length in lengths.items() if length > positions}
    table = has_table(model, positions)
    what = f"{model.config.model_type} has {positions} positions"
    if table and longer:
        asked = ", ".join(f"{key} {length}" for key, length in longer.items())
        raise InputError(f"{asked}: {what}: set {' and '.join(longer)} to at most {positions}")
    scaled = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if longer and scaled.get("rope_type", "default") == "default":
        warnings += [f"{key} is {length}: {what}, beyond them it was not trained" for key, length in longer.items()]
    if not table:
        return texts
    return replace(texts, probes={n: tuple(row.cut(positions) for row in rows) for n, rows in texts.probes.items()})
