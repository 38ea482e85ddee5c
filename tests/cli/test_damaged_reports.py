"""Commands that read a report.json with wrong facts: one line that names the fact."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import reports

from requant.cli import report_commands
from requant.errors import InputError
from requant_eval.report.assemble import save

WRONG: dict[str, tuple[tuple[str | int, ...], Any]] = {
    "facts.quantize": (("quantize",), "x"),
    "facts.quantize.modules": (("quantize", "modules"), 3),
    "facts.quantize.modules.0": (("quantize", "modules", 0), None),
}


def damaged(folder: Path, path: tuple[str | int, ...], value: Any) -> Path:
    file = folder / "report.json"
    save(reports.full(2), file)  # type: ignore[arg-type]
    report = json.loads(file.read_text())
    holder = report["facts"]
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = value
    file.write_text(json.dumps(report))
    return file


@pytest.mark.parametrize("named", WRONG)
def test_a_fact_of_another_type_is_named_and_nothing_written(named: str, tmp_path: Path) -> None:
    file = damaged(tmp_path, *WRONG[named])
    says = f"damaged: a value is not as requant writes it ({named}"
    with pytest.raises(InputError, match=rf"^{re.escape(str(file))}: {re.escape(says)}"):
        report_commands.render(file)
    (tmp_path / "other").mkdir()
    other = damaged(tmp_path / "other", ("name",), "other")
    try:
        report_commands.compare([str(other), str(file)], html=tmp_path / "c.html")
    except InputError as error:  # not every fact is compared
        said = str(error)
        assert says in said
    assert not (tmp_path / "report.md").exists()
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"schema_version": ' + b"9" * 5000 + b"}", "a number of 5000 digits"),
        (b'{"schema_version": 2, "schema_version": 2}', "'schema_version' is there twice"),
        (b'{"schema_version": NaN}', "NaN is no JSON number"),
        (b"\xff\xfe{", "not UTF-8"),
    ],
)
def test_a_file_that_is_no_report_is_named(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(data)
    for command in (report_commands.render, lambda file: report_commands.gate(file, [])):
        with pytest.raises(InputError, match=rf"report\.json: {message}"):
            command(tmp_path / "report.json")
