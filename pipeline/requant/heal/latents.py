"""Trainable codes: a latent in units of codes, of which the code is the rounded value.

A latent begins inside the cell of the code that the file has, where the 16-bit weight lies, or at the edge next to it:
rounding gives the file's codes. It never leaves the range of the codes, so that no code is stuck at an end of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from requant.heal.codes import Codes, integers
from requant.modeling import skeleton, stacked_experts

EDGE = 0.49  # of a cell, from its middle: a latent there has one rounding on every device


class OriginalWeights:
    """The weights of the 16-bit model by the names that they have in the student's model."""

    def __init__(self, path: Path, *, trust_remote_code: bool = False) -> None:
        model, self.tensors = stacked_experts.open_split(path, trust_remote_code=trust_remote_code)
        self.names = skeleton.tensor_names(model, self.tensors)
        self.transposed = {f"{name}.weight" for name in skeleton.conv1d_modules(model)}

    def read(self, parameter: str) -> Tensor | None:
        """A weight [out, in]; None where the model has none of that name."""
        if parameter not in self.names:
            return None
        weight = self.tensors.read(self.names[parameter])
        return weight.T if parameter in self.transposed else weight


def latent_of(codes: Codes, weight: Tensor | None) -> Tensor:
    """The latent that rounds to `codes` and is nearest to `weight`, fp32 [out, in] in the order of `Codes.packed`.

    weight: [out, in] in the file's order, on any device; None, or of another shape: the middle of every cell.
    """
    rows, groups = codes.scale.shape
    centred = codes.centred(torch.float32)
    latent = (centred + codes.zero[..., None]).view(rows, -1)
    if weight is None or tuple(weight.shape) != tuple(latent.shape):
        return latent
    wanted = weight.to(latent.device, torch.float32)
    wanted = wanted if codes.order is None else wanted[:, codes.order]
    residual = (wanted.reshape(rows, groups, -1) / codes.scale[..., None]).sub_(centred).view(rows, -1)
    return latent.add_(residual.nan_to_num_(0.0).clamp_(-EDGE, EDGE))


class TrainableCodes:
    """The codes of one linear, written over in place while their latent moves.

    offset: the latent, fp32 [out, in]; its learning rate is in codes. A snapshot is packed as `Codes.packed`.
    """

    unit_of_rate: Literal["value", "code"] = "code"

    def __init__(self, stem: str, codes: Codes, latent: Tensor) -> None:
        self.name, self.codes = f"{stem}.qweight", codes
        self.offset: Tensor = nn.Parameter(latent)
        self.offset.grad = torch.zeros_like(latent)
        self.first = codes.packed.clone()

    @torch.no_grad()
    def refresh(self) -> None:
        """Keep the latent in the range of the codes, and round it."""
        self.codes.round_from(self.offset, EDGE)

    def snapshot(self) -> Tensor:
        """A copy of the packed codes."""
        return self.codes.packed.clone()

    def start(self) -> Tensor:
        """The file's own packed codes."""
        return self.first

    def changed(self) -> int:
        """How many codes are others than the file's."""
        columns = self.codes.columns
        return int((integers(self.codes.packed, columns, None) != integers(self.first, columns, None)).sum())

    def adopt(self, snapshot: Tensor) -> None:
        """Use these packed codes; the latent stays where it is."""
        self.codes.packed.copy_(snapshot)

    def values(self) -> dict[str, Tensor]:
        """The codes in use in the file's order, uint8 [out, in] on the CPU."""
        return {self.name: self.codes.integers().cpu()}
