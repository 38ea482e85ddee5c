"""The command line run in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.e2e import one_thread
from requant.cli.main import main
from requant.deploy import engine_processes, own_scores
from requant.deploy.engine_processes import Answer


class Here:
    """The command in this process: exit code, stdout and stderr of the last call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys
        self.out = self.err = ""

    def __call__(self, *arguments: str) -> int:
        self.monkeypatch.setattr("sys.argv", ["requant", *arguments])
        self.capsys.readouterr()
        with one_thread(), pytest.raises(SystemExit) as stopped:
            main()
        self.out, self.err = self.capsys.readouterr()
        assert isinstance(stopped.value.code, int | None)
        return stopped.value.code or 0


def answers(monkeypatch: pytest.MonkeyPatch, shift: float) -> None:
    """An engine that reads what we read, `shift` off."""

    def ask(engine: str, path: Path, rows: list[list[int]], **options: object) -> Answer:
        from requant.evaluate import variants

        model = variants.quantized(path, device=torch.device("cpu"), dtype=torch.float32)
        nll, _ = own_scores.score_rows(model, rows, torch.device("cpu"))
        shifted = tuple(tuple(x + shift for x in row) for row in nll)
        return Answer(
            engine=engine,
            dtype="bfloat16",
            load_seconds=1.5,
            kernels=("Kernel",),
            versions={engine: "9.9"},
            nll=shifted,
            generated=(1, 2),
        )

    monkeypatch.setattr(engine_processes, "require", lambda engine: "python")
    monkeypatch.setattr(engine_processes, "ask", ask)
