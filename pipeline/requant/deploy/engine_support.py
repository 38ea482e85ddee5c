"""Engine support: which engines load a quantized checkpoint, with which kernels, why not.

One table, read off the engines' sources, judges a plan before any weight is read. As in the engines, the first kernel
of a list that fits the matrix is used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from requant.deploy import tensor_parallel
from requant.deploy.engine_targets import Kernel, Matrix, Target, Trait
from requant.deploy.gguf_families import family_of
from requant.errors import InputError
from requant.formats.registry import FORMATS
from requant.modeling import linears
from requant.modeling.families import BY_INPUTS, EXPERT, expert_groups, fused_groups
from requant.numerics.grid import Grid
from requant.quantize.plan import Plan

_LATENT = (".q_a_proj", ".kv_a_proj_with_mqa", ".kv_b_proj")
# optimum 2.3 gptq/constants.py BLOCK_PATTERNS, of causal language models.
_BLOCKS = ("transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers", "model.language_model.layers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One engine's verdict on a plan.

    format: of the checkpoint. source: where the rules were read. problems: why it does not load it; empty: it does.
    remarks: how it runs the model, where not by a class of its own with everything quantized. kernels: hardware ->
    kernel -> number of matrices. lacking: hardware -> why no kernel fits. parallel: number of GPUs -> why they cannot
    split every matrix, None when they can; empty: not checked.
    """

    target: Target
    format: str
    source: str
    problems: tuple[str, ...]
    kernels: Mapping[str, Mapping[str, int]]
    lacking: Mapping[str, str]
    parallel: Mapping[int, str | None] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @property
    def loads(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        if self.problems:
            return f"does not load this: {'; '.join(self.problems)}"
        parts = [f"{where}: {', '.join(f'{k} {n}' for k, n in found.items())}" for where, found in self.kernels.items()]
        parts += [f"not on {where}: {why}" for where, why in self.lacking.items()]
        loads = "loads" if self.format == "gptq" else f"loads, as {self.format}"
        return "; ".join([", ".join([loads, *self.remarks]), *parts, *self._parallel_text()])

    def _parallel_text(self) -> list[str]:
        """How many GPUs can split the matrices, and the first number that cannot."""
        if not self.parallel:
            return []
        able = ", ".join(str(n) for n in (1, *(n for n, why in self.parallel.items() if why is None)))
        first = next(((n, why) for n, why in self.parallel.items() if why), None)
        return [f"tensor parallel {able}" + (f", not {first[0]} ({first[1]})" if first else "")]


def judge(plan: Plan, model: nn.Module, target: Target, name: str | None = None) -> Verdict:
    """Whether and with which kernels `target` loads the checkpoint of `plan`. name: of a format; None: the plan's."""
    name = name or plan.format.name
    plan = replace(plan, format=FORMATS.get(name, plan.format))
    loader = target.formats.get(name)
    if loader is None:
        return _reads_no_such_format(name, target)
    found = traits(plan, model)
    problems, remarks = _by_class(plan, model, target)
    problems += [text.format(found[t]) for t, text in loader.refuses.items() if t in found]
    matrices = list(_matrices(plan, model, fused=target.fuses))
    kernels: dict[str, Mapping[str, int]] = {}
    lacking: dict[str, str] = {}
    for where, offered in loader.hardware.items():
        chosen, why = _choose(offered, matrices)
        if why:
            lacking[where] = why
        else:
            kernels[where] = chosen
    if not kernels:
        problems += list(dict.fromkeys(lacking.values()))
    gpus = [offered for where, offered in loader.hardware.items() if where in kernels and not where.startswith("CPU")]
    parallel = (
        {n: _why_not_parallel(plan, model, gpus, n) for n in tensor_parallel.DEGREES} if target.fuses and gpus else {}
    )
    return Verdict(
        target=target,
        format=name,
        source=loader.source,
        problems=tuple(problems),
        kernels=kernels,
        lacking=lacking,
        parallel=parallel,
        remarks=tuple(remarks),
    )


def best(plan: Plan, model: nn.Module, target: Target, formats: Sequence[str]) -> Verdict:
    """The verdict on the first of `formats` that `target` loads; where it loads none, on the first."""
    verdicts = [judge(plan, model, target, name) for name in formats]
    return next((verdict for verdict in verdicts if verdict.loads), verdicts[0])


def readers(plan: Plan, model: nn.Module, targets: Iterable[Target], name: str) -> tuple[str, ...]:
    """The engines among `targets` that load the checkpoint of `plan` in the format `name`."""
    return tuple(target.name for target in targets if judge(plan, model, target, name).loads)


def _reads_no_such_format(name: str, target: Target) -> Verdict:
    """The verdict of an engine that does not know a format."""
    known = " and ".join(target.formats)
    source = next(iter(target.formats.values())).source
    problem = f"it reads {known}, not {name}"
    return Verdict(target=target, format=name, source=source, problems=(problem,), kernels={}, lacking={})


def _architecture(model: Any) -> str:
    """The class of a model as servers look it up: by config.json, which may name one of the checkpoint's own code."""
    return str(next(iter(getattr(model.config, "architectures", None) or ()), type(model).__name__))


def _by_class(plan: Plan, model: nn.Module, target: Target) -> tuple[list[str], list[str]]:
    """What an engine cannot load of a class of models, and how it runs it where not as its own class, quantized."""
    problems, remarks, classes, name = list[str](), list[str](), target.classes, _architecture(model)
    if classes:
        how = classes.has(name, type(model))
        if how == "none":
            problems.append(f"{classes.name} has no {name}")
        elif how == "generic":
            remarks.append(f"{name} by transformers' code, as {classes.name} has no such class")
        if name in classes.refuses:
            problems.append(f"{name}: {classes.refuses[name]}")
        elif name in classes.refuses_gptq and plan.format.name == "gptq":
            problems.append(f"{name}: {classes.refuses_gptq[name]}: serve it in compressed-tensors (output.formats)")
        elif name in classes.refuses_experts and any(EXPERT.fullmatch(n) for n in plan.grids):
            problems.append(f"{name}: {classes.refuses_experts[name]}: leave them in 16 bit (quantize.experts)")
    if experts_left(plan):
        remarks.append("experts in 16 bit")
    return problems, remarks


def why_no_experts(model: nn.Module, targets: Iterable[Target]) -> str | None:
    """Why no server reads a model's experts quantized, where one has its class; None: one does, or none has it."""
    name, kind = _architecture(model), type(model)
    serving = [c for t in targets if (c := t.classes) and c.has(name, kind) != "none" and name not in c.refuses]
    if not serving or any(name not in c.refuses_experts for c in serving):
        return None
    return "; ".join(f"{c.name}: {c.refuses_experts[name]}" for c in serving)


def _why_not_parallel(plan: Plan, model: nn.Module, gpus: list[tuple[Kernel, ...]], degree: int) -> str | None:
    """Why `degree` GPUs of none of these kinds can split the matrices; None when some can."""
    heads = tensor_parallel.Heads.of(model.config)
    if heads and (why := heads.why_not(degree)):
        return why
    for name, grid in plan.grids.items():
        module: Any = model.get_submodule(name)
        if why := tensor_parallel.why_not(name, module.out_features, module.in_features, grid, degree, heads):
            return why
    matrices = list(_matrices(plan, model, fused=True, degree=degree))
    tried = [_choose(offered, matrices)[1] for offered in gpus]
    return None if None in tried else tried[0]


def _choose(offered: tuple[Kernel, ...], matrices: list[Matrix]) -> tuple[Mapping[str, int], str | None]:
    """The first kernel of `offered` that fits each matrix.

    (kernel -> how many matrices it gets, None), or ({}, what the first matrix without a kernel lacks).
    """
    chosen: Counter[str] = Counter()
    for matrix in matrices:
        expert = ".experts" in matrix.name
        fitting = [k for k in offered if k.experts in (None, expert)]
        kernel = next((k for k in fitting if k.why_not(matrix) is None), None)
        if kernel is None:
            why = fitting[-1].why_not(matrix) if fitting else "no kernel for experts"
            return {}, f"{matrix.name}: {why}"
        chosen[kernel.name] += 1
    return dict(chosen), None


def traits(plan: Plan, model: nn.Module) -> dict[Trait, str]:
    """Trait that the plan has -> an example of it."""
    modules = {name: model.get_submodule(name) for name in plan.grids}
    by_grid: dict[tuple[int, int, bool], list[str]] = {}
    for name, grid in plan.grids.items():
        by_grid.setdefault((grid.bits, grid.group_size, grid.symmetric), []).append(name)
    rarest = min(by_grid.values(), key=len)
    found: dict[Trait, list[str]] = {
        "conv1d": [n for n, m in modules.items() if type(m) is linears.TransposedLinear],
        "linear-like": [
            type(m).__name__ for m in modules.values() if type(m) not in (nn.Linear, linears.TransposedLinear)
        ],
        "experts": [n for n in modules if EXPERT.fullmatch(n)],
        "renamed": _renamed(plan, model),
        "fused gate_up": [n for n in modules if n.endswith(".gate_up_proj")],
        "overrides": rarest if len(by_grid) > 1 else [],
        "asymmetric overrides": rarest if len(by_grid) > 1 and not all(symmetric for *_, symmetric in by_grid) else [],
        "skipped in some blocks": plan.partly_left,
        "unlike fused parts": [
            f"the parts of {fused}" for fused, _, same in _groups(plan) if not same and ".experts." not in fused
        ],
        "unlike experts": [n for n, same in _experts(plan).items() if not same],
        "blocks elsewhere": [] if plan.prefix in _BLOCKS else [plan.prefix],
        "experts in 16 bit": experts_left(plan),
        "experts in 16 bit of other sizes": [
            f"{n} {list(shape)}" for n, shape in _left_shapes(plan, model) if not _marlin_fits(plan, shape)
        ],
        "latent attention": [n for n in modules if n.endswith(_LATENT)],
        "kv_b_proj": [n for n in modules if n.endswith(_LATENT[-1])],
        "towers": list(plan.towers),
        "not in GGUF": _not_in_gguf(model),
    }
    return {trait: examples[0] for trait, examples in found.items() if examples}


def _not_in_gguf(model: Any) -> list[str]:
    """Why a model is not written as GGUF."""
    try:
        family_of(model.config, "")
    except InputError as error:
        return [str(error).removeprefix(": ")]
    return []


def experts_left(plan: Plan) -> list[str]:
    """The experts that stay in 16 bit, all of a layer's: containers, or modules that are not split."""
    quantized = expert_groups(plan.grids)
    return [*plan.fused, *(name for name in expert_groups(plan.left) if name not in quantized)]


def _left_shapes(plan: Plan, model: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """(container, [expert width, model width]) of experts in 16 bit whose matrices are known."""
    for container, names in expert_groups(plan.left).items():
        first = next((n for n in names if n.rpartition(".")[2] not in BY_INPUTS), names[0])
        module: Any = model.get_submodule(first)
        if container in experts_left(plan):
            yield container, (module.out_features, module.in_features)


def _marlin_fits(plan: Plan, shape: tuple[int, int]) -> bool:
    """vLLM's `check_moe_marlin_supports_config`, asked before its rules are."""
    group = next(iter(Counter(g.group_size for g in plan.grids.values()).most_common(1)), (-1, 0))[0]
    return shape[1] % 128 == 0 and (group < 0 or shape[0] % group == 0)


def _renamed(plan: Plan, model: nn.Module) -> list[str]:
    """Tensors whose name in the checkpoint is not the model's.

    A missing or additional prefix of the base model does not count.
    """
    stored = {slot.name for slot in plan.slots}
    prefix = getattr(model, "base_model_prefix", "") + "."
    names = [n for n, _ in model.named_parameters()]
    ours = [
        f"{m}.{plan.format.codes}" if n == f"{m}.weight" and m in plan.grids else n
        for n in names
        for m in [n.rpartition(".")[0]]
    ]
    return [n for n in ours if n not in stored and n.removeprefix(prefix) not in stored]


def _groups(plan: Plan) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """(fused name, parts, whether all parts are quantized alike) of what engines fuse."""
    every = _grids(plan)
    for fused, parts in fused_groups(every):
        yield fused, parts, len({every[p] for p in parts}) == 1


def _experts(plan: Plan) -> dict[str, bool]:
    """Container of experts -> whether all of its matrices are quantized alike."""
    every = _grids(plan)
    return {name: len({every[n] for n in inside}) == 1 for name, inside in expert_groups(every).items()}


def _grids(plan: Plan) -> dict[str, Grid | None]:
    """Every linear of the blocks -> its grid, None where it is left in 16 bit."""
    return {**plan.grids, **dict.fromkeys(plan.left)}


def _matrices(plan: Plan, model: nn.Module, *, fused: bool, degree: int = 1) -> Iterator[Matrix]:
    """Every quantized matrix, fused as servers fuse it, or one GPU's shard of it.

    degree: number of GPUs.
    """
    heads = tensor_parallel.Heads.of(model.config)

    def size(name: str) -> tuple[int, int]:
        module: Any = model.get_submodule(name)
        whole = (module.out_features, module.in_features)
        return tensor_parallel.shard_shape(name, *whole, degree, heads) or whole

    taken: set[str] = set()
    if fused:
        for container in _experts(plan):
            inside = [n for n in plan.grids if n.startswith(container + ".")]
            taken |= set(inside)
            if inside:
                first = next((n for n in inside if n.rpartition(".")[2] not in BY_INPUTS), inside[0])
                yield Matrix(container, *size(first), plan.grids[first])
        for name, parts, same in _groups(plan):
            if len(parts) > 1 and same and parts[0] in plan.grids and not taken & set(parts):
                taken |= set(parts)
                rows = sum(size(p)[0] for p in parts)
                yield Matrix(name, rows, size(parts[0])[1], plan.grids[parts[0]])
    for name, grid in plan.grids.items():
        if name not in taken:
            yield Matrix(name, *size(name), grid)
