"""How far rows have been written, batch by batch, so that an interrupted call goes on there."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mlpmem_rag.processes import Team
from mlpmem_rag.storage import write_json

EVERY = 32
"""Batches after which a note is taken."""

Batch = TypeVar("Batch")
Arrays = Sequence[npt.NDArray[Any]]


class Notes:
    """Of a team whose processes take batches by turns and write into the same files."""

    def __init__(self, state: Path, expected: dict[str, Any], team: Team) -> None:
        """Say what is written.

        Args:
            state: file with how far all is; beside it each of several processes has its own.
            expected: what tells these rows from any others, `batches` among it, their number.
            team: who writes.
        """
        self._state = state
        self._expected = expected
        self._team = team

    def begin(self, allocate: Callable[[], object]) -> None:
        """Have the first process make room, unless that is there already; the others wait."""
        if self._team.first and self._done(self._state) is None:
            self._forget_parts()
            self._state.unlink(missing_ok=True)
            allocate()
            self._write(self._state, 0)
        self._team.wait()

    @property
    def finished(self) -> bool:
        """Whether all is written, by whomever."""
        return bool(self._done(self._state) == self._expected["batches"])

    def mine(self, batches: Sequence[Batch]) -> tuple[Sequence[Batch], int]:
        """The batches of this process, and how many of them are written."""
        own = [] if self.finished else batches[self._team.index :: self._team.count]
        return own, min(self._done(self._own) or 0, len(own))

    def take(self, done: int, arrays: Arrays) -> None:
        """So many batches of this process are in the arrays; noted now and then."""
        if done % EVERY == 0:
            _flush(arrays)  # rows before the note that they are there
            self._write(self._own, done)

    def finish(self, arrays: Arrays) -> None:
        """This process has written all it had to; comes back when all have."""
        _flush(arrays)
        self._team.wait()
        if self._team.first and not self.finished:
            self._write(self._state, self._expected["batches"])
            self._forget_parts()
        self._team.wait()

    @property
    def _own(self) -> Path:
        if self._team.count == 1:
            return self._state
        return self._state.with_name(f"part-{self._team.index}-of-{self._team.count}.json")

    def _done(self, note: Path) -> int | None:
        """What a note says of the same rows; None when it is not there or of others."""
        state = json.loads(note.read_text()) if note.is_file() else {}
        same = all(state.get(key) == value for key, value in self._expected.items())
        return int(state["batches_done"]) if same else None

    def _write(self, note: Path, done: int) -> None:
        write_json(note, {**self._expected, "batches_done": done})

    def _forget_parts(self) -> None:
        for part in self._state.parent.glob("part-*.json"):
            part.unlink()


def _flush(arrays: Arrays) -> None:
    for array in arrays:
        if isinstance(array, np.memmap):
            array.flush()
