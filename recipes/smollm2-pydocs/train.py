"""A QLoRA fine-tune of the NF4 base on Python's help topics, in a plain torch loop.

    python3 train.py --base work/base-nf4 --data work/texts --out work/adapter

Plain-text language modelling on packed windows. The held-out perplexity is printed after every epoch but
selects nothing: the adapter saved is the one after the last step. Writes `adapter_model.safetensors`
(float16), `adapter_config.json` and `training.json`.
"""

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

Tokens = list[list[int]]

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKAGES = ["torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors"]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="NF4 checkpoint directory")
    parser.add_argument("--data", type=Path, required=True, help="directory of train.jsonl, heldout.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="adapter directory to write; must not exist")
    parser.add_argument("--base-name", default="./base-nf4", help="base_model_name_or_path to record")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=2e-4, help="peak learning rate")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps")
    parser.add_argument("--window", type=int, default=1024, help="tokens")
    parser.add_argument("--windows-per-step", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=4, help="windows per forward pass")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-steps", type=int, default=None, help="stop early, for a smoke test")
    return parser.parse_args()


def read_documents(path: Path, tokenizer: Any) -> Tokens:
    """Token ids of each row's text, closed by EOS; the tokenizer adds no BOS."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [[*tokenizer(row["text"], verbose=False).input_ids, tokenizer.eos_token_id] for row in rows]


def pack(documents: Tokens, window: int) -> Tokens:
    """The documents end to end, cut into windows; only the last may be shorter (2 tokens at least)."""
    stream = [token for document in documents for token in document]
    windows = [stream[i : i + window] for i in range(0, len(stream), window)]
    return [chunk for chunk in windows if len(chunk) > 1]


def epoch_windows(documents: Tokens, window: int, rng: random.Random) -> Tokens:
    """One epoch's full windows in random order, over freshly shuffled documents."""
    order = rng.sample(documents, len(documents))
    windows = [chunk for chunk in pack(order, window) if len(chunk) == window]
    rng.shuffle(windows)
    return windows


def steps(documents: Tokens, args: argparse.Namespace) -> Iterator[tuple[int, Tokens]]:
    """(epoch, windows of one optimizer step), `windows_per_step` at a time.

    What is left of an epoch is dropped: the shuffle leaves out other windows each time.
    """
    rng = random.Random(args.seed)
    for epoch in range(args.epochs):
        windows = epoch_windows(documents, args.window, rng)
        if len(windows) < args.windows_per_step:
            raise SystemExit(f"only {len(windows)} windows of {args.window} tokens: shorten --window")
        for i in range(0, len(windows) - args.windows_per_step + 1, args.windows_per_step):
            yield epoch, windows[i : i + args.windows_per_step]


