"""Commands about finished checkpoints: verify, push. Heavy imports are inside the functions."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from requant.cli import run_paths
from requant.cli.outputs import require_output, write_output
from requant.cli.wrapping import say
from requant.errors import InputError, RecipeError
from requant.runtime.library_imports import importing_models
from requant_eval import regular_files

if TYPE_CHECKING:
    from requant.deploy.engine_processes import Engine
    from requant.deploy.verification import Verification


def verify(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A GPTQ checkpoint, or a run: of it healed/, else gptq/.")
    ],
    with_: Annotated[
        list[str],
        typer.Option("--with", metavar="ENGINE", help="Load it there: transformers, vllm, llamacpp, mlx; repeatable."),
    ] = [],  # noqa: B006
    against: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="The model that was quantized: every weight is compared with it."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to score; default: a paragraph of our own.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="The engines' dtype: float16, bfloat16 or float32; default: as it is served.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON there too.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run the checkpoint's own model code.")] = False,
) -> None:
    """Verify a GPTQ checkpoint, or that of a run.

    Names, shapes, values, a few tokens, the serving engines.
    """
    names = _engines(with_)
    require_output(out)
    if dtype not in (None, "float16", "bfloat16", "float32"):
        raise RecipeError(f"--dtype {dtype}: expected float16, bfloat16 or float32")
    sample = None if text is None else _read(text)
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", device):
        raise RecipeError(f"--device {device}: expected cpu, cuda or cuda:N")
    if run_paths.names_gguf(checkpoint):
        done = _verified_gguf(checkpoint, against, names, text=sample, trust_remote_code=trust_remote_code)
    else:
        done = _verified(
            _checkpoint(checkpoint), source=run_paths.merged_in(against) if against else None, load_in=names,
            engine_dtype=dtype, device=device, trust_remote_code=trust_remote_code, text=sample,
        )  # fmt: skip
    if out is not None:
        write_output(out, json.dumps(done.facts(), indent=2, ensure_ascii=False) + "\n")
    if as_json:
        print(json.dumps(done.facts(), indent=1))
    else:
        _print(done, _what_text(done, text))
    if not done.ok:
        raise typer.Exit(1)


def _verified(checkpoint: Path, *, device: str, load_in: list[Engine], **options: Any) -> Verification:
    """The verification of a checkpoint; of engines, kept in its run: all other checks are in the run's own result."""
    if "llamacpp" in load_in:
        raise RecipeError("--with llamacpp: reads GGUF files: `requant convert CHECKPOINT --to gguf` makes one")
    from requant.cli.console import ConsoleWatcher
    from requant.cli.foreign_output import quiet

    with ConsoleWatcher() as watcher:
        watcher.stage("verify", done=False)
        with quiet():
            with importing_models():
                import torch

                from requant import deploy
                from requant.deploy.verification import save_verification

            where = torch.device(device)
            done = deploy.verify(checkpoint, device=where, load_in=load_in, doing=watcher.doing, **options)
            if load_in:
                save_verification(done)
    return done


def _verified_gguf(
    path: Path, against: Path | None, engines: list[Engine], *, text: str | None, trust_remote_code: bool
) -> Verification:
    """The verification of a GGUF file. against: the quantized checkpoint that it was made of, or its run."""
    others = [name for name in engines if name != "llamacpp"]
    if others:
        raise RecipeError(f"--with {others[0]}: does not read GGUF files; llamacpp does")
    if engines and against is None:
        raise RecipeError(
            "--with llamacpp: its scores are compared with those of the checkpoint that the file was made of: "
            "name it (--against)"
        )
    from requant.cli.console import ConsoleWatcher
    from requant.cli.foreign_output import quiet

    source = None if against is None else _checkpoint(against)
    with ConsoleWatcher() as watcher:
        watcher.stage("verify", done=False)
        with quiet():
            from requant.deploy.gguf_verification import gguf_file, verify_gguf
            from requant.deploy.verification import save_verification

            done = verify_gguf(
                gguf_file(path) or path, source=source, load_in=engines, text=text,
                trust_remote_code=trust_remote_code, doing=watcher.doing,
            )  # fmt: skip
            if engines:
                save_verification(done)
    return done


