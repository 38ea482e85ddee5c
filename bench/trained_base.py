"""How far is a merged model from what training saw, by the base it is folded onto?

    python bench/trained_base.py --base work/base-nf4 --adapter adapter --texts work/texts --out FILE

Folded onto the exact 4-bit weights, or onto training's cast of them. The reference is the base's weights cast as
training cast them, plus the adapter's delta, in fp32. One row for each dtype of the merged checkpoint and each way to
read the base: mean KL divergence a token from the reference, in nats, on the first tokens of the held-out documents.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "pipeline"), str(ROOT / "eval"), str(ROOT / "bench")]

from settings import texts

from requant.adapters import peft_directory
from requant.evaluate import variant_weights, variants
from requant.merge.plan import MergePlan
from requant.modeling import skeleton
from requant.run import prepare

CPU = torch.device("cpu")
COARSE, FINE = torch.bfloat16, torch.float32  # a plan for a file as coarse as training's dtype reads exact weights


def model_of(plan: MergePlan, base: Path, stored: torch.dtype) -> Any:
    """The merged model in fp32, its weights rounded to `stored`."""

    class Stored(variant_weights.Merged):
        def read(self, name: str) -> Tensor:
            return super().read(name).to(stored)

    return variants.fill(skeleton.open_model(base), Stored(plan, CPU), CPU, torch.float32).eval()


@torch.no_grad()
def log_probabilities(model: Any, documents: list[Tensor]) -> list[Tensor]:
    return [model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1) for ids in documents]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "adapter", "texts", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--length", type=int, default=128)
    args = parser.parse_args()
    from transformers import AutoTokenizer

    _, sets = texts(args.texts, AutoTokenizer.from_pretrained(str(args.base)))
    documents = [w.ids[: args.length] for w in sets[0].windows][: args.documents]
    plan, _ = prepare.plan_merge(args.base, peft_directory.load(args.adapter), None, trust_remote_code=False)
    read = {"as trained": replace(plan, stored=FINE), "exact": replace(plan, stored=COARSE)}
    reference = log_probabilities(model_of(read["as trained"], args.base, torch.float32), documents)
    rows: list[dict[str, Any]] = []
    for stored in (torch.float32, torch.float16, torch.bfloat16):
        for name, chosen in read.items():
            got = log_probabilities(model_of(chosen, args.base, stored), documents)
            kl = torch.cat([(r.exp() * (r - g)).double().sum(-1) for r, g in zip(reference, got, strict=True)])
            rows.append({"stored": str(stored).removeprefix("torch."), "base": name, "kl": float(kl.mean())})
            print(rows[-1], flush=True)
    facts = {"device": "cpu", "torch": torch.__version__, "tokens": sum(len(d) - 1 for d in documents)}
    args.out.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
