"""`requant_eval.regular_files`: what is no regular file is refused, and never waited for."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from requant.checkpoint.atomic_write import copy_file
from requant.errors import InputError
from requant_eval.errors import EvaluationError
from requant_eval.regular_files import NotAFileError, open_regular, read_bytes, require_regular
from requant_eval.scoring.reference_states import prove
from requant_eval.scoring.token_scores import TokenScores


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.parametrize("make", [pipe, Path.mkdir, lambda p: p.symlink_to("/dev/zero")])
@pytest.mark.parametrize("use", [open_regular, read_bytes, require_regular])
def test_only_regular_files_are_opened(
    tmp_path: Path, make: Callable[[Path], None], use: Callable[[Path], Any]
) -> None:
    make(tmp_path / "it")
    with pytest.raises(NotAFileError, match=r"(a directory|a device or a pipe), expected a file.*it"):
        use(tmp_path / "it")
    with pytest.raises(NotAFileError, match="no file can have this name"):
        use(tmp_path / "a\0b")
    with pytest.raises(FileNotFoundError):
        use(tmp_path / "missing")


def test_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    listening(Path("s"))
    with pytest.raises(OSError, match="s"):
        open_regular("s")


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    assert read_bytes(tmp_path / "link") == b"content"
    assert read_bytes(tmp_path / "link", 3) == b"con"
    require_regular(tmp_path / "link")
    with open_regular(str(tmp_path / "link")) as opened:
        assert not os.get_inheritable(opened.fileno())


def test_what_reads_for_us_does_not_wait(tmp_path: Path) -> None:
    pipe(tmp_path / "p")
    with pytest.raises(InputError, match="p: cannot be read \\(a device or a pipe"):
        copy_file(tmp_path / "p", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    for read in (TokenScores.load, lambda file: prove(file, digest="x")):
        with pytest.raises(EvaluationError, match="a device or a pipe"):
            read(tmp_path / "p")
