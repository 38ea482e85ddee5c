"""How a task lets a model answer (`generation_kwargs`): greedy, with an end; nothing else.

The library hands these settings to `generate` of transformers, which for some of them loads code of a hub or another
model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from requant.errors import InputError

DEFAULT_NEW_TOKENS = 256  # of an answer, where a task does not say: the library's own
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the library takes the first
_OF_SAMPLING = ("temperature", "top_p", "top_k")  # mean nothing where answers are greedy
_KNOWN = ("until", *_LENGTHS, "do_sample", *_OF_SAMPLING, "num_beams")


def check(settings: Mapping[str, Any], where: str) -> None:
    """Raise InputError for settings that are not of greedy answers. where: the task, for the message."""
    where = f"{where}: generation_kwargs"
    stray = next((key for key in settings if key not in _KNOWN), None)
    if stray is not None:
        raise InputError(f"{where}: {stray!r:.60} is not run here: expected {', '.join(_KNOWN)}")
    if _samples(settings) or settings.get("num_beams") not in (None, 1):
        raise InputError(
            f"{where}: answers are sampled or searched with beams, and only greedy ones are compared: "
            "set do_sample: false and num_beams: 1"
        )
    until = settings.get("until", [])
    if not all(isinstance(end, str) for end in (until if isinstance(until, list) else [until])):
        raise InputError(f"{where}: until: {until!r:.60}, expected texts that end an answer")
    for name in _LENGTHS:
        length = settings.get(name)
        if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 1):
            raise InputError(f"{where}: {name}: {length!r:.60}, expected a number of tokens of at least 1")


def _samples(settings: Mapping[str, Any]) -> bool:
    """Whether the library would sample: a temperature alone is enough for it."""
    asked = settings.get("do_sample")
    return asked is not False if asked is not None else settings.get("temperature", 0) not in (0, None)


def new_tokens(settings: Mapping[str, Any]) -> int:
    """How many tokens a task lets a model answer with."""
    return next((int(settings[name]) for name in _LENGTHS if settings.get(name) is not None), DEFAULT_NEW_TOKENS)
