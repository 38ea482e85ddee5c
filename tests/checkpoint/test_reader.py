"""`requant.checkpoint.reader` against safetensors, and on cut, missing or wrong files."""

from __future__ import annotations

import errno
import json
import os
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from requant.checkpoint import reader
from requant.checkpoint.atomic_write import write_text
from requant.checkpoint.digests import DIGESTS
from requant.checkpoint.reader import DTYPES, INDEX, SINGLE, Checkpoint, file_digest, read_header, read_json
from requant.checkpoint.writer import CheckpointWriter, Slot, plan_shards
from requant.errors import InputError, StageError


def tensors() -> dict[str, torch.Tensor]:
    """One tensor of every dtype, with odd sizes, a scalar and an empty one."""
    made = {f"t.{n}": (torch.randn(3, 5) * 3).to(d) for n, d in DTYPES.items()}
    made["scalar"] = torch.tensor(2.5)
    made["empty"] = torch.empty(0, 4)
    return made


def write(path: Path, values: dict[str, torch.Tensor], **options: Any) -> None:
    plan = [Slot(n, t.dtype, tuple(t.shape)) for n, t in values.items()]
    with CheckpointWriter(path, plan, **options) as writer:
        for name in reversed(values):  # any order
            writer.write(name, values[name])
        writer.close()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits (NaN and float8 included)."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


def test_what_we_write_safetensors_reads(tmp_path: Path) -> None:
    values = tensors()
    write(tmp_path, values)
    theirs = load_file(tmp_path / SINGLE)
    assert theirs.keys() == values.keys()
    assert all(same(theirs[n], values[n]) for n in values)
    assert not (tmp_path / INDEX).exists()


def test_what_safetensors_writes_we_read(tmp_path: Path) -> None:
    values = tensors()
    save_file(values, tmp_path / SINGLE, metadata={"format": "pt"})
    ours = Checkpoint(tmp_path)
    assert set(ours) == set(values)
    assert len(ours) == len(values)
    assert all(same(ours.read(n), values[n]) for n in values)
    with pytest.raises(KeyError, match=r"no tensor 'nothing'"):
        ours["nothing"]


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    limit=st.integers(1, 300),
)
def test_shards_hold_everything_once(sizes: list[int], limit: int) -> None:
    plan = [Slot(f"t{i}", torch.float32, (n,)) for i, n in enumerate(sizes)]
    shards = plan_shards(plan, limit)
    assert [s for shard in shards for s in shard] == plan
    for shard in shards:
        assert len(shard) == 1 or sum(s.nbytes for s in shard) <= limit


def test_several_shards_and_their_index(tmp_path: Path) -> None:
    values = {f"t{i}": torch.randn(8, 8) for i in range(5)}
    write(tmp_path, values, max_bytes=600)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 5 * 256}
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for name, file in index["weight_map"].items():
        assert same(load_file(tmp_path / file)[name], values[name])
    assert all(same(Checkpoint(tmp_path).read(n), values[n]) for n in values)


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    """Wide types first: a mapped tensor must lie at a multiple of its item size."""
    write(tmp_path, {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(2), "c": torch.ones(5).bfloat16()})
    for info in read_header(tmp_path / SINGLE).values():
        assert info.offset % info.dtype.itemsize == 0


