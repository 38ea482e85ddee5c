"""Imports of large libraries without the parts of others that no run uses.

Where they are installed, transformers imports scipy for losses of object detection, and torchao for checkpoints that
requant refuses; bitsandbytes has torch compile four functions, which imports torch's compiler. That is a third of the
time of all imports, and Python's search for garbage among what they define another tenth. transformers also lists its
classes twice.
"""

from __future__ import annotations

import gc
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
UNUSED = ("scipy", "torchao")
"""Packages of which transformers uses nothing in a run. Other libraries, and a model's own code, may import them."""
MODEL_CODE = "transformers.modeling_utils"

_froze = False


def froze() -> bool:
    """Whether `importing` has excluded objects from garbage collection in this process."""
    return _froze


@contextmanager
def importing() -> Iterator[None]:
    """Context for imports at the start of a process: no search for garbage, in it or later in what exists at its end.

    A full search visits the objects of all libraries, a third of a second, and frees none of them. Where the model code
    is imported already, nothing is changed.
    """
    global _froze
    if MODEL_CODE in sys.modules:
        yield
        return
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        _froze = True
        if enabled:
            gc.enable()


@contextmanager
def importing_models() -> Iterator[None]:
    """`importing`, after what all model classes of transformers share."""
    with importing():
        load_model_code()
        yield


def load_model_code() -> None:
    """Import what all model classes of transformers share, without `UNUSED`; nothing where that is imported already.

    For a process of our own: afterwards transformers has no losses of object detection and loads no torchao checkpoint.
    """
    if MODEL_CODE in sys.modules:
        return
    with hidden(*UNUSED), _listed_once():
        import transformers.modeling_utils  # noqa: F401


def load_training_libraries() -> None:
    """Import bitsandbytes and PEFT, which hold the base and the adapter as training does."""
    if "bitsandbytes" not in sys.modules:
        with _uncompiled():
            import bitsandbytes  # noqa: F401
    import peft  # noqa: F401


@contextmanager
def training_libraries_ahead() -> Iterator[None]:
    """Context beside which a thread imports bitsandbytes and PEFT, while other work waits for disk and device."""
    thread = threading.Thread(target=_attempt, name="training libraries")
    thread.start()
    try:
        yield
    finally:
        thread.join()


@contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """Context in which libraries do not find `packages`, but for those that are imported already."""
    names = [name for name in packages if name not in sys.modules]
    _forget(names)
    for name in names:
        sys.modules[name] = None  # type: ignore[assignment]  # an import of it fails, and no package is found
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        _forget(names)


def _forget(packages: list[str]) -> None:
    """Have transformers look for packages again when it is asked for them."""
    if (answers := sys.modules.get("transformers.utils.import_utils")) is not None:
        for name in packages:
            if (answer := getattr(answers, f"is_{name}_available", None)) is not None:
                answer.cache_clear()


@contextmanager
def _listed_once() -> Iterator[None]:
    """Context in which transformers' package of models takes the list of all classes that transformers itself has made.

    It reads the files of all models for it. Its cache knows the list by the folder, and is asked by the folder's
    `__init__.py`.
    """
    from transformers.utils import import_utils

    original = getattr(import_utils, "create_import_structure_from_path", None)

    def of_folder(path: str | Path) -> Any:
        return original(Path(path).parent if Path(path).is_file() else Path(path))  # type: ignore[misc]

    if original is None:
        yield
        return
    import_utils.create_import_structure_from_path = of_folder
    try:
        yield
    finally:
        import_utils.create_import_structure_from_path = original


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Context in which `torch.compile` leaves functions as they are.

    bitsandbytes runs its functions so too where compiling fails. Both give the same codes and the same numbers.
    """
    import torch

    def as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Any:
        return function if function is not None else lambda decorated: decorated

    original = torch.compile
    torch.compile = as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original


def _attempt() -> None:
    with suppress(ImportError):  # raised again where it is first needed
        load_training_libraries()
