"""Zero points trained beside scales and codes, on a random two-layer model, on a CPU.

    python bench/heal_zeros_pico.py --out FILE [--bits 2,3,4]

A latent for each zero point, rounded to the whole numbers that GPTQ stores, beside the latents of the codes: 40 steps
of 16 windows, KL on windows looked at once. Two gradients: "ends" keeps the weights where they are when a zero point
moves, but for those cut off at an end of the range, and counts the codes at the ends (EfficientQAT, arXiv:2407.11062);
"all" lets a zero point move all weights of its group. Symmetric and asymmetric grids without them are the first rows.
Says whether a way works at all, not how much a trained model gains.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT / folder) for folder in ("tests", "pipeline", "eval")]  # instead of bench: its heal.py

import torch
from heal import test_codes, test_stage
from torch import Tensor

from requant.heal import codes as codes_module
from requant.heal import student, teacher
from requant.heal.codes import Codes
from requant.heal.end_to_end import EndToEndLoss
from requant.heal.latents import EDGE, TrainableCodes
from requant.heal.trainer import Trainer
from requant.numerics.grid import Grid

BOTH = ("scales", "codes")
RATES = (0.01, 0.03, 0.04, 0.05, 0.07, 0.1)  # of zero points, in codes
ZEROS: dict[int, TrainableZeros] = {}  # by the id of their codes


class TrainableZeros:
    """The zero points of one linear. offset: their latent, fp32 [out, groups]."""

    unit_of_rate = "zero"

    def __init__(self, codes: Codes, latents: TrainableCodes, ends: bool) -> None:
        self.codes, self.latents, self.ends = codes, latents, ends
        self.offset = torch.nn.Parameter(codes.zero.float())
        self.offset.grad = torch.zeros_like(self.offset)
        self.first = codes.zero.clone()

    def add_gradient(self, flat: Tensor) -> None:
        """flat: of the weight, [out, in]."""
        centred = self.codes.centred(torch.float32)
        gradient = flat.reshape(centred.shape).float()
        if self.ends:
            code = centred + self.codes.zero[..., None]
            gradient = gradient * ((code == 0) | (code == 2**self.codes.bits - 1))
        self.offset.grad.sub_(gradient.sum(-1) * self.codes.scale)

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the latent; with `ends` the codes' latents move along, and are cut off by their own refresh."""
        self.offset.clamp_(1 - EDGE, 2**self.codes.bits - 1 + EDGE)
        rounded = self.offset.round()
        if self.ends:
            change = (rounded - self.codes.zero.float())[..., None]
            self.latents.offset.view(*rounded.shape, -1).add_(change)
        self.codes.zero.copy_(rounded.to(torch.uint8))

    def snapshot(self) -> Tensor:
        return self.codes.zero.clone()

    def start(self) -> Tensor:
        return self.first

    def adopt(self, snapshot: Tensor) -> None:
        self.codes.zero.copy_(snapshot)

    def values(self) -> dict[str, Tensor]:
        return {}


def with_zeros(pupil: student.Student, rate: float, ends: bool, runs: Trainer) -> list[TrainableZeros]:
    """Zero points among what is trained, before the codes, whose refresh cuts off what left their range."""
    latents = [v for v in pupil.trainable if isinstance(v, TrainableCodes)]
    zeros = [TrainableZeros(v.codes, v, ends) for v in latents]
    ZEROS.update({id(zero.codes): zero for zero in zeros})
    at = pupil.trainable.index(latents[0])
    pupil.trainable[at:at] = zeros
    runs.best = [v.start() for v in pupil.trainable]
    group = {"params": [zero.offset for zero in zeros], "peak": rate, "weight_decay": 0.0}
    runs.optimizer.add_param_group(group)
    return zeros


def counting_zeros(returned: Any) -> Any:
    """The gradient function of codes, which also gives their zero points a gradient."""

    def both(ctx: Any, flat: Tensor | None) -> Any:
        if flat is not None and id(ctx.codes) in ZEROS:
            ZEROS[id(ctx.codes)].add_gradient(flat)
        return returned(ctx, flat)

    return both


def row(pair: tuple[Path, Path], taught: Any, text: Any, rate: float, kind: str) -> dict[str, Any]:
    ZEROS.clear()
    pupil = student.load(pair[1], device=test_stage.CPU, dtype=torch.float32, tune=BOTH, original=pair[0])
    settings = replace(test_codes.CODES, steps=40, code_lr=0.003, tune=BOTH)
    loss = EndToEndLoss(pupil, taught, text, test_stage.CPU)
    runs = Trainer(pupil, loss, loss.measure, settings, train=640, choosing=16, judging=16, micro_batch=16)
    zeros = with_zeros(pupil, rate, kind == "ends", runs) if kind else []
    judged = runs.run(None).judged
    changed = torch.cat([(zero.codes.zero != zero.first).flatten() for zero in zeros]) if zeros else torch.zeros(1)
    kl = {"kl_start": judged.start.mean_kl, "kl": judged.chosen.mean_kl}
    return kl | {"step": judged.chosen.steps, "zeros_changed": float(changed.float().mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", default="2,3,4")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    codes_module._returned = counting_zeros(codes_module._returned)
    text, rows = test_codes.sample(), []
    for bits in map(int, args.bits.split(",")):
        for symmetric in (True, False):
            folder = Path(tempfile.mkdtemp()) / "pair"
            grid = Grid(bits, 32, symmetric=symmetric)
            pair = test_stage.quantized(folder, grid=grid, tie_word_embeddings=True)
            taught = teacher.ResidentTeacher(test_stage.model_of(pair[0]), text.windows, test_stage.CPU)
            trained = [(rate, kind) for kind in ("ends", "all") for rate in RATES]
            for rate, kind in [(0.0, "")] + ([] if symmetric else trained):
                about = {"bits": bits, "symmetric": symmetric, "zeros": kind, "rate": rate}
                rows.append(about | row(pair, taught, text, rate, kind))
                print(rows[-1], flush=True)
                args.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
