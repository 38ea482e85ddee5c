"""What a merge plan must know about the model: names, ties, Conv1D modules, stacked experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

from requant.merge.base_weights import BaseWeights
from requant.modeling import conversions, cut_linears, joined_parts, skeleton, stored_parameters
from requant.modeling.cut_linears import Cut
from requant.modeling.stacked_experts import StackedParameter, stacked
from requant.modeling.unplaced import Unplaced


@dataclass(frozen=True, kw_only=True)
class ModelLayout:
    """How the parameters of a model are stored in the base checkpoint.

    names: parameter -> tensor of the checkpoint. conv1d: names of Conv1D modules.
    tied: parameters (input, output embedding) that share one tensor. embedding: parameter of the input embedding.
    shared: other parameters that are one with an earlier layer's -> that one; the file holds each once.
    cuts: module of the class -> its rows of the one Linear that the file holds for several.
    joins: module of the class -> the parameters that the file holds for it, and their rows of it.
    fused: stacked expert parameter -> where it is stored. current_name: an older release's tensor name -> today's.
    converted: what transformers does with a stored tensor of this name besides renaming it, None: nothing.
    unplaced: what the checkpoint holds besides the parameters of `model_class`.
    """

    names: Mapping[str, str]
    conv1d: frozenset[str]
    tied: tuple[str, str] | None
    embedding: str
    shared: Mapping[str, str] = field(default_factory=dict)
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    joins: Mapping[str, Mapping[str, range]] = field(default_factory=dict)
    fused: Mapping[str, StackedParameter] = field(default_factory=dict)
    current_name: Callable[[str], str] = str
    converted: Callable[[str], str | None] = lambda _: None
    unplaced: Unplaced = field(default_factory=Unplaced)
    model_class: str = "the model"

    @classmethod
    def of(cls, model: Any, base: BaseWeights) -> ModelLayout:
        """The layout of a model from `skeleton.build`, stored as `base`."""
        names = skeleton.tensor_names(model, base.checkpoint)
        embedding = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
        shapes = {w.name: w.shape for w in base.weights.values()}
        fused = stacked(model, names, shapes)
        placed = {part.name for parameter in fused.values() for part in parameter.parts}
        return cls(
            names=names,
            conv1d=frozenset(skeleton.conv1d_modules(model) | stored_parameters.transposed(model)),
            tied=skeleton.tied_pair(model),
            embedding=f"{embedding}.weight",
            shared={
                n: first for n, first in (getattr(model, "all_tied_weights_keys", None) or {}).items() if n not in names
            },
            cuts=cut_linears.cuts(model),
            joins=joined_parts.joined(model),
            fused=fused,
            current_name=lambda name: conversions.renamed(model, name),
            converted=lambda name: conversions.converted(model, name),
            unplaced=Unplaced.of(model, shapes, placed),
            model_class=type(model).__name__,
        )

    def tensor(self, parameter: str) -> str:
        """The checkpoint's name of a parameter."""
        return self.names.get(parameter, parameter)

    @property
    def embedding_tensors(self) -> tuple[str, ...]:
        """The checkpoint's names of the input embedding: one tensor, or its tables."""
        parts = self.joins.get(self.embedding.removesuffix(".weight"), (self.embedding,))
        return tuple(map(self.tensor, parts))

    def modules(self, stored: Iterable[str]) -> Iterator[str]:
        """Modules of the class, and those of `stored` tensors that are no parameter of it, each under one name."""
        extra = (name for name in stored if name not in self._placed)
        return chain((name.rpartition(".")[0] for name in chain(self.names, self.fused, extra)), self.cuts, self.joins)

    @cached_property
    def _placed(self) -> frozenset[str]:
        return frozenset(self.names.values())
