"""A 16-bit weight as 4-bit training held it: rounded in the pieces that it quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def rounded(
    name: str,
    read: Callable[[str], Tensor],
    round_trip: Callable[[Tensor], Tensor],
    *,
    parts: Sequence[Sequence[int]] = (),
    whole: tuple[str, ...] = (),
) -> Tensor:
    """The values of the stored weight `name` after quantizing and decoding, fp32 [out, in].

    read: a stored weight, [out, in], in the dtype that training loaded it in. round_trip: quantizes and decodes what is
    one weight in training: blocks of scales run through all of it. parts: rows that are weights of their own there.
    whole: names of the stored weights, this one among them, that are one there.
    """
    if whole:
        every = [read(part) for part in whole]
        first = sum(len(part) for part in every[: whole.index(name)])
        return round_trip(torch.cat(every))[first : first + len(every[whole.index(name)])]
    stored = read(name)
    if not parts:
        return round_trip(stored)
    found = torch.empty(stored.shape, device=stored.device)
    for rows in map(list, parts):
        found[rows] = round_trip(stored[rows])
    return found