def set_dropout(model: Any, on: bool) -> None:
    """Switch the dropout layers alone.

    Not `model.eval()`: on a CPU with AVX512-BF16, bitsandbytes 0.50 repacks its weights for good at the first
    forward in eval mode, and has no gradient for them any more.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.train(on)


@torch.no_grad()
def perplexity(model: Any, windows: Tokens, device: str) -> float:
    """exp of the mean negative log-likelihood over all predicted tokens of `windows`, one at a time."""
    set_dropout(model, on=False)
    total, predicted = 0.0, 0
    for window in windows:
        ids = torch.tensor([window], device=device)
        with torch.autocast(ids.device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        total += loss.item() * (len(window) - 1)
        predicted += len(window) - 1
    set_dropout(model, on=True)
    return math.exp(total / predicted)


def train_step(model: Any, windows: Tokens, args: argparse.Namespace) -> float:
    """Accumulate the gradient of the mean loss over `windows` and return that loss."""
    mean = 0.0
    for i in range(0, len(windows), args.micro_batch):
        ids = torch.tensor(windows[i : i + args.micro_batch], device=args.device)
        with torch.autocast(ids.device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss * (len(ids) / len(windows))
        loss.backward()
        mean += loss.item()
    return mean


def learning_rate(step: int, total: int, args: argparse.Namespace) -> float:
    """Linear warm-up to `lr`, then a cosine down to 0 at step `total`."""
    warm = max(1, round(args.warmup * total))
    if step < warm:
        return float(args.lr) * (step + 1) / warm
    return float(args.lr) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def with_adapter(args: argparse.Namespace) -> Any:
    """The frozen NF4 base with fresh LoRA layers (float32) on every linear layer but the head."""
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.bfloat16, device_map={"": args.device})
    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.alpha,
        lora_dropout=args.dropout,
        target_modules=LINEAR_LAYERS,
        bias="none",
        task_type="CAUSAL_LM",
    )
    base.config.use_cache = False
    model = get_peft_model(base, config)
    model.train()
    return model


def fit(model: Any, train: Tokens, heldout: Tokens, args: argparse.Namespace) -> dict[str, Any]:
    """Run all steps; returns the losses and the held-out perplexity after each epoch."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay)
    batches = list(steps(train, args))
    total = len(batches)
    before = perplexity(model, heldout, args.device)
    history: dict[str, Any] = {"steps": 0, "loss": [], "heldout_perplexity": [before]}
    print(f"{total} steps; held-out perplexity before {before:.4f}", flush=True)
    for step, (epoch, windows) in enumerate(batches[: args.max_steps]):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, args)
        loss = train_step(model, windows, args)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history["loss"].append(round(loss, 5))
        history["steps"] = step + 1
        last = step + 1 == min(total, args.max_steps or total)
        if last or batches[step + 1][0] != epoch:
            now = perplexity(model, heldout, args.device)
            history["heldout_perplexity"].append(now)
            print(f"epoch {epoch + 1} step {step + 1} loss {loss:.4f} held-out ppl {now:.4f}", flush=True)
    return history


def save(model: Any, out: Path, base_name: str) -> None:
    """The adapter as float16 safetensors and a config without machine paths."""
    out.mkdir(parents=True)
    state = get_peft_model_state_dict(model)
    half = {name: tensor.detach().cpu().to(torch.float16).contiguous() for name, tensor in state.items()}
    if not all(torch.isfinite(tensor).all() for tensor in half.values()):
        raise SystemExit("the adapter doesn't fit float16: it holds infinite or undefined values")
    save_file(half, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"]
    config.inference_mode = True
    config.base_model_name_or_path = base_name
    config.save_pretrained(out)
    path = out / "adapter_config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    written["target_modules"] = sorted(written["target_modules"])  # a set inside peft: its order is random
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def record(args: argparse.Namespace, history: dict[str, Any], started: float) -> dict[str, Any]:
    """What `training.json` holds: settings, versions, device, losses."""
    settings = {key: value for key, value in vars(args).items() if key not in {"base", "data", "out"}}
    on_gpu = args.device.startswith("cuda")
    return {
        "settings": settings,
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "cpu",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "seconds": round(time.monotonic() - started, 1),
        **history,
    }


def main() -> None:
    args = options()
    if args.out.exists():
        raise SystemExit(f"{args.out} exists; remove it or choose another --out")
    started = time.monotonic()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    train = read_documents(args.data / "train.jsonl", tokenizer)
    heldout = pack(read_documents(args.data / "heldout.jsonl", tokenizer), args.window)
    model = with_adapter(args)
    sizes = sum(map(len, train)), sum(map(len, heldout))
    print(f"{sizes[0]} training tokens, {sizes[1]} held-out, on {args.device}", flush=True)
    model.print_trainable_parameters()
    history = fit(model, train, heldout, args)
    save(model, args.out, args.base_name)
    written = record(args, history, started)
    (args.out / "training.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    before, after = history["heldout_perplexity"][0], history["heldout_perplexity"][-1]
    print(f"held-out perplexity {before:.4f} -> {after:.4f} in {written['seconds']} s; adapter in {args.out}")


if __name__ == "__main__":
    main()
