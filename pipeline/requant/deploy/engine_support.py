"""Engine support: which engines load a quantized checkpoint, with which kernels, why not.

One table, read off the engines' sources, judges a plan before any weight is read. As in the engines, the first kernel
of a list that fits the matrix is used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from requant.deploy import tensor_parallel
from requant.deploy.engine_targets import Kernel, Matrix, Target
from requant.deploy.plan_traits import experts, experts_left, groups, traits
from requant.formats.registry import FORMATS
from requant.modeling.families import BY_INPUTS, EXPERT
from requant.quantize.plan import Plan


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
    if target.classes and _architecture(model) in target.classes.experts_in_16_bit:
        found.pop("experts in 16 bit", None)
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


def best(plans: Mapping[str, Plan], model: nn.Module, target: Target) -> Verdict:
    """The verdict on the first format of `plans` that `target` loads; where it loads none, on the first."""
    verdicts = [judge(plan, model, target, name) for name, plan in plans.items()]
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
        if held := [n for n in plan.ends if n not in plan.outside and name not in classes.embeds]:
            problems.append(f"its {name} takes {held[0]} for a 16-bit one: leave quantize.embeddings out")
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
    for each in tensor_parallel.Heads.all_of(model.config):
        if why := each.why_not(degree):
            return why
    for name, grid in plan.grids.items():
        module: Any = model.get_submodule(name)
        heads = tensor_parallel.Heads.of(model.config, name)
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


def _matrices(plan: Plan, model: nn.Module, *, fused: bool, degree: int = 1) -> Iterator[Matrix]:
    """Every quantized matrix, fused as servers fuse it, or one GPU's shard of it.

    degree: number of GPUs.
    """

    def size(name: str) -> tuple[int, int]:
        module: Any = model.get_submodule(name)
        whole, heads = (module.out_features, module.in_features), tensor_parallel.Heads.of(model.config, name)
        return tensor_parallel.shard_shape(name, *whole, degree, heads) or whole

    taken: set[str] = set()
    if fused:
        for container in experts(plan):
            inside = [n for n in plan.grids if n.startswith(container + ".")]
            taken |= set(inside)
            if inside:
                first = next((n for n in inside if n.rpartition(".")[2] not in BY_INPUTS), inside[0])
                yield Matrix(container, *size(first), plan.grids[first])
        for name, parts, same in groups(plan):
            if len(parts) > 1 and same and parts[0] in plan.grids and not taken & set(parts):
                taken |= set(parts)
                rows = sum(size(p)[0] for p in parts)
                yield Matrix(name, rows, size(parts[0])[1], plan.grids[parts[0]])
    for name, grid in plan.grids.items():
        if name not in taken:
            yield Matrix(name, *size(name), grid)
    for name in set(plan.ends) & set(plan.outside):
        yield Matrix(name, *plan.shapes[name], plan.ends[name])
