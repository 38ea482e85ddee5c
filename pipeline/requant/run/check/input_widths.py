"""Of a config.json: widths, which a group must divide, and positions, which windows fit."""

from __future__ import annotations

import logging
from pathlib import Path

from requant.errors import InputError
from requant.modeling import skeleton
from requant.modeling.blocks import block_linears, block_list
from requant.quantize.plan import quantizable

log = logging.getLogger(__name__)
UNREADABLE = (InputError, ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError)
"""What a config raises that transformers does not know or cannot use."""


def input_widths(directory: Path) -> set[int]:
    """Numbers of inputs of the linears that are quantized; empty if transformers cannot build the model."""
    try:
        model = skeleton.open_model(directory)
        linears = quantizable(block_linears(block_list(model)[1]))
    except UNREADABLE as error:
        log.debug("widths are not known: %s", error)
        return set()
    return {m.in_features for m in linears.values()}


def known_positions(directory: Path) -> int | None:
    """Number of positions that the config declares; None if it declares none or cannot be read."""
    try:
        return skeleton.positions(skeleton.load_config(directory))
    except UNREADABLE as error:
        log.debug("positions are not known: %s", error)
        return None
