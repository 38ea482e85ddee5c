"""The campaigns' surroundings: project, finished run, commands in processes and limits."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helpers import e2e

from campaigns import crash_states, same_run, syscall_layer, verdicts
from campaigns.verdicts import End

ROOT = Path(__file__).resolve().parents[2]
CPU_SECONDS = 10.0  # of one mutated input: more is a hang
IDLE_SECONDS = 10.0  # asleep without any progress: waits for what never comes
WORK = 0.1  # CPU seconds: less in all of that time is a thread that tells of no progress
MEMORY = 2 * 10**9  # bytes resident
LOOK = 0.02  # seconds between two looks at a process
RUN_CPU_SECONDS = 120.0  # of a whole run, on a machine that others use too
RECIPE: dict[str, Any] = {
    "heal": {"steps": 8, "batch": 2, "length": 48, "lr": 0.02, "tune": ["scales", "norms"]},
    "evaluate.variants": ["base", "adapter", "merged", "gptq", "healed"],
    "gates": [{"metric": "ppl_increase", "set": "in-domain", "max": "500%"}],
}


@dataclass
class Running:
    """A command in its forked process."""

    process: int
    log: Path
    line: CommandLine
    end: End | None = None

    def send(self, number: int) -> None:
        """Send a signal to the process alone, as `kill` does."""
        with suppress(ProcessLookupError):
            os.kill(self.process, number)

    def poll(self, seconds: float = 0.0) -> End | None:
        """Its end, if that comes within `seconds`."""
        until = time.monotonic() + seconds
        while self.end is None:
            answer = self.line.ends.pop(self.process, None)
            if answer is not None:
                text = self.log.read_text(encoding="utf-8", errors="replace")
                self.end = End(text=text, **answer)
            elif not self.line.listen(max(0.0, until - time.monotonic())):
                break
        return self.end

    def wait(self, *, cpu: float = RUN_CPU_SECONDS, memory: int = MEMORY) -> End:
        """Its end; it is killed when it uses more than `cpu` seconds or `memory` bytes, or sleeps for IDLE_SECONDS."""
        used, asleep, looked = -1.0, 0.0, time.monotonic()
        while self.poll(LOOK) is None:
            state, now, resident = usage(self.process)
            before, looked = looked, time.monotonic()
            if now > used + WORK:
                used, asleep = now, 0.0
            elif state != "R":  # else it waits for a processor that others use
                asleep += looked - before
            stopped = "memory" if resident > memory else "hang" if now > cpu or asleep > IDLE_SECONDS else ""
            if stopped and self.poll() is None:
                return self.stop(stopped)
        assert self.end is not None
        return self.end

    def stop(self, reason: str) -> End:
        """Kill it and what it has started; its end says why."""
        with suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)
        while self.poll(1.0) is None:
            pass
        assert self.end is not None
        self.end = replace(self.end, stopped=reason)
        return self.end


def usage(process: int) -> tuple[str, float, int]:
    """State letter, CPU seconds and resident bytes of a process and its children; zeros when it is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return "", 0.0, 0
    seconds = sum(int(n) for n in fields[11:15]) / os.sysconf("SC_CLK_TCK")
    state, resident = fields[0], int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError):
        for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
            below = usage(int(child))
            state = "R" if below[0] == "R" else state
            seconds, resident = seconds + below[1], resident + below[2]
    return state, seconds, resident


