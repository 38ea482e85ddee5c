"""Bench of the start of `requant run`, and of the CPU seconds of its parts.

    python bench/start.py RECIPE [--times 8] [--repeat 5] [--out FILE]
    python bench/start.py RECIPE --check [--code ../before .] [--set KEY=VALUE ...] [--repeat 3] [--out FILE]
    python bench/start.py RECIPE --parts [--code ../before .] [--set KEY=VALUE ...] [--repeat 3] [--out FILE]

The start is measured with and without stored token documents. --times: the recipe's local texts, this many times over. Each
measurement is a process of its own: it imports and prepares; cold finds no token documents in the run directory, warm those
that an earlier start kept. Cold and warm alternate. CPU seconds are the process's own, which other load of the machine changes
less than the clock.
--parts: CPU seconds of all threads of a whole `requant run`, by what its watcher is told: imports, prepare, each stage; and digests
of weights and of sections of the report. "libraries": what importing them alone takes.
--check: CPU seconds of a whole `requant check`, and what it foresees.
--code: checkouts, run in turn.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = (
    "import time, torch, transformers.models.llama.modeling_llama, peft, bitsandbytes; print(time.process_time())"
)
CHECK = "from requant.cli.main import main; main()"
RUN = """
import atexit, sys, time
from requant.cli import console
marks = [("import", 0.0)]
def mark(name):
    marks.append((name, time.process_time()))
class Watcher(console.ConsoleWatcher):
    def stage(self, name, *, done):
        if name != "prepare":
            mark(name)
        super().stage(name, done=done)
    def doing(self, what):
        at = {1: "prepare"}.get(len(marks)) or {"digests of the files of base and adapter": "keys"}.get(what)
        if at or what.startswith("what rounding keeps"):
            mark(at or "rounding")
        super().doing(what)
console.ConsoleWatcher = Watcher
def told():
    mark("end")
    print("PARTS", [(name, end - at) for (name, at), (_, end) in zip(marks, marks[1:])], len(sys.modules))
atexit.register(told)
from requant.__main__ import main
main()
"""
PARTS = ("import torch", "import a model class", "import requant", "prepare")
MEASURED = """
import json, sys, time
laps = [time.process_time()]
def lap():
    laps.append(time.process_time())
import torch
lap()
import transformers.models.llama.modeling_llama
lap()
from pathlib import Path
from requant import recipe
from requant.run import prepare
from requant.run.runner import directory_of
from requant.run.shared_inputs import SharedInputs
lap()
loaded = recipe.load(sys.argv[1], sys.argv[2:])
with directory_of(loaded).open() as directory:
    inputs = SharedInputs.of_run(directory.path)
    prepared = prepare.prepare(loaded, shared=inputs)
    lap()
    inputs.save(directory)
