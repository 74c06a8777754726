"""The folder of a comparison: checked, locked, and never someone else's."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from mlpmem_eval.schema import REPORT
from mlpmem_rag.artifact import WORK
from mlpmem_rag.lock import LOCK
from mlpmem_rag.output import check_output, output_folder

KIND = "comparison"
ROWS = "rows.jsonl"
JUDGEMENTS = "judgements.jsonl"


def report_folder(out: Path) -> AbstractContextManager[Path]:
    """Make or check the output folder, hold its lock, and yield its working folder.

    Raises:
        OutputError: `out` is a file, holds something else, cannot be written, or is in use.
        ResourceError: the disk became full.
    """
    return output_folder(out, kind=KIND, is_ours=is_report)


def check_report_folder(out: Path) -> None:
    """Refuse a folder for a report that is there already.

    Raises:
        OutputError: `out` is a file, or holds something else.
    """
    check_output(out, KIND, is_report)


def is_report(folder: Path) -> bool:
    """Whether a folder holds a comparison, or one that was interrupted."""
    return (folder / REPORT).is_file() or (folder / WORK / LOCK).is_file()
