"""A QLoRA fine-tune of the NF4 base on chats of word problems, in a plain torch loop.

    python3 train.py --base work/base-nf4 --data work/texts --replay work/texts/replay.jsonl --out work/adapter

The loss is on answers alone, with the end of the turn, or with `--loss-on chats` on every token of the chat. With
`--replay` every step also learns windows of other text, so that the model forgets less of what it knew. Held-out
perplexity is printed before, after every epoch and at the end: of answers, of whole chats, and of the text of
`--general`, which says what was forgotten. So is the share of held-out problems that greedy decoding solves, before and
after. None selects anything: the adapter saved is that after the last step. Writes `adapter_model.safetensors`
(bfloat16), `adapter_config.json` and `training.json`.
"""

import argparse
import json
import math
import platform
import random
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ASKED_AT_ONCE = 60
PACKAGES = ["torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors"]


class Chat(NamedTuple):
    """Token ids of a chat up to the end of its answer; `asked`: how many come before the answer."""

    ids: list[int]
    asked: int
    answer: int


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="NF4 checkpoint directory")
    parser.add_argument("--data", type=Path, required=True, help="directory of train.jsonl, heldout.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="adapter directory to write; must not exist")
    parser.add_argument("--base-name", default="./base-nf4", help="base_model_name_or_path to record")
    parser.add_argument("--general", type=Path, help="JSONL of {text} rows of another kind to score before and after")
    parser.add_argument("--replay", type=Path, help="JSONL of {text} rows of another kind to learn besides")
    parser.add_argument("--replayed", type=int, default=8, help="windows of 256 tokens of --replay a step")
    parser.add_argument("--loss-on", choices=("answers", "chats"), default="answers")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument("--warmup", type=float, default=0.05, help="share of the steps")
    parser.add_argument("--batch", type=int, default=32, help="chats a step")
    parser.add_argument("--rows", type=int, default=None, help="first chats of train.jsonl; all where left out")
    parser.add_argument("--held-out", type=int, default=None, help="first chats of heldout.jsonl; all where left out")
    parser.add_argument("--solve", type=int, default=120, help="held-out problems to answer before and after")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-steps", type=int, default=None, help="stop early, for a smoke test")
    parser.add_argument(
        "--decode", action="store_true",
        help="train on the base's 4-bit values decoded once to float32: the same values, faster on a CPU",
    )  # fmt: skip
    return parser.parse_args()


def read_texts(path: Path | None, tokenizer: Any, length: int = 512, windows: int = 64) -> list[Chat]:
    """The text of all rows as windows of `length` tokens, the first of them not scored."""
    if path is None:
        return []
    rows = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    ids = [i for text in rows for i in tokenizer(text, add_special_tokens=False).input_ids]
    first = [tokenizer.bos_token_id]
    starts = range(0, len(ids) - length, length)
    return [Chat(first + ids[i : i + length], 1, "") for i in starts][:windows]


def read_chats(path: Path, tokenizer: Any, count: int | None) -> list[Chat]:
    """Chats in the model's own turns; what follows the end of the last turn is cut off."""
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    chats = []
    for line in path.read_text(encoding="utf-8").splitlines()[:count]:
        row = json.loads(line)
        turns = row["messages"]
        before, whole = (
            tokenizer(tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=asked),
                      add_special_tokens=False).input_ids
            for part, asked in ((turns[:-1], True), (turns, False))
        )  # fmt: skip
        if whole[: len(before)] != before:
            raise SystemExit(f"{path}: the question is not the beginning of the chat: {turns[0]['content'][:60]!r}")
        last = len(whole) - whole[::-1].index(end)
        chats.append(Chat(whole[:last], len(before), row["answer"]))
    return chats


def answer_loss(model: Any, chats: list[Chat], device: str) -> tuple[torch.Tensor, int]:
    """(sum of the negative log-likelihood of all scored tokens, their number); logits of these alone are made."""
    width = max(len(chat.ids) for chat in chats)
    ids = torch.zeros(len(chats), width, dtype=torch.long)
    mask, scored = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for i, chat in enumerate(chats):
        ids[i, : len(chat.ids)] = torch.tensor(chat.ids)
        mask[i, : len(chat.ids)] = 1
        scored[i, chat.asked : len(chat.ids)] = True
    ids, mask, scored = ids.to(device), mask.to(device), scored.to(device)
    whole = model.get_base_model()
    with torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda")):
        hidden = whole.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        logits = whole.lm_head(hidden[:, :-1][scored[:, 1:]])
    targets = ids[:, 1:][scored[:, 1:]]
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum"), len(targets)


def every_token(chats: list[Chat]) -> list[Chat]:
    """The same chats with every token but the first scored."""
    return [chat._replace(asked=1) for chat in chats]


@torch.no_grad()
def perplexity(model: Any, chats: list[Chat], device: str) -> float:
    """exp of the mean negative log-likelihood over all scored tokens."""
    found = [answer_loss(model, chats[i : i + 8], device) for i in range(0, len(chats), 8)]
    return math.exp(sum(loss.item() for loss, _ in found) / sum(count for _, count in found))


