"""Commands that read finished reports only: gate, compare. No model, no GPU."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from requant.cli import run_paths
from requant.cli.outputs import require_output, write_output
from requant.cli.wrapping import say
from requant.errors import InputError
from requant_eval import whole_files

if TYPE_CHECKING:
    from requant_eval.report.records import Report

ReportPath = Annotated[Path, typer.Argument(metavar="REPORT", help="A report.json, or the directory of a run.")]
Junit = Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="Also write the gates as JUnit XML.")]


def gate(
    report: ReportPath,
    gates: Annotated[
        list[str],
        typer.Option("--gate", metavar="GATE", help='Instead of the report\'s own, e.g. "ppl_increase in-domain 5%".'),
    ] = [],  # noqa: B006
    junit: Junit = None,
) -> None:
    """Check a report against its gates, or against others."""
    from requant_eval import gate as rules
    from requant_eval.render import terminal
    from requant_eval.report import verdict
    from requant_eval.report.assemble import conclude
    from requant_eval.report.schema import load

    require_output(junit)
    file = run_paths.report_in(report)
    with readable_errors(file):
        loaded = load(file)
        asked = [rules.parse(text) for text in gates] or verdict.saved_gates(loaded)
        if not asked:
            raise InputError(f'{report}: no gates in it: add them to the recipe, or give --gate "ppl_increase SET 5%"')
        concluded = conclude(loaded, asked)
        shown = terminal.decision(concluded)
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120).print(shown)
    for warning in concluded["warnings"]:
        say(f"warning: {warning}")
    finish(concluded, junit)


def render(file: Path, junit: Path | None = None) -> None:
    """Render a report.json of this or an older version again, and show it.

    file: the report.json, or the directory of its run.
    """
    from rich.console import Console

    from requant_eval.render import html, markdown, terminal
    from requant_eval.report.assemble import save_text
    from requant_eval.report.schema import load

    require_output(junit)
    with readable_errors(file):
        loaded = load(file)
        written = {".md": markdown.render(loaded), ".html": html.render(loaded)}
        shown = terminal.table(loaded)
    file = file / "report.json" if file.is_dir() else file
    for suffix, text in written.items():
        save_text(file.with_suffix(suffix), text)
    Console(width=None if sys.stdout.isatty() else 120).print(shown)
    say(f"written: {', '.join(str(file.with_suffix(suffix)) for suffix in written)}")
    finish(loaded, junit)


def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Runs or report.json files; RUN:VARIANT for one.")
    ],
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the data.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="Also write Markdown.")] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also write one HTML page.")] = None,
) -> None:
    """Say which run is better on which set.

    From their reports alone: no GPU, no model.
    """
    from rich.console import Console

    from requant_eval.render import compare_tables
    from requant_eval.render import html as pages
    from requant_eval.render import markdown as md
    from requant_eval.report.assemble import dumps
    from requant_eval.report.compare import compare as compared

    require_output(json_file, markdown, html)
    with readable_errors(*(path for path, _ in map(_split, runs))):
        comparison = compared(_entrants(runs))
        document = compare_tables.document(comparison)
        shown = compare_tables.terminal(comparison)
    if json_file is not None:
        write_output(json_file, dumps(comparison))
    if markdown is not None:
        write_output(markdown, md.page(document))
    if html is not None:
        write_output(html, pages.page(document))
    Console(width=None if sys.stdout.isatty() else 120).print(shown)


def _entrants(runs: list[str]) -> list[Any]:
    """Each RUN or RUN:VARIANT with the shortest unique name."""
    from requant_eval.report.compare import Entrant
    from requant_eval.report.schema import load

    split = [_split(text) for text in runs]
    short = [_name(path) for path, _ in split]
    plain = short if len(set(short)) == len({path for path, _ in split}) else [str(path) for path, _ in split]
    names = [name + (f":{variant}" if variant else "") for name, (_, variant) in zip(plain, split, strict=True)]
    loaded = {path: load(run_paths.report_in(path)) for path, _ in split}
    return [Entrant.of(name, loaded[path], variant) for name, (path, variant) in zip(names, split, strict=True)]


def _split(text: str) -> tuple[Path, str | None]:
    """RUN:VARIANT, unless a file of that very name exists."""
    run, colon, variant = text.rpartition(":")
    return (Path(run), variant) if colon and run and not Path(text).exists() else (Path(text), None)


def _name(path: Path) -> str:
    """A run's name: its directory's, also when its report.json was given."""
    return path.absolute().parent.name if path.name == "report.json" else path.absolute().name


def schema_of_reports() -> None:
    """Print the JSON Schema of report.json."""
    from requant_eval.report.schema import json_schema

    print(json.dumps(json_schema(), indent=2))


def finish(report: Report, junit: Path | None = None) -> None:
    """Report the gates to CI: JUnit file, step summary, exit code.

    Raises:
        typer.Exit: with 3 or 4, unless every gate holds.
    """
    from requant_eval.render import ci

    if junit is not None:
        write_output(junit, ci.junit(report))
    if step := os.environ.get("GITHUB_STEP_SUMMARY"):
        whole_files.append(Path(step), ci.summary(report))
    code = ci.EXIT_CODES[report["verdict"]["status"]]
    if code:
        raise typer.Exit(code)


@contextmanager
def readable_errors(*files: Path) -> Iterator[None]:
    """Turn errors of `requant_eval` into InputError: exit code 2.

    files: the reports that are read. The schema leaves facts free, so whatever else is raised says that theirs are
    not as requant writes them.
    """
    from requant_eval.errors import EvaluationError
    from requant_eval.gate import GateError
    from requant_eval.report.schema import wrong_fact

    try:
        yield
    except (EvaluationError, GateError) as error:
        raise InputError(str(error)) from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        names = " or ".join(map(str, files))
        fact = next(filter(None, map(wrong_fact, files)), None)
        raise InputError(
            f"{names}: damaged: a value is not as requant writes it ({fact or repr(error)[:200]}): "
            "`requant report RECIPE` writes the report again"
        ) from error
