"""Token ids of a long text, part by part: the library takes 300 bytes a token."""

from __future__ import annotations

from typing import Any

from requant.errors import library_call

PART = 500_000  # characters at a time
AROUND = 400  # characters on either side of a cut that are tokenized together and apart
TRIED = 40  # places in a row
LONGEST_WORD = 2**22  # characters without a blank: the library takes them as one, in 250 bytes and 3 microseconds each

Offsets = list[tuple[int, int]]


def encode(tokenizer: Any, text: str) -> tuple[list[int], Offsets]:
    """(token ids of the whole text, where each token stands in it), without special tokens.

    A long text is cut after line ends, or before blanks where there are none, where its tokens are the same with and
    without the cut. Where no such place is found, the rest is tokenized whole.
    """
    ids: list[int] = []
    offsets: Offsets = []
    start = 0
    while start < len(text):
        stop = _cut(tokenizer, text, start)
        found, places = _encode(tokenizer, text[start:stop])
        ids += found
        offsets += [(a + start, b + start) for a, b in places] if start else places
        start = stop
    return ids, offsets


def _encode(tokenizer: Any, text: str) -> tuple[list[int], Offsets]:
    with library_call("the tokenizer cannot read a text", "its files do not belong together: copy them again"):
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
    return encoded["input_ids"], encoded["offset_mapping"]


def _cut(tokenizer: Any, text: str, start: int) -> int:
    """Where the part that begins at `start` ends."""
    if len(text) - start <= 2 * PART:
        return len(text)
    for mark, behind in (("\n", 1), (" ", 0)):
        at = start + PART
        for _ in range(TRIED):
            at = text.find(mark, at + 1 - behind) + behind
            if at <= start or len(text) - at < AROUND:
                break
            left, right = text[at - AROUND : at], text[at : at + AROUND]
            apart = _encode(tokenizer, left)[0] + _encode(tokenizer, right)[0]
            if _encode(tokenizer, left + right)[0] == apart:
                return at
    return len(text)


def longest_word(text: str) -> int:
    """The most characters of a text that have no blank or line end between them; 0 for a text that is short enough."""
    return max(map(len, text.split()), default=0) if len(text) > LONGEST_WORD else 0
