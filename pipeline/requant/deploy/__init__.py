"""Deploy: prove the written checkpoint, ask real engines, push it.

    stage                              verify(checkpoint, ...): all checks of a written checkpoint   <- start here
    check_headers                      configs and headers against the format and the model
    check_tensors                      values: scales, zero points, codes, NaN
    engine_support                     which engines load which settings, and why not
    tensor_parallel                    how engines split a linear over GPUs
    engine_processes                   start a real engine and compare its scores
    engine_vllm, engine_transformers   the programs that run inside them
    scored_sample                      the text that engines are compared on
    hub_upload                         push to the hub

May import: errors, runtime, numerics, checkpoint, formats, modeling, quantize, evaluate; requant_eval.scoring, .metrics.
"""

from requant.deploy.hub_upload import push
from requant.deploy.stage import verify

__all__ = ["push", "verify"]
