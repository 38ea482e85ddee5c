"""Numerics: tensors in, tensors out. NF4, GPTQ and what they need; no files, no models.

    nf4                NF4 decoder and encoder (bitsandbytes 4-bit), double quantization   <- start here for the base
    mxfp4, fp8         decoders of what bases are stored in besides: blocks of 4-bit floats, 8-bit floats with scales
    gptq               the GPTQ solver: factor, column loop, coordinate descent   <- start here for quantizing
    solution           what the solver returns: codes, scales, errors, losses
    grid               integer grids and the search for their scales
    hessian            sums of x x^T over calibration tokens, and the drift of inputs
    token_errors       the relative error of hidden states, token by token
    cholesky           triangular solves and a Cholesky factorization shared by several ranks
    triton_kernels     the inner loops as Triton kernels, and when they may run
    code_kernels       packed codes to weights and gradients to codes as Triton kernels
    kl_kernels         a KL divergence of logits and its gradient as a Triton kernel
    blocks             a dimension as slices of one size
    dtypes             dtypes of unquantized weights by name
    finite             the largest magnitude, and whether all values are finite
    matmul_precision   fp32 products in full precision or TF32, for a block of code
    delta_retention    how much of an adapter's delta is left after rounding

May import: errors, runtime (device profiles only).
"""