def _checkpoint(path: Path) -> Path:
    """The checkpoint that `path` names; which one of a run it is goes to stderr."""
    found, which = run_paths.checkpoint_in(path)
    if which:
        say(which, file=sys.stderr)
    return found


def _engines(names: list[str]) -> list[Engine]:
    from requant.deploy.engine_processes import ENGINES

    unknown = [n for n in names if n not in ENGINES]
    if unknown:
        raise RecipeError(f"--with {unknown[0]}: expected one of {', '.join(ENGINES)}")
    return [e for e in ENGINES if e in names]


def _read(file: Path) -> str:
    try:
        text = regular_files.read_bytes(file).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as text ({error})") from error
    if len(text.split()) < 8:
        raise InputError(f"{file}: {len(text.split())} words are too few to score: give it a paragraph")
    return text


def _what_text(done: Verification, given: Path | None) -> str:
    """The text that was scored, in words."""
    if given is not None:
        return f"of {given.name}"
    return (
        f"of {done.sample_set}, beginnings of its documents" if done.sample_set else "of a paragraph of requant's own"
    )


def _print(done: Verification, text: str) -> None:
    """One line a check; the findings last. text: what was scored."""
    if done.tensors:
        held = f"{done.tensors} tensors, {done.linears} packed linears"
        bits = f", {done.bits_per_weight:.2f} bits a weight" if done.bits_per_weight else ""
        say(f"structure  {held}{bits}")
    if done.disk_bytes and done.expected_bytes:
        extra = done.disk_bytes / done.expected_bytes - 1
        say(f"size       {done.disk_bytes / 1e6:.1f} MB on disk, {extra:+.3%} of what the config describes")
    if done.relative_error is not None:
        say(f"weights    at most {done.relative_error:.1%} from the source's, linear by linear")
    if done.largest_rounding is not None:
        off = f"at most {done.largest_rounding:.2g} steps off" if done.largest_rounding else "exactly"
        say(f"weights    each decodes to its source's, {off}")
    if done.negative_scales:
        say(f"scales     {done.negative_scales} are negative")
    if done.perplexity is not None:
        say(
            f"scores     perplexity {done.perplexity:.4f} on {done.sample_tokens} tokens {text} (fp32, our decoding)",
            indent=11,
        )
        say(f"generates  {done.text!r}")
    for row in done.engines:
        if row["error"] is None:
            what = f"{row['dtype']}, {', '.join(row['kernels'])}, loaded in {row['load_seconds']:.1f} s"
            say(f"{row['engine']:<10} perplexity {row['perplexity']:.4f} on the same text ({what})", indent=11)
    if done.carried:
        held = ", ".join(f"{root} ({count} tensors)" for root, count in done.carried.items())
        say(f"carried    in 16 bit for servers: {held}")
    for line in done.skipped:
        say(f"skipped    {line}")
    say("ok" if done.ok else done.message())


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A checkpoint, or a run: of it healed/, else gptq/.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the hub.")],
    yes: Annotated[bool, typer.Option("--yes", help="Send it; without this only list what would be sent.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Make the repository public; default: private.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Add a commit to a repository that has files.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Build the checkpoint's own model code to check it.")] = False,
) -> None:
    """Send a checkpoint and its model card to a Hugging Face hub.

    The token is read from HF_TOKEN. A dry run unless --yes.
    """
    from requant.cli.console import ConsoleWatcher
    from requant.cli.foreign_output import quiet

    folder = _checkpoint(run)
    with quiet():
        from requant.deploy import hub_upload

        upload = hub_upload.plan_upload(folder, repo, trust_remote_code=trust_remote_code)
    for name, size in upload.files:
        say(f"{size:>14,}  {name}")
    kind = "public" if public else "private"
    say(f"{upload.total:>14,}  bytes in {len(upload.files)} files to {repo} ({kind}), {upload.format}")
    if not yes:
        say("dry run: nothing was sent; --yes sends it")
        return
    with ConsoleWatcher() as watcher:
        watcher.stage("push", done=False)
        watcher.doing(f"{upload.total / 1e9:.2f} GB to {repo}")
        with quiet():
            address = hub_upload.push(upload, private=not public, update=update)
    say(f"sent: {address}")
