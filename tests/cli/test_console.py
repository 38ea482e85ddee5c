"""Progress on the console: rows, clocks, plain lines; words kept whole; output of libraries."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from requant.cli import console, foreign_output
from requant.cli.console import ConsoleWatcher, StageRow, clock
from requant.cli.foreign_output import quiet, readable
from requant.cli.wrapping import wrapped
from requant.errors import InputError

# --- rows ---


def test_what_is_left_is_not_guessed_from_the_first_steps() -> None:
    """A first block of a minute of loading, then one a second; of 400 windows a twentieth is waited for."""
    row = StageRow("quantize", started=0.0)
    row.told(1, 30, "", 60.0)
    assert row.left(60.0) is None
    row.told(2, 30, "", 61.0)
    assert row.left(61.0) is None
    row.told(3, 30, "", 62.0)
    assert row.left(62.0) == 27.0
    many = StageRow("evaluate", started=0.0)
    many.told(5, 400, "", 30.0)
    many.told(24, 400, "", 49.0)
    assert many.left(49.0) is None
    many.told(25, 400, "", 50.0)
    assert many.left(50.0) == 375.0
    many.told(400, 400, "", 425.0)
    assert many.left(425.0) is None


def test_what_is_left_of_other_steps_is_not_guessed_from_those_before() -> None:
    """400 windows in 40 s, then 10 prompts of a minute each, none of which is done when they are told."""
    row = StageRow("evaluate", started=0.0)
    row.told(1, 400, "", 1.0)
    row.told(400, 400, "", 40.0)
    row.told(0, 10, "", 40.0)
    for done in range(1, 4):
        row.told(done, 10, "", 40.0 + 60 * done)
    assert row.left(220.0) == 7 * 60.0


def test_a_row_counts_with_its_unit_and_says_what_is_left() -> None:
    row = StageRow("quantize", started=100.0)
    row.told(1, 32, "1.5 s a block", 104.0)  # of which 2.5 s were spent once
    row.told(8, 32, "1.5 s a block", 112.0)
    assert row.line(114.5, 120) == "quantize ━━━━──────────── 8/32 blocks  0:14  0:36 left  1.5 s a block"
    row.ended = 148.0
    assert "0:48" in row.line(1e6, 120), "its clock has stopped"
    assert "left" not in row.line(1e6, 120)


def test_a_row_without_steps_moves_and_has_a_clock() -> None:
    row = StageRow("probe", started=0.0, note="loss")
    assert row.line(3700.0, 120).endswith("1:01:40  loss")
    assert row.line(1.0, 120) != row.line(1.3, 120)
    assert StageRow("merge", 0.0, up_to_date=True).line(9.0, 120) == f"merge    {'━' * 16} up to date"


@given(st.integers(12, 200), st.text(st.characters(codec="ascii", categories=("L", "N", "Zs")), max_size=300))
def test_a_row_never_exceeds_the_width(width: int, note: str) -> None:
    row = StageRow("evaluate", started=0.0, done=3, total=400, note=note)
    assert len(row.line(60.0, width)) <= width


def test_clocks() -> None:
    assert [clock(s) for s in (0, 59.9, 61, 3600)] == ["0:00", "0:59", "1:01", "1:00:00"]


# --- plain lines ---


def test_a_silent_stage_speaks_in_a_file_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "PLAIN_EVERY", 0.02)
    spoken = threading.Event()
    with ConsoleWatcher() as watcher:
        monkeypatch.setattr(watcher, "_print", lambda text: (lines.append(text), spoken.set()))
        lines: list[str] = []
        watcher.stage("verify", done=False)
        watcher.doing("values of 14 linears")
        spoken.clear()
        assert spoken.wait(30)
    assert lines[0] == "verify: started"
    assert lines[1].startswith("verify: values of 14 linears (")


def test_plain_lines_count_and_warn(capsys: pytest.CaptureFixture[str]) -> None:
    with ConsoleWatcher() as watcher:
        watcher.stage("merge", done=False)
        watcher.warn("look here")
        watcher.progress(0, 7, "loading")
        watcher.progress(7, 7)
        watcher.stage("quantize", done=True)
    assert capsys.readouterr().err.splitlines() == [
        "merge: started", "warning: look here", "merge: 7/7 tensors (0 s)", "quantize: up to date",
    ]  # fmt: skip


# --- wrapping ---


@given(st.lists(st.text("abc-._/", min_size=1, max_size=30), min_size=1, max_size=40), st.integers(20, 100))
def test_text_breaks_between_words_only(words: list[str], width: int) -> None:
    text = wrapped(" ".join(words), width, indent=10)
    assert text.split() == words
    assert all(len(line) <= width or len(line.split()) == 1 for line in text.splitlines())


# --- output of libraries ---


def test_what_libraries_print_is_kept_in_the_log(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("ours\n")
    with ConsoleWatcher() as watcher, quiet(log):
        print("banner")
        print("advice", file=sys.stderr)
        os.write(1, b"native out\n")
        os.write(2, b"\x1b[31mnative err\x1b[0m\n 10%|#\r 90%|##\rdone\n")
        warnings.warn("a library's", stacklevel=1)
        watcher.stage("merge", done=False)
    print("after")
    out, err = capfd.readouterr()
    assert (out, err) == ("after\n", "merge: started\n")
    kept = [line.removeprefix("printed by a library: ") for line in log.read_text().splitlines()]
    assert kept == ["ours", "banner", "advice", "native out", "native err", "done"]


def test_a_fault_shows_what_libraries_said_and_our_errors_do_not(capfd: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> None:
        with pytest.raises(type(error)), quiet():  # noqa: PT012
            print("the library's last words")
            raise error

    fail(InputError("ours"))
    fail(KeyboardInterrupt())
    assert capfd.readouterr() == ("", "")
    fail(ZeroDivisionError())
    assert capfd.readouterr().err == "the library's last words\n"


def test_a_crash_of_native_code_shows_the_stack(tmp_path: Path) -> None:
    code = "import os; from requant.cli.foreign_output import quiet\nwith quiet():\n    print('lost')\n    os.abort()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode < 0
    assert "Fatal Python error: Aborted" in done.stderr
    assert "lost" not in done.stdout


def test_several_processes_keep_their_descriptors(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with quiet():
        print("how a rank died")
    assert capfd.readouterr().out == "how a rank died\n"


def test_states_of_a_bar_are_one_line() -> None:
    assert readable(b"Loading: 0%|   |\rLoading: 100%|###|\r\n\n\x1b]0;title\x07x\xff\n") == [
        "Loading: 100%|###|",
        "x\ufffd",
    ]
    assert foreign_output.readable(b"") == []
