"""`requant.checkpoint.atomic_write`: a file is the old or the new one, nothing else left."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from requant.checkpoint.atomic_write import TEMPORARY, atomic_write, read_state, write_text
from requant.errors import StageError


def test_a_file_changes_at_once(tmp_path: Path) -> None:
    file = tmp_path / "answers.json"
    write_text(file, "old")
    with atomic_write(file) as handle:
        handle.write(b"new")
        assert file.read_text() == "old"
        assert len(list(tmp_path.glob(TEMPORARY))) == 1, "who cleans up finds it"
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_after_an_error_the_file_is_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "answers.json"
    write_text(file, "old")

    def interrupted() -> None:
        with atomic_write(file) as handle:
            handle.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_write_that_fails_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"answers\.json: write failed \(No such file or directory\)"):
        write_text(tmp_path / "nowhere" / "answers.json", "text")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_state_that_is_no_file_is_made_again(make: Callable[[Path], None], tmp_path: Path) -> None:
    """Opening a pipe would wait for its writer without an end."""
    file = tmp_path / "state"
    make(file)
    assert read_state(file, Path.read_bytes) is None
    assert not file.exists()
