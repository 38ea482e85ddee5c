"""Formats: one file a quantized layout on disk.

    gptq   GPTQ v1 and v2: pack, unpack, config, reading back   <- start here

May import: errors, checkpoint.
"""