tokens = sum(len(w.ids) for s in prepared.texts.sets for w in s.windows)
print(json.dumps([[b - a for a, b in zip(laps, laps[1:])], prepared.texts.calibration_facts["digest"], tokens]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--code", type=Path, nargs="+", default=[ROOT], help="checkouts of requant")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of requant run")
    args = parser.parse_args()
    if args.parts:
        return whole_runs(args)
    if args.check:
        return whole_checks(args)
    with tempfile.TemporaryDirectory() as folder:
        settings, size = larger_texts(args.recipe, args.times, Path(folder))
        settings += [f"output.dir={folder}/runs"]
        found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
        same = set()
        for _ in range(args.repeat):
            shutil.rmtree(Path(folder) / "runs", ignore_errors=True)
            for name in found:
                laps, *result = started(args.recipe, settings)
                found[name].append(dict(zip(PARTS, (round(lap, 2) for lap in laps), strict=True)))
                same.add(tuple(result))
                print(name, found[name][-1], flush=True)
    assert len(same) == 1, "cold and warm give the same windows"
    medians = {name: {p: statistics.median(one[p] for one in many) for p in PARTS} for name, many in found.items()}
    report = surroundings(args) | {
        "text_bytes": size,
        "cpu_seconds_median": medians,
        "prepare_warm_to_cold": round(medians["warm"]["prepare"] / medians["cold"]["prepare"], 2),
        "measured": found,
    }
    print(json.dumps({key: report[key] for key in ("cpu_seconds_median", "prepare_warm_to_cold")}, indent=1))
    keep(report, args.out)


def whole_runs(args: argparse.Namespace) -> None:
    """Run the recipe whole with every checkout in turn; medians of the CPU seconds of each part."""
    found: dict[str, list[dict[str, float]]] = {code.resolve().name: [] for code in args.code}
    libraries, made = [], {}
    for _ in range(args.repeat):
        libraries.append(float(python(ROOT, LIBRARIES).stdout.splitlines()[-1]))
        for code in args.code:
            with tempfile.TemporaryDirectory() as folder:
                settings = [f"--set={value}" for value in [*args.set, f"output.dir={folder}"]]
                done = python(code, RUN, "run", str(args.recipe), *settings)
                if not done.stdout.strip() or done.returncode not in (0, 3, 4):  # 3, 4: its gates
                    raise SystemExit(f"{code}: requant run ended with {done.returncode}: {done.stderr[-2000:]}")
                told = done.stdout.splitlines()[-1].removeprefix("PARTS ")
                parts, modules = ast.literal_eval(f"({told.replace('] ', '], ')})")
                name = code.resolve().name
                found[name].append({part: round(seconds, 2) for part, seconds in parts} | {"modules": modules})
                made.setdefault(name, set()).add(json.dumps(results(next(Path(folder).glob("*/report.json")).parent)))
                print(name, found[name][-1], flush=True)
    medians = {
        name: {p: round(statistics.median(one[p] for one in many), 2) for p in many[0]} for name, many in found.items()
    }
    for parts in medians.values():
        parts["whole"] = round(sum(seconds for part, seconds in parts.items() if part != "modules"), 2)
    report = surroundings(args) | {
        "settings": args.set,
        "libraries": round(statistics.median(libraries), 2),
        "cpu_seconds_median": medians,
        "measured": found,
        "results": {name: [json.loads(one) for one in sorted(every)] for name, every in made.items()},
    }
    print(json.dumps({key: report[key] for key in ("libraries", "cpu_seconds_median", "results")}, indent=1))
    keep(report, args.out)


def whole_checks(args: argparse.Namespace) -> None:
    """Check the recipe with every checkout in turn; medians of the CPU seconds, and every forecast."""
    found: dict[str, list[float]] = {code.resolve().name: [] for code in args.code}
    foreseen: dict[str, list[list[str]]] = {name: [] for name in found}
    for _ in range(args.repeat):
        for code in args.code:
            name, before = code.resolve().name, children_seconds()
            settings = [f"--set={value}" for value in args.set]
            done = python(code, CHECK, "check", str(args.recipe), *settings)
            if done.returncode:
                raise SystemExit(f"{code}: requant check ended with {done.returncode}: {done.stderr[-2000:]}")
            found[name].append(round(children_seconds() - before, 1))
            foreseen[name].append([line for line in done.stdout.splitlines() if line.startswith("takes")])
            print(name, found[name][-1], flush=True)
    report = surroundings(args) | {
        "settings": args.set,
        "cpu_seconds_median": {name: statistics.median(many) for name, many in found.items()},
        "measured": found,
        "foreseen": foreseen,
    }
    print(json.dumps(report["cpu_seconds_median"]))
    keep(report, args.out)


def surroundings(args: argparse.Namespace) -> dict[str, Any]:
    """What every result says of its run."""
    return {
        "recipe": args.recipe.name,
        "date": time.strftime("%Y-%m-%d"),
        "device": f"CPU, {os.cpu_count()} cores",
        "versions": versions(),
    }


def keep(report: dict[str, Any], out: Path | None) -> None:
    """Write a result, where a file was asked for."""
    if out:
        out.write_text(json.dumps(report, indent=1) + "\n")


def children_seconds() -> float:
    """CPU seconds of all processes that this one has started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def results(run: Path) -> dict[str, str]:
    """Digests of a run's weights and of its report's sections, and what the probe said."""

    def digest(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()[:16]

    found = {str(f.relative_to(run)): digest(f.read_bytes()) for f in sorted(run.glob("[!.]*/*.safetensors"))}
    report = json.loads((run / "report.json").read_text())
    found |= {key: digest(json.dumps(timeless(report.get(key))).encode()) for key in ("sets", "answers", "gates")}
    said = [line for line in (run / "log.txt").read_text().splitlines() if "probe: " in line]
    return found | {"probe": said[0].partition("probe: ")[2] if said else ""}


def timeless(value: Any) -> Any:
    """A part of a report without its seconds."""
    if isinstance(value, dict):
        return {key: timeless(part) for key, part in value.items() if "seconds" not in key}
    return [timeless(part) for part in value] if isinstance(value, list) else value


def python(code: Path, script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A process of its own that imports the packages of a checkout."""
    paths = os.pathsep.join(str(code.resolve() / part) for part in ("pipeline", "eval"))
    return subprocess.run(
        [sys.executable, "-c", script, *words],
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def larger_texts(recipe: Path, times: int, folder: Path) -> tuple[list[str], int]:
    """(settings that name copies of the recipe's local calibration texts, each `times` over; their bytes)."""
    sys.path[:0] = [str(ROOT / "pipeline"), str(ROOT / "eval")]
    from requant import recipe as recipes

    loaded, settings, size = recipes.load(recipe), [], 0
    for i, entry in enumerate(loaded.calibration.entries):
        path = entry.data.resolve(loaded.directory)
        if path is not None:
            copy = folder / path.name
            copy.write_bytes(path.read_bytes() * times)
            size += copy.stat().st_size
            key = f"calibration.mix.{i}.data.path" if loaded.calibration.mix else "calibration.data.path"
            settings.append(f"{key}={json.dumps(str(copy))}")
    return settings, size


def started(recipe: Path, settings: list[str]) -> Any:
    paths = os.pathsep.join(str(ROOT / part) for part in ("pipeline", "eval"))
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(recipe), *settings],
        env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def versions() -> dict[str, str]:
    import torch
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    main()
