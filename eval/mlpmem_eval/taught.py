"""What a memory was taught, as far as its training has left it."""

from __future__ import annotations

from pathlib import Path

from mlpmem_rag.artifact import WORK
from mlpmem_rag.errors import ArtifactError
from mlpmem_rag.provenance import documents_of
from mlpmem_rag.questions import Question, load_questions


def taught_questions(folder: Path) -> list[Question] | None:
    """The questions; None where `work/` is gone, of another training, or without questions."""
    try:
        documents_of(folder)
        return load_questions(folder / WORK / "questions" / "questions.jsonl")
    except (ArtifactError, FileNotFoundError):
        return None