@torch.no_grad()
def solved(model: Any, tokenizer: Any, chats: list[Chat], device: str) -> dict[str, float]:
    """Share of problems whose greedy answer ends its turn, and of those that then say the right number."""
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    right, ended = 0, 0
    for start in range(0, len(chats), ASKED_AT_ONCE):
        part = chats[start : start + ASKED_AT_ONCE]
        width = max(chat.asked for chat in part)
        ids = [[0] * (width - chat.asked) + chat.ids[: chat.asked] for chat in part]  # what is before is masked
        mask = [[0] * (width - chat.asked) + [1] * chat.asked for chat in part]
        with torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda")):
            out = model.generate(
                input_ids=torch.tensor(ids, device=device), attention_mask=torch.tensor(mask, device=device),
                do_sample=False, max_new_tokens=96, use_cache=True,
            )  # fmt: skip
        for chat, written in zip(part, out[:, width:].tolist(), strict=True):
            text = tokenizer.decode(written, skip_special_tokens=True)
            ended += end in written
            right += end in written and text.rstrip().endswith(f"The answer is {chat.answer}.")
    return {"solved": right / max(len(chats), 1), "ended": ended / max(len(chats), 1)}


def learning_rate(step: int, total: int, args: argparse.Namespace) -> float:
    """Linear warm-up to `lr`, then a cosine down to 0 at step `total`."""
    warm = max(1, round(args.warmup * total))
    if step < warm:
        return float(args.lr) * (step + 1) / warm
    return float(args.lr) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def with_adapter(args: argparse.Namespace) -> Any:
    """The frozen NF4 base with fresh LoRA layers (float32) on every linear layer but the head."""
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.bfloat16, device_map={"": args.device})
    if args.decode:
        base = base.dequantize().float()
    settings = LoraConfig(
        r=args.rank, lora_alpha=args.alpha, lora_dropout=0.0, target_modules=LINEAR_LAYERS, bias="none",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(base, settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.train()
    return model


def batches(chats: list[Chat], args: argparse.Namespace) -> list[tuple[int, list[Chat]]]:
    """(epoch, chats of one step): every epoch in another order; what is left of an epoch is dropped."""
    if len(chats) < args.batch:
        raise SystemExit(f"only {len(chats)} chats to train on: shorten --batch {args.batch}")
    draw, steps = random.Random(args.seed), []
    for epoch in range(args.epochs):
        order = draw.sample(chats, len(chats))
        steps += [(epoch, order[i : i + args.batch]) for i in range(0, len(order) - args.batch + 1, args.batch)]
    return steps


def perplexities(model: Any, held_out: dict[str, list[Chat]], device: str) -> dict[str, float]:
    return {kind: perplexity(model, chats, device) for kind, chats in held_out.items() if chats}


def with_replay(steps: list[tuple[int, list[Chat]]], other: list[Chat], args: argparse.Namespace) -> None:
    """Add `replayed` windows of other text to each step, every window once before any twice."""
    draw, left = random.Random(args.seed + 1), []
    for _, chats in steps:
        if len(left) < args.replayed:
            left += draw.sample(other, len(other))
        chats += [left.pop(0) for _ in range(args.replayed)]


def fit(
    model: Any, train: list[Chat], replay: list[Chat], held_out: dict[str, list[Chat]], args: argparse.Namespace
) -> dict[str, Any]:
    """Run all steps; returns the losses and the held-out perplexities before and after each epoch."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    steps = batches(train, args)
    if replay:
        with_replay(steps, replay, args)
    wanted = steps[: args.max_steps]
    before = perplexities(model, held_out, args.device)
    history: dict[str, Any] = {"steps": 0, "loss": [], "heldout_perplexity": [before]}
    print(f"{len(wanted)} steps; held-out perplexity before {before}", flush=True)
    for step, (epoch, chats) in enumerate(wanted):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(wanted), args)
        total, count = answer_loss(model, chats, args.device)
        loss = total / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history["loss"].append(round(loss.item(), 5))
        history["steps"] = step + 1
        if step + 1 == len(wanted) or wanted[step + 1][0] != epoch:
            now = perplexities(model, held_out, args.device)
            history["heldout_perplexity"].append(now)
            print(f"epoch {epoch + 1} step {step + 1} loss {loss.item():.4f} held-out perplexity {now}", flush=True)
    return history


def save(model: Any, out: Path, base_name: str) -> None:
    """The adapter as bfloat16 safetensors and a config without machine paths."""
    out.mkdir(parents=True)
    state = get_peft_model_state_dict(model)
    half = {name: tensor.detach().cpu().to(torch.bfloat16).contiguous() for name, tensor in state.items()}
    if not all(torch.isfinite(tensor).all() for tensor in half.values()):
        raise SystemExit("the adapter holds infinite or undefined values: lower --lr")
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
    settings = {
        key: value for key, value in vars(args).items() if key not in {"base", "data", "out", "general", "replay"}
    }
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
    train = read_chats(args.data / "train.jsonl", tokenizer, args.rows)
    asked = read_chats(args.data / "heldout.jsonl", tokenizer, args.held_out)
    general, replay = read_texts(args.general, tokenizer), read_texts(args.replay, tokenizer, 256, 1 << 20)
    held_out = {"answers": asked, "chats": every_token(asked), "general": general}
    if args.loss_on == "chats":
        train = every_token(train)
    model = with_adapter(args)
    scored = sum(len(chat.ids) - chat.asked for chat in train)
    print(f"{len(train)} chats, {sum(len(chat.ids) for chat in train)} tokens, {scored} learned", flush=True)
    model.print_trainable_parameters()
    before = solved(model, tokenizer, asked[: args.solve], args.device)
    history = fit(model, train, replay, held_out, args)
    save(model, args.out, args.base_name)
    after = solved(model, tokenizer, asked[: args.solve], args.device)
    history |= {"answers_before": before, "answers_after": after}
    written = record(args, history, started)
    (args.out / "training.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    first, last = history["heldout_perplexity"][0], history["heldout_perplexity"][-1]
    print(f"held-out perplexity {first} -> {last}; answers {before} -> {after}; {written['seconds']} s")


if __name__ == "__main__":
    main()
