"""One model type through the whole pipeline on a tiny random model: what works.

Base in NF4 + LoRA on every linear -> merged: every weight is PEFT's -> GPTQ block by block: the written file gives the
states that the walk ended in -> loaded by our decoder. `python -m helpers.sweep [--write] [MODEL_TYPE ...]` prints a line
each; without types it tries all of transformers. Then, or with `--write`, their results are in `RESULTS`, from which
docs/families.md has its second table.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from helpers import oracle, pico, tiny
from requant.evaluate import variants
from requant.merge.base_weights import Nf4Settings
from requant.modeling.model_classes import model_class
from requant.numerics.grid import Grid
from requant.quantize.plan import Settings
from requant.quantize.stage import quantize

CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[2] / "bench" / "results" / "2026-11-29-model-types-cpu.json"
FP32 = 1e-5  # relative: sums of up to 128 products in another order


@dataclass(kw_only=True)
class Outcome:
    """What one model type gave.

    merged: largest difference of a merged weight from PEFT's, relative. quantized, left: linears of blocks.
    states: what nine of ten tokens' logits stay within of the merged model's, relative: routers that are undecided
    between two experts may choose the other. error: stage and reason.
    """

    kind: str
    made: str = ""
    merged: float = -1.0
    quantized: int = 0
    left: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()
    states: float = -1.0
    error: str = ""

    @property
    def verdict(self) -> str:
        """`exact`, `experts in 16 bit`, `differs` from PEFT, `refused`, or `not tried`.

        Not tried are those without a tiny model, or whose forward wants more than text.
        """
        if self.error:
            return "not tried" if self.error.startswith(("build", "save")) else "refused"
        if not 0 <= self.merged < FP32:
            return "differs"
        return "experts in 16 bit" if self.fused else "exact"

    def __str__(self) -> str:
        if self.error:
            return f"{self.kind}: FAIL {self.error}"
        return (
            f"{self.kind}: {self.made} merged {self.merged:.1e} quantized {self.quantized} states {self.states:.1e} "
            f"left {' '.join(self.left) or '-'} fused {' '.join(self.fused) or '-'}"
        )


def sweep(kind: str, folder: Path, **changes: Any) -> Outcome:
    """The outcome of a model type; nothing that a library raises gets out. changes: of its tiny config."""
    outcome, stage = Outcome(kind=kind), "build"
    try:
        config = tiny.default_config(kind)
        config.architectures, stage = [tiny.kinds()[kind]], "open"
        model_class(config)
        stage = "build"
        made = tiny.model(kind, **changes)
        outcome.made = type(made).__name__
        pico.logits(made, ids())
        stage = "save"
        base = pico.save(made, folder / "base", torch.bfloat16)
        stage = "merge"
        outcome.merged = merge(made, base, folder)
        stage = "quantize"
        quantize_merged(outcome, folder)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this model type's outcome
        outcome.error = f"{stage} {_where(error)}"
    return outcome


def ids(seed: int = 7) -> Tensor:
    """Token ids int64 [2, 24] that no tiny vocabulary lacks and no placeholder of an image has."""
    return torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(seed))


def merge(made: Any, base: Path, folder: Path) -> float:
    """Merge a LoRA on every linear, onto the base as training held it; largest difference from PEFT's weights."""
    live = pico.quantize(base, bnb_4bit_quant_type="nf4")
    live = pico.live_4bit(live)
    try:
        trained = pico.train(made, folder / "adapter", target_modules="all-linear")
    except ValueError:  # PEFT refuses what the kernels of Mamba do not call, and cannot spell some names
        left = ("out_proj", "conv1d", "lm_head")
        names = [name for name in pico.linears(made) if name.rpartition(".")[2] not in left]
        trained = pico.train(made, folder / "adapter", target_modules=names)
    live = peft.PeftModel.from_pretrained(live, folder / "adapter").eval()
    expected = _trained_weights(live, trained)
    simulate = Nf4Settings(quant_type="nf4", double_quant=False, compute_dtype="float32")  # transformers' default
    pico.merged(base, folder / "adapter", folder / "merged", simulate=simulate)
    loaded = pico.reload(folder / "merged")
    turned = {f"{name}.weight" for name, module in loaded.named_modules() if type(module) is Conv1D}  # [in, out]
    weights = {n: p.T if n in turned else p for n, p in loaded.state_dict().items() if n in expected}
    return max(pico.relative(weights[name].double(), value.double()) for name, value in expected.items())


