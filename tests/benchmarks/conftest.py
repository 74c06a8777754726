"""What the suites measure on, everything tiny."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.setup import Setup
from mlpmem_rag.corpus import Document


@pytest.fixture(scope="module")
def setup(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_folder: Path,
    tiny_memory: Path,
    tiny_documents: list[Document],
) -> Setup:
    """Base model, memory and corpus."""
    folder = tmp_path_factory.mktemp("bench")
    for name in ("work", "corpus"):
        (folder / name).mkdir()
    for document in tiny_documents:
        (folder / "corpus" / f"{document.id}.txt").write_text(document.text)
    return Setup(
        folder / "work",
        device="cpu",
        dtype="float32",
        base_model=str(tiny_folder),
        memory=tiny_memory,
        corpus=folder / "corpus",
        search_rows=3000,
        rounds=2,
    )
