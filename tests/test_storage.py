"""Files are whole or not there."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from mlpmem_rag.storage import (
    allocate_array,
    folder_bytes,
    replace_file,
    save_array,
    write_json,
)


@pytest.mark.parametrize(
    ("dtype", "shape"), [("float16", (1000, 7)), ("int32", (5,)), ("f8", (0,))]
)
def test_an_allocated_array_is_an_npy_file(
    tmp_path: Path, dtype: str, shape: tuple[int, ...]
) -> None:
    path = tmp_path / "a.npy"
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    array = allocate_array(path, dtype, shape)
    assert not array.any()
    array[...] = values
    del array
    found = np.load(path)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, values)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve space")
def test_an_allocated_array_has_its_space_on_the_disk(tmp_path: Path) -> None:
    allocate_array(tmp_path / "a.npy", np.float32, (1000, 100))
    status = (tmp_path / "a.npy").stat()
    assert status.st_blocks * 512 >= status.st_size > 400_000


def test_a_disk_that_cannot_hold_an_array_is_an_error_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, f"no space for {length}")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="no space for 4128"):
        allocate_array(tmp_path / "a.npy", np.float32, (1000,))


def test_a_replaced_file_is_the_old_one_until_the_new_one_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(beside: Path) -> None:
        beside.write_text("ne")
        assert path.read_text() == "old"
        beside.write_text("new")

    replace_file(path, write)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, failure: BaseException
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(beside: Path) -> None:
        beside.write_text("ne")
        raise failure

    with pytest.raises(type(failure)):
        replace_file(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"λ": [0.1, None, "Ørsted"]})
    assert "Ørsted" in path.read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_json(path, {"λ": [0.2, object()]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"λ": [0.1, None, "Ørsted"]}


def test_folder_bytes_counts_every_file_below(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name, size in {"one": 10, "a/.two": 200, "a/b/three": 3000}.items():
        (tmp_path / name).write_bytes(bytes(size))
    assert folder_bytes(tmp_path) == 3210
    assert folder_bytes(tmp_path / "a" / "b") == 3000


@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (7,)])
def test_a_saved_array_replaces_the_one_before(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "a.npy"
    save_array(path, np.ones(99))
    values = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    save_array(path, values[::-1])
    found = np.load(path, allow_pickle=False)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, values[::-1])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("I/O error: No space left on device (os error 28)", errno.ENOSPC),
        ("I/O error: Read-only file system (os error 30)", errno.EROFS),
        ("something else", errno.EIO),
    ],
)
def test_what_failed_below_safetensors_is_told_by_its_number(
    tmp_path: Path, said: str, number: int
) -> None:
    def write(beside: Path) -> None:
        raise SafetensorError(f"Error while serializing: {said}")

    with pytest.raises(OSError, match=said.split(" (")[0]) as caught:
        replace_file(tmp_path / "a", write)
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "a"))
