"""Deploy: verify the written checkpoint, load it in real engines, upload it.

    stage                              verify(checkpoint, ...): all checks of a written checkpoint   <- start here
    conversion, conversion_plan        convert(checkpoint, out, to): the same codes in another layout
    end_codes                          codes of token embeddings and head for a format
    gguf_export                        export(checkpoint, out): the same codes as a GGUF file
    gguf_verification                  verify_gguf(file): a GGUF file read back, against its source
    gguf_package, gguf_metadata        the package gguf; name, sizes, tokenizer and template in the file
    gguf_families, gguf_tokenizer      which models that is written of; tokens and the rule that cuts text
    verification                       the result: findings, sizes, scores; saved beside a run
    check_headers                      configs and headers against the format and the model
    check_tensors                      values: scales, zero points, codes, NaN
    own_scores                         scores and tokens by our own decoding in fp32
    engine_targets                     the table of engines: kernels and what they refuse
    engine_classes                     the table of engines' model classes
    engine_support                     which engines load which settings, and why not
    plan_traits                        properties of a plan that some engine cannot load
    tensor_parallel                    how servers split a linear over GPUs
    engine_processes                   start a real engine and compare its scores
    task_server                        a checkpoint in vLLM that answers the requests of tasks
    engine_vllm, engine_transformers, engine_llamacpp, engine_mlx
                                       the programs that run inside them
    scored_sample                      the text that engines are compared on
    hub_upload                         upload to the hub

May import: errors, runtime, numerics, checkpoint, formats, modeling, quantize, evaluate;
requant_eval.scoring, .metrics.
"""

from requant.deploy.hub_upload import push
from requant.deploy.stage import verify

__all__ = ["push", "verify"]
