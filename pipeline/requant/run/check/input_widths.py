"""Widths of a model's linears, from its config.json: what a group size must divide."""

from __future__ import annotations

import logging
from pathlib import Path

from requant.errors import InputError
from requant.modeling import skeleton
from requant.modeling.blocks import block_linears, block_list
from requant.quantize.plan import quantizable

log = logging.getLogger(__name__)


def input_widths(directory: Path) -> set[int]:
    """Numbers of inputs of the linears that are quantized; empty if transformers cannot build the model."""
    try:
        model = skeleton.open_model(directory)
        linears = quantizable(block_linears(block_list(model)[1]))
    except (InputError, ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError) as error:
        log.debug("widths are not known: %s", error)
        return set()
    return {m.in_features for m in linears.values()}
