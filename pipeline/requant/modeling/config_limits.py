"""Sizes in config.json that no weights stand behind, refused before anything is built.

transformers makes a module a layer, a name a label and a table as wide as a head, whatever the numbers are: a million
layers take hours. The headers bound them: a layer has a tensor, a head is no wider than a tensor is large.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from requant.checkpoint.reader import Checkpoint
from requant.errors import InputError

MOST_LABELS = 10**5  # names of a classifier's classes
_COUNTS = re.compile(r"(num|n)_(\w+_)?(layers?|blocks?|experts)")
_SIZES = re.compile(r"(\w+_)?(dims?|size|rank|heads?|embd|inner|channels)")
_LABELS = re.compile(r"num_labels")
_NOT_OF_WEIGHTS = re.compile(r"\w*(window|chunk|batch|block|image|patch|crop)\w*size")
_CACHE = ("sliding_window", "attention_chunk_size")  # read by every model's cache, declared by few
_UNKNOWN = 10**5  # tensors, where no weights are beside the config
_LEAST_SIZE = 2**20  # a table so wide costs nothing


def check(path: Path, config: Mapping[str, Any]) -> None:
    """Raise InputError for a number of a model's config.json that is far beyond what its weights hold.

    And for a window of attention that is no whole number: a class that does not declare it takes anything, and fails in
    its forward. config: the content of config.json in the directory `path`.
    """
    text = config.get("text_config")
    for section, values in (("", config), ("text_config.", text if isinstance(text, Mapping) else {})):
        for key in _CACHE:
            if not isinstance(value := values.get(key), int | None) or isinstance(value, bool):
                raise InputError(
                    f"{path / 'config.json'}: {section}{key} is {value!r:.60}, expected a whole number or null: "
                    "correct or download the file again"
                )
    tensors, largest = _held(path)
    for name, number in _numbers(config):
        key = name.rpartition(".")[2]
        if _COUNTS.fullmatch(key) and number > tensors:
            held = f"the weights are {tensors} tensors"
        elif _LABELS.fullmatch(key) and number > MOST_LABELS:
            held = f"expected at most {MOST_LABELS}"
        elif _SIZES.fullmatch(key) and not _NOT_OF_WEIGHTS.fullmatch(key) and number > max(largest, _LEAST_SIZE):
            held = f"the largest tensor has {largest} elements"
        else:
            continue
        raise InputError(
            f"{path / 'config.json'}: {name} is {number}, {held}: take the config.json that belongs to the weights, or "
            "download the model again"
        )


def _held(path: Path) -> tuple[int, int]:
    """(most modules of a kind, most elements of a tensor) that the weights explain, from headers."""
    try:
        infos = Checkpoint(path).values()
    except InputError:  # no weights: said where they are needed
        return _UNKNOWN, _LEAST_SIZE
    stacked = (info.shape[0] for info in infos if len(info.shape) > 2)
    largest = max((info.nbytes for info in infos), default=0)
    return max(len(infos), *stacked, 1), 2 * largest  # two 4-bit values a byte


def _numbers(config: Mapping[str, Any], outer: str = "") -> Iterator[tuple[str, int]]:
    """(dotted key, value) of every whole number, also those of sections such as text_config."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{outer}{key}.")
        elif isinstance(value, int) and not isinstance(value, bool):
            yield f"{outer}{key}", value
