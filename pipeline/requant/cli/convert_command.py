"""The command convert: a quantized checkpoint in another format. Heavy imports are inside."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from requant.cli import run_paths
from requant.cli.wrapping import say
from requant.errors import InputError, RecipeError

if TYPE_CHECKING:
    from requant.deploy.conversion import Conversion
    from requant.deploy.gguf_export import GgufExport

TARGETS = ("auto-round", "compressed-tensors", "gguf", "gptq", "mlx")
"""`formats.registry.FORMATS`, which would load torch, and GGUF."""


def convert(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A quantized checkpoint, or a run: of it healed/, else gptq/.")
    ],
    to: Annotated[str, typer.Option(metavar="FORMAT", help=f"The format to write: {', '.join(TARGETS)}.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="New directory.")],
    embeddings: Annotated[
        int | None, typer.Option(metavar="BITS", help="Round the token embeddings to 8 or 4 bits.", show_default=False)
    ] = None,
    head: Annotated[int | None, typer.Option(metavar="BITS", help="The same of the head.", show_default=False)] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Build the checkpoint's own model code to plan it.")] = False,
) -> None:
    """Write a quantized checkpoint in another format.

    Codes, scales and zero points stay as they are, or it is refused; the result is read back and compared. gguf, for
    llama.cpp: OUT holds one file. Token embeddings and head stay in 16 bit unless bits are given.
    """
    for option, bits in (("--embeddings", embeddings), ("--head", head)):
        if bits not in (None, 4, 8):
            raise RecipeError(f"{option} {bits}: expected 4 or 8")
    if to not in TARGETS:
        raise RecipeError(f"--to {to}: expected one of {', '.join(TARGETS)}")
    if run_paths.names_gguf(checkpoint):
        raise InputError(f"{checkpoint}: GGUF is written and not read back: convert the checkpoint that it was made of")
    from requant.cli.console import ConsoleWatcher
    from requant.cli.foreign_output import quiet

    source, which = run_paths.checkpoint_in(checkpoint)
    if which:
        say(which, file=sys.stderr)
    with ConsoleWatcher() as watcher:
        watcher.stage("convert", done=False)
        watcher.doing("names, shapes and configs")
        with quiet():
            from requant.deploy import conversion, gguf_export
            from requant.deploy.conversion_plan import AS_THEY_ARE

            ends = replace(AS_THEY_ARE, embeddings=embeddings, head=head)
            function = gguf_export.export if to == "gguf" else partial(conversion.convert, to=to)
            done = function(source, out, ends=ends, trust_remote_code=trust_remote_code, progress=watcher.progress)
    _print(done, out)


def _print(done: Conversion | GgufExport, out: Path) -> None:
    """What was written, what was left out, and how exact it is."""
    for name, why in done.dropped.items():
        say(f"left out   {name}: {why}")
    exact = not done.largest_rounding
    how = "exactly what its source does" if exact else f"its source's, at most {done.largest_rounding:.2g} steps off"
    say(f"converted  {done.linears} linears, each decodes to {how}")
    for name, bits in done.ends.items():
        say(f"quantized  {name}: {bits} bits, each value to its nearest")
    before, after = done.nbytes
    say(f"size       {after / 1e6:.1f} MB of tensors, {before / 1e6:.1f} MB before")
    say(f"done: {out}")
