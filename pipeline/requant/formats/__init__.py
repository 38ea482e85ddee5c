"""Formats: one file a quantized layout on disk, one entry of FORMATS.

    registry           FORMATS: name -> what the stages call   <- start here
    quantized_format   the record of one layout, and the protocols of its reader and checks
    gptq               GPTQ v1 and v2: pack, unpack, config, rules
    gptq_reader        a GPTQ checkpoint by the names of a 16-bit one
    gptq_checks        config, headers and values of a GPTQ checkpoint, for `verify`
    compressed_tensors, compressed_tensors_reader, compressed_tensors_checks
                       the same of compressed-tensors' packed integers
    auto_round, auto_round_reader, auto_round_checks
                       GPTQ's packing under AutoRound's config
    awq, awq_reader, awq_checks
                       AWQ as AutoAWQ packs it, read only
    mlx, mlx_reader, mlx_checks
                       MLX's affine quantization
    gguf_blocks        blocks of 32 weights as GGUF stores them (its file is written by deploy)
    bit_stream         codes in 32-bit words, as both hold them
    stored_reader      what the readers share
    stored_checks      what the checks share

May import: errors, runtime, checkpoint.
"""
