"""Stages that are done once: each folder remembers what it was made from."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from mlpmem_rag.storage import write_json

NOTE = "stage.json"


def stage_key(*parts: Any) -> str:  # noqa: ANN401
    """A fingerprint of everything that decides what a stage produces."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def enter_stage(folder: Path, key: str) -> bool:
    """Prepare the folder of a stage and tell whether the stage is finished already.

    What an earlier run of the same stage left is kept, so that it can go on; what was made
    from something else is removed.
    """
    note = _read(folder)
    if note.get("key") != key:
        forget_stage(folder)
        folder.mkdir(parents=True)
        write_json(folder / NOTE, {"key": key, "finished": False, "seconds": 0.0})
    return bool(note.get("key") == key and note.get("finished"))


def forget_stage(folder: Path) -> None:
    """Remove a stage. Its note goes first: half of a stage must never count as one."""
    (folder / NOTE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def leave_stage(folder: Path, key: str, seconds: float, *, finished: bool) -> None:
    """Note so many more seconds of work, and whether the stage is finished with them."""
    spent = stage_seconds(folder) + seconds
    write_json(folder / NOTE, {"key": key, "finished": finished, "seconds": spent})


def stage_seconds(folder: Path) -> float:
    """How long the stage took, in all runs that worked at it."""
    return float(_read(folder).get("seconds", 0.0))


def _read(folder: Path) -> dict[str, Any]:
    try:
        note = json.loads((folder / NOTE).read_text())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}
