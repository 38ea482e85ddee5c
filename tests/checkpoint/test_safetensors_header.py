"""Headers of safetensors: what the library refuses is refused, by what is wrong with it."""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from requant.checkpoint.reader import Checkpoint
from requant.checkpoint.safetensors_header import read_header
from requant.errors import InputError

T = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 32]},
}
BODY = bytes(32)


def packed(table: Any, body: bytes = BODY) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(**changes: Any) -> dict[str, Any]:
    return T | {"b": T["b"] | changes}


def loads(file: Path) -> bool:
    """Whether the library takes the file."""
    try:
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                opened.get_tensor(name)
    except SafetensorError:
        return False
    return True


CASES = {
    "trailing": (packed(T, BODY + b"junk"), "4 bytes behind the last tensor"),
    "overlap": (packed(entry(data_offsets=[0, 16]), BODY[:16]), "'b' overlaps 'a'"),
    "partial overlap": (packed(entry(data_offsets=[8, 24]), BODY[:24]), "'b' overlaps 'a'"),
    "gap": (packed(entry(data_offsets=[20, 36]), bytes(36)), "'b' begins 4 bytes behind 'a'"),
    "gap at the start": (packed({"b": T["b"]}), "'b' begins 16 bytes behind the header"),
    "float shape": (packed(entry(shape=[2.0, 2.0])), "unreadable header entry"),
    "text shape": (packed(entry(shape=["2", "2"])), "unreadable header entry"),
    "boolean shape": (packed(entry(shape=[True, 4])), "unreadable header entry"),
    "negative shape": (packed(entry(shape=[-2, -2])), "unreadable header entry"),
    "null shape": (packed(entry(shape=None)), "unreadable header entry"),
    "float offsets": (packed(entry(data_offsets=[16.0, 32.0])), "unreadable header entry"),
    "three offsets": (packed(entry(data_offsets=[16, 32, 32])), "unreadable header entry"),
    "offsets backwards": (packed(entry(data_offsets=[32, 16])), "spans -16 bytes"),
    "overflow": (packed(entry(shape=[2**40, 2**40])), "impossible shape"),
    "overflow times none": (packed(entry(shape=[2**62, 2**40, 0], data_offsets=[16, 16])), "impossible shape"),
    "many digits": (packed(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b"]}}"), "5000 digits"),
    "no dtype": (packed(entry(dtype=None)), "unreadable header entry"),
    "unknown dtype": (packed(entry(dtype="bf16")), "is stored as bf16, which is not read here"),
    "numeric metadata": (packed(T | {"__metadata__": 3}), "__metadata__"),
    "a number in metadata": (packed(T | {"__metadata__": {"step": 3}}), "__metadata__"),
    "name twice": (packed(json.dumps(T).encode()[:-1] + b', "b": ' + json.dumps(T["b"]).encode() + b"}"), "'b' is there"),
    "not at the start": (packed(b" " + json.dumps(T).encode()), "no table"),
    "deep": (packed(b'{"a":' * 50_000), "nested too deeply"),
    "surrogate": (packed({"\ud800": T["a"]}, BODY[:16]), "surrogate"),
    "header too large": (struct.pack("<Q", 100_000_001) + bytes(100_000_001), "not a safetensors file"),
    "two headers long": (struct.pack("<Q", 8) + b"{}", "not a safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_refused_and_why(tmp_path: Path, case: str) -> None:
    data, says = CASES[case]
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_header(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert says in str(caught.value)
    assert len(str(caught.value)) < 600
    assert not loads(file) or case in ("name twice", "not at the start")  # the library is not strict there


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for file, found in (
        (tmp_path / "pipe", "a device or a pipe"),
        (tmp_path, "a directory"),
        (Path("/dev/zero"), "a device or a pipe"),
        (tmp_path / "a\0b", "no file can have this name"),
    ):
        with pytest.raises(InputError, match=f"not a safetensors file: {found}"):
            read_header(file)


def test_tables_in_any_order_with_empty_tensors_and_scalars(tmp_path: Path) -> None:
    file = tmp_path / "blob"
    none = {"dtype": "F16", "shape": [0, 7], "data_offsets": [16, 16]}
    scalar = {"dtype": "U8", "shape": [], "data_offsets": [32, 33]}
    file.write_bytes(packed({"s": scalar, "b": T["b"], "none": none, "a": T["a"], "__metadata__": {}}, bytes(33)))
    link = tmp_path / "model.safetensors"
    link.symlink_to(file)  # as in the hub's cache
    infos = read_header(link)
    assert list(infos) == ["s", "b", "none", "a"]
    assert [i.nbytes for i in infos.values()] == [1, 16, 0, 16]
    assert loads(link)


def mutations(data: bytes, rng: random.Random) -> Iterator[bytes]:
    """Files like `data` with a fault, or none: bytes flipped, cut or added; values of the table replaced."""
    length = struct.unpack("<Q", data[:8])[0]
    table, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    odd: list[Any] = [
        None,
        True,
        0,
        -1,
        1.0,
        "1",
        [],
        [0],
        {},
        2**63,
        2**64,
        10**30,
        [8, 4],
        [[1]],
        "F16",
        "BOOL",
        [4, 4],
    ]
    while True:
        changed = copy.deepcopy(table)
        place = changed[rng.choice(list(changed))]
        kind = rng.randrange(5)
        if kind == 0:
            place[rng.choice(list(place))] = rng.choice(odd)
            yield packed(changed, body)
        elif kind == 1:
            other = rng.choice(list(changed))
            changed[other] = {**changed[other], rng.choice(list(place)): rng.choice(list(place.values()))}
            yield packed(changed, body)
        elif kind == 2:
            flipped = bytearray(data)
            for _ in range(rng.choice((1, 3))):
                flipped[rng.randrange(8 + length)] ^= 1 << rng.randrange(8)
            yield bytes(flipped)
        elif kind == 3:
            yield data[: rng.randrange(len(data))] + rng.randbytes(rng.choice((0, 0, 5)))
        else:
            yield packed(changed, body + rng.randbytes(rng.choice((0, 1, 64))))


def test_what_is_accepted_the_library_loads(tmp_path: Path) -> None:
    """400 mutated files: nothing but InputError, and nothing accepted that the library refuses."""
    rng, file = random.Random(20), tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2, 2), "b": torch.ones(4).bfloat16(), "c": torch.ones(3).byte()}, file)
    accepted, refused = 0, list[str]()
    for data, _ in zip(mutations(file.read_bytes(), rng), range(400), strict=False):
        file.write_bytes(data)
        try:
            read_header(file)
        except InputError as error:
            refused.append(str(error))
        else:
            assert loads(file), data
            accepted += 1
    assert accepted > 20
    assert len(refused) > 200
    assert all(text.startswith(f"{file}: ") for text in refused)


