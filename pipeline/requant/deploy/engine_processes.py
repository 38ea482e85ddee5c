"""Engine processes: find an installed engine, start it, get scores and tokens.

Each engine is a script that imports nothing of ours and may run in another interpreter: vLLM needs its own torch.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from requant.errors import InputError
from requant_eval.strict_json import JsonError, parse

Engine = Literal["transformers", "vllm", "llamacpp", "mlx"]
ENGINES: tuple[Engine, ...] = ("transformers", "vllm", "llamacpp", "mlx")
PYTHON = "REQUANT_{}_PYTHON"  # environment: the interpreter that has the engine
TIMEOUT = 1800
RANK = re.compile(r"^\s*\[rank\d+\]:")  # before every line of a worker's traceback
# Largest difference of mean -ln p from ours, computed in fp32: the engine's rounding, no more.
# llama.cpp multiplies blocks with activations that it rounds to 8 bits.
TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2, "int8": 1e-1}
MLX_TOLERANCE = 1e-3  # in float32 too: its sums were off by 0.00016 on a model of 30 layers
_NEEDS = {
    "transformers": ("transformers", "gptqmodel", "optimum"),
    "vllm": ("vllm",),
    "llamacpp": ("xllamacpp",),
    "mlx": ("mlx_lm",),
}
_SETTINGS = {
    "transformers": {"GPTQMODEL_DISABLE_PACK_EXT": "1", "GPTQMODEL_CPU_WORKERS": "2"},
    "vllm": {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # a token more than is scored, whose logits are not asked for
    },
    "llamacpp": {},
    "mlx": {},
}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One engine's scores and tokens.

    error: why it does not load the checkpoint; all else is empty then.
    """

    engine: str
    dtype: str
    device: str = "cpu"
    backend: str | None = None
    error: str | None = None
    load_seconds: float | None = None
    kernels: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    nll: tuple[tuple[float, ...], ...] = ()
    generated: tuple[int, ...] = ()
    speed: Mapping[str, float] | None = None

    def difference(self, ours: Sequence[Sequence[float]]) -> float:
        """Mean -ln p of the same tokens, theirs minus ours: the log ratio of perplexities."""
        return mean(self.nll) - mean(ours)

    def agrees(self, ours: Sequence[Sequence[float]]) -> bool:
        """Whether it loaded, scored finite numbers and stays within the tolerance of its dtype."""
        if self.error is not None or not self.nll:
            return False
        return abs(self.difference(ours)) <= self.tolerance  # False for NaN

    @property
    def tolerance(self) -> float:
        """Largest difference that is the engine's rounding."""
        return max(TOLERANCE[self.dtype], MLX_TOLERANCE if self.engine == "mlx" else 0.0)


def mean(rows: Sequence[Sequence[float]]) -> float:
    """Mean over all tokens of all rows."""
    values = [x for row in rows for x in row]
    return math.fsum(values) / len(values)


def perplexity(nll: Sequence[Sequence[float]]) -> float:
    """exp of the mean; infinite where that has no double."""
    try:
        return math.exp(mean(nll))
    except OverflowError:
        return math.inf


def interpreter(engine: Engine, directory: Path | None = None) -> str | None:
    """The Python that has the engine, None when there is none.

    In this order: the environment variable REQUANT_<ENGINE>_PYTHON, `.venv-<engine>` in `directory` (default: the
    current one), this interpreter.
    """
    asked = os.environ.get(PYTHON.format(engine.upper()))
    if asked:
        return asked
    own = (directory or Path.cwd()) / f".venv-{engine}" / "bin" / "python"
    if own.exists():
        return str(own.absolute())
    return sys.executable if all(importlib.util.find_spec(name) for name in _NEEDS[engine]) else None


def installed(names: Container[str]) -> list[Engine]:
    """Those of `names` that are engines with an interpreter on this machine."""
    return [engine for engine in ENGINES if engine in names and interpreter(engine) is not None]


