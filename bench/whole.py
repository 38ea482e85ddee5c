"""Bench of a whole `requant run`, from a cold process to the report, by stage.

    python bench/whole.py RECIPE [--set heal=off] [--code . ../before] [--ranks 1 2] [--check] [--again] [--keep FOLDER]
        [--out FILE]
    python bench/whole.py --inputs smollm2 FOLDER [--documents 200 ...] -- [--set heal=off ...]
    python bench/whole.py --inputs random FOLDER --layers 8 -- [...]

--inputs: make them with bench/whole_inputs.py first (kept in FOLDER between calls); its options follow, then `--`.
--code: checkouts to run, one after another, on the same recipe; ratios to the last one are printed.
--ranks: numbers of GPUs (of processes, without GPUs) that torchrun starts; ratios to the last one, as above.
--check: also `requant check`, before. --again: also the finished run once more, which has nothing to do.
Stages are read from the run's own events.jsonl and log.txt. `limit`: the least that a stage can take on this machine, by
bench/limits.py. `cpu`: cores that the process kept busy, from /proc;
`gpu`: share of the time in which the first GPU ran a kernel, from nvidia-smi, a sample every tenth of a second.
With several ranks `cpu` is left out: the process that is sampled is torchrun's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) \w+ (\S+): (.*)")
SCORING = re.compile(r"scoring (\S+) on (.+)|loading (\S+)$")
EVERY = 0.1  # seconds between two samples
Span = tuple[str, float, float]  # name, start and end in seconds since the epoch


@dataclass
class Samples:
    """What a process and its GPU did over time. cpu: (time, CPU seconds so far); gpu: (time, busy share, bytes)."""

    pid: int
    cpu: list[tuple[float, float]] = field(default_factory=list)
    gpu: list[tuple[float, float, float]] = field(default_factory=list)

    def mean(self, start: float, end: float) -> dict[str, float]:
        """Cores and GPU share busy between two times."""
        found: dict[str, float] = {}
        cpu = [(at, used) for at, used in self.cpu if start <= at <= end]
        if len(cpu) > 1 and cpu[-1][0] > cpu[0][0]:
            found["cpu"] = (cpu[-1][1] - cpu[0][1]) / (cpu[-1][0] - cpu[0][0])
        gpu = [(share, used) for at, share, used in self.gpu if start <= at <= end]
        if gpu:
            found |= {"gpu": sum(share for share, _ in gpu) / len(gpu), "gpu memory": max(used for _, used in gpu)}
        return found

    def sample_cpu(self, done: threading.Event) -> None:
        ticks = os.sysconf("SC_CLK_TCK")
        while not done.wait(EVERY):
            with suppress(OSError, IndexError):  # it has ended, or this is no Linux
                fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
                self.cpu.append((time.time(), (int(fields[11]) + int(fields[12])) / ticks))

    def read_gpu(self, lines: Any) -> None:
        for line in lines:
            with suppress(ValueError):
                share, used = (float(part) for part in line.split(","))
                self.gpu.append((time.time(), share / 100, used * 2**20))


@contextmanager
def sampled(pid: int) -> Iterator[Samples]:
    samples, done = Samples(pid), threading.Event()
    threads = [threading.Thread(target=samples.sample_cpu, args=(done,))]
    smi = None
    if shutil.which("nvidia-smi"):
        query = ["--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits", "-i", "0"]
        smi = subprocess.Popen(["nvidia-smi", *query, "-lms", str(int(1e3 * EVERY))], stdout=subprocess.PIPE, text=True)
        threads.append(threading.Thread(target=samples.read_gpu, args=(smi.stdout,)))
    for thread in threads:
        thread.start()
    try:
        yield samples
    finally:
        done.set()
        if smi is not None:
            smi.terminate()
            smi.wait()
        for thread in threads:
            thread.join()


def environment(code: Path) -> dict[str, str]:
    """The environment in which a checkout's own packages are imported."""
    own = [str(code.resolve() / part) for part in ("pipeline", "eval")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [*own, os.environ.get("PYTHONPATH")]))}


