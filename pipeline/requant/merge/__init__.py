"""Merge: fold the adapter into the base, in fp32, with one rounding.

    base_weights        what the base holds: bitsandbytes 4-bit, 16-bit, or 16-bit seen through NF4
    plan                which adapter tensor goes where, from headers only
    stage               merge(plan, out, dtype=...): write the checkpoint   <- start here
    selftest            reopen it and recompute random rows in fp64
    selftest_formulas   the formulas of every adapter kind a second time, in fp64
    adapter_match       do names, shapes, vocabulary say that adapter and base belong together
    deltas              what the adapter adds to one weight

May import: errors, numerics, checkpoint, modeling, adapters. Knows no recipe.
"""

from requant.merge.plan import plan
from requant.merge.stage import merge

__all__ = ["merge", "plan"]