def require(engine: Engine) -> str:
    """`interpreter`, or InputError that says how to get one."""
    found = interpreter(engine)
    if found is None:
        how = {
            "transformers": "pip install gptqmodel optimum",
            "vllm": "make setup-vllm, or pip install vllm elsewhere",
            "llamacpp": "pip install xllamacpp",
            "mlx": "pip install mlx-lm (on Linux 'mlx[cpu]' too)",
        }
        raise InputError(
            f"{engine} is not installed here: {how[engine]}, and set {PYTHON.format(engine.upper())} to its Python"
        )
    return found


def ask(
    engine: Engine,
    path: Path,
    rows: Sequence[Sequence[int]],
    *,
    dtype: str,
    device: str = "cpu",
    backend: str | None = None,
    new_tokens: int = 8,
    prompt: int = 8,
    trust_remote_code: bool = False,
    speed: Mapping[str, int] | None = None,
    threads: int | None = None,
) -> Answer:
    """Score and generate with one engine, in a process of its own.

    rows: token ids to score. The first `prompt` tokens of the first row are continued greedily.

    Raises InputError when the engine is not installed or its interpreter does not start; a checkpoint that it refuses
    is an answer.
    """
    request = {
        "path": str(path),
        "rows": [list(r) for r in rows],
        "dtype": dtype,
        "device": device,
        "backend": backend,
        "new_tokens": new_tokens,
        "prompt": prompt,
        "trust_remote_code": trust_remote_code,
        "speed": speed,
        "threads": threads,
    }
    asked: dict[str, Any] = {"engine": engine, "dtype": dtype, "device": device, "backend": backend}
    script = Path(__file__).with_name(f"engine_{engine}.py")
    # -P: the script's own directory is full of names that others use too.
    command = [require(engine), "-P", str(script)]
    try:
        done = _run(command, engine, request, threads)
    except subprocess.TimeoutExpired:
        return Answer(**asked, error=f"no answer in {TIMEOUT} s")
    return _answer(asked, done)


def _answer(asked: Mapping[str, Any], done: subprocess.CompletedProcess[str]) -> Answer:
    """The answer in the output of an engine's process. asked: which engine, and how."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        return Answer(**asked, error=reason(done))
    try:
        raw = parse(lines[-1].removeprefix("RESULT "), constants=True)
    except JsonError as error:
        return Answer(**asked, error=f"its answer is {error}")
    return Answer(
        **asked,
        load_seconds=raw["load_seconds"],
        kernels=tuple(raw["kernels"]),
        versions=raw["versions"],
        nll=tuple(tuple(row) for row in raw["nll"]),
        generated=tuple(raw["generated"]),
        speed=raw.get("speed"),
    )


def _run(
    command: Sequence[str], engine: Engine, request: Mapping[str, Any], threads: int | None
) -> subprocess.CompletedProcess[str]:
    """Start an engine's process, and wait for its answer to a request."""
    try:
        return subprocess.run(
            command,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
            env=environment(engine, command[0], threads),
        )
    except OSError as error:
        raise InputError(
            f"{command[0]}: cannot be started ({error.strerror}): set {PYTHON.format(engine.upper())}"
        ) from error


def environment(engine: Engine, python: str, threads: int | None) -> dict[str, str]:
    """The environment of an engine's process: this one's, offline and without tokens.

    Another interpreter also gets no PYTHONPATH and no PYTHONHOME, which belong to this one.
    """
    hidden = () if python == sys.executable else ("PYTHONPATH", "PYTHONHOME")
    kept = {k: v for k, v in os.environ.items() if k not in hidden and not k.endswith("_TOKEN")}
    limit = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    return _SETTINGS[engine] | kept | limit | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """The exception that ended an engine: the last line of its output that looks like one."""
    stripped = (RANK.sub("", line).strip() for line in (done.stderr + done.stdout).splitlines())
    lines = [line for line in stripped if line]
    named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception")) and ": " in line]
    last = named[-1] if named else (lines[-1] if lines else "no output")
    return f"{last[:400]} (exit {done.returncode})"