def command(code: Path, words: list[str], log: Path, ranks: int = 1) -> tuple[float, float, Samples]:
    """(start, end, samples) of one `requant` command of a checkout, in a cold process; of ranks by torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    started = time.time()
    with log.open("w") as out:
        start = [sys.executable, *torchrun, "-m", "requant", *words]
        process = subprocess.Popen(start, env=environment(code), stdout=out, stderr=out)
        with sampled(process.pid) as samples:
            code_of_exit = process.wait()
            ended = time.time()
    if code_of_exit not in (0, 1):  # 1: a gate failed
        raise SystemExit(f"requant {' '.join(words)} ended with {code_of_exit}:\n{log.read_text()[-3000:]}")
    return started, ended, samples


def stages(run: Path, started: float, ended: float) -> list[Span]:
    """The spans of a run that began in an empty directory: stages in order, and what is around them."""
    found: list[Span] = []
    begun: dict[str, float] = {}
    before = started
    for line in (run / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "start":
            begun[event["stage"]] = event["time"]
            name = {"merge": "start and check", "quantize": "probe"}.get(event["stage"], f"before {event['stage']}")
            if event["time"] - before > EVERY:
                found.append((name, before, event["time"]))
        elif event["event"] == "done":
            before = event["time"]
            found.append((event["stage"], begun[event["stage"]], before))
    return [*found, ("end", before, ended)]


def variants(run: Path, evaluate: Span) -> list[Span]:
    """The spans inside evaluate: "variant, loading" and "variant on set"."""
    marks: list[tuple[str, float]] = []
    for line in (run / "log.txt").read_text().splitlines():
        at = LINE.match(line)
        said = SCORING.match(at[4]) if at and at[3].startswith("requant.evaluate") else None
        if at is None or said is None:
            continue
        when = time.mktime(time.strptime(at[1], "%Y-%m-%d %H:%M:%S")) + int(at[2]) / 1e3
        if evaluate[1] - 1e-3 <= when <= evaluate[2]:
            marks.append((f"{said[3]}, loading" if said[3] else f"{said[1]} on {said[2]}", when))
    ends = [when for _, when in marks[1:]] + [evaluate[2]]
    return [(name, when, end) for (name, when), end in zip(marks, ends, strict=True)]


def measured(code: Path, ranks: int, recipe: Path, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One whole run of a checkout, on this many ranks, in an empty directory."""
    words = [word for value in [*args.set, f"output.dir={folder}"] for word in ("--set", value)]
    result: dict[str, Any] = {}
    if args.check:
        begun, over, _ = command(code, ["check", str(recipe), *words], folder / "check.txt")
        result["check"] = over - begun
    started, ended, samples = command(code, ["run", str(recipe), *words], folder / "printed.txt", ranks)
    if ranks > 1:
        samples.cpu.clear()  # torchrun's, which only waits
    (run,) = (path.parent for path in folder.glob("*/events.jsonl"))
    spans = stages(run, started, ended)
    inside = [s for span in spans if span[0] == "evaluate" for s in variants(run, span)]
    result |= {"seconds": ended - started, "stages": table(spans, samples), "evaluate": table(inside, samples)}
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
        shutil.copy(run / "log.txt", args.keep / f"{code.resolve().name}-{ranks}.txt")
    result["numbers"] = numbers(json.loads((run / "report.json").read_text()))
    result |= asked(str(ROOT / "bench" / "limits.py"), str(run))
    for name, row in result["limits"].items():
        result["stages"][name]["limit"] = row["seconds"]
    if args.again:
        begun, over, _ = command(code, ["run", str(recipe), *words], folder / "again.txt")
        result["again"] = over - begun
    return result


def table(spans: list[Span], samples: Samples) -> dict[str, dict[str, float]]:
    return {name: {"seconds": end - start, **samples.mean(start, end)} for name, start, end in spans}


