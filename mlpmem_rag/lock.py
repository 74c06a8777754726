"""One writer at a time: a lock on a folder that says who holds it.

The lock is the operating system's: it ends with the process that holds it, however that ends. The
note beside it, of who holds it since when, is for messages alone and decides nothing.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from mlpmem_rag.errors import OutputError
from mlpmem_rag.storage import write_json

LOCK = ".lock"
OWNER = ".owner.json"


@dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Attributes:
        pid: process number.
        host: machine on which it runs.
        since: ISO 8601 time, UTC.
    """

    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        """As messages name it."""
        return f"process {self.pid} on {self.host}, since {self.since}"


@contextmanager
def exclusive(work: Path, out: Path) -> Iterator[None]:
    """Hold the lock of a working folder.

    A lock whose holder has died is free. Where the holder is on another machine and its file
    system has not noticed its end, the message names the file to delete.

    Args:
        work: where the lock lies.
        out: what is written to, as messages name it.

    Raises:
        OutputError: another run holds it; who and since when is named.
    """
    lock = FileLock(work / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise OutputError(_in_use(work, out)) from error
    try:
        _note_owner(work)
        yield
    finally:
        with suppress(OSError):
            (work / OWNER).unlink(missing_ok=True)
        lock.release()


def read_owner(work: Path) -> Owner | None:
    """Who holds the lock of a working folder, as far as it is noted."""
    try:
        return Owner(**json.loads((work / OWNER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _note_owner(work: Path) -> None:
    """Best effort: a disk that is too full for it is reported by whoever needs the space."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with suppress(OSError):
        (work / OWNER).unlink(missing_ok=True)  # of a holder that died
        write_json(work / OWNER, asdict(Owner(os.getpid(), socket.gethostname(), now)))


def _in_use(work: Path, out: Path) -> str:
    owner = read_owner(work)
    if owner is None:
        return f"another run is writing to {out}; wait for it, or give another --out"
    if owner.host == socket.gethostname():
        return f"another run is writing to {out} ({owner}); wait for it, or give another --out"
    return (
        f"another run is writing to {out} ({owner}); wait for it, or give another --out. If that "
        f"machine no longer runs it, delete {work / LOCK}"
    )