def test_views_and_transposes_are_written_by_value(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    write(tmp_path, {"t": whole.T, "part": whole[2:4]})
    ours = Checkpoint(tmp_path)
    assert same(ours.read("t"), whole.T.contiguous())
    assert same(ours.read("part"), whole[2:4].clone())


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        Checkpoint(path)
    return str(caught.value)


def test_truncated_file(tmp_path: Path) -> None:
    save_file({"t": torch.randn(64)}, tmp_path / SINGLE)
    data = (tmp_path / SINGLE).read_bytes()
    for keep, message in (
        (len(data) - 1, "truncated"),
        (20, "truncated"),
        (4, "not a safetensors file"),
        (0, "0 bytes"),
    ):
        (tmp_path / SINGLE).write_bytes(data[:keep])
        assert message in refused(tmp_path)
        assert "download it again" in refused(tmp_path)


def header(table: Any, body: bytes = b"") -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header(b"{not json"), "corrupt safetensors header"),
        (header(b"\xff\xff\xff"), "corrupt safetensors header"),
        (struct.pack("<Q", 2**60) + b"x" * 40, "not a safetensors file, or truncated"),
        (
            header({"t": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}, b"0" * 4),
            "is stored as F4, which is not read here",
        ),
        (header({"t": {"dtype": "F32", "data_offsets": [0, 4]}}, b"0" * 4), "unreadable header entry"),
        (header({"t": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"0" * 4), "unreadable header entry"),
        (header({"t": 7}), "unreadable header entry"),
        (header({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"0" * 4), "spans 4 bytes"),
        (header({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"0" * 4), "truncated"),
        (header([]), "corrupt safetensors header"),
        (header({"t": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}, b"0" * 4), "unreadable"),
        (header({"t": {"dtype": "F32", "shape": [1], "data_offsets": [-8, -4]}}, b"0" * 4), "t"),
    ],
)
def test_corrupt_headers(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / SINGLE).write_bytes(data)
    assert message in refused(tmp_path)


def test_large_tensors_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "PART", 100)
    values = {"a": torch.randn(7), "b": torch.randn(257), "c": torch.zeros(0), "d": torch.randint(0, 9, (99,)).byte()}
    save_file(values, tmp_path / SINGLE)
    read = Checkpoint(tmp_path)
    assert all(torch.equal(read.read(name), value) for name, value in values.items())
    info = read["b"]
    os.truncate(info.file, info.offset + 250)  # after the headers were read
    with pytest.raises(StageError, match="'b' ends after 250 of 1028 bytes"):
        read.read("b")


def test_missing_shard(tmp_path: Path) -> None:
    write(tmp_path, {f"t{i}": torch.randn(8, 8) for i in range(5)}, max_bytes=600)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors: missing; the checkpoint is incomplete" in refused(tmp_path)


