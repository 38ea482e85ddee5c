"""Rotary tables as a model class computes them, whatever other packages registered.

transformers computes the tables of a model again when it loads one. There it prefers a registered function to the
class's own. gptqmodel registers one named `default` when it is imported.

PEFT imports gptqmodel. A class with another order of frequencies, as ERNIE 4.5 VL, is then rotated wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# What classes define themselves. Source: transformers 5.17 to 5.23, `PreTrainedModel._init_weights`.
OF_CLASSES = ("default", "axial", "ntk_alpha")


@contextmanager
def of_model_classes() -> Iterator[None]:
    """A block in which `from_pretrained` computes rotary tables with the functions of model classes."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    registered = {name: ROPE_INIT_FUNCTIONS.pop(name) for name in OF_CLASSES if name in ROPE_INIT_FUNCTIONS}
    try:
        yield
    finally:
        ROPE_INIT_FUNCTIONS.update(registered)
