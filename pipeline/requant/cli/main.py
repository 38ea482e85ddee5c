"""The command line: commands of a recipe, printing, exit codes (`exit_codes`).

torch and transformers are imported inside the commands, so that help and recipe errors are immediate.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from requant import __version__
from requant.cli import (
    convert_command,
    deploy_commands,
    exit_codes,
    init_command,
    last_lines,
    outputs,
    report_commands,
    run_paths,
    sweep_command,
)
from requant.cli.report_commands import Junit
from requant.cli.wrapping import say
from requant.errors import RecipeError, RequantError, bounded
from requant.outgoing import masked_stream
from requant.runtime import signals
from requant.runtime.library_imports import importing, importing_models


class Commands(TyperGroup):
    """The commands. Ctrl-C, SIGTERM and SIGHUP end each with one line and an exit code of their own."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        with exit_codes.told():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with exit_codes.told():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands,
    help="QLoRA fine-tune in, deployable GPTQ checkpoint and quality-loss report out.",
    epilog=exit_codes.epilog(),
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file; or the directory of a run.")
]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe, e.g. quantize.bits=3."),
]


def main() -> None:
    """Entry point. Of several ranks the first runs the command, the others execute its calls.

    Whatever is printed, tracebacks too, is printed without secrets.
    """
    outputs.open_streams()
    signals.raise_on_termination()
    sys.stdout, sys.stderr = masked_stream(sys.stdout), masked_stream(sys.stderr)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a lost rank is told with frames of C++
        from requant.cli.foreign_output import quiet
        from requant.runtime.launch import run_on_all_ranks

        run_on_all_ranks(_command, quiet)
    else:
        _command()


def _command() -> None:
    """Run the command; requant's own errors become a message and an exit code."""
    try:
        app(standalone_mode=True)
    except RecipeError as error:
        _stop("\n".join(error.problems), error.exit_code)
    except RequantError as error:
        _stop(f"error: {error}", error.exit_code)
    except OSError as error:
        _stop(f"error: {bounded(outputs.message(error))}", 1)
    except KeyboardInterrupt as error:  # before a command has begun
        number = signals.number_of(error)
        _stop(signals.word(number), signals.exit_code(number))
    except SystemExit as end:
        unwritten = outputs.close_stdout()
        if unwritten is not None and not end.code:
            _stop(f"error: {outputs.message(unwritten)}", 1)
        raise


def _stop(message: str, code: int) -> NoReturn:
    """End the process with a message on stderr."""
    outputs.close_stdout()
    with suppress(OSError):  # nobody reads it
        say(message, file=sys.stderr)
    raise SystemExit(code)