def numbers(report: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Sums over each document of each variant on each set: what all other numbers are made of."""
    return {
        f"{name} on {section['name']}": {
            "ppl": [v["ppl"]["value"] for v in section["variants"] if v["name"] == name],
            **sums,
        }
        for section in report["sets"]
        for name, sums in section["documents"].items()
    }


def show(result: dict[str, Any], beside: dict[str, Any] | None) -> None:
    """Seconds of each part, and how many times less that is than `beside`."""

    def line(name: str, row: dict[str, float], other: dict[str, float] | None) -> None:
        more = "".join(f"  {k} {row[k]:5.2f}" for k in ("cpu", "gpu") if k in row)
        more += f"  {row['gpu memory'] / 1e9:6.1f} GB" if "gpu memory" in row else ""
        more += f"  limit {row['limit']:6.2f}" if "limit" in row else ""
        more += f"  {other['seconds'] / row['seconds']:5.2f} x" if other and row["seconds"] > 0 else ""
        print(f"{name:32} {row['seconds']:8.2f} s{more}")

    for part in ("stages", "evaluate"):
        print(f"-- {part}")
        for name, row in result[part].items():
            line(name, row, beside[part].get(name) if beside else None)
    print("-- whole")
    for name in ("check", "seconds", "again"):
        if name in result:
            line(name, {"seconds": result[name]}, {"seconds": beside[name]} if beside else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of requant run")
    parser.add_argument("--code", type=Path, nargs="+", default=[ROOT], help="checkouts of requant")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="GPUs of each run")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for the log of each run, with what each stage did")
    parser.add_argument("--out", type=Path)
    argv = sys.argv[1:]
    recipe = None
    if argv[:1] == ["--inputs"]:
        end = argv.index("--") if "--" in argv else len(argv)
        recipe, made, argv = Path(argv[2]) / "recipe.yaml", argv[1:end], argv[end + 1 :]
        if not recipe.exists():  # in a process of its own: no memory of the GPU stays taken
            subprocess.run(
                [sys.executable, ROOT / "bench" / "whole_inputs.py", *made], check=True, env=environment(ROOT)
            )
    args = parser.parse_args(argv)
    recipe = recipe or args.recipe or parser.error("a recipe, or --inputs")
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "arguments": shown(sys.argv[1:]),
        **machine(),
        "runs": {},
    }
    runs = result["runs"]
    for number, (code, ranks) in enumerate((code, ranks) for code in args.code for ranks in args.ranks):
        with tempfile.TemporaryDirectory() as folder:
            name = f"{number}: {code.resolve().name}" + (f", {ranks} ranks" if len(args.ranks) > 1 else "")
            runs[name] = measured(code, ranks, recipe, args, Path(folder))
            print(f"== {name}", flush=True)
            show(runs[name], None)
    if len(runs) > 1:
        *_, last = runs.values()
        for name, one in list(runs.items())[:-1]:
            print(f"== {name}, as many times the last one's seconds")
            show(last, one)
            print("numbers, largest relative difference:", difference(one, last))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Largest relative difference of each kind of number, over variants, sets and documents."""
    found: dict[str, float] = {}
    for name, kinds in one["numbers"].items():
        for kind, values in kinds.items():
            for a, b in zip(values, other["numbers"][name][kind], strict=True):
                found[kind] = max(found.get(kind, 0.0), abs(a - b) / max(abs(b), 1e-30))
    return found


def shown(arguments: list[str]) -> list[str]:
    """Arguments without the directories of this machine."""
    return [Path(word).name if os.sep in word and "=" not in word else word for word in arguments]


def machine() -> dict[str, Any]:
    """The device and the versions, asked in a process of its own."""
    ask = (
        "import json; from requant.runtime import measurements as m; from requant.runtime.device import pick_device;"
        "d = str(pick_device('auto')); print(json.dumps({'machine': m.hardware(d), 'versions': m.versions()}))"
    )
    return {"platform": platform.machine(), **asked("-c", ask)}


def asked(*arguments: str) -> Any:
    """What Python prints last, as JSON, in a process of its own: no memory of the GPU stays taken."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment(ROOT))
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
