"""A checkpoint in vLLM, in a process of its own, that answers the requests of tasks.

One line of JSON each way, so a process loads its checkpoint once for all tasks.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from requant.checkpoint.reader import Checkpoint
from requant.deploy import engine_processes
from requant.deploy.stage import serving_dtype
from requant.errors import StageError
from requant_eval.strict_json import JsonError, parse

SEQUENCES = 64  # at a time
ON_GPU = {"gpu_memory_utilization": 0.8, "max_num_batched_tokens": 2048}  # room for the logits of all prompt tokens


class VllmServer:
    """vLLM with one checkpoint, from `with` to its end. described: its version, dtype and kernels, once it runs.

    Raises InputError where vLLM is not installed, StageError where it does not load the checkpoint, ends, or gives no
    answer in half an hour.
    """

    def __init__(self, path: Path, *, device: torch.device, longest: int, trust_remote_code: bool) -> None:
        """longest: tokens of a request with its answer, at most."""
        self.path, self.dtype = path, serving_dtype("vllm", Checkpoint(path), device)
        self._command = [
            engine_processes.require("vllm"), "-P", str(Path(engine_processes.__file__).with_name("engine_vllm.py")),
        ]  # fmt: skip
        self._settings = {
            "path": str(path.absolute()), "dtype": self.dtype, "longest": longest, "sequences": SEQUENCES,
            "trust_remote_code": trust_remote_code, "serve": True, "options": ON_GPU if device.type == "cuda" else {},
        }  # fmt: skip
        self.described = ""

    def __enter__(self) -> Self:
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # until __exit__
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            errors="replace", env=engine_processes.environment("vllm", self._command[0], None),
        )  # fmt: skip
        try:
            loaded = self._exchange(self._settings)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        version = ", ".join(f"{name} {number}" for name, number in loaded["versions"].items() if name != "torch")
        self.described = f"{version}, {self.dtype}" + "".join(f", {kernel}" for kernel in loaded["kernels"])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def scores(self, rows: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, bool]]:
        """(ln p of the tokens from `first` on, whether each was the most likely one) of each (ids, first)."""
        asked = [[list(ids), first] for ids, first in rows]
        return [(float(total), bool(greedy)) for total, greedy in self._exchange({"score": asked})["scores"]]

    def continuations(
        self, prompts: Sequence[Sequence[int]], *, new_tokens: int, until: Sequence[str], stops: Sequence[int]
    ) -> list[list[int]]:
        """The greedy continuation of each prompt, up to a text of `until` or a token of `stops`, both included."""
        asked = {"continue": [list(ids) for ids in prompts], "new_tokens": new_tokens}
        return list(self._exchange({**asked, "until": list(until), "stops": list(stops)})["tokens"])

    def _exchange(self, request: dict[str, Any]) -> Any:
        """The answer to one request."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        watch = threading.Timer(engine_processes.TIMEOUT, self._process.kill)
        watch.start()
        lines: list[str] = []
        try:
            with suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
            for line in self._process.stdout:
                if line.startswith("RESULT "):
                    return parse(line.removeprefix("RESULT "), constants=True)
                lines = [*lines[-50:], line]
        except JsonError as error:
            raise StageError(f"{self._who}: its answer is {error}") from error
        finally:
            watch.cancel()
        code = self._process.wait()
        self._errors.seek(0)
        ended = subprocess.CompletedProcess(self._command, code, "".join(lines), self._errors.read())
        raise StageError(f"{self._who}: {engine_processes.reason(ended)}: set evaluate.task_backend: transformers")

    @property
    def _who(self) -> str:
        return f"{self.path.name}: vLLM cannot run tasks on it"
