"""Notes of how far rows have been written."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from mlpmem_rag.notes import Notes
from mlpmem_rag.processes import ALONE, Team

ROWS = {"batches": 10, "content": "these"}
OTHERS = {"batches": 10, "content": "others"}


def of(folder: Path, expected: dict[str, object], index: int = 0, count: int = 1) -> Notes:
    team = Mock(Team, index=index, count=count, first=index == 0) if count > 1 else ALONE
    return Notes(folder / "state.json", expected, team)


def test_room_is_made_once_and_anew_for_other_rows(tmp_path: Path) -> None:
    made: list[int] = []
    for expected, times in ((ROWS, 1), (ROWS, 1), (OTHERS, 2), (ROWS, 3)):
        of(tmp_path, expected).begin(lambda: made.append(1))
        assert len(made) == times


def test_what_a_process_noted_of_these_rows_is_not_believed_once_others_stood_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlpmem_rag.notes.EVERY", 2)
    second = of(tmp_path, ROWS, index=1, count=2)
    of(tmp_path, ROWS, count=2).begin(lambda: None)
    second.take(3, [])
    assert second.mine(range(10)) == (range(1, 10, 2), 0), "no note is due"
    second.take(4, [])
    assert second.mine(range(10)) == (range(1, 10, 2), 4)
    of(tmp_path, OTHERS).begin(lambda: None)
    of(tmp_path, ROWS, count=2).begin(lambda: None)
    assert second.mine(range(10)) == (range(1, 10, 2), 0)


def test_when_all_is_written_there_is_nothing_left_for_anyone(tmp_path: Path) -> None:
    first, second = (of(tmp_path, ROWS, index=n, count=2) for n in range(2))
    first.begin(lambda: None)
    assert not first.finished
    second.finish([np.zeros(2)])
    assert not first.finished
    first.finish([])
    assert first.finished
    assert second.mine(range(10)) == ([], 0)
    assert json.loads((tmp_path / "state.json").read_text()) == {**ROWS, "batches_done": 10}
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
