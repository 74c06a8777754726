"""Writing files so that a crash or a full disk never leaves half of one behind."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.format import open_memmap
from safetensors import SafetensorError

_OS_ERROR = re.compile(r"os error (\d+)")


def allocate_array(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """A writable memory-mapped `.npy` whose bytes are on the disk from the start.

    Without the reservation a full disk would end the process by signal at some later write.

    Raises:
        OSError: the disk cannot hold it.
    """
    array: np.memmap[Any, Any] = open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path`, then put it in place in one step."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        try:
            write(beside)
        except SafetensorError as error:
            number = _OS_ERROR.search(str(error))  # all that it tells of the cause
            cause = int(number[1]) if number else errno.EIO
            raise OSError(cause, str(error), str(path)) from error
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.chmod(0o644)  # safetensors writes files that only their owner may read
        beside.replace(path)
        _sync_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Have a rename outlast a power cut, where the system can be told so."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write a `.npy` in place of `path` in one step, nothing pickled."""

    def write(beside: Path) -> None:
        # Not np.save, which does not tell a full disk from other failures.
        there = allocate_array(beside, array.dtype, array.shape)
        there[...] = array
        there.flush()

    replace_file(path, write)


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401
    """Write JSON in place of `path` in one step."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    replace_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
