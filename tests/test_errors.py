"""`requant.errors.library_call`: what a library raises names the file; the rest passes."""

from __future__ import annotations

import pytest

from requant.errors import InputError, StageError, library_call


class PanicException(BaseException):
    """What extensions written in Rust raise when they panic; they do not share a class."""


@pytest.mark.parametrize(
    "error", [KeyError("a"), RecursionError("deep"), TypeError("two\nlines"), PanicException("index out of bounds")]
)
def test_whatever_a_library_raises_is_an_error_of_ours(error: BaseException) -> None:
    with (
        pytest.raises(
            InputError, match=rf"^c\.json: transformers cannot read it: {type(error).__name__}: .*: get another$"
        ),
        library_call("c.json: transformers cannot read it", "get another"),
    ):
        raise error


def test_the_message_is_one_short_line() -> None:
    with pytest.raises(StageError) as caught, library_call("c.json", kind=StageError):
        raise ValueError("a\n\n  b" + "x" * 10_000)
    assert str(caught.value).startswith("c.json: ValueError: a bxxx")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), StageError("ours"), MemoryError()])
def test_what_is_not_about_the_file_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, library_call("c.json", passing=(MemoryError,)):
        raise error
    assert caught.value is error