class CommandLine:
    """`requant` in forks of one prepared process (`fork_server`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        places = (ROOT / "tests", ROOT / "pipeline", ROOT / "eval")
        surroundings = {
            "PYTHONPATH": os.pathsep.join(map(str, places)), "HF_TOKEN": verdicts.SECRET, "HF_HOME": str(folder / "hub"),
            "TMPDIR": str(folder / "tmp"), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false", "TORCHDYNAMO_DISABLE": "1", "COLUMNS": "120",
        }  # fmt: skip
        self.server = subprocess.Popen(
            [sys.executable, "-m", "campaigns.fork_server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=(folder / "server.txt").open("w"), env=os.environ | surroundings,
        )  # fmt: skip
        self.heard, self.jobs = b"", 0
        self.started: list[int] = []
        self.ends: dict[int, dict[str, Any]] = {}  # by process, not yet asked for
        self.ready = False
        while not self.ready:
            self.listen(60.0)

    def listen(self, seconds: float) -> bool:
        """Take what the server says within `seconds`; whether it said anything."""
        assert self.server.stdout is not None
        if not select.select([self.server.stdout], [], [], seconds)[0]:
            return False
        more = os.read(self.server.stdout.fileno(), 65536)
        if not more:
            raise RuntimeError((self.folder / "server.txt").read_text()[-2000:])
        *lines, self.heard = (self.heard + more).split(b"\n")
        for answer in map(json.loads, lines):
            process = answer.pop("process", None)
            if process is None:
                self.ready = True
            elif answer:
                self.ends[process] = answer
            else:
                self.started.append(process)
        return True

    def start(self, argv: Sequence[object], *, cwd: Path | None = None, **job: Any) -> Running:
        """Start a command. job: env, file_bytes or layer, see `fork_server.child`."""
        self.jobs += 1
        log = self.folder / f"out{self.jobs % 100}.txt"
        log.unlink(missing_ok=True)
        told = {"argv": [str(a) for a in argv], "log": str(log), "cwd": str(cwd or self.folder), **job}
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(told).encode() + b"\n")
        self.server.stdin.flush()
        while not self.started:
            self.listen(10.0)
        return Running(self.started.pop(), log, self)

    def run(self, argv: Sequence[object], *, cpu: float = RUN_CPU_SECONDS, **job: Any) -> End:
        """Start a command and wait for its end."""
        return self.start(argv, **job).wait(cpu=cpu)

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(10)


class Workshop:
    """One project, one finished run of it, and a folder for what campaigns make.

    `base`, `adapter`,
    the texts: `project`. The undisturbed run's directory: `finished`; all its calls: `record`, where the
    machine can (`syscall_layer`); how long its stages took: `stages`, seconds from its start.
    """

    def __init__(self, folder: Path, project: Path) -> None:
        self.folder, self.project, self.cases = folder, folder / "project", folder / "cases"
        self.cases.mkdir(parents=True)
        self.project.mkdir()
        for item in project.iterdir():
            if item.name not in ("runs", "recipe.yaml"):
                (self.project / item.name).symlink_to(item)
        self.recipe = e2e.write_recipe(self.project, RECIPE)
        self.requant = CommandLine(folder)
        self.finished = folder / "reference" / "pico"
        self.finished.parent.mkdir()
        self.record = crash_states.Record(self.finished.parent) if syscall_layer.usable() else None
        began = time.time()
        first = self.layered(self.finished.parent, self.record.see if self.record else None)
        if first.code != 0:
            raise RuntimeError(first.text[-3000:])
        self.seconds = first.seconds
        events = [json.loads(line) for line in (self.finished / "events.jsonl").read_text().splitlines()]
        self.stages: dict[str, tuple[float, float]] = {
            a["stage"]: (a["time"] - began, b["time"] - began)
            for a, b in zip(events[::2], events[1::2], strict=True)
        }  # fmt: skip

    def run_of(self, runs: Path, command: str = "run", changes: Mapping[str, object] | None = None) -> list[object]:
        """The arguments that run the recipe into `runs`/pico. changes: of the recipe, `--set` each."""
        sets = [f"{key}={value}" for key, value in {"output.dir": runs, **(changes or {})}.items()]
        return [command, self.recipe, *(word for s in sets for word in ("--set", s))]

    def layered(self, runs: Path, decide: syscall_layer.Decide | None) -> End:
        """A run into `runs`/pico whose calls on files there `decide` sees and may refuse."""
        if decide is None:
            return self.requant.run(self.run_of(runs))
        layer = syscall_layer.Layer(runs, self.folder / "layer", decide)
        end = self.requant.run(self.run_of(runs), layer=layer.address)
        layer.close()
        return end

    def resumed(self, runs: Path, *, digits: float = 0.0) -> tuple[End, str]:
        """Run to the end what was interrupted: its end, and why it is not as the undisturbed run, or "".

        digits: as of `same_run.difference`.
        """
        end = self.requant.run(self.run_of(runs))
        cause = verdicts.fault_of(end) or (f"not resumed: {end.code}" if end.code else "")
        return end, cause or same_run.difference(runs / "pico", self.finished, digits=digits)

    def fresh(self, name: str) -> Path:
        """An empty folder for one case."""
        folder = self.cases / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def close(self) -> None:
        self.requant.close()
