"""Bench of `requant sweep`: many settings against one run, from cold processes.

    python bench/sweep.py FOLDER --set quantize.bits=3,4 --set quantize.group_size=32,64 [--layers 4] [--repeat 3] [--out FILE]

The model is the demo's (recipes/smollm2-pydocs, whose prepare.py has made ./work), cut to its first --layers blocks with the
adapter's, and its texts. One run is `requant run` of the sweep's first combination. Run and sweep alternate, each into an empty
directory; CPU seconds are those of the process and its children, which other load of the machine changes less than the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "recipes" / "smollm2-pydocs"
LAYER = re.compile(r"\blayers\.(\d+)\.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--set", dest="settings", action="append", required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16, help="windows of calibration, 512 tokens each")
    parser.add_argument("--tokens", type=int, default=8000, help="of each of the two evaluation sets")
    parser.add_argument("--work", type=Path, default=DEMO / "work")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    recipe = inputs(args)
    one, count = first_combination(recipe, args.settings)
    measured: dict[str, list[dict[str, Any]]] = {"one": [], "sweep": []}
    commands = {"one": ["run", *setting_options(one)], "sweep": ["sweep", *setting_options(args.settings)]}
    for _ in range(args.repeat):
        for name, (command, *options) in commands.items():
            runs = args.folder / "runs"
            shutil.rmtree(runs, ignore_errors=True)
            measured[name].append(timed([command, str(recipe), *options, "--set", f"output.dir={runs}"], runs))
            print(name, {k: v for k, v in measured[name][-1].items() if k != "runs"}, flush=True)
    report = {"settings": args.settings, "combinations": count, **facts(args), "measured": measured}
    for unit in ("seconds", "cpu_seconds"):
        medians = {name: statistics.median(one[unit] for one in many) for name, many in measured.items()}
        report[f"{unit}_ratio"] = round(medians["sweep"] / medians["one"], 2)
    print({key: value for key, value in report.items() if key.endswith("ratio")})
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def inputs(args: argparse.Namespace) -> Path:
    """Write base, adapter and recipe of the first blocks."""
    from safetensors.torch import load_file, save_file

    args.folder.mkdir(parents=True, exist_ok=True)
    work = args.work.resolve()
    for name, source in (("base", work / "base-nf4"), ("adapter", DEMO / "adapter")):
        target = args.folder / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
        tensors: dict[str, Any] = {}
        for file in sorted(source.glob("*.safetensors")):
            tensors |= load_file(file)
        kept = {n: t for n, t in tensors.items() if not (at := LAYER.search(n)) or int(at[1]) < args.layers}
        file_name = "model.safetensors" if name == "base" else "adapter_model.safetensors"
        save_file(kept, target / file_name, metadata={"format": "pt"})
    config = json.loads((args.folder / "base" / "config.json").read_text())
    (args.folder / "base" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": args.layers}))
    texts = work / "texts"
    mix = [{"data": {"path": str(texts / f"{name}.jsonl")}} for name in ("train", "general-calibration")]
    sets = [
        {"name": name, "data": {"path": str(texts / f"{file}.jsonl")}, "tokens": args.tokens, "document_tokens": 128}
        for name, file in (("in-domain", "heldout"), ("general", "general"))
    ]
    document = {
        "name": "cut",
        "base": {"model": "./base"},
        "adapter": "./adapter",
        "calibration": {"mix": mix, "samples": args.samples, "length": 512},
        "evaluate": {"window": 512, "sets": sets},
        "device": "cpu",
    }
    (args.folder / "recipe.yaml").write_text(json.dumps(document, indent=1) + "\n")
    return args.folder / "recipe.yaml"  # type: ignore[no-any-return]


def first_combination(recipe: Path, settings: Sequence[str]) -> tuple[list[str], int]:
    """(settings of the first run, number of runs)."""
    sys.path[:0] = [str(ROOT / "pipeline"), str(ROOT / "eval")]
    from requant import recipe as recipes
    from requant.recipe.combinations import combinations

    chosen = combinations(partial(recipes.load, recipe), settings)
    varied = {setting.partition("=")[0] for setting in chosen[0].settings}
    single = [setting for setting in settings if setting.partition("=")[0] not in varied]
    return [*chosen[0].settings, *single], len(chosen)


def setting_options(settings: Sequence[str]) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def timed(arguments: Sequence[str], runs: Path) -> dict[str, Any]:
    """Seconds on the clock and of the CPU, and the stages of every run."""
    paths = os.pathsep.join(str(ROOT / part) for part in ("pipeline", "eval"))
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "requant", *arguments],
        env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    stages = {run.name: stages_of(run) for run in sorted(runs.iterdir())}
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "runs": stages}


def stages_of(run: Path) -> dict[str, float]:
    """Stage -> seconds, of what this run did itself."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return {event["stage"]: event["seconds"] for event in events if event["event"] == "done"}


def facts(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    return {
        "model": f"SmolLM2-135M-Instruct, NF4, first {args.layers} of 30 blocks, with the demo's adapter",
        "calibration": f"{args.samples} x 512 tokens",
        "evaluation": f"2 sets of {args.tokens} tokens",
        "date": time.strftime("%Y-%m-%d"),
        "device": f"CPU, {os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
    }  # fmt: skip


if __name__ == "__main__":
    main()
