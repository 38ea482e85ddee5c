"""Engine script: load a checkpoint in MLX's format with mlx-lm, score, generate.

    python engine_mlx.py < request.json       (started by `engine_processes` in the interpreter that has mlx-lm)

It imports nothing of ours. MLX takes its own device: a GPU of Apple's where there is one, else the CPU.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def load(request: dict[str, Any]) -> Any:
    """The model, computing in request["dtype"]."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(request["path"]))
    model.set_dtype(getattr(mx, request["dtype"]))
    return model


def kernels(model: Any) -> list[str]:
    """Class names of the modules that hold packed weights."""
    return sorted({type(module).__name__ for _, module in model.named_modules() if hasattr(module, "scales")})


def nll(model: Any, row: list[int]) -> list[float]:
    """-ln p of every token after the first, in fp32."""
    import mlx.core as mx

    logits = model(mx.array([row]))[0, :-1].astype(mx.float32)
    targets = mx.array(row[1:])[:, None]
    found: list[float] = (
        mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets, axis=-1).squeeze(-1)
    ).tolist()
    return found


def generated(model: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens after a prompt."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=count)]


def speed(model: Any, request: dict[str, Any]) -> dict[str, float]:
    """Seconds of a prefill and tokens per second of decoding; one sequence at a time."""
    asked = request["speed"]
    row = (request["rows"][0] * asked["prompt"])[: asked["prompt"]]
    best: dict[str, float] = {}
    for _ in range(asked["repeat"] + 1):  # the first one warms up
        for name, count in (("prefill", 1), ("whole", asked["new"])):
            started = time.perf_counter()
            generated(model, row, count)
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - started)
    decode = best["whole"] - best["prefill"]
    return {"prefill_seconds": best["prefill"], "decode_tokens_per_second": (asked["new"] - 1) / decode}


def main() -> None:
    request = json.load(sys.stdin)
    rows, started = request["rows"], time.perf_counter()
    model = load(request)
    answer: dict[str, Any] = {"load_seconds": time.perf_counter() - started, "kernels": kernels(model)}
    answer["nll"] = [nll(model, row) for row in rows]
    answer["generated"] = generated(model, rows[0][: request["prompt"]], request["new_tokens"])
    if request.get("speed"):
        answer["speed"] = speed(model, request)
    answer["versions"] = {name: version(name) for name in ("mlx", "mlx-lm")}
    print("RESULT " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
