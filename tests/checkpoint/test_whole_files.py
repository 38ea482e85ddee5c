"""`requant_eval.whole_files`: nothing through a link, on the disk before it has its name."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from requant.checkpoint.atomic_write import append_text, copy_file, write_text
from requant.checkpoint.writer import CheckpointWriter, Slot, load_tensors, save_tensors
from requant.cli.outputs import require_output, write_output
from requant.errors import InputError, StageError
from requant_eval import whole_files
from requant_eval.report.assemble import save_text

WRITERS: dict[str, Callable[[Path], None]] = {
    "write_text": lambda file: write_text(file, "new"),
    "save_text": lambda file: save_text(file, "new"),
    "save_tensors": lambda file: save_tensors(file, {"a": torch.ones(2)}, {}),
    "copy_file": lambda file: copy_file(Path(__file__), file),
    "shards": lambda file: CheckpointWriter(file.parent, [Slot("a", torch.int8, (3,))], resume=True).abandon(),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path: Path, name: str) -> None:
    """Also one under the names that temporary files once had."""
    victim, file = tmp_path / "victim", tmp_path / "run" / "model.safetensors"
    victim.write_text("precious")
    file.parent.mkdir()
    for planted in (
        file,
        *(file.with_name(n) for n in (".model.safetensors.tmp", f".model.safetensors.{os.getpid()}.tmp")),
    ):
        planted.symlink_to(victim)
    WRITERS[name](file)
    assert victim.read_text() == "precious"
    assert file.is_file()
    assert not file.is_symlink()


def test_a_shard_with_a_second_name_is_not_filled_in_place(tmp_path: Path) -> None:
    plan = [Slot("a", torch.int8, (3,))]
    with CheckpointWriter(tmp_path, plan) as writer:
        writer.write("a", torch.ones(3, dtype=torch.int8))
    os.link(tmp_path / "model.safetensors", tmp_path / "other")
    before = (tmp_path / "other").read_bytes()
    with CheckpointWriter(tmp_path, plan, resume=True) as writer:
        assert not writer.kept
        writer.write("a", torch.zeros(3, dtype=torch.int8))
    assert (tmp_path / "other").read_bytes() == before


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "directory"])
def test_logs_are_added_to_regular_files_alone(tmp_path: Path, kind: str) -> None:
    """A pipe without a reader must not make a run wait."""
    file, victim = tmp_path / "log.txt", tmp_path / "victim"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    else:
        file.symlink_to(victim)
    if kind == "link":
        victim.write_text("precious")
    with pytest.raises(StageError, match=r"log\.txt: write failed"):
        append_text(file, "line\n")
    assert not victim.exists() or victim.read_text() == "precious"


@pytest.mark.parametrize("kind", ["link", "dangling", "directory", "no directory"])
def test_a_file_that_was_asked_for_is_refused_where_a_link_is(tmp_path: Path, kind: str) -> None:
    file, victim = tmp_path / "out.json", tmp_path / "victim"
    if kind == "directory":
        file.mkdir()
    elif kind == "no directory":
        file = tmp_path / "nowhere" / "out.json"
    else:
        file.symlink_to(victim)
    if kind == "link":
        victim.write_text("precious")
    with pytest.raises(
        InputError, match=r"out\.json: (is a link to .*victim|is no regular file|there is no directory)"
    ):
        require_output(None, file)
    with pytest.raises(InputError):
        write_output(file, "x")
    assert not victim.exists() or victim.read_text() == "precious"


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_permissions_that_the_umask_gives(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        for name, write in WRITERS.items():
            (tmp_path / name).mkdir()
            write(tmp_path / name / "model.safetensors")
            assert stat.S_IMODE((tmp_path / name / "model.safetensors").stat().st_mode) == 0o666 & ~mask, name
    finally:
        os.umask(before)


def test_a_full_disk_is_said_with_file_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(
        StageError, match=r"state: write failed \(No space left on device: 168 B needed, .* [kMG]B free; "
    ):
        save_tensors(tmp_path / "state", {"a": torch.ones(2)}, {})
    assert list(tmp_path.iterdir()) == []


def test_names_too_long_for_a_temporary_one_are_written(tmp_path: Path) -> None:
    file = tmp_path / ("ü" * 120 + ".json")
    write_text(file, "x")
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


DYING = """
import os, signal, sys
from pathlib import Path
from requant_eval import whole_files
with whole_files.whole_file(Path(sys.argv[1])) as handle:
    handle.write(b"half")
    handle.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_swept_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    file = tmp_path / "scores"
    done = subprocess.run([sys.executable, "-c", DYING, str(file)], check=False)
    assert done.returncode == -signal.SIGKILL
    left = list(tmp_path.glob(whole_files.TEMPORARY))
    assert len(left) == 1
    with whole_files.whole_file(tmp_path / "other") as handle:
        whole_files.sweep(tmp_path)
        assert not left[0].exists()
        handle.write(b"whole")
    assert [f.name for f in tmp_path.iterdir()] == ["other"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data, then the name, then the directory."""
    done: list[str] = []
    for name in ("fdatasync", "fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, name=name, real=real: (done.append(name), real(*given))[1])
    write_text(tmp_path / "state", "x")
    assert done == ["fdatasync", "replace", "fsync"]
    done.clear()
    whole_files.make_directory(tmp_path / "a" / "b")
    assert done == ["fsync", "fsync"], "each new directory, into the one above it"


def test_a_directory_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(StageError, match=r"link: write failed \(is a link to .*real: nothing is written through links"):
        copy_file(Path(__file__), tmp_path / "link" / "tokenizer.json")
    assert list((tmp_path / "real").iterdir()) == []


def test_changed_tensors_and_metadata_of_a_state_are_seen(tmp_path: Path) -> None:
    """Still a safetensors file with the right names and shapes: a run went on with other numbers."""
    file = tmp_path / "state"
    save_tensors(file, {"a": torch.ones(2), "b": torch.zeros((), dtype=torch.bfloat16)}, {"key": "kkkk"})
    metadata, tensors = load_tensors(file)
    assert metadata == {"key": "kkkk"}
    assert torch.equal(tensors["a"], torch.ones(2))
    whole = file.read_bytes()
    for changed in (whole[:-1] + b"\x01", whole.replace(b"kkkk", b"kkkj"), whole.replace(b'"a"', b'"c"')):
        assert changed != whole
        file.write_bytes(changed)
        with pytest.raises(ValueError, match="its bytes have changed"):
            load_tensors(file)
