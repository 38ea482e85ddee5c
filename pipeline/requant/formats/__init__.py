"""Formats: one file a quantized layout on disk, one entry of FORMATS.

    registry           FORMATS: name -> what the stages call   <- start here
    quantized_format   the record of one layout
    gptq               GPTQ v1 and v2: pack, unpack, config, rules
    gptq_reader        a GPTQ checkpoint by the names of a 16-bit one

May import: errors, checkpoint.
"""
