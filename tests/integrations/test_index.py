"""MLPMemIndex: trains, answers, tells its sources, and knows what has gone stale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama_index.core import Document

from llama_index.indices.managed.mlpmem import MLPMemIndex

QUESTION = "Who found wild honey?"


def test_documents_become_a_memory_that_answers(
    documents: list[Document], training: dict[str, Any], tmp_path: Path
) -> None:
    index = MLPMemIndex.from_documents(documents, out=tmp_path / "memory", **training)
    response = index.as_query_engine().query(QUESTION)
    assert str(response) == index.llm.model.answer(QUESTION, max_new_tokens=48).text
    print(response.metadata, response.source_nodes[:])
