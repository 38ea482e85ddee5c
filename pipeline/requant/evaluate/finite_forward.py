"""One forward of a checkpoint in the dtype that it ships in, to find NaN and infinity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from requant.checkpoint.reader import Checkpoint
from requant.modeling import skeleton
from requant.modeling.block_walk import Walk
from requant.numerics.finite import all_finite


@torch.no_grad()
def first_overflow(
    path: Path,
    windows: Tensor,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> str | None:
    """The block after which, or the head in which, a forward in `dtype` is not finite; None: all of it is.

    windows: token ids, int64 [n, length]. One block is in memory at a time.
    """
    model: Any = skeleton.open_model(path, trust_remote_code=trust_remote_code)
    walk = Walk(Checkpoint(path), model, device=device, dtype=dtype)
    (item,) = walk.embed(windows, len(windows))
    for index in range(len(walk)):
        walk.load(index)
        item.hidden = walk.run(index, item)
        walk.release(walk.blocks[index])
        if progress:
            progress(index + 1, len(walk))
        if not all_finite(item.hidden):
            return f"{walk.prefix}.{index}"
    walk.fill_rest()
    with walk.instead(lambda *_, **__: item.hidden):
        logits = model(input_ids=windows.to(device), use_cache=False).logits
    return None if all_finite(logits) else "the output embedding"
