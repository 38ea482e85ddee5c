"""Evaluate: every variant as a model, and its scores on every set.

    stage             evaluate(scores, sources, ...)   <- start here
    variants          base, adapter, merged, rtn, gptq, healed, original as models
    variant_weights   their weights, each made when it is read
    streamed          a variant block by block, for models that do not fit
    memory            what a variant needs, and so whether it is streamed
    over_ranks        the same work shared by several ranks
    peft_runtime      the adapter applied by PEFT, as in training
    adapter_probe     does the adapter lower the loss on its own text

May import: errors, runtime, numerics, checkpoint, formats, data, modeling, adapters, merge; requant_eval.scoring.
"""

from requant.evaluate.stage import evaluate

__all__ = ["evaluate"]
