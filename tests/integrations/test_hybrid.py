"""Memory first: routes, their reasons, and a threshold fitted the slow way too."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_index.core import Document
from llama_index.core.query_engine import CustomQueryEngine

from llama_index.indices.managed.mlpmem import MemoryFirstQueryEngine, MLPMemIndex
from llama_index.indices.managed.mlpmem.hybrid import best_threshold
from mlpmem_rag.errors import ConfigError

QUESTION = "Did Ines Maro find a map of the tunnels?"
STRANGE = "Who is the king?"


class Rag(CustomQueryEngine):
    """Another engine."""

    def custom_query(self, query_str: str) -> str:
        return f"retrieved for {query_str}"


def engine(
    index: MLPMemIndex,
    threshold: float = 0.3,
    **kwargs: Any,  # noqa: ANN401
) -> MemoryFirstQueryEngine:
    return MemoryFirstQueryEngine(index.as_query_engine(**kwargs), Rag(), threshold)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_sure_answers_are_the_memorys_and_others_are_not(
    index: MLPMemIndex, streaming: bool, asynchronous: bool
) -> None:
    first = engine(index, streaming=streaming)

    def ask(question: str) -> Any:  # noqa: ANN401
        return asyncio.run(first.aquery(question)) if asynchronous else first.query(question)

    sure, unsure = ask(QUESTION), ask(STRANGE)
    assert str(sure) == "yes"
    assert sure.metadata["mlpmem"]["route"] == "memory"
    assert str(unsure) == f"retrieved for {STRANGE}"
    details = unsure.metadata["mlpmem"]
    assert details["route"] == "rag"
    assert details["confidence"] < 0.3
    assert "is below 0.300" in details["why"]
    # What the memory had cost and found is not told of the other's answer.
    assert details["attribution"] == "retrieved passages"
    assert not {"usage", "seconds", "ttft_seconds"} & set(details)
    asked = index.llm.model.answer(STRANGE, max_new_tokens=16)
    assert details["memory"]["usage"]["completion_tokens"] == asked.new_tokens
    assert 0 < details["memory"]["ttft_seconds"] <= details["memory"]["seconds"]
    assert "memory" not in sure.metadata["mlpmem"]


def test_stale_documents_are_for_the_other(index: MLPMemIndex) -> None:
    first = engine(index)
    assert str(first.query(QUESTION)) == "yes"
    index.update_ref_doc(Document(text="In Lake Orsa, nobody found anything.", doc_id="doc-7"))
    assert index.stale == {"doc-7": "changed"}
    response = first.query(QUESTION)
    assert response.metadata is not None
    assert response.metadata["mlpmem"]["why"] == "stale: doc-7 (changed)"
    assert str(response) == f"retrieved for {QUESTION}"


@pytest.mark.parametrize("kept", [True, False])
def test_inserted_and_deleted_documents_are_for_the_other(index: MLPMemIndex, kept: bool) -> None:
    first = engine(index)
    if not kept:
        shutil.rmtree(index.memory_folder / "work")
    new = "Did Ines Maro find a map of the tunnels? Nobody knows."
    index.insert(Document(text=new, doc_id="new"))
    index.delete_ref_doc("doc-3")

    def told(question: str) -> dict[str, Any]:
        found: dict[str, Any] = (first.query(question).metadata or {})["mlpmem"]
        return found

    # Without the rows, any answer may come from what was deleted.
    assert told(QUESTION)["touched_stale"] == (["new"] if kept else ["doc-3", "new"])
    assert "new (inserted)" in told(QUESTION)["why"]
    index.delete_ref_doc("new", delete_from_docstore=True)
    assert told(QUESTION)["route"] == ("memory" if kept else "rag")
    index.delete_ref_doc("doc-7", delete_from_docstore=True)
    assert "doc-7 (deleted)" in told(QUESTION)["why"]
    assert index.stale == {"doc-3": "deleted", "doc-7": "deleted"}


def test_a_new_document_about_something_else_touches_no_answer(index: MLPMemIndex) -> None:
    """In an index on a memory alone, what was inserted is all that can be found."""
    alone = MLPMemIndex.from_memory(index.memory_folder, device="cpu", max_new_tokens=16)
    vectors = {"Bicycles": [0.0, 1.0], "wild honey": [1.0, 0.0], "another name": [0.8, 0.6]}

    class Encoder:
        name, size = "fake", alone.llm.model.model.query_size

        def encode(self, texts: Sequence[str]) -> Any:  # noqa: ANN401
            found = [next((v for k, v in vectors.items() if k in t), [1.0, 0.0]) for t in texts]
            return np.pad(np.array(found, np.float32), ((0, 0), (0, self.size - 2)))

    alone.llm.model.encoder = Encoder()
    engine = alone.as_query_engine()
    question = "Who found wild honey in the old mill?"
    alone.insert(Document(text="Bicycles are mended on Fridays.", doc_id="bike"))
    told = (engine.query(question).metadata or {})["mlpmem"]
    assert (told["stale_documents"], told["touched_stale"]) == ({"bike": "unknown"}, [])
    alone.insert(Document(text="The finder had another name.", doc_id="news"))
    told = (engine.query(question).metadata or {})["mlpmem"]
    assert told["touched_stale"] == ["news"]


def test_what_is_deleted_and_inserted_is_stale_until_it_is_as_before(
    index: MLPMemIndex, documents: list[Document]
) -> None:
    assert index.refresh_ref_docs(documents) == [False] * 16
    index.delete_ref_doc("doc-3", delete_from_docstore=True)
    index.insert(Document(text="A new text.", doc_id="new"))
    assert index.stale == {"doc-3": "deleted", "new": "inserted"}
    assert set(index.ref_doc_info) == {d.doc_id for d in documents if d.doc_id != "doc-3"} | {"new"}
    index.persist()
    assert MLPMemIndex.load(index.memory_folder, device="cpu").stale == index.stale
    index.insert(documents[3])
    index.delete_ref_doc("new", delete_from_docstore=True)
    assert index.stale == {}


def test_a_memory_without_confidence_is_trusted_only_at_0(index: MLPMemIndex) -> None:
    warm = index.as_llm(max_new_tokens=16, temperature=0.01, seed=0)
    assert str(engine(index, 0.1, llm=warm).query(QUESTION)).startswith("retrieved")
    assert str(engine(index, 0.0, llm=warm).query(QUESTION)) == "yes"


def test_a_threshold_is_fitted_on_questions(index: MLPMemIndex) -> None:
    first = engine(index)
    fit = first.fit_threshold([(QUESTION, ["yes"]), (STRANGE, [f"retrieved for {STRANGE}"])])
    assert (fit.right, fit.memory, fit.rag, fit.from_memory) == (1.0, 0.5, 0.5, 0.5)
    assert first.threshold == fit.threshold
    assert str(first.query(QUESTION)) == "yes"
    assert str(first.query(STRANGE)).startswith("retrieved")


ROWS = st.lists(
    st.tuples(st.sampled_from([0.1, 0.5, 0.9]), st.integers(0, 1), st.integers(0, 1)), min_size=1
)


@given(ROWS)
def test_no_threshold_is_better(rows: list[tuple[float, int, int]]) -> None:
    sure, memory, rag = zip(*rows, strict=True)
    fit = best_threshold(sure, memory, rag)
    for threshold in (0.0, 0.3, 0.7, 0.95, 1.0):
        graded = sum(m if s >= threshold else r for s, m, r in rows) / len(rows)
        assert fit.right >= graded - 1e-9


def test_what_cannot_be_fitted_is_refused(index: MLPMemIndex) -> None:
    with pytest.raises(ConfigError, match="no questions"):
        engine(index).fit_threshold([])
    with pytest.raises(ConfigError, match=r"threshold = 1\.5"):
        engine(index, 1.5)