def _version(shown: bool) -> None:
    if shown:
        print(f"requant {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command()(init_command.init)
app.command(epilog=exit_codes.epilog(exit_codes.GATES, {0: "every gate passed", 1: "a file cannot be written"}))(
    report_commands.gate
)
app.command()(report_commands.compare)


@app.command()
def schema(
    report: Annotated[bool, typer.Option("--report", help="The schema of report.json instead.")] = False,
) -> None:
    """Print the recipe's JSON Schema."""
    import json

    if report:
        return report_commands.schema_of_reports()
    from requant.recipe import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command(epilog=exit_codes.epilog(exit_codes.WORK))
def check(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    show_text: Annotated[
        int, typer.Option(min=0, help="Print so many documents of every text as the model will see them.")
    ] = 0,
) -> None:
    """Check a recipe against model, adapter and texts.

    Reads headers and a few layers, and tries one block for time and memory.
    """
    loaded = run_paths.load_recipe(recipe, overrides)
    from requant.cli import check_command

    check_command.check(loaded, show_text)


@app.command(epilog=exit_codes.epilog(for_command={0: "done, and every gate passed"}))
def run(recipe: RecipePath, overrides: Overrides = [], junit: Junit = None) -> None:  # noqa: B006
    """Dequantize, merge, quantize, heal, evaluate, report.

    Resumes where an earlier run stopped.
    """
    _run(recipe, overrides, "report", junit)


app.command(epilog=exit_codes.epilog(exit_codes.WORK, {0: "every run is done", 1: "a run failed"}))(sweep_command.sweep)


@app.command(epilog=exit_codes.epilog(exit_codes.WORK))
def merge(recipe: RecipePath, overrides: Overrides = []) -> None:  # noqa: B006
    """Only dequantize the base and merge the adapter."""
    _run(recipe, overrides, "merge")


@app.command(epilog=exit_codes.epilog(exit_codes.WORK))
def quantize(recipe: RecipePath, overrides: Overrides = []) -> None:  # noqa: B006
    """Merge, then quantize with GPTQ."""
    _run(recipe, overrides, "quantize")


@app.command(epilog=exit_codes.epilog(exit_codes.WORK))
def heal(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="The recipe; or use the options.")] = None,
    overrides: Overrides = [],  # noqa: B006
    checkpoint: Annotated[Path | None, typer.Option(help="A GPTQ checkpoint, written by any tool.")] = None,
    teacher: Annotated[Path | None, typer.Option(help="The 16-bit model that it was made from.")] = None,
    data: Annotated[list[Path], typer.Option(help="Text to heal on; may be given again.")] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="New directory; default: CHECKPOINT-healed.")] = None,
    steps: Annotated[int, typer.Option(min=1, max=100_000)] = 600,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Windows a step.")] = 16,
    length: Annotated[int, typer.Option(min=8, max=131072, help="Tokens a window.")] = 512,
    lr: Annotated[float, typer.Option(min=1e-9, max=1.0, help="Of scales and norms.")] = 0.005,
    codes: Annotated[bool, typer.Option(help="Train the codes too: 16 bytes of memory a weight.")] = True,
    code_lr: Annotated[float, typer.Option(min=1e-9, max=1.0, help="Of codes, in codes.")] = 0.001,
    norms: Annotated[bool, typer.Option("--norms", help="Train the norm weights too.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False,
) -> None:
    """Distil scales (and codes) of a run's or any checkpoint."""
    alone = {"--checkpoint": checkpoint, "--teacher": teacher, "--data": data}
    if recipe is not None:
        for name in (name for name, value in alone.items() if value):
            raise RecipeError(f"{name} cannot be used with a RECIPE: give one of the two")
        _run(recipe, overrides, "heal")
        return
    if checkpoint is None or teacher is None or not data:
        missing = ", ".join(name for name, value in alone.items() if not value)
        raise RecipeError(f"healing needs a RECIPE, or {missing} too")
    from requant.cli.console import ConsoleWatcher
    from requant.cli.foreign_output import quiet

    checkpoint, teacher = run_paths.checkpoint_in(checkpoint, ("gptq",))[0], run_paths.merged_in(teacher)
    target = out or checkpoint.resolve().with_name(checkpoint.resolve().name + "-healed")
    with ConsoleWatcher() as watcher:
        watcher.stage("heal", done=False)
        watcher.doing("tokens of the texts, then the models")
        with quiet():
            from requant.heal.settings import HealSettings, Tune
            from requant.heal.stage import summary
            from requant.run.heal_checkpoint import heal_checkpoint
            from requant.runtime.device import pick_device

            asked: dict[Tune, bool] = {"scales": True, "codes": codes, "norms": norms}
            facts = heal_checkpoint(
                checkpoint, teacher, data, target,
                HealSettings(steps=steps, batch=batch, length=length, lr=lr, code_lr=code_lr, seed=seed,
                             tune=tuple(name for name in asked if asked[name])), device=pick_device(device),
                trust_remote_code=trust_remote_code, progress=watcher.progress, warn=watcher.warn,
            )  # fmt: skip
    say(f"{summary(facts)}: {target}")


@app.command(epilog=exit_codes.epilog(exit_codes.WORK))
def evaluate(recipe: RecipePath, overrides: Overrides = []) -> None:  # noqa: B006
    """Merge, quantize and score every variant."""
    _run(recipe, overrides, "evaluate")


@app.command(epilog=exit_codes.epilog(for_command={0: "done, and every gate passed"}))
def report(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    suggest: Annotated[
        bool, typer.Option("--suggest", help="Also measure which modules are worth more bits; print the recipe patch.")
    ] = False,
    junit: Junit = None,
) -> None:
    """Write the report, scoring what is missing, and show it.

    A report.json or a run's directory instead of a recipe is rendered again as it is.
    """
    if recipe.suffix == ".json" or recipe.is_dir():
        recipe = run_paths.report_in(recipe)
        if overrides:
            raise RecipeError(f"--set {overrides[0]}: changes a recipe, and {recipe} is a finished report")
        if suggest:
            raise RecipeError(f"--suggest needs the run's recipe, and {recipe} is a finished report")
        return report_commands.render(recipe, junit)
    _run(recipe, overrides, "report", junit, suggest=suggest)


app.command(
    epilog=exit_codes.epilog(exit_codes.WORK, {0: "nothing is wrong", 1: "something is wrong with the checkpoint"})
)(deploy_commands.verify)
app.command(epilog=exit_codes.epilog(exit_codes.WORK, {1: "what was converted does not decode to its source"}))(
    convert_command.convert
)
app.command(epilog=exit_codes.epilog(exit_codes.WORK, {1: "the checkpoint is wrong, or the connection broke"}))(
    deploy_commands.push
)


def _run(path: Path, overrides: list[str], until: Any, junit: Path | None = None, *, suggest: bool = False) -> None:
    outputs.require_output(junit)
    loaded = run_paths.load_recipe(path, overrides)
    with importing():
        from requant.cli.console import ConsoleWatcher
        from requant.cli.foreign_output import quiet
        from requant.runtime import launch

    hint = launch.idle_gpus_hint(loaded.device, path)
    if hint:
        say(hint, file=sys.stderr)
    try:
        with ConsoleWatcher() as watcher:
            watcher.stage("prepare", done=False)
            with quiet(Path(loaded.output.dir) / loaded.name / "log.txt"):
                with importing_models():
                    from requant.run import run as run_recipe

                ranks = launch.current_ranks()
                outcome = run_recipe(loaded, until=until, watcher=watcher, suggest=suggest, ranks=ranks)
    except KeyboardInterrupt as error:
        launch.current_ranks().claim_end()
        raise exit_codes.interrupted(error, signals.RESUMES) from None
    if outcome.report is not None:
        last_lines.show(outcome.path, outcome.report, suggest=suggest)
    if not outcome.ran:
        say(f"nothing to do: everything in {outcome.path} is up to date")
    else:
        say(f"{', '.join(dict.fromkeys(outcome.ran))} done: {outcome.path}")
    if outcome.report is not None:
        report_commands.finish(outcome.report, junit)
