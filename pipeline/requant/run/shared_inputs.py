"""What several recipes have in common, made once: plans, tokenizer, token documents.

A sweep prepares all of its recipes with one `SharedInputs`. Each part is known by the keys of the recipe that it
depends on; what is shared is never changed. A run keeps its token documents for the next `check` or `run` of the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from requant.checkpoint.run_directory import CACHE, RunDirectory, key_of
from requant.data.documents import Format, TextSource, TokenDocument, tokenize
from requant.data.stored_tokens import Documents, StoredTokens
from requant.recipe import Recipe

T = TypeVar("T")


class SharedInputs:
    """Parts of recipes, made once for equal keys. Kept in memory, for as long as this object is.

    stored: token documents that a run keeps on the disk.
    """

    def __init__(self, stored: StoredTokens | None = None) -> None:
        self.stored = stored
        self._made: dict[str, Any] = {}
        self._documents: dict[tuple[Any, ...], Documents] = {}

    @classmethod
    def of_run(cls, path: Path) -> SharedInputs:
        """With the token documents that a run keeps in its directory; one that is not there yet keeps them later."""
        return cls(StoredTokens(path / CACHE))

    def save(self, directory: RunDirectory) -> None:
        """Keep the token documents in an open run directory: written in their own, taken over from it in others."""
        if self.stored is None:
            return
        if self.stored.folder == directory.cache:
            self.stored.save()
        else:
            for name in self.stored.used:
                directory.take_cached(name)

    def release(self) -> None:
        """Give up all that is in memory, but for token documents that are still to be kept."""
        self._made.clear()
        self._documents.clear()

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
            self._documents[key] = self._read(source, tokenizer, asked, completions=completions)
        documents, told = self._documents[key]
        if notes is not None:
            notes += told
        return list(documents)

    def _read(self, source: TextSource, tokenizer: Any, asked: Format, *, completions: bool) -> Documents:
        """The documents of a source, from the disk where they are there."""
        stored = self.stored
        name = stored.name(source, tokenizer, asked, completions=completions) if stored else None
        found = stored.load(name) if stored and name else None
        if found is not None:
            return found
        told: list[str] = []
        made = tokenize(source, tokenizer, asked, completions=completions, notes=told), told
        if stored and name and name == stored.name(source, tokenizer, asked, completions=completions):
            stored.made[name] = made  # the text did not change meanwhile
        return made
