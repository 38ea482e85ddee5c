"""Engine script: load a GGUF file in llama.cpp, score, generate.

    python engine_llamacpp.py < request.json       (started by `engine_processes` in the interpreter that has xllamacpp)

It imports nothing of ours. llama.cpp's own server is asked over loopback: it has no scores of a prompt, so every token
is forced by a bias after those before it, which its cache keeps, and its probability without the bias is read.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from importlib.metadata import version
from typing import Any

FORCED = 1000.0  # bias of a token's logit
EVERY = 10**7  # tokens of a vocabulary, at most


def start(request: dict[str, Any]) -> Any:
    """A server of one slot that holds the longest row."""
    import xllamacpp

    longest = max(map(len, request["rows"])) + request["new_tokens"]
    if request.get("speed"):
        longest = max(longest, request["speed"]["prompt"] + request["speed"]["new"])
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_parallel, settings.warmup = request["path"], 1, False
    settings.n_ctx = 256 * (longest // 256 + 1)
    settings.cpuparams.n_threads = request.get("threads") or os.cpu_count()
    return xllamacpp.Server(settings)


def post(server: Any, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The server's answer to a request."""
    asked = urllib.request.Request(
        server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=600) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def logprob(server: Any, before: list[int], token: int, letter: int) -> float:
    """ln p of a token after others.

    letter: a token that is shown at once. The end, and a part of a character, are not: they are looked up among all.
    """
    asked = {"prompt": before, "n_predict": 1, "temperature": -1, "n_probs": 1, "logit_bias": [[token, FORCED]]}
    made = post(server, "/completion", asked).get("completion_probabilities") or [{"id": None}]
    if made[0]["id"] == token:
        return float(made[0]["logprob"])
    asked |= {"n_probs": EVERY, "logit_bias": [[letter, FORCED]]}
    listed = post(server, "/completion", asked)["completion_probabilities"][0]["top_logprobs"]
    return float(next(t["logprob"] for t in listed if t["id"] == token))


def speed(server: Any, request: dict[str, Any]) -> dict[str, float]:
    """Seconds of a prefill and tokens per second of decoding, as llama.cpp times them."""
    asked = request["speed"]
    row = (request["rows"][0] * asked["prompt"])[: asked["prompt"]]
    body = {"prompt": row, "n_predict": asked["new"], "temperature": -1, "ignore_eos": True, "cache_prompt": False}
    timed = [post(server, "/completion", body)["timings"] for _ in range(asked["repeat"] + 1)]  # the first warms up
    return {
        "prefill_seconds": min(t["prompt_ms"] for t in timed) / 1000,
        "decode_tokens_per_second": max(t["predicted_per_second"] for t in timed),
    }


def main() -> None:
    request = json.load(sys.stdin)
    rows, started = request["rows"], time.perf_counter()
    server = start(request)
    answer: dict[str, Any] = {"load_seconds": time.perf_counter() - started, "kernels": ["llama.cpp"]}
    letter = post(server, "/tokenize", {"content": "a"})["tokens"][-1]
    answer["nll"] = [[-logprob(server, row[:k], row[k], letter) for k in range(1, len(row))] for row in rows]
    body = {"prompt": rows[0][: request["prompt"]], "n_predict": request["new_tokens"], "temperature": -1}
    answer["generated"] = post(server, "/completion", body | {"return_tokens": True})["tokens"]
    if request.get("speed"):
        answer["speed"] = speed(server, request)
    answer["versions"] = {"xllamacpp": version("xllamacpp")}
    print("RESULT " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
