"""The folder a memory is written to: checked, locked, and never someone else's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mlpmem_rag.artifact import MANIFEST, WORK
from mlpmem_rag.errors import OutputError
from mlpmem_rag.failures import told
from mlpmem_rag.lock import LOCK, exclusive

KIND = "kind.txt"
"""In a working folder: what is written to its output folder, from the first run on."""


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
        ResourceError: the disk became full, or the memory of the machine did not suffice.
    """
    work = out / WORK
    with ExitStack() as held:
        try:
            check_output(out, kind, is_ours)
            work.mkdir(parents=True, exist_ok=True)
            held.enter_context(exclusive(work, out))
            if not (work / KIND).is_file():
                with suppress(OSError):  # a disk that is full is told by who needs the space
                    (work / KIND).write_text(f"{kind}\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(
                f"--out {out} cannot be written ({error.strerror or error}); give a folder you "
                "may write to"
            ) from error
        try:
            yield work
        except Exception as error:
            in_words = told(error, out, kept=work)
            if in_words is None:
                raise
            raise in_words from error


def check_output(out: Path, kind: str, is_ours: Callable[[Path], bool]) -> None:
    """Refuse a folder that someone else's things lie in.

    Raises:
        OutputError: `out` is a file, or holds something else.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out} is a file; give a new folder")
    if out.is_dir() and not is_ours(out) and (names := _names(out)):
        raise OutputError(
            f"--out {out} is not empty and holds no {kind} ({', '.join(names[:3])}); "
            "give a new or empty folder"
        )
    note = out / WORK / KIND
    there = note.read_text(encoding="utf-8").strip() if note.is_file() else ""
    if there not in ("", kind):
        raise OutputError(
            f"--out {out} is the folder of a {there}, not of a {kind}; give a new or empty folder"
        )


def _names(folder: Path) -> list[str]:
    """What lies in a folder, but for the beginnings of a run that ended before it had begun."""
    begun = folder / WORK
    begun_only = begun.is_dir() and not begun.is_symlink() and not any(begun.iterdir())
    return sorted(p.name for p in folder.iterdir() if not (begun_only and p == begun))
