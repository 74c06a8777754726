"""The folder a memory is written to: checked, locked, and never someone else's."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mlpmem_rag.artifact import (
    MANIFEST,
    WORK,
)
from mlpmem_rag.errors import OutputError, ResourceError

LOCK = ".lock"


def is_memory(folder: Path) -> bool:
    """Whether a folder holds a memory, or one whose training was interrupted."""
    return (folder / MANIFEST).is_file() or (folder / WORK / LOCK).is_file()


@contextmanager
def output_folder(
    out: Path, *, kind: str = "memory", is_ours: Callable[[Path], bool] = is_memory
) -> Iterator[Path]:
    """Make or check the output folder, hold its lock, and yield its working folder.

    Args:
        out: the folder.
        kind: what is written to it, as messages say it.
        is_ours: whether a folder that is not empty holds one already.

    Raises:
        OutputError: `out` is a file, holds something else, cannot be written, or is in use.
        ResourceError: the disk became full.
    """
    work = out / WORK
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out} is a file; give a new folder")
    try:
        if out.is_dir() and not is_ours(out) and (names := [p.name for p in out.iterdir()]):
            raise OutputError(
                f"--out {out} is not empty and holds no {kind} ({', '.join(sorted(names)[:3])}); "
                "give a new or empty folder"
            )
        work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(work / LOCK, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise OutputError(
            f"another run is writing to {out}; wait for it, or give another --out"
        ) from error
    except OSError as error:
        raise OutputError(
            f"--out {out} cannot be written ({error.strerror or error}); give a folder you may "
            "write to"
        ) from error
    try:
        yield work
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceError(
            f"the disk of {out} is full; finished stages are kept in {work}. Free some space "
            "and run the same command again to go on"
        ) from error
    finally:
        lock.release()
