"""Failures of the machine in words: no space, no memory, no permission, a broken disk."""

from __future__ import annotations

import errno
from pathlib import Path

from mlpmem_rag.errors import MLPMemError, OutputError, ResourceError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_BROKEN = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO)
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")
"""How torch, CUDA and C++ say it, in errors that have no class of their own on every device."""


def told(error: Exception, out: Path, *, kept: Path) -> MLPMemError | None:
    """What a failure of the machine means to the one who started a run; None: it is none.

    Says what was kept and how to go on. Failures of files outside of `out` are left alone.
    """
    done = f"finished stages are kept in {kept}"
    again = "and run the same command again to go on"
    if is_out_of_memory(error):
        return ResourceError(
            f"out of memory ({_first_line(error)}); {done}. End other programs {again}, or give a "
            "smaller --size or --neighbors"
        )
    if not isinstance(error, OSError):
        return None
    if error.errno in _FULL:
        return ResourceError(f"the disk of {out} is full; {done}. Free some space {again}")
    if not _is_below(error, out):
        return None
    what = f"{error.filename or out} can no longer be written ({error.strerror}); {done}."
    if error.errno in _CLOSED:
        return OutputError(f"{what} Make it writable {again}")
    if error.errno in _BROKEN:
        return ResourceError(f"{what} Check the disk {again}")
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether the main or the accelerator's memory did not suffice."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return any(words in str(error).lower() for words in _NO_MEMORY)
    return isinstance(error, MemoryError)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def _is_below(error: OSError, out: Path) -> bool:
    """Whether the file that failed is one of the run's; one without a name is."""
    if error.filename is None:
        return True
    return Path(str(error.filename)).absolute().is_relative_to(out.absolute())
