"""Convolutions, Linears and embeddings that a checkpoint holds in parts, each a parameter.

Gated delta nets convolve queries, keys and values apart in their files, and together in transformers' classes. Some
classes multiply by gate and up at once. Molmo 2 holds the embeddings of its added tokens in a table of their own,
Qwen 4 those of n-grams in hundreds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ConvolutionPart(nn.Module):
    """The weight [channels, 1, width] of one part of a convolution, as stored."""

    def __init__(self, channels: int, whole: nn.Conv1d) -> None:
        super().__init__()
        self.weight = nn.Parameter(whole.weight.new_empty(channels, *whole.weight.shape[1:]), requires_grad=False)


class JoinedConvolution(nn.Module):
    """A convolution without bias whose weight is that of its parts, one after the other.

    Only the weight is asked for: the classes that have it call a kernel of their own.
    """

    bias = None

    def __init__(self, parts: Iterable[ConvolutionPart]) -> None:
        super().__init__()
        self.parts = tuple(parts)  # modules beside this one, by the names of the checkpoint

    @property
    def weight(self) -> Tensor:
        return torch.cat([part.weight for part in self.parts])


class JoinedLinear(nn.Linear):
    """A Linear of the class whose outputs are those of its parts, one after the other; it has no parameters."""

    def __init__(self, parts: Sequence[nn.Linear]) -> None:
        nn.Module.__init__(self)
        self.parts = tuple(parts)  # modules beside this one, by the names of the checkpoint
        self.in_features, self.out_features = parts[0].in_features, sum(part.out_features for part in parts)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return torch.cat(tuple(part.weight for part in self.parts))

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        biases = tuple(part.bias for part in self.parts if part.bias is not None)
        return torch.cat(biases) if biases else None

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([part(input) for part in self.parts], dim=-1)


class EmbeddingTable(nn.Module):
    """A table [tokens, width] of an embedding, or several, each under its name in the checkpoint."""

    def __init__(self, tables: Mapping[str, Tensor]) -> None:
        super().__init__()
        for leaf, table in tables.items():
            self.register_parameter(leaf, nn.Parameter(table, requires_grad=False))


class JoinedEmbedding(nn.Embedding):
    """An embedding of the class whose rows are those of its tables, one after the other; it has no parameters."""

    def __init__(self, whole: nn.Embedding, tables: Sequence[EmbeddingTable]) -> None:
        nn.Module.__init__(self)
        self.tables = tuple(tables)  # modules by the names of the checkpoint
        for setting in (*nn.Embedding.__constants__, "freeze"):
            if hasattr(whole, setting):
                setattr(self, setting, getattr(whole, setting))

    def __deepcopy__(self, _: dict[int, Any]) -> JoinedEmbedding:
        """The same tables: PEFT copies an embedding that it trains whole, whose values are in them then."""
        return JoinedEmbedding(self, self.tables)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return tuple(part for table in self.tables for part in table._parameters.values() if part is not None)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return torch.cat(self.parts)

    def forward(self, input: Tensor) -> Tensor:
        """Rows of each table, without a copy of all: the tables of n-grams are larger than the rest of a model."""
        first, parts = 0, self.parts
        out = parts[0].new_zeros(*input.shape, parts[0].shape[1])
        for part in parts:
            inside = ((input >= first) & (input < first + len(part))).nonzero(as_tuple=True)
            if len(inside[0]):
                out[inside] = part[input[inside] - first]
            first += len(part)
        return out


def joined(model: nn.Module) -> dict[str, dict[str, range]]:
    """Linear or embedding of the class -> the parameters that it is made of, and their rows of it."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, dict[str, range]] = {}
    for name, module in model.named_modules():
        first = 0
        for part in _parts(module):
            found.setdefault(name, {})[names[id(part)]] = range(first, first := first + part.shape[0])
    return found


def _parts(module: nn.Module) -> tuple[Tensor, ...]:
    if isinstance(module, JoinedEmbedding):
        return module.parts
    return tuple(part.weight for part in module.parts) if isinstance(module, JoinedLinear) else ()