def sharded(path: Path, **shards: dict[str, torch.Tensor]) -> dict[str, str]:
    """Shards of these names; returns the weight map."""
    for name, tensors in shards.items():
        save_file(tensors, path / f"{name}.safetensors")
    return {tensor: f"{name}.safetensors" for name, tensors in shards.items() for tensor in tensors}


@pytest.mark.parametrize(
    "shard", [None, 1, [], {}, "", ".", "..", "../x.safetensors", "/dev/zero", "config.json", "a\0b"]
)
def test_an_index_that_names_no_shard(tmp_path: Path, shard: object) -> None:
    weight_map: dict[str, Any] = sharded(tmp_path, one={"a": torch.ones(1)}) | {"b": shard}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=r"index\.json: weight_map says that 'b' is in "):
        Checkpoint(tmp_path)


def in_two_shards(path: Path) -> None:
    save_file({"b": torch.ones(1), "a": torch.ones(1)}, path / "two.safetensors")


def beside_a_single_file(path: Path) -> None:
    save_file({"a": torch.ones(1)}, path / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (in_two_shards, "'a' is in one.safetensors and in two.safetensors"),
        (beside_a_single_file, "does not name model.saf"),
    ],
)
def test_shards_that_leave_it_open_what_counts(tmp_path: Path, damage: Callable[[Path], None], says: str) -> None:
    weight_map = sharded(tmp_path, one={"a": torch.ones(1)}, two={"b": torch.ones(1)})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert list(Checkpoint(tmp_path)) == ["a", "b"]
    damage(tmp_path)
    with pytest.raises(InputError, match=says):
        Checkpoint(tmp_path)


def test_a_shard_with_more_than_the_index_lists(tmp_path: Path) -> None:
    """transformers and vLLM load whole shards: so did training."""
    weight_map = sharded(tmp_path, one={"a": torch.ones(1), "more": torch.ones(2)})
    del weight_map["more"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert list(Checkpoint(tmp_path)) == ["a", "more"]
