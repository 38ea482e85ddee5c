"""The command line in a process of its own, on a pseudo-terminal or with pipes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COMMAND = (sys.executable, "-m", "requant")
PATIENCE = 300  # seconds for one command


def environment() -> dict[str, str]:
    """As a user has it: none of the settings that keep libraries quiet in the other tests."""
    hidden = ("PYTEST", "GPTQMODEL", "TOKENIZERS", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "GITHUB")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    return kept | {"PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in ("pipeline", "eval")), "TERM": "xterm-256color"}


def piped(*arguments: str, cwd: Path) -> tuple[int, list[str], list[str]]:
    """(exit code, lines of stdout, lines of stderr), read through pipes."""
    done = subprocess.run(
        [*COMMAND, *arguments], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False
    )  # fmt: skip
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def on_terminal(
    *arguments: str, cwd: Path, columns: int = 80, interrupt_at: str | None = None
) -> tuple[int, list[str]]:
    """(exit code, all different lines that were shown), on a terminal of `columns`.

    interrupt_at: Ctrl-C is pressed as soon as this text is shown.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=cwd, env=environment(), stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
    )  # fmt: skip
    os.close(theirs)
    text = _read(process, ours, interrupt_at)
    os.close(ours)
    return process.wait(), _lines(text)


def _read(process: subprocess.Popen[bytes], descriptor: int, interrupt_at: str | None) -> str:
    """Everything that is shown until the process ends."""
    shown, end = b"", time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if select.select([descriptor], [], [], 0.2)[0]:
            try:
                part = os.read(descriptor, 1 << 16)
            except OSError:  # the process has closed its side
                break
            if not part:
                break
            shown += part
        if interrupt_at and interrupt_at in ESCAPE.sub("", shown.decode("utf-8", "replace")):
            os.write(descriptor, b"\x03")
            interrupt_at = None
    else:
        process.kill()
        raise AssertionError(f"no end in {PATIENCE} s: {shown[-2000:]!r}")
    return shown.decode("utf-8", "replace")


def _lines(text: str) -> Sequence[str]:
    lines = (line.rstrip() for line in re.split(r"[\r\n]+", ESCAPE.sub("", text)))
    return list(dict.fromkeys(line for line in lines if line))
