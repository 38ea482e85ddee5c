"""Ways to heal codes on a random two-layer model, 40 steps of 16 windows: seconds on a CPU.

    python bench/heal_codes_pico.py [--blocks]

End to end; with --blocks block by block, and one after the other.

Says whether a way works at all, not how much a trained model gains: for that see bench/heal.py on a GPU.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT / folder) for folder in ("tests", "pipeline", "eval")]  # instead of bench: its heal.py

import torch
from heal import test_blocks, test_codes, test_stage

sys.path.append(str(ROOT / "bench"))  # once the tests' heal is known

from heal_lab import SignedCodes

from requant.heal import student, teacher
from requant.heal.end_to_end import EndToEndLoss
from requant.heal.trainer import Trainer
from requant.numerics.grid import Grid

BOTH = ("scales", "codes")
# name, what is trained, rate of codes, along signs, from where the 16-bit weight lies
WAYS = (
    ("scales", ("scales",), 0.01, False, True),
    ("AdamW, 0.01", BOTH, 0.01, False, True),
    ("AdamW, 0.003", BOTH, 0.003, False, True),
    ("signs, 0.01", BOTH, 0.01, True, True),
    ("signs, 0.003", BOTH, 0.003, True, True),
    ("AdamW, 0.01, from the middle", BOTH, 0.01, False, False),
)


# name, what is trained, rate of codes, plan
BLOCK_WAYS = (
    ("scales, end to end", ("scales",), 0.01, test_codes.WHOLE),
    ("scales, block by block", ("scales",), 0.01, test_blocks.BLOCKS),
    ("0.003, end to end", BOTH, 0.003, test_codes.WHOLE),
    ("0.01, block by block", BOTH, 0.01, test_blocks.BLOCKS),
    ("0.003, block by block", BOTH, 0.003, test_blocks.BLOCKS),
    ("0.001, block by block", BOTH, 0.001, test_blocks.BLOCKS),
    ("0.003, then scales end to end", BOTH, 0.003, test_blocks.BOTH),
)


def block_by_block(bits: int, pair: tuple[Path, Path]) -> None:
    for number, (name, tune, rate, plan) in enumerate(BLOCK_WAYS):
        settings = replace(test_codes.CODES, steps=40, code_lr=rate, tune=tune)
        told = test_codes.run(pair, pair[0].with_name(f"healed-{number}"), settings, plan=plan)
        changed = f"{told['changed_codes']['share']:.1%} of the codes" if told["changed_codes"] else ""
        kl = f"KL {told['kl_start']:.5f} -> {told['kl_best']:.5f}"
        print(f"{bits} bits  {name:30} {kl} {changed}", flush=True)


def main() -> None:
    text = test_codes.sample()
    for bits in (3, 4):
        merged, source = test_stage.quantized(
            Path(tempfile.mkdtemp()) / "pair", grid=Grid(bits, 32), tie_word_embeddings=True
        )
        if "--blocks" in sys.argv[1:]:
            block_by_block(bits, (merged, source))
            continue
        taught = teacher.ResidentTeacher(test_stage.model_of(merged), text.windows, test_stage.CPU)
        for name, tune, rate, signs, begun in WAYS:
            pupil = student.load(
                source, device=test_stage.CPU, dtype=torch.float32, tune=tune, original=merged if begun else None
            )
            settings = replace(test_codes.CODES, steps=40, code_lr=rate, tune=tune)
            loss = EndToEndLoss(pupil, taught, text, test_stage.CPU)
            runs = Trainer(pupil, loss, loss.measure, settings, train=640, choosing=16, judging=16, micro_batch=16)
            if signs:
                runs.optimizer = SignedCodes(pupil, settings)
            judged = runs.run(None).judged
            print(f"{bits} bits  {name:30} KL {judged.start.mean_kl:.5f} -> {judged.chosen.mean_kl:.5f}", flush=True)


if __name__ == "__main__":
    main()
