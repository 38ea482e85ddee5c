"""The command convert: a quantized checkpoint in another format. Heavy imports are inside."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from requant.cli import run_paths
from requant.cli.wrapping import say
from requant.errors import RecipeError

if TYPE_CHECKING:
    from requant.deploy.conversion import Conversion

TARGETS = ("compressed-tensors", "gptq")  # as `formats.registry.FORMATS`, which would load torch


def convert(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A quantized checkpoint, or a run: of it healed/, else gptq/.")
    ],
    to: Annotated[str, typer.Option(metavar="FORMAT", help=f"The format to write: {', '.join(TARGETS)}.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="New directory.")],
    trust_remote_code: Annotated[bool, typer.Option(help="Build the checkpoint's own model code to plan it.")] = False,
) -> None:
    """Write a quantized checkpoint in another format.

    Codes, scales and zero points stay as they are, or it is refused; the result is read back and compared.
    """
    if to not in TARGETS:
        raise RecipeError(f"--to {to}: expected one of {', '.join(TARGETS)}")
    from requant.cli.console import ConsoleWatcher
    from requant.cli.foreign_output import quiet

    source, which = run_paths.checkpoint_in(checkpoint)
    if which:
        say(which, file=sys.stderr)
    with ConsoleWatcher() as watcher:
        watcher.stage("convert", done=False)
        watcher.doing("names, shapes and configs")
        with quiet():
            from requant.deploy import conversion

            done = conversion.convert(source, out, to, trust_remote_code=trust_remote_code, progress=watcher.progress)
    _print(done, out)


def _print(done: Conversion, out: Path) -> None:
    """What was written, and what was left out."""
    before, after = done.nbytes
    for name, why in done.dropped.items():
        say(f"left out   {name}: {why}")
    say(f"converted  {done.linears} linears, each decodes to exactly what its source does")
    say(f"size       {after / 1e6:.1f} MB of tensors, {before / 1e6:.1f} MB before")
    say(f"done: {out}")