def test_index_that_names_a_missing_tensor(tmp_path: Path) -> None:
    write(tmp_path, {f"t{i}": torch.randn(8, 8) for i in range(5)}, max_bytes=600)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["ghost"] = index["weight_map"]["t0"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert "1 tensors are not in the shards it names, e.g. 'ghost'" in refused(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    assert "no weight_map" in refused(tmp_path)


def test_shards_without_an_index(tmp_path: Path) -> None:
    for i in (1, 2):
        save_file({f"t{i}": torch.ones(1)}, tmp_path / f"model-{i}.safetensors")
    assert "2 safetensors files but no model.safetensors.index.json" in refused(tmp_path)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    assert "only pickled weights (pytorch_model.bin); requant never loads pickles" in refused(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    assert "no safetensors weights found" in refused(tmp_path)
    assert "no such model directory" in refused(tmp_path / "absent")


def test_a_file_cut_while_in_use_is_a_stage_error(tmp_path: Path) -> None:
    save_file({"t": torch.randn(64)}, tmp_path / SINGLE)
    ours = Checkpoint(tmp_path)
    os.truncate(tmp_path / SINGLE, (tmp_path / SINGLE).stat().st_size - 10)
    with pytest.raises(StageError, match=r"ends after 246 of 256 bytes"):
        ours.read("t")


def test_full_disk_shows_when_the_file_is_laid_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        StageError, match=r"safetensors: write failed \(No space left on device: \d+ B needed, .* free; free"
    ):
        write(tmp_path, {"t": torch.ones(4)})


def test_full_disk_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with CheckpointWriter(tmp_path, [Slot("t", torch.float32, (4,))]) as ours:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(
            StageError,
            match=r"safetensors: write failed \(No space left on device: 16 B needed, .* free; free space and",
        ):
            ours.write("t", torch.ones(4))


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A raw file may take fewer bytes than asked; nothing may be lost."""
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, view, at: whole(file, view[:3], at))
    write(tmp_path, {"t": torch.arange(7.0)})
    assert torch.equal(Checkpoint(tmp_path).read("t"), torch.arange(7.0))


def test_threads_write_to_one_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes of 200 bytes in turn: no thread may write at another's offset."""
    tensors = {f"t{i}": torch.full((600,), float(i)) for i in range(4)}
    whole = os.pwrite

    def slow(file: int, view: memoryview, at: int) -> int:
        time.sleep(1e-5)
        return whole(file, view[:200], at)

    monkeypatch.setattr(os, "pwrite", slow)
    with CheckpointWriter(tmp_path, [Slot(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]) as ours:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(ours.write, tensors, tensors.values()))
        ours.close()
    stored = Checkpoint(tmp_path)
    assert all(torch.equal(stored.read(n), t) for n, t in tensors.items())


def test_an_unfinished_checkpoint_cannot_be_closed(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, [Slot("a", torch.float32, (2,)), Slot("b", torch.float32, (2,))]) as writer:
        writer.write("a", torch.ones(2))
        with pytest.raises(ValueError, match=r"1 planned tensors were never written, e.g. b"):
            writer.close()


def test_only_what_was_planned_is_written(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, [Slot("a", torch.float32, (2,))]) as writer:
        with pytest.raises(ValueError, match=r"planned torch.float32 .2,., got torch.float32 .3,."):
            writer.write("a", torch.ones(3))
        with pytest.raises(ValueError, match=r"got torch.float16"):
            writer.write("a", torch.ones(2).half())
    with pytest.raises(ValueError, match=r"planned twice"):
        CheckpointWriter(tmp_path, [Slot("a", torch.float32, (2,))] * 2)


def test_resume_keeps_what_was_written(tmp_path: Path) -> None:
    plan = [Slot(f"t{i}", torch.float32, (8, 8)) for i in range(5)]
    values = {s.name: torch.randn(8, 8) for s in plan}
    with CheckpointWriter(tmp_path, plan, max_bytes=600) as writer:
        for name in ("t0", "t3"):
            writer.write(name, values[name])
    with CheckpointWriter(tmp_path, plan, max_bytes=600, resume=True) as writer:
        assert same(writer.read("t3"), values["t3"])
        writer.mark_written(["t0", "t3"])
        for name in ("t1", "t2", "t4"):
            writer.write(name, values[name])
        writer.close()
    assert all(same(Checkpoint(tmp_path).read(n), values[n]) for n in values)


def test_resume_with_another_plan_starts_anew(tmp_path: Path) -> None:
    """Same size, other layout: old bytes must not pass for new ones."""
    write(tmp_path, {"a": torch.ones(4)})
    with CheckpointWriter(tmp_path, [Slot("b", torch.float32, (4,))], resume=True) as writer:
        assert same(writer.read("b"), torch.zeros(4))
    write(tmp_path, {"a": torch.ones(4)})
    with CheckpointWriter(tmp_path, [Slot("a", torch.float32, (4,))], resume=False) as writer:
        assert same(writer.read("a"), torch.zeros(4))


def test_json_errors_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for text, message in ((None, "missing"), ("{", "not valid JSON"), ("[1]", "expected a JSON object, found list")):
        if text is not None:
            file.write_text(text)
        with pytest.raises(InputError, match=f"config.json: {message}"):
            read_json(file)


def test_small_files_are_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    write_text(file, "old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(StageError, match=r"a\.json: write failed \(No space left on device: 3 B needed, .* free;"):
        write_text(file, "new")
    assert file.read_text() == "old"


def test_file_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert file_digest(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("name", ["tokenizer.json", "model-extra.bin", "additional_chat_templates/tool.jinja"])
def test_a_pipe_among_a_models_files_is_refused(tmp_path: Path, name: str) -> None:
    """Whatever library opens it would wait for its writer without an end."""
    write(tmp_path, tensors())
    (tmp_path / name).parent.mkdir(exist_ok=True)
    assert Checkpoint(tmp_path)
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: a device or a pipe, expected files"):
        Checkpoint(tmp_path)


def test_a_directory_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(InputError, match=r": cannot be read \(Permission denied\)"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "notes.txt"])
@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_a_link_to_nowhere_among_a_models_files_is_refused(tmp_path: Path, name: str, target: str) -> None:
    """What it stood for would be missing in what is written, and nobody would be told."""
    write(tmp_path, tensors())
    (tmp_path / name).symlink_to(name if target == "itself" else target)
    with pytest.raises(InputError, match=f"{name}: a link that leads nowhere: download the file again, or remove"):
        Checkpoint(tmp_path)


def test_an_editors_lock_is_no_file_of_the_model(tmp_path: Path) -> None:
    write(tmp_path, tensors())
    (tmp_path / ".#config.json").symlink_to("someone@somewhere.1")
    assert set(Checkpoint(tmp_path)) == set(tensors())


def test_a_file_that_became_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(2)})
    checkpoint = Checkpoint(tmp_path)
    (tmp_path / SINGLE).unlink()
    os.mkfifo(tmp_path / SINGLE)
    with pytest.raises(StageError, match="cannot be read \\(a device or a pipe, expected a file\\)"):
        checkpoint.read("a")
    with pytest.raises(StageError, match="cannot be read \\(a device or a pipe, expected a file\\)"):
        DIGESTS.of(tmp_path / SINGLE)
