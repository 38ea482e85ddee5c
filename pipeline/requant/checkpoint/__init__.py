"""Checkpoint: bytes on disk. safetensors in and out, small files, the run directory.

    reader               a directory of safetensors: headers first, tensors when asked for   <- start here
    pieces               pieces of stacked tensors, each read under a name of its own
    safetensors_header   the table of one file, as strict as the format's library
    journal              results of the blocks that a killed run has whole on disk
    writer               sharded safetensors, written in order and resumable
    open_files           files filled in place, of which few are open at a time
    atomic_write         files that are whole or absent
    model_files          config.json, tokenizer and other small files of a model
    run_directory        results and the log of a run
    artifact             a directory that is whole, as its manifest says, or absent
    digests              sha256 of files, computed once while a file stays what it was
    device_loader        tensors of a checkpoint straight to a GPU

May import: errors, runtime; requant_eval.whole_files.
"""

from requant.checkpoint.reader import Checkpoint
from requant.checkpoint.writer import CheckpointWriter

__all__ = ["Checkpoint", "CheckpointWriter"]
