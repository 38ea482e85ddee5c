"""Wraps functions of requant, given by name, in a context manager: what benches measure."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

Around = Callable[[str], AbstractContextManager[Any]]


def watch(names: Mapping[str, str], around: Around) -> None:
    """Wrap each function of `names` in `around(label)`. Call it once in a process.

    names: "package.file.function" or "package.file.Class.method" of requant -> label.
    """
    for path, shown in names.items():
        package, file, *inner, name = path.split(".")
        holder: Any = import_module(f"requant.{package}.{file}")
        for part in inner:
            holder = getattr(holder, part)
        original = getattr(holder, name)
        wrapped = _wrapped(original, shown, around)
        setattr(holder, name, wrapped)
        if not inner:  # others may have imported it by its name
            for other in [m for n, m in sys.modules.items() if n.startswith("requant.")]:
                if getattr(other, name, None) is original:
                    setattr(other, name, wrapped)


def _wrapped(original: Callable[..., Any], shown: str, around: Around) -> Callable[..., Any]:
    @functools.wraps(original)
    def named(*args: Any, **kwargs: Any) -> Any:
        with around(shown):
            return original(*args, **kwargs)

    return named
