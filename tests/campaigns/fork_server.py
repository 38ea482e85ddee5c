"""A process that has imported everything, and runs command lines in forks of itself.

A fork starts in milliseconds where a fresh interpreter takes five seconds, and what an input does to the process (memory,
endless loops, a crash) ends with it. Run as a program: one JSON job a line on stdin; two JSON lines an answer on
stdout, the process id at once and the end when it comes. Several jobs may run at once.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

PRELOAD = (
    "accelerate", "bitsandbytes", "datasets", "encodings.unicode_escape", "encodings.utf_8_sig", "jinja2.sandbox",
    "peft", "peft.tuners.lora.bnb",
    "peft.utils.transformers_weight_conversion", "pyarrow.parquet", "rich.console", "safetensors.numpy",
    "safetensors.torch",     "transformers", "transformers.models.auto", "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama", "transformers.tokenization_utils_tokenizers",
)  # fmt: skip
LOOK = 0.004  # seconds between two looks at the children
CRASHED = 70  # exit code of a child whose own frame broke


def import_everything() -> None:
    """All modules of ours, and the libraries that commands import late."""
    import torch

    torch.set_num_threads(1)
    for name in PRELOAD:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with contextlib.suppress(ImportError, AttributeError):  # 900 patterns, half of a short command's time
        importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
    for root in ("requant", "requant_eval"):
        folder = Path(str(importlib.import_module(root).__file__)).parent
        for file in sorted(folder.rglob("*.py")):
            if file.stem not in ("__main__", "gptqmodel_engine"):
                module = ".".join((root, *file.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
                with contextlib.suppress(ImportError):
                    importlib.import_module(module)


def run_command(argv: list[str]) -> int:
    """What `python -m requant` would do with these arguments, or a function: `module:function`, its arguments."""
    try:
        if ":" in argv[0]:
            module, name = argv[0].split(":")
            getattr(importlib.import_module(module), name)(*argv[1:])
            return 0
        from requant.cli.main import main

        sys.argv = ["requant", *argv]
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - what the interpreter would print
        traceback.print_exc()
        return 1
    return 0


def child(job: dict[str, Any]) -> NoReturn:
    """The forked process: its own group, output in a file, the surroundings of a fresh interpreter."""
    code = CRASHED
    try:
        os.setpgid(0, 0)
        output = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for the life of the process
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
        for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            signal.signal(number, handler)
        os.environ.update(job.get("env", {}))
        tempfile.tempdir = None
        os.chdir(job["cwd"])
        if "file_bytes" in job:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_bytes"],) * 2)
        if "layer" in job:
            from campaigns.syscall_layer import enter

            enter(job["layer"])
        code = run_command(job["argv"])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001 - a fork must never return into the server
        traceback.print_exc()
    finally:
        os._exit(code)


def serve(answers: int) -> None:
    """Fork for every job, until stdin ends; several may run at once. Answers are told apart by their process ids."""
    waiting, started = b"", dict[int, float]()
    while True:
        if select.select([0], [], [], LOOK if started else None)[0]:
            more = os.read(0, 65536)
            if not more:
                return
            *lines, waiting = (waiting + more).split(b"\n")
            for line in lines:
                process = os.fork()
                if process == 0:
                    os.close(answers)
                    child(json.loads(line))
                started[process] = time.monotonic()
                os.write(answers, json.dumps({"process": process}).encode() + b"\n")
        while started:
            process, status, used = os.wait4(-1, os.WNOHANG)
            if not process:
                break
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)  # what it has started
            end = {"process": process, "code": os.waitstatus_to_exitcode(status), "peak": used.ru_maxrss * 1024}
            end["cpu"] = used.ru_utime + used.ru_stime
            end["seconds"] = time.monotonic() - started.pop(process)
            os.write(answers, json.dumps(end).encode() + b"\n")


if __name__ == "__main__":
    own = os.dup(1)  # closed when a program is started
    os.dup2(2, 1)  # what libraries print while they are imported is no answer
    import_everything()
    gc.collect()
    gc.freeze()  # a fork shares all this, and its collections need not look at it
    os.write(own, b"{}\n")
    serve(own)
