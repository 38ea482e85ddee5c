"""The relative error of hidden states, token by token."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of |output - target|^2 / |target|^2, [n] in fp32, or in fp64 where the target is.

    output, target: hidden states [n, length, width].
    Every token has the same weight, as in the next block, whose norm divides by the length of the hidden state. In a
    plain sum of squares the few tokens with outlying activations would outweigh all others.
    """
    dtype = torch.promote_types(target.dtype, torch.float32)
    target = target.to(dtype)
    error = (output.to(dtype) - target).square().sum(-1)
    return (error / target.square().sum(-1).clamp_min(1e-12)).mean(-1)
