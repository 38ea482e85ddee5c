"""The exception tree, and the boundary to libraries that raise what they like.

    RequantError
    +-- RecipeError   the recipe or the command line is wrong: exit code 2, nothing was read
    +-- InputError    a model, adapter or dataset cannot be used as given, seen from headers: exit code 2
    +-- StageError    only the data itself showed it (NaN, overflow, full disk): exit code 1
        +-- NotFiniteError   what a linear receives holds NaN or infinity: all ranks see that alike
        +-- MemoryLackError  a device has too little memory: another time it may have enough

Every message says what was found, what was expected and what to do; secrets in it are masked (`outgoing`), and what it
repeats of strangers' names is cut (`bounded`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

from requant.outgoing import masked

LONGEST = 4000  # characters of a message
_LONG_WORD = re.compile(r"\S{1001,}")


class RequantError(Exception):
    """Base of every error that requant raises on purpose."""

    exit_code = 1

    def __init__(self, *args: object) -> None:
        super().__init__(*(bounded(masked(a)) if isinstance(a, str) else a for a in args))


class RecipeError(RequantError):
    """The recipe or the command line is wrong; `problems` holds one line for each thing found."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        given = (problems,) if isinstance(problems, str) else problems
        self.problems = _first([bounded(masked(problem), LONGEST // 4) for problem in given])
        super().__init__("\n".join(self.problems))


class InputError(RequantError):
    """A model, adapter or dataset cannot be used as given; known before any weight is read."""

    exit_code = 2


class StageError(RequantError):
    """A stage failed on its data: non-finite values, overflow, a full disk, a failed self-test."""


class NotFiniteError(StageError):
    """A Hessian holds NaN or infinity; ranks that share it all raise this."""


class MemoryLackError(StageError):
    """A device has too little memory for what was asked; in the next run it may have enough."""


def lacks_memory(error: BaseException) -> bool:
    """Whether an exception of a library, or one that it was raised from, says that memory ran out."""
    while True:
        if isinstance(error, MemoryError | MemoryLackError) or type(error).__name__ == "OutOfMemoryError":  # torch's
            return True
        before = error.__cause__ or error.__context__
        if before is None:
            return False
        error = before


@contextmanager
def library_call(
    what: str,
    advice: str = "",
    *,
    kind: type[RequantError] = InputError,
    passing: tuple[type[BaseException], ...] = (),
) -> Iterator[None]:
    """One call into a library on files of strangers: whatever it raises becomes one error of ours.

    Only the library's call belongs inside, so that no fault of ours is taken for one of the file.

    what: the file, and who cannot do what with it. advice: what to do. kind: of the error. passing: exceptions that are
    not about the file.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, (RequantError, *passing)):
            raise
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # that of Rust's extensions
            raise
        raise kind(": ".join(filter(None, (what, one_line(error), advice)))) from error


def bounded(text: str, longest: int = LONGEST) -> str:
    """The text where words, such as names that a file made up, and the whole are cut in the middle.

    Words of more than 1,000 characters become 200. The beginning stays, which names the file, and the end, which says
    what to do.
    """
    text = _LONG_WORD.sub(lambda word: _cut(word[0], 200), text)
    return text if len(text) <= longest else _cut(text, longest)


def _first(problems: Sequence[str]) -> tuple[str, ...]:
    """The problems that fit into one message, and how many do not."""
    sizes = accumulate(len(problem) + 1 for problem in problems)
    fitting = sum(size <= LONGEST - 20 for size in sizes)
    rest = len(problems) - fitting
    return (*problems[:fitting], f"and {rest} more") if rest else tuple(problems)


def _cut(text: str, longest: int) -> str:
    """The first two thirds and the last third of `longest` characters."""
    end = longest // 3
    return f"{text[: longest - end]}... ({len(text):,} characters) ...{text[-end:]}"


def one_line(error: BaseException) -> str:
    """The class and the message of an exception, in one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
