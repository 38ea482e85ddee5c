"""The table of engines: their kernels, and what of a checkpoint they refuse.

Read off the engines' sources, which each entry names. `engine_support` holds a plan against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from requant.deploy.engine_classes import SGLANG, VLLM, Registry
from requant.formats.mlx import GROUPS as MLX_GROUPS
from requant.numerics.grid import Grid

Name = Literal["vllm", "sglang", "transformers", "gptqmodel", "mlx", "llama.cpp"]
# Properties of a plan that some engine cannot load.
Trait = Literal[
    "conv1d", "linear-like", "experts", "renamed", "fused gate_up", "overrides", "asymmetric overrides",
    "skipped in some blocks", "unlike fused parts", "unlike experts", "blocks elsewhere", "experts in 16 bit",
    "experts in 16 bit of other sizes", "latent attention", "kv_b_proj", "towers", "not in GGUF",
    "quantized embeddings", "quantized head", "cut while loading",
]  # fmt: skip
GROUPS = (-1, 32, 64, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What one kernel multiplies.

    inputs, outputs: of what the fused matrix's sizes must be multiples.
    """

    name: str
    bits: tuple[int, ...] = (4, 8)
    groups: tuple[int, ...] = GROUPS
    inputs: int = 1
    outputs: int = 1
    symmetric: bool = True  # only symmetric ones; False: both
    signed: bool = False  # proven with negative scales (bench/kernel_table.py, make test-vllm)
    experts: bool | None = None  # True: only routed experts; False: everything else; None: both

    def why_not(self, matrix: Matrix) -> str | None:
        """Why this kernel cannot multiply a matrix; None when it can."""
        grid = matrix.grid
        if grid.bits not in self.bits:
            return f"no {grid.bits}-bit weights"
        if self.symmetric and not grid.symmetric:
            return "no asymmetric weights"
        if grid.signed and not self.signed:
            return f"negative scales are not proven in {self.name}"
        if grid.group_size not in self.groups:
            return f"no groups of {grid.group_size}"
        for what, size, unit in (("inputs", matrix.columns, self.inputs), ("outputs", matrix.rows, self.outputs)):
            if size % unit:
                return f"its {size} {what} are no multiple of {unit}"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """How one engine loads one format.

    source: where that was read. hardware: device kind -> kernels in the order they are tried. refuses: trait -> what
    goes wrong.
    """

    source: str
    hardware: Mapping[str, tuple[Kernel, ...]]
    refuses: Mapping[Trait, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One engine. formats: name of a format -> how it loads it.

    fuses: whether it fuses linears with the same input. classes: the model classes that it has; None: it runs
    transformers' own.
    """

    name: Name
    fuses: bool
    formats: Mapping[str, Loader]
    classes: Registry | None = None


_CUT = "it cuts {} into modules of its own while it loads, and cannot cut packed weights"
_PARTS = "{} differ in their settings, and it fuses them"
_CONVERT = "; in compressed-tensors it does not (output.formats)"
_ALIKE: Mapping[Trait, str] = {"unlike fused parts": _PARTS, "unlike experts": _PARTS}
_TORCH = (Kernel(name="Torch", bits=(2, 3, 4, 8), symmetric=False, signed=True),)
_MOE_MARLIN = Kernel(name="Marlin MoE", inputs=128, experts=True)
_GPTQMODEL = {
    "NVIDIA GPU": (
        Kernel(name="Marlin", signed=True),
        Kernel(name="Triton", bits=(2, 4, 8), symmetric=False, signed=True),
        *_TORCH,
    ),
    "CPU": (Kernel(name="TorchAten", bits=(4,), groups=(32, 64, 128), symmetric=False, signed=True), *_TORCH),
}
_MACHETE = Kernel(name="Machete", groups=(-1, 64, 128), inputs=64, outputs=128, experts=False)
_VLLM_GPTQ = {
    "Hopper": (_MACHETE, Kernel(name="Marlin", experts=False), _MOE_MARLIN, Kernel(name="MoeWNA16", experts=True)),
    "other NVIDIA GPU": (Kernel(name="Marlin", experts=False), _MOE_MARLIN, Kernel(name="MoeWNA16", experts=True)),
    "CPU": (
        Kernel(name="CPUWNA16", bits=(4,), inputs=32, outputs=32, experts=False, signed=True),
        Kernel(name="CPU MoE (needs AMX)", bits=(4,), experts=True),
    ),
}
_VLLM_PACKED_GPU = (
    Kernel(name="Marlin", experts=False),
    Kernel(name="Marlin", bits=(4,), symmetric=False, experts=False),
    _MOE_MARLIN,
    Kernel(name="Humming (where installed)", bits=(2, 3, 4, 8), symmetric=False, experts=False),
)
_VLLM_PACKED = {
    "Hopper": (replace(_MACHETE, symmetric=False), *_VLLM_PACKED_GPU),
    "other NVIDIA GPU": _VLLM_PACKED_GPU,
    "CPU": (Kernel(name="CPUWNA16", bits=(4,), inputs=32, outputs=32, symmetric=False, experts=False, signed=True),),
}
_HUMMING = Kernel(name="Humming (where installed)", bits=(2, 3))
_VLLM_AUTO_ROUND = {
    "NVIDIA GPU": (Kernel(name="Marlin", experts=False), _MOE_MARLIN, Kernel(name="MoeWNA16", experts=True), _HUMMING),
    "CPU": (Kernel(name="CPUWNA16", bits=(4,), inputs=32, outputs=32, experts=False, signed=True),),
}
_SGLANG_MARLIN = Kernel(name="Marlin", inputs=128, outputs=64, experts=False)
_SGLANG_GPTQ = {  # AutoRound's tensors run on the same kernels
    "NVIDIA GPU from Ampere on": (_SGLANG_MARLIN, replace(_SGLANG_MARLIN, name="Marlin MoE", experts=True)),
    "CPU with AMX": (Kernel(name="AMX", bits=(4,), outputs=32, experts=None),),
}
_BLOCK = Kernel(name="Q4_0", bits=(2, 3, 4), groups=(-1, *range(32, 2**12 + 1, 32)), inputs=32, signed=True)
_BLOCKS = (
    _BLOCK,
    replace(_BLOCK, bits=(2, 3), symmetric=False),
    replace(_BLOCK, name="Q4_1", bits=(4,), symmetric=False),
    replace(_BLOCK, name="Q8_0", bits=(8,)),
)
TARGETS: Mapping[Name, Target] = {
    t.name: t
    for t in (
        Target(
            name="vllm",
            fuses=True,
            formats={
                "gptq": Loader(
                    source="vLLM 0.33.0, read 2026-11-29: quantization/auto_gptq.py, utils/marlin_utils.py, "
                    "kernels/linear/mixed_precision",
                    hardware=_VLLM_GPTQ,
                    refuses={
                        **_ALIKE,
                        "experts in 16 bit of other sizes": "it takes {} for quantized, whatever the rules say, since "
                        f"its Marlin kernel would not fit their sizes{_CONVERT}",
                    },
                ),
                "compressed-tensors": Loader(
                    source="vLLM 0.32.0, read 2026-11-29: quantization/compressed_tensors, "
                    "kernels/linear/mixed_precision, fused_moe/oracle/int_wna16.py",
                    hardware=_VLLM_PACKED,
                    refuses=_ALIKE,
                ),
                "auto-round": Loader(
                    source="vLLM 0.32.0, read 2026-11-29: quantization/inc (config_parser.py, inc_wna16_scheme.py)",
                    hardware=_VLLM_AUTO_ROUND,
                    refuses=_ALIKE,
                ),
            },
            classes=VLLM,
        ),
        Target(
            name="sglang",
            fuses=True,
            formats={
                "gptq": Loader(
                    source="SGLang 0.5.23, read 2026-11-29: layers/quantization/gptq (schemes), marlin_utils.py",
                    hardware=_SGLANG_GPTQ,
                    refuses={
                        **_ALIKE,
                        "experts in 16 bit": f"it takes {{}} for quantized, whatever the rules say{_CONVERT}",
                        "latent attention": "it reads {} as AWQ stores it: leave such modules in 16 bit "
                        '(quantize.overrides: {{"*_a_proj*": {{skip: true}}, "*.kv_b_proj": {{skip: true}}}})',
                    },
                ),
                "compressed-tensors": Loader(
                    source="SGLang 0.5.23, read 2026-11-29: layers/quantization/compressed_tensors/schemes",
                    hardware={
                        "NVIDIA GPU from Ampere on": (
                            replace(_SGLANG_MARLIN, symmetric=False),
                            replace(_SGLANG_MARLIN, name="Marlin MoE", experts=True),
                        ),
                    },
                    refuses={
                        **_ALIKE,
                        "kv_b_proj": 'it wants {} in 16 bit (quantize.overrides: {{"*.kv_b_proj": {{skip: true}}}})',
                    },
                ),
                "auto-round": Loader(
                    source="SGLang 0.5.23, read 2026-11-29: layers/quantization/auto_round.py",
                    hardware=_SGLANG_GPTQ,
                    refuses={
                        **_ALIKE,
                        "experts in 16 bit": f"it has no way to run {{}} in 16 bit{_CONVERT}",
                        "latent attention": "that it reads {} was not proven: leave such modules in 16 bit",
                        "towers": "beside {} it calls the blocks otherwise, and takes them for 16 bit",
                    },
                ),
            },
            classes=SGLANG,
        ),
        Target(
            name="transformers",
            fuses=False,
            formats={
                "gptq": Loader(
                    source="transformers 5.23 with optimum 2.3 (gptq/quantizer.py) and gptqmodel 7.7",
                    hardware=_GPTQMODEL,
                    refuses={
                        "conv1d": "it cannot make Conv1D layers ({}) quantized ones; gptqmodel's own loader can",
                        "linear-like": "it passes over {}, so that their weights would be random; "
                        "gptqmodel's own loader does not",
                        "experts": "it keeps experts fused, so that their weights would be random; "
                        "gptqmodel's own loader does not",
                        "overrides": "it ignores settings of single modules ({})",
                        "skipped in some blocks": "{} stays in 16 bit in some blocks only",
                        "blocks elsewhere": "it does not look for blocks in {}",
                        "cut while loading": _CUT,
                    },
                ),
                "compressed-tensors": Loader(
                    source="transformers 5.23 with compressed-tensors 0.20.1 (quantization/lifecycle/apply.py)",
                    hardware={"any device": (replace(_TORCH[0], name="decoded when loaded"),)},
                    refuses={
                        "conv1d": "it cannot make Conv1D layers ({}) quantized ones",
                        "linear-like": "it passes over {}, so that their weights would be random",
                        "asymmetric overrides": "with zero points ({}) it takes the first settings for every module",
                        "quantized embeddings": "it stops at {}, of which it looks for a 16-bit weight",
                        "cut while loading": _CUT,
                    },
                ),
                "auto-round": Loader(
                    source="transformers 5.23 with auto-round 0.16.1 (inference/convert_model.py)",
                    hardware={"any device": _TORCH},
                    refuses={
                        "conv1d": "that it reads Conv1D layers ({}) was not proven",
                        "linear-like": "it passes over {}, so that their weights would be random",
                        "experts": "that it splits experts ({}) as we do was not proven",
                        "cut while loading": _CUT,
                    },
                ),
            },
        ),
        Target(
            name="gptqmodel",
            fuses=False,
            formats={
                "gptq": Loader(
                    source="gptqmodel 7.7: GPTQModel.load, models/definitions",
                    hardware=_GPTQMODEL,
                    refuses={
                        "renamed": "it looks for {}, which the original checkpoint, and so ours, calls otherwise",
                        "fused gate_up": "it splits {} before it looks for its weights; transformers loads them",
                    },
                ),
            },
        ),
        Target(
            name="mlx",
            fuses=False,
            formats={
                "mlx": Loader(
                    source="mlx-lm 0.32.2 with mlx 0.32.4 (utils.py), run on a CPU",
                    hardware={"Apple GPU or CPU": (replace(_TORCH[0], name="quantized_matmul", groups=MLX_GROUPS),)},
                    refuses={
                        "conv1d": "that it reads Conv1D layers ({}) was not proven",
                        "linear-like": "that it reads {} was not proven",
                        "experts": "that it stacks experts ({}) as it does its own was not proven",
                        "towers": "mlx-lm reads text alone, not {}",
                    },
                ),
            },
        ),
        Target(
            name="llama.cpp",
            fuses=False,
            formats={
                "gguf": Loader(
                    source="llama.cpp in xllamacpp 2026.10.11549, run on a CPU; ggml-common.h",
                    hardware={"any device": _BLOCKS},
                    refuses={"not in GGUF": "{}", "towers": "{} is not in the file"},
                ),
            },
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Matrix:
    """One quantized matrix as a server holds it: rows are outputs, fused parts stacked.

    The experts of a layer are one, [expert width, model width], for a server that fuses them.
    """

    name: str
    rows: int
    columns: int
    grid: Grid
