"""Whether the calibration text is large enough for the widths of the linears."""

from __future__ import annotations

from collections.abc import Mapping

from requant.recipe.text_sections import Calibration

TOKENS_PER_INPUT = 16  # from here on `damp: auto` trusts the Hessian


def too_few_tokens(calibration: Calibration, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """A warning when a linear has more inputs than there are calibration tokens.

    Its Hessian then has not full rank: in some directions nothing was seen, and GPTQ rounds there as damping says.
    shapes: quantized module -> (outputs, inputs).
    """
    tokens = calibration.samples * calibration.length
    wide = {name: inputs for name, (_, inputs) in shapes.items() if inputs > tokens}
    if not wide:
        return []
    widest = max(wide.values())
    samples = -(-TOKENS_PER_INPUT * widest // calibration.length)
    return [
        f"calibration: {calibration.samples} x {calibration.length} = {tokens:,} tokens, and {len(wide)} of "
        f"{len(shapes)} linears have more inputs (up to {widest:,}): their Hessians have not full rank. Use "
        f"{TOKENS_PER_INPUT} tokens for each input: samples: {samples} with length: {calibration.length} "
        f"({samples * calibration.length:,} tokens)"
    ]
