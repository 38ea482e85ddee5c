"""Engine script: load a quantized checkpoint with transformers, score, generate.

    python engine_transformers.py < request.json       (started by `engine_processes`)

It needs transformers, and gptqmodel with optimum, compressed-tensors or auto-round. It imports nothing of ours and is a
process of its own: gptqmodel patches what it imports and compiles kernels.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from typing import Any


def load(request: dict[str, Any]) -> Any:
    """The model on its device; request["backend"]: the kernel, default the library's choice."""
    import torch
    import transformers

    options: dict[str, Any] = {"dtype": getattr(torch, request["dtype"]), "device_map": {"": request["device"]}}
    declared = quantization_of(request["path"])
    if request.get("backend"):
        options["quantization_config"] = transformers.GPTQConfig(bits=declared["bits"], backend=request["backend"])
    if needs_dequantize(declared):
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        request["path"], output_loading_info=True, trust_remote_code=request["trust_remote_code"], **options
    )
    lost = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if lost:
        raise RuntimeError(f"transformers reports {lost}")
    return model.eval()


def quantization_of(path: str) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint; an empty one for a model in 16 bit."""
    with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
        declared: dict[str, Any] = json.load(file).get("quantization_config") or {}
    return declared


def needs_dequantize(declared: dict[str, Any]) -> bool:
    """Whether transformers 5.23 loads a checkpoint only if it may decode it while loading.

    Otherwise it expects zero points that are not packed. Decoding so, it knows one config group alone.
    """
    groups = list((declared.get("config_groups") or {}).values())
    return len(groups) == 1 and not groups[0]["weights"]["symmetric"]


def score(model: Any, rows: list[list[int]]) -> list[list[float]]:
    """-ln p of every token after the first, row by row, in fp32."""
    import torch

    out = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row], device=model.device)
            logits = model(input_ids=ids).logits[0, :-1].float()
            nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            out.append([float(x) for x in nll])
    return out


def kernels(model: Any) -> list[str]:
    """Class names of the modules that hold packed weights."""
    ways = ({"weight_packed"}, {"qweight", "scales"})
    packed = (m for m in model.modules() if any(all(hasattr(m, name) for name in way) for way in ways))
    return sorted({type(m).__name__ for m in packed})


def speed(model: Any, request: dict[str, Any]) -> dict[str, float]:
    """Seconds of a prefill and of decoding; request["speed"]: prompt, new, batch, repeat."""
    import torch

    asked = request["speed"]
    ids = torch.tensor(
        [(request["rows"][0] * asked["prompt"])[: asked["prompt"]]] * asked["batch"], device=model.device
    )
    fixed: dict[str, Any] = {"do_sample": False, "min_new_tokens": asked["new"], "max_new_tokens": asked["new"]}
    best: dict[str, float] = {}
    for _ in range(asked["repeat"] + 1):  # the first one warms up
        for name, options in (("prefill", {"max_new_tokens": 1, "do_sample": False}), ("whole", fixed)):
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - started)
    decode = best["whole"] - best["prefill"]
    return {
        "prefill_seconds": best["prefill"],
        "decode_tokens_per_second": asked["batch"] * (asked["new"] - 1) / decode,
    }


def main() -> None:
    import torch

    request = json.load(sys.stdin)
    torch.set_num_threads(request.get("threads") or torch.get_num_threads())
    started = time.perf_counter()
    model = load(request)
    seconds = time.perf_counter() - started
    answer: dict[str, Any] = {"load_seconds": seconds, "kernels": kernels(model)}
    answer["nll"] = score(model, request["rows"])
    ids = torch.tensor([request["rows"][0][: request["prompt"]]], device=model.device)
    with torch.no_grad():
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request["new_tokens"],
            do_sample=False,
            pad_token_id=0,
        )
    answer["generated"] = made[0, ids.shape[1] :].tolist()
    if request.get("speed"):
        answer["speed"] = speed(model, request)
    readers = {
        "gptq": ("gptqmodel", "optimum"),
        "compressed-tensors": ("compressed-tensors",),
        "auto-round": ("auto-round",),
    }
    method = quantization_of(request["path"]).get("quant_method", "")
    answer["versions"] = {n: version(n) for n in ("transformers", "torch", *readers.get(method, ()))}
    print("RESULT " + json.dumps(answer))


if __name__ == "__main__":
    main()
