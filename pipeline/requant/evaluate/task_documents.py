"""The document of a task that lm-evaluation-harness works on, so that its errors name it.

The library's own name none. It also writes a null field as the word None into questions and answers, which nobody
trained on: in tasks of a file that is refused. Those of the library stay as others publish their scores.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from requant.errors import one_line

KEYS = ("doc_to_text", "doc_to_target", "doc_to_choice")


class NullFieldError(Exception):
    """A field of a document that is null and would be written as text. Its text: the field."""


class Null:
    """What a template sees in place of a null: false, equal to None, and nothing that can be written."""

    def __init__(self, field: str) -> None:
        self._field = field

    def _written(self, *_: object) -> NoReturn:
        raise NullFieldError(self._field)

    __str__ = __repr__ = __iter__ = __len__ = __add__ = __radd__ = _written

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, Null)

    def __hash__(self) -> int:
        return hash(None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise NullFieldError(self._field)


@dataclass
class Watched:
    """What the library works on. task: its object. document: a row. key: whose value was asked for last."""

    task: Any = None
    document: Any = None
    key: str = ""

    def __str__(self) -> str:
        """`document 3 of test, doc_to_text`, counted from 0; empty before the first document."""
        if self.task is None:
            return ""
        found = next((f"document {i} of {name}" for name, rows in self._rows() for i, row in rows if self._is(row)), "")
        return ", ".join(filter(None, [found or "a document", self.key]))

    def _is(self, row: Any) -> bool:
        return bool(row == self.document)

    def _rows(self) -> Iterator[tuple[str, Any]]:
        """(name of a split, its rows with their numbers): what is asked, and what examples are taken from."""
        config = self.task.config
        yield config.test_split or config.validation_split, enumerate(self.task.eval_docs)
        if (sampler := getattr(self.task, "sampler", None)) is not None:
            yield self.task.fewshot_cfg.split or "the examples", enumerate(sampler.df)


@contextmanager
def watched(*, refuse_nulls: bool) -> Iterator[Watched]:
    """What the library works on inside of the block.

    refuse_nulls: whether a null that `doc_to_text`, `doc_to_target` or `doc_to_choice` would write raises
    NullFieldError.
    """
    from lm_eval import utils
    from lm_eval.api.task import ConfigurableTask

    seen = Watched()
    with ExitStack() as until:
        for name in ("fewshot_context", *KEYS):
            own = _method(name, getattr(ConfigurableTask, name), seen, refuse_nulls=refuse_nulls)
            _replace(until, ConfigurableTask, name, own)
        if refuse_nulls:
            honest, policies = utils.apply_template, utils.env.policies
            dumping = {**policies["json.dumps_kwargs"], "default": _as_json}
            _replace(until, utils, "apply_template", lambda text, row: honest(text, marked(row)))
            _replace(until, utils.env, "tests", utils.env.tests | {"none": _is_none})
            _replace(until, utils.env, "policies", policies | {"json.dumps_kwargs": dumping})
        yield seen


def _replace(until: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Give an attribute another value until the end of a block."""
    until.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _method(name: str, honest: Callable[..., Any], seen: Watched, *, refuse_nulls: bool) -> Callable[..., Any]:
    """A method of the library's task that remembers the document that it is asked about."""

    @functools.wraps(honest)
    def method(task: Any, doc: Any, *args: Any, **options: Any) -> Any:
        seen.task, seen.document, seen.key = task, doc, name if name in KEYS else ""
        value = honest(task, doc, *args, **options)
        if refuse_nulls and name in KEYS:
            _refuse_null(value, (*args, *options.values(), getattr(task.config, name))[0])
        return value

    return method


def _refuse_null(value: Any, column: Any) -> None:
    """Raise NullFieldError for a column's value that is null or a list with one. column: its name, or a template."""
    if isinstance(column, str) and value is None:
        raise NullFieldError(column)
    if isinstance(column, str) and isinstance(value, list) and None in value:
        raise NullFieldError(f"{column}.{value.index(None)}")


def marked(value: Any, field: str = "") -> Any:
    """A row, or a part of it at `field`, with `Null` in place of every null."""
    if value is None:
        return Null(field)
    if isinstance(value, dict):
        return {key: marked(item, f"{field}.{key}".lstrip(".")) for key, item in value.items()}
    if isinstance(value, list):
        return [marked(item, f"{field}.{i}") for i, item in enumerate(value)]
    return value


def _is_none(value: Any) -> bool:
    return value is None or isinstance(value, Null)


def _as_json(value: Any) -> None:
    if not isinstance(value, Null):
        raise TypeError(f"{type(value).__name__} is no JSON")


def failure(error: Exception, seen: Watched) -> str:
    """What the library could not do, with which document, and what to do."""
    if isinstance(error, NullFieldError):
        return (
            f"{seen}: the field {error} is null and would be written as the word None: give it a value, leave the "
            "document out, or say in the template what stands there"
        )
    if "Sample larger than population" in str(error):
        return f"has fewer documents for examples than are asked for ({one_line(error)}): lower few_shot"
    if seen.task is not None:
        return f"lm-evaluation-harness cannot ask {seen} ({one_line(error)}): correct that document or the task"
    if isinstance(error, StopIteration | IndexError) or "corresponds to no data" in str(error):
        return (
            f"its data holds no documents ({one_line(error)}): a file of dataset_kwargs.data_files has no rows, or "
            "none is for its test_split or validation_split"
        )
    return f"lm-evaluation-harness cannot build it ({one_line(error)}): correct the task"
