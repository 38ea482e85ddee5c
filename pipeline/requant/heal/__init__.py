"""Heal: distil group scales (and norms) of a GPTQ checkpoint towards its 16-bit model.

    stage       heal(...): train, choose the best step, write   <- start here
    plan        mode, memory and time from the structure of a model
    student     the GPTQ checkpoint as a trainable model
    teacher     the 16-bit model: beside the student, or run before it
    kl_loss     KL divergence to the teacher, a chunk of positions at a time
    trainer     steps, learning rate, held-out loss
    blockwise   one block at a time, for models that do not fit whole

May import: errors, runtime, numerics, checkpoint, formats, data, modeling; requant_eval.scoring.
"""

from requant.heal.stage import heal

__all__ = ["heal"]
