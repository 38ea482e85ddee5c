"""PEFT's types other than LoRA that a weight can absorb: their formulas, and how their tensors are read from the file.

loha     W + s * (A1 @ B1) * (A2 @ B2)      arXiv:2108.06098, elementwise product
lokr     W + s * kron(W1, W2)               arXiv:2212.10650
vera     W + diag(b) @ B @ diag(d) @ A      arXiv:2310.11454, A and B shared by all modules and cut to size
ia3      W * l                              arXiv:2205.05638, l scales inputs or outputs
oft      W @ R'                             arXiv:2306.07280, R block-diagonal, near orthogonal
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from requant.adapters.fold import Fold, Parts
from requant.adapters.ia3 import _ia3
from requant.adapters.loha import _loha
from requant.adapters.lokr import _lokr
from requant.adapters.oft import _oft
from requant.adapters.vera import _vera

NEEDS = {"LOHA": "hada_w1_a", "LOKR": "lokr_w", "VERA": "vera_lambda_b", "IA3": "ia3_l", "OFT": "oft_R"}
"""peft_type -> the tensor that every adapted module of that type has."""


def build(kind: str, config: Mapping[str, Any], module: str, found: Parts, shared: Parts, scaling: float) -> Fold:
    """One module's fold of a peft_type in NEEDS; raises InputError when tensors are missing or do not fit together.

    shared: the tensors of no module, VeRA's projections. scaling: alpha / r where the type has one.
    """
    if kind == "LOHA":
        return _loha(module, found, scaling)
    if kind == "LOKR":
        return _lokr(module, found, scaling)
    if kind == "VERA":
        return _vera(module, found, shared)
    if kind == "IA3":
        return _ia3(module, found)
    return _oft(config, module, found)
