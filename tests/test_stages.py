"""A stage is done once for the same input, goes on where it stopped, and starts anew otherwise."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mlpmem_rag.stages import NOTE, enter_stage, leave_stage, stage_key, stage_seconds


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A stage that was finished in 2.5 seconds and left one file."""
    folder = tmp_path / "work" / "stage"
    assert not enter_stage(folder, "key")
    (folder / "result").write_text("kept")
    leave_stage(folder, "key", 2.5, finished=True)
    return folder


def test_a_finished_stage_is_known(folder: Path) -> None:
    assert enter_stage(folder, "key")
    assert stage_seconds(folder) == 2.5
    assert (folder / "result").read_text() == "kept"


def test_an_unfinished_stage_keeps_what_it_has(tmp_path: Path) -> None:
    enter_stage(tmp_path / "stage", "key")
    (tmp_path / "stage" / "half").write_text("kept")
    assert not enter_stage(tmp_path / "stage", "key")
    assert (tmp_path / "stage" / "half").read_text() == "kept"
    assert stage_seconds(tmp_path / "stage") == 0.0


def test_all_runs_that_worked_at_a_stage_count(tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    for seconds, finished in ((2.0, False), (1.5, True)):
        assert not enter_stage(folder, "key")
        leave_stage(folder, "key", seconds, finished=finished)
    assert enter_stage(folder, "key")
    assert stage_seconds(folder) == 3.5


def test_another_input_removes_what_was_made_from_the_first(folder: Path) -> None:
    assert not enter_stage(folder, "other")
    assert [path.name for path in folder.iterdir()] == [NOTE]
    assert not enter_stage(folder, "key"), "the first result is gone"


@pytest.mark.parametrize("key", ["key", "other"])
def test_what_is_half_removed_does_not_count_as_finished(
    folder: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(removed: Path, **_: object) -> None:
        (removed / "result").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            enter_stage(folder, "other")
    assert not enter_stage(folder, key)


@pytest.mark.parametrize("damage", ["", '{"key": "ke', "[]", '{"key": null}'])
def test_a_damaged_note_is_no_note(folder: Path, damage: str) -> None:
    (folder / NOTE).write_text(damage)
    assert not enter_stage(folder, "key")
    assert not (folder / "result").exists()


def test_a_missing_folder_took_no_time(tmp_path: Path) -> None:
    assert stage_seconds(tmp_path / "nothing") == 0.0


def test_keys_tell_inputs_apart() -> None:
    different = [
        stage_key("a", "b"),
        stage_key("ab"),
        stage_key(("a", "b")),
        stage_key("a", {"b": 1}),
        stage_key("a", {"b": 2}),
        stage_key("a", {"b": None}),
    ]
    assert len(set(different)) == len(different)


def test_keys_do_not_depend_on_the_order_of_settings() -> None:
    assert stage_key({"x": 1, "y": 2.5}) == stage_key({"y": 2.5, "x": 1})
