"""Formats: one file a quantized layout on disk, one entry of FORMATS.

    registry           FORMATS: name -> what the stages call   <- start here
    quantized_format   the record of one layout, and the protocols of its reader and checks
    gptq               GPTQ v1 and v2: pack, unpack, config, rules
    gptq_reader        a GPTQ checkpoint by the names of a 16-bit one
    gptq_checks        config, headers and values of a GPTQ checkpoint, for `verify`

May import: errors, runtime, checkpoint.
"""
