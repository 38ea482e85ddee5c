"""Journal of the blocks that are whole on disk, with a checksum of the tensors of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from requant.checkpoint.atomic_write import DAMAGED, read_state, write_text
from requant.checkpoint.run_directory import sealed, unsealed
from requant.checkpoint.writer import CheckpointWriter
from requant.errors import StageError
from requant_eval import strict_json


@dataclass(frozen=True, slots=True)
class _Block:
    """One block's results, and the checksum of what was written for it."""

    results: list[dict[str, Any]]
    checksum: str


class Journal:
    """Results of the blocks that are whole on disk: what an interrupted run need not do again."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._blocks: list[_Block] = read_state(file, _read) or []

    @property
    def blocks(self) -> list[list[dict[str, Any]]]:
        """The results of each block."""
        return [block.results for block in self._blocks]

    def keep_whole(self, writer: CheckpointWriter, slots: Sequence[Sequence[str]]) -> None:
        """Forget the first block whose tensors are no longer what was written, and all after it.

        slots: names of each block's tensors.
        """
        whole = len(self._blocks) if writer.kept else 0
        for index, block in enumerate(self._blocks[:whole]):
            if index >= len(slots) or writer.checksum(slots[index]) != block.checksum:
                whole = index
                break
        if whole < len(self._blocks):
            found = "its blocks' files are not there"
            if writer.kept:
                found = f"block {whole} of {len(self._blocks)} is not as it was written"
            DAMAGED.warning("%s: %s: solved again from there", self.file, found)
            self._blocks = self._blocks[:whole]

    def commit(
        self,
        index: int,
        writer: CheckpointWriter,
        writing: Sequence[Future[None]],
        results: list[dict[str, Any]],
        slots: Sequence[str],
    ) -> None:
        """Add the results of one more block, once all of its tensors are on the disk.

        slots: names of its tensors. Raises StageError when one before it has not.
        """
        if index != len(self._blocks):
            raise StageError(f"{self.file}: block {index} cannot follow {len(self._blocks)} blocks: run again")
        for future in writing:
            future.result()
        writer.sync()
        self._blocks.append(_Block(results, writer.checksum(slots)))
        write_text(self.file, json.dumps(sealed({"blocks": [asdict(block) for block in self._blocks]})))


def _read(file: Path) -> list[_Block]:
    """The journal's blocks; ValueError where it holds something else."""
    blocks: Any = unsealed(strict_json.load(file, constants=True)).get("blocks")
    if not isinstance(blocks, list) or not all(
        isinstance(b, dict) and b.keys() == {"results", "checksum"} for b in blocks
    ):
        raise ValueError("it holds no list of blocks")
    if not all(isinstance(b["results"], list) and all(isinstance(row, dict) for row in b["results"]) for b in blocks):
        raise ValueError("a block holds no results")
    return [_Block(**block) for block in blocks]