@torch.no_grad()
def _trained_weights(live: Any, trained: Any) -> dict[str, Tensor]:
    """Every adapted weight as bitsandbytes decodes it, in `live`, plus what PEFT says is its delta, in `trained`.

    PEFT 0.21 does not load the adapter of every model type that it has saved, and says nothing.
    """
    from peft.tuners.lora.layer import LoraLayer

    found = {}
    for name, module in live.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            leaf = getattr(module, "parameter_name", "weight")  # another one: of stacked experts
            weight = getattr(module.get_base_layer(), leaf)
            value = decoded_by_bitsandbytes(weight) if hasattr(weight, "quant_state") else weight.data.float()
            owner = name.replace(".base_layer", "")
            adapted = trained.get_base_model().get_submodule(name)
            delta = adapted.get_delta_weight("default").float()
            if type(adapted.get_base_layer()) is Conv1D:
                delta = delta.T  # bitsandbytes holds it as [out, in]
            found[f"{owner}.{leaf}"] = value + delta.reshape(value.shape)  # PEFT drops the dimension of a single expert
    assert found, "no adapted module"
    return found


def decoded_by_bitsandbytes(weight: Any) -> Tensor:
    """A weight as bitsandbytes decodes it; entry by entry where its decoder for CPUs fails, on odd widths."""
    from bitsandbytes.functional import dequantize_4bit

    state = weight.quant_state
    if state.shape[-1] % state.blocksize == 0:
        return dequantize_4bit(weight.data, state).float()
    flat = oracle.decode_4bit(
        bytes(weight.data.flatten().numpy()), state.absmax.tolist(), state.code.tolist(), state.blocksize,
        state.shape.numel(),
    )  # fmt: skip
    return flat.reshape(state.shape).to(state.dtype).float()  # as training multiplied by it


def quantize_merged(outcome: Outcome, folder: Path) -> None:
    """Quantize the merged model to 8 bits; the file's logits must be those that the walk ends in."""
    (folder / "gptq").mkdir()
    source = folder / "merged"
    plan, results = quantize(
        source, folder / "gptq", torch.cat([ids(s) for s in range(2)]), Settings(grid=Grid(8, 32)),
        dtype=torch.float16, device=CPU, batch=2,
    )  # fmt: skip
    assert {r.name for r in results} == set(plan.grids)
    outcome.quantized, outcome.fused = len(plan.grids), tuple(sorted({_inner(n) for n in plan.fused}))
    outcome.left = tuple(sorted({_inner(n) for n in plan.left}))
    sources = variants.VariantSources.of_checkpoint(source, gptq=folder / "gptq")
    ours = variants.load("gptq", sources, device=CPU, dtype=torch.float32)
    expected = pico.logits(pico.reload(source), ids())
    difference = (pico.logits(ours, ids()) - expected).abs().amax(dim=-1) / expected.abs().max()
    outcome.states = float(difference.quantile(0.9))


def _inner(name: str) -> str:
    """A module's name inside its block, experts as one."""
    return re.sub(r".*?\.\d+\.", "", name, count=1)


def _where(error: Exception) -> str:
    """An exception in one line, with the last place in our code."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/requant/" in f.filename]
    place = f" @{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}{place}"


def main(arguments: list[str]) -> None:
    chosen = [kind for kind in arguments if kind != "--write"]
    rows = {row["kind"]: row for row in json.loads(RESULTS.read_text())} if chosen else {}
    for kind in chosen or tiny.kinds():
        with tempfile.TemporaryDirectory() as folder:
            outcome = sweep(kind, Path(folder))
            outcome.error = outcome.error.replace(folder, "")
            print(outcome, flush=True)
            rows[kind] = asdict(outcome)
    if not chosen or "--write" in arguments:
        RESULTS.write_text("[\n" + ",\n".join(json.dumps(rows[kind]) for kind in sorted(rows)) + "\n]\n")


if __name__ == "__main__":
    main(sys.argv[1:])
