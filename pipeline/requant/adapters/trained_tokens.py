"""Trained tokens: rows of an embedding replaced (PEFT's trainable tokens)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from requant.adapters import fp64
from requant.adapters.fold import Fold, read
from requant.adapters.module_tensors import ModuleTensors, TensorKey
from requant.checkpoint.reader import TensorInfo

ROWS = "trainable_tokens_delta"
TENSORS = {ROWS: TensorKey(wrapper="token_adapter")}
SETTINGS = frozenset({"token_indices", "init_weights"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedTokens(Fold):
    """Trained rows [tokens, width] of an embedding, or of the head tied to it.

    They replace the base's rows `indices`.
    """

    indices: tuple[int, ...]
    rows: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return (-1, self.rows.shape[1])

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return (self.rows,)

    def why_it_does_not_fit(self, shape: tuple[int, ...]) -> str | None:
        last = max(self.indices, default=0)
        return f"token {last} is trained, the embedding has {shape[0]} rows" if last >= shape[0] else None

    def apply(self, weight: Tensor) -> bool:
        weight[list(self.indices)] = read(self.rows)
        return True

    def bound(self, largest: float) -> float:
        return max(largest, float(read(self.rows).abs().max()))

    def exact_rows(self, rows: Tensor, index: list[int]) -> fp64.Exact:
        new = fp64.read64(self.rows)
        chosen = zip(index, rows, strict=True)
        out = torch.stack([new[self.indices.index(i)] if i in self.indices else row for i, row in chosen])
        return fp64.Exact(out, out.abs() * fp64.EPS)


def build(tensors: ModuleTensors, setting: str = "token_indices") -> Fold:
    """The trained rows of one embedding.

    Raises InputError when the config does not say which rows they are.
    setting: the key of adapter_config.json with the token ids: a list, or a dict from the module's name to a list.
    """
    module, config, file = tensors.module, tensors.config, tensors.file.name
    if ROWS not in tensors.found:
        raise tensors.error(f"{module} has {', '.join(sorted(tensors.found))}, expected {ROWS} alone")
    if len(tensors.found) > 1:
        raise tensors.error(f"{module} has trained tokens and {', '.join(sorted(tensors.found))}")
    indices, rows = config.get(setting), tensors.found[ROWS]
    if isinstance(indices, Mapping):
        indices = next((v for name, v in indices.items() if module == name or module.endswith(f".{name}")), None)
    if not isinstance(indices, list) or not all(isinstance(i, int) and i >= 0 for i in indices):
        raise config.error(f"{setting} has no list of token ids for {module}, whose trained rows are in {file}")
    if len(rows.shape) != 2 or len(indices) != rows.shape[0] or len(set(indices)) != len(indices):
        raise config.error(f"{setting} lists {len(indices)} tokens for {module}, {file} has rows {rows.shape}")
    return TrainedTokens(module=module, indices=tuple(indices), rows=rows)
