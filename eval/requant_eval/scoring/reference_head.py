"""The reference's LM head in a file of its own, for all evaluation sets of one model.

An 8B's has 1 GB: written, summed and synced once a model, not once a set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from requant_eval.errors import EvaluationError
from requant_eval.scoring import summed_file
from requant_eval.scoring.lm_head import Head

FORMAT = "requant-reference-head-1"
SAMPLED = 1024  # rows by which a file is told to be of another head


def tensors_of(head: Head) -> dict[str, Tensor]:
    """Weight and bias by the name that they have in a file."""
    return {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})


def numbers_of(head: Head) -> dict[str, str]:
    """Scale and softcap as metadata of a file."""
    return {"scale": repr(head.scale)} | ({} if head.softcap is None else {"softcap": repr(head.softcap)})


def head_in(file: Any, meta: dict[str, str]) -> Head:
    """The head whose tensors and numbers an open file has, on the host."""
    bias = file.get_tensor("bias") if "bias" in file.keys() else None  # noqa: SIM118
    softcap = float(meta["softcap"]) if "softcap" in meta else None
    return Head(file.get_tensor("weight"), bias, float(meta["scale"]), softcap)


def keep(path: Path, head: Head) -> str | None:
    """Write a head unless its file is there already; returns the checksum in the file.

    None where the file has another head, which others may refer to: it is left as it is.
    """
    if path.exists():
        try:
            file = summed_file.open_file(path)
            meta = summed_file.metadata(path, file, FORMAT)
            return meta["checksum"] if _is_of(file, meta, head) else None
        except (EvaluationError, KeyError):
            pass  # unreadable: nothing refers to it
    with summed_file.SummedFile(path, {"format": FORMAT, **numbers_of(head)}, tensors_of(head)) as writer:
        return writer.checksum


def _is_of(file: Any, meta: dict[str, str], head: Head) -> bool:
    """Whether an open file says what a head has: numbers, names, shapes, dtypes and a sample of its rows."""
    wanted = tensors_of(head)
    if {k: v for k, v in meta.items() if k not in ("format", "checksum")} != numbers_of(head):
        return False
    if set(file.keys()) != set(wanted):
        return False
    for name, tensor in wanted.items():
        part = file.get_slice(name)
        if part.get_shape() != list(tensor.shape) or part.get_dtype() != summed_file.DTYPES[tensor.dtype]:
            return False
        step = max(1, len(tensor) // SAMPLED)
        found = torch.cat([part[i : i + 1] for i in range(0, len(tensor), step)])
        if not torch.equal(found, tensor[::step].detach().cpu()):
            return False
    return True


def prove(path: Path) -> str:
    """Read a head's file whole: its bytes are those that were written. Returns its checksum.

    Raises:
        EvaluationError: not such a file, or a damaged one.
    """
    file = summed_file.open_file(path)
    meta = summed_file.metadata(path, file, FORMAT)
    summed_file.prove_sum(path, file, meta)
    return meta["checksum"]


def opened(path: Path, checksum: str) -> tuple[Any, dict[str, str]]:
    """(open file, metadata) of the head with this checksum.

    Raises:
        EvaluationError: no such file, or one of another head.
    """
    file = summed_file.open_file(path)
    meta = summed_file.metadata(path, file, FORMAT)
    if meta.get("checksum") != checksum:
        raise EvaluationError(f"{path}: has another head than the hidden states: score the reference again")
    return file, meta
