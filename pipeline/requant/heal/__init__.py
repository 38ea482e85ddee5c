"""Stage: distil group scales (and norms) of a GPTQ checkpoint towards its 16-bit model.

    stage       heal(job, out): train, choose the best step, write   <- start here
    job         HealJob: the checkpoint, its teacher, the text, the settings and the plan
    settings    HealSettings: steps, batch, learning rate, when to validate
    plan        HealPlan: mode, memory and time from the structure of a model
    student     the GPTQ checkpoint as a trainable model
    trainable   the trainable values of a student as vectors of offsets
    teacher     the 16-bit model: resident beside the student, or its stored hidden states
    kl_loss     KL divergence from the teacher, a chunk of positions at a time
    trainer     optimizer steps, held-out loss, the best step
    blockwise   one block at a time, for models that do not fit whole

May import: errors, runtime, numerics, checkpoint, formats, data, modeling; requant_eval.scoring.
"""

from requant.heal.job import HealJob
from requant.heal.stage import heal

__all__ = ["HealJob", "heal"]
