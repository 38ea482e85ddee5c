"""`requant.errors.library_call`: what a library raises names the file; the rest passes."""

from __future__ import annotations

import pytest

from requant.errors import LONGEST, InputError, RecipeError, StageError, library_call


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


def test_what_a_message_repeats_of_names_is_cut() -> None:
    """The file in front and the advice at the end stay, of one long name and of many short ones."""
    said = str(InputError(f"x.safetensors: tensor {'a' * 10_000} is extra: remove it"))
    assert said.startswith("x.safetensors: tensor aaaa")
    assert said.endswith("aaa is extra: remove it")
    assert "... (10,000 characters) ..." in said
    assert len(said) < 300
    many = str(StageError(f"x.safetensors: tensors {', '.join(map(str, range(5000)))} are extra: remove them"))
    assert many.startswith("x.safetensors: tensors 0, 1,")
    assert many.endswith("4999 are extra: remove them")
    assert len(many) < LONGEST + 50
    path = "/a" * 500
    assert str(InputError(path)) == path


def test_problems_beyond_one_message_are_counted() -> None:
    error = RecipeError([f"recipe.yaml: key {i}: {'b ' * 1000}unknown" for i in range(50)])
    assert len(error.problems) == 4
    assert error.problems[-1] == "and 47 more"
    assert all(p.endswith("b unknown") for p in error.problems[:-1])
    assert len(str(error)) < LONGEST
    assert RecipeError("a").problems == ("a",)
