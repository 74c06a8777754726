"""The folder of a comparison: checked, locked, and never someone else's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mlpmem_eval.schema import REPORT
from mlpmem_rag.errors import OutputError

WORK = "work"
ROWS = "rows.jsonl"
LOCK = ".lock"


@contextmanager
def report_folder(out: Path) -> Iterator[Path]:
    """Make or check the output folder, hold its lock, and yield its working folder.

    Raises:
        OutputError: `out` is a file, holds something else, cannot be written, or is in use.
    """
    work = out / WORK
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out} is a file; give a new folder")
    try:
        ours = (out / REPORT).is_file() or (work / LOCK).is_file()
        if out.is_dir() and not ours and (names := sorted(p.name for p in out.iterdir())):
            raise OutputError(
                f"--out {out} is not empty and holds no comparison ({', '.join(names[:3])}); give "
                "a new or empty folder"
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
    finally:
        lock.release()
