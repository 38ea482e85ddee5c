"""Quantize: GPTQ block by block on calibration text, written as it goes.

    plan                what the quantized checkpoint will hold, from headers only
    stage               quantize(source, out, windows, settings, ...)   <- start here
    block_quantizer     one block: calibrate, solve, replace, commit
    calibration_plan    which batches wait where, run unquantized too, are held out
    memory              bytes of batches that pause inside a block, and whether they fit
    solve               the linears that share an input: order, correction, rows over ranks
    error_correction    make up for the error of earlier layers (QEP)
    out_of_memory       restart a block with less memory
    module_results      loss and retention of every linear
    background_writer   finished blocks written by threads
    gptq_files          config.json, quantize_config.json and the tokenizer
    warmup              libraries loaded and kernels compiled beside other work
    gptqmodel_engine    the same stage by the library gptqmodel

May import: errors, runtime, numerics, checkpoint, formats, modeling. Knows no recipe.
"""

from requant.quantize.plan import Settings
from requant.quantize.stage import quantize

__all__ = ["Settings", "quantize"]
