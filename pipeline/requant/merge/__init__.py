"""Merge: fold the adapter into the base, in fp32, with one rounding.

    base_weights           the base's weights, decoded: bitsandbytes 4-bit, 16-bit, or 16-bit rounded to NF4
    packed_parts           quant_state, scales and tables of a 4-bit weight
    simulated_weight       a 16-bit weight as 4-bit training held it
    base_checkpoint        the base's files as a 16-bit checkpoint: FORMATS, those that are decoded when read
    mxfp4_base, fp8_base   one file a format: which tensors are a weight, and how it is read
    encoded_weight         what a format tells of one weight
    plan                   what becomes of every tensor, from headers only
    changes                what all adapters change, by the checkpoint's names; embeddings that are no longer tied
    refusals               what is refused before any work: foreign tensors, adapters that do not add up
    stored_dtype           the dtype of the result: one in which the model runs
    stop_tokens            those of the fine-tune that the base's configs lack
    model_layout           what the plan must know about the model: names, ties, Conv1D, stacked experts
    stage                  merge(plan, out, dtype=...): write the checkpoint   <- start here
    selftest               random rows of the written checkpoint, recomputed in fp64
    adapter_match          do names, shapes, vocabulary say that adapter and base belong together
    adapter_completeness   modules that the settings name and the adapter's file lacks
    config_agreement       whether config.json describes the base's weights
    deltas                 the adapter's delta to one weight
    no_change              adapters that change nothing: untrained ones, deltas that cancel each other out

May import: errors, numerics, runtime, checkpoint, modeling, adapters. Knows no recipe.
"""

from requant.merge.plan import plan
from requant.merge.stage import merge

__all__ = ["merge", "plan"]
