"""What several recipes have in common, made once: plans, tokenizer, token documents.

A sweep prepares all of its recipes with one `SharedInputs`. Each part is known by the keys of the recipe that it
depends on; what is shared is never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from requant.checkpoint.run_directory import key_of
from requant.data.documents import Format, TextSource, TokenDocument, tokenize
from requant.recipe import Recipe

T = TypeVar("T")


class SharedInputs:
    """Parts of recipes, made once for equal keys. Kept in memory, for as long as this object is."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._documents: dict[tuple[Any, ...], tuple[list[TokenDocument], list[str]]] = {}

    def once(self, part: str, recipe: Recipe, keys: Sequence[str], make: Callable[[], T], *more: Any) -> T:
        """What `make` gives for a recipe with these values. keys: the sections it depends on. more: what else."""
        key = key_of(part, str(recipe.directory), recipe.model_dump(mode="json", include=set(keys)), more)
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[no-any-return]

    def tokenize(
        self, source: TextSource, tokenizer: Any, asked: Format = "auto", *,
        completions: bool = True, notes: list[str] | None = None,
    ) -> list[TokenDocument]:  # fmt: skip
        """`data.documents.tokenize`, once for each source, format and tokenizer (which `once` has given)."""
        key = (source, id(tokenizer), asked, completions)
        if key not in self._documents:
            told: list[str] = []
            self._documents[key] = tokenize(source, tokenizer, asked, completions=completions, notes=told), told
        documents, told = self._documents[key]
        if notes is not None:
            notes += told
        return list(documents)