def expose(model: nn.Module, rules: Iterable[Any]) -> None:
    """Cut what a model on the meta device has as one and its checkpoints hold in parts, in place.

    rules: transformers' conversions for the model.
    """
    for rule in rules:
        if [type(op).__name__ for op in getattr(rule, "operations", ())] != ["Concatenate"] or rule.operations[0].dim:
            continue
        target, sources = _module(rule.target_patterns[0]), [_module(pattern) for pattern in rule.source_patterns]
        for name, module in list(model.named_modules()):
            parts = [name.removesuffix(target) + source for source in sources]
            if type(module) is nn.Conv1d and module.bias is None and f".{name}".endswith(f".{target}"):
                _cut(model, module, name, parts)
            elif type(module) is nn.Linear and f".{name}".endswith(f".{target}"):
                _cut_linear(model, module, name, parts)
            elif type(module) is nn.Embedding and f".{name}".endswith(f".{target}"):
                _cut_embedding(model, module, name, [name.removesuffix(target) + n for n in _tables(model, rule)])


def _tables(model: Any, rule: Any) -> list[str]:
    """The names of the parameters that a conversion joins; of numbered ones as many as the config says."""
    patterns = [pattern.replace("\\", "") for pattern in rule.source_patterns]
    setting = getattr(rule.operations[0], "num_shards_attribute", None)
    count = getattr(model.config.get_text_config(), setting or "", 0)
    return [pattern.replace("*", str(i)) for pattern in patterns for i in range(count if "*" in pattern else 1)]


def _cut_embedding(model: Any, whole: nn.Embedding, name: str, names: list[str]) -> None:
    """Replace an embedding by tables of these names: equal ones; of tokens the config's vocabulary and the rest."""
    rows, vocabulary = whole.num_embeddings, model.config.get_text_config().vocab_size
    tied = (getattr(model, "all_tied_weights_keys", None) or {}).values()
    of_tokens = whole is model.get_input_embeddings()
    sizes = [vocabulary, rows - vocabulary] if of_tokens else [rows // max(1, len(names))] * len(names)
    if len(sizes) != len(names) or sum(sizes) != rows or min(sizes) < 1 or f"{name}.weight" in tied:
        return
    first, held = 0, dict[str, dict[str, Tensor]]()
    for path, size in zip(names, sizes, strict=True):
        owner, _, leaf = path.rpartition(".")
        held.setdefault(owner, {})[leaf] = whole.weight[first : first + size]
        first += size
    made = {owner: EmbeddingTable(tables) for owner, tables in held.items()}
    _place(model, {name: JoinedEmbedding(whole, tuple(made.values())), **made})


def _cut_linear(model: nn.Module, whole: nn.Linear, name: str, names: list[str]) -> None:
    """Replace a Linear by equal parts of these names."""
    rows, rest = divmod(whole.out_features, len(names))
    if rest or whole.bias is not None:
        return
    parts = [nn.Linear(whole.in_features, rows, bias=False, device="meta").requires_grad_(False) for _ in names]
    _place(model, {**dict(zip(names, parts, strict=True)), name: JoinedLinear(parts)})


def _cut(model: nn.Module, whole: nn.Conv1d, name: str, names: list[str]) -> None:
    """Replace a convolution by parts of these names."""
    sizes = [_outputs(model, part) for part in names]
    if sum(sizes) != whole.weight.shape[0]:
        return
    parts = [ConvolutionPart(size, whole) for size in sizes]
    _place(model, {**dict(zip(names, parts, strict=True)), name: JoinedConvolution(parts)})


def _place(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for path, module in modules.items():
        owner, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(owner), leaf, module)


def _outputs(model: nn.Module, part: str) -> int:
    """The channels of a part: the outputs of the projection before it, q_proj of q_conv1d; 0 where it has none."""
    owner, _, leaf = part.rpartition(".")
    projection: Any = getattr(model.get_submodule(owner), f"{leaf.partition('_')[0]}_proj", None)
    return int(getattr(projection, "out_features", 0))


def _module(pattern: str) -> str:
    """The module that the pattern of a conversion names."""
    return pattern.replace("\\", "").removesuffix(".weight").lstrip(".")
