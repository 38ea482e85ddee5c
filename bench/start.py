"""Bench of the start of `requant run`, with and without stored token documents.

    python bench/start.py RECIPE [--times 8] [--repeat 5] [--out FILE]

--times: the recipe's local texts, this many times over. Each measurement is a process of its own: it imports and prepares; cold
finds no token documents in the run directory, warm those that an earlier start kept. Cold and warm alternate. CPU seconds are the
process's own, which other load of the machine changes less than the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
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
    args = parser.parse_args()
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
    report = {
        "recipe": args.recipe.name,
        "text_bytes": size,
        "date": time.strftime("%Y-%m-%d"),
        "device": f"CPU, {os.cpu_count()} cores",
        "versions": versions(),
        "cpu_seconds_median": medians,
        "prepare_warm_to_cold": round(medians["warm"]["prepare"] / medians["cold"]["prepare"], 2),
        "measured": found,
    }
    print(json.dumps({key: report[key] for key in ("cpu_seconds_median", "prepare_warm_to_cold")}, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


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
