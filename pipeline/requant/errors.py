"""The exception tree, and the boundary to libraries that raise what they like.

    RequantError
    +-- RecipeError   the recipe or the command line is wrong: exit code 2, nothing was read
    +-- InputError    a model, adapter or dataset cannot be used as given, seen from headers: exit code 2
    +-- StageError    only the data itself showed it (NaN, overflow, full disk): exit code 1
        +-- NotFiniteError   what a linear receives holds NaN or infinity: all ranks see that alike

Every message says what was found, what was expected and what to do; secrets in it are masked (`outgoing`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from requant.outgoing import masked


class RequantError(Exception):
    """Base of every error that requant raises on purpose."""

    exit_code = 1

    def __init__(self, *args: object) -> None:
        super().__init__(*(masked(a) if isinstance(a, str) else a for a in args))


class RecipeError(RequantError):
    """The recipe or the command line is wrong; `problems` holds one line for each thing found."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = tuple(map(masked, (problems,) if isinstance(problems, str) else problems))
        super().__init__("\n".join(self.problems))


class InputError(RequantError):
    """A model, adapter or dataset cannot be used as given; known before any weight is read."""

    exit_code = 2


class StageError(RequantError):
    """A stage failed on its data: non-finite values, overflow, a full disk, a failed self-test."""


class NotFiniteError(StageError):
    """A Hessian holds NaN or infinity; ranks that share it all raise this."""


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


def one_line(error: BaseException) -> str:
    """The class and the message of an exception, in one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
