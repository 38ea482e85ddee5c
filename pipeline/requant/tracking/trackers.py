"""Trackers: which are installed, and sending a report in a process that may fail or hang.

A client talks to a network and starts processes of its own. So each runs in a process group with a time limit: what it
does ends with it, and a run goes on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from requant.errors import InputError
from requant.outgoing import masked
from requant.tracking.payload import payload

Tracker = Literal["wandb", "mlflow", "trackio", "tensorboard"]
INSTALL: dict[Tracker, str] = {
    "wandb": "pip install wandb",
    "mlflow": "pip install mlflow-skinny",
    "trackio": "pip install trackio",
    "tensorboard": "pip install tensorboard",
}
SECONDS = 180.0  # that a client has to send a report
SCRIPT = Path(__file__).with_name("clients.py")
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # of no use to a tracker that is not trackio


def require(names: Sequence[Tracker], place: str) -> None:
    """Raise InputError for a tracker that is not installed. place: `file:line: key`."""
    for name in names:
        if find_spec(name) is None:
            raise InputError(f"{place}: {name} is not installed: {INSTALL[name]}, or take it out of the list")


def send(
    name: Tracker, report: Mapping[str, Any], files: Sequence[Path], folder: Path, *, seconds: float = SECONDS
) -> str | None:
    """Send a report to one tracker; why that failed, or None.

    files: sent as artifacts. folder: what a client writes locally, unless its own variables name another place.
    """
    request = {**payload(report), "tracker": name, "files": [str(f) for f in files], "folder": str(folder)}
    kept = {k: v for k, v in os.environ.items() if name == "trackio" or k not in _SECRETS}
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", env=kept, cwd=folder, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return f"its process cannot be started ({error.strerror})"
    try:
        said, _ = process.communicate(json.dumps(request), timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"no end after {seconds:.0f} s"
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
    if process.returncode:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        return masked(lines[-1] if lines else "no output")[:300]
    return None
