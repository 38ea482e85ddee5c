"""Stage: distil scales, codes or norms of a GPTQ checkpoint towards its 16-bit model.

    stage            heal(job, out): train, choose the best step, write   <- start here
    job              HealJob: the checkpoint, its teacher, the text, the settings and the plan
    settings         HealSettings: steps, batch, learning rates, when to validate
    plan             HealPlan: mode, memory and time
    model_size       ModelSize: what memory and time depend on, from the structure of a model
    student          the GPTQ checkpoint as a trainable model
    codes            codes of one linear in memory, its product, gradients through the rounding
    latents          the trainable codes: latents that are rounded
    trainable        the other trainable values of a student as vectors of offsets
    teacher          the 16-bit model: resident beside the student, or its stored hidden states
    kl_loss          KL divergence from the teacher, a chunk of positions at a time
    end_to_end       the loss of a whole student
    captured_steps   steps of small models as CUDA graphs
    curve            looks at held-out windows by source, which step is best, whether a file gained
    curve_facts      what held-out text says, for the report
    changes          how far scales moved, how many codes changed
    trainer          optimizer steps, the best step, states to resume from
    blockwise        one block at a time, for models that do not fit whole
    block_streams    hidden states between blocks: the merged model's, the healed and the unhealed student's

May import: errors, runtime, numerics, checkpoint, formats, data, modeling; requant_eval.scoring.
"""

from requant.heal.job import HealJob
from requant.heal.stage import heal

__all__ = ["HealJob", "heal"]
