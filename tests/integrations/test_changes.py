"""Documents come, go and change; then the memory is trained again, and all who ask it notice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_index.core import Document
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import MetadataMode

from llama_index.indices.managed.mlpmem import MemoryFirstQueryEngine, MLPMemIndex, base
from llama_index.indices.managed.mlpmem.attribution import LABEL, TRACED
from llama_index.llms.mlpmem import MLPMemLLM
from llama_index.llms.mlpmem.loading import reload
from mlpmem_rag.errors import ArtifactError, ConfigError, CorpusError
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.pipeline import train

QUESTION = "In the observatory,"
NEWS = "In the observatory, Ada Quill counted nine comets. Nobody else was awake that night!"

Do = Callable[..., Any]


@pytest.fixture
def plain(documents: list[Document], training: dict[str, Any], tmp_path: Path) -> MLPMemIndex:
    """An index of a quick training, in a folder of its own, in sentences."""
    index = MLPMemIndex.from_documents(
        documents,
        out=tmp_path / "memory",
        transformations=[SentenceSplitter(chunk_size=40, chunk_overlap=0)],
        **training,
    )
    return MLPMemIndex.load(
        index.memory_folder,
        device="cpu",
        dtype="float32",
        max_new_tokens=12,
        transformations=[SentenceSplitter(chunk_size=40, chunk_overlap=0)],
    )


# Changes.


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def do(request: pytest.FixtureRequest) -> Do:
    """Calls a method of an index, or its async twin."""

    def call(index: MLPMemIndex, name: str, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if not request.param:
            return getattr(index, name)(*args, **kwargs)
        return asyncio.run(getattr(index, f"a{name}")(*args, **kwargs))

    return call


def test_what_changes_is_stale(plain: MLPMemIndex, documents: list[Document], do: Do) -> None:
    assert do(plain, "refresh_ref_docs", documents) == [False] * 16
    assert plain.stale == {}
    do(plain, "insert", Document(text=NEWS, doc_id="news"))
    assert plain.stale == {"news": "inserted"}
    changed = [*documents[:4], Document(text=NEWS, doc_id=documents[4].doc_id)]
    assert do(plain, "refresh_ref_docs", changed) == [False] * 4 + [True]
    assert plain.stale == {"news": "inserted", "doc-4": "changed"}
    do(plain, "delete_ref_doc", "doc-5", delete_from_docstore=True)
    do(plain, "delete_ref_doc", "news", delete_from_docstore=True)
    assert plain.stale == {"doc-4": "changed", "doc-5": "deleted"}
    do(plain, "update_ref_doc", documents[4])
    do(plain, "insert", documents[5])
    assert plain.stale == {}
    assert set(plain.ref_doc_info) == {document.doc_id for document in documents}


def test_a_document_that_lost_a_part_has_changed(plain: MLPMemIndex, do: Do) -> None:
    found = plain.ref_doc_info
    name = max(found, key=lambda name: len(found[name].node_ids))
    first, *others = found[name].node_ids
    assert others
    do(plain, "delete_nodes", [first])
    assert plain.stale == {name: "changed"}
    do(plain, "delete_nodes", others)
    assert plain.stale == {name: "deleted"}


def test_a_document_that_is_taken_out_stays_in_the_store(
    plain: MLPMemIndex, documents: list[Document], do: Do
) -> None:
    nodes = plain.ref_doc_info["doc-5"].node_ids
    do(plain, "delete_ref_doc", "doc-5")
    assert plain.stale == {"doc-5": "deleted"}
    assert "doc-5" not in plain.ref_doc_info
    assert all(plain.docstore.document_exists(node) for node in nodes)
    found = plain.as_retriever(similarity_top_k=20).retrieve(documents[5].text)
    assert "doc-5" not in {source.node.ref_doc_id for source in found}
    do(plain, "update_ref_doc", documents[5])
    assert plain.stale == {}


def test_a_changed_documents_source_is_the_text_that_was_learned(
    index: MLPMemIndex, documents: list[Document]
) -> None:
    question = "Who found wild honey in the old mill?"
    engine = index.as_query_engine(attribution="eager")
    (before,) = engine.query(question).source_nodes
    index.update_ref_doc(Document(text="In the old mill, a bell was found.", doc_id="doc-10"))
    for deleted in (False, True):
        if deleted:
            index.delete_ref_doc("doc-10")
        response = engine.query(question)
        (source,) = response.source_nodes
        assert source.node.ref_doc_id == "doc-10"
        assert source.node.metadata[LABEL] == TRACED
        assert source.node.get_content(metadata_mode=MetadataMode.NONE) in documents[10].text
        assert source.node.node_id != before.node.node_id
    index.insert(documents[10])
    (again,) = engine.query(question).source_nodes
    assert again.node.get_content(metadata_mode=MetadataMode.NONE) == documents[10].text


# Training again.


def test_an_index_on_a_memory_alone_does_not_forget_it(
    plain: MLPMemIndex, documents: list[Document], do: Do
) -> None:
    alone = MLPMemIndex.from_memory(plain.memory_folder, device="cpu", dtype="float32")
    answer = str(alone.as_query_engine().query(QUESTION))
    manifest = (plain.memory_folder / "manifest.json").read_bytes()
    assert do(alone, "refresh_ref_docs", documents[:2]) == [True, True]
    do(alone, "insert", Document(text=f"{NEWS} " * 8, doc_id="news"))
    do(alone, "delete_ref_doc", "doc-1")
    assert alone.stale == {"doc-0": "unknown", "doc-1": "deleted", "news": "unknown"}
    loaded = MLPMemIndex.load(alone.persist(), device="cpu", dtype="float32")
    assert loaded.stale == alone.stale
    for index in (alone, loaded):
        with pytest.raises(ConfigError, match=r"alone and does not hold what .*from_documents"):
            index.retrain()
        assert str(index.as_query_engine().query(QUESTION)) == answer
    assert (plain.memory_folder / "manifest.json").read_bytes() == manifest
    first = MemoryFirstQueryEngine(alone.as_query_engine(), alone.as_query_engine(), 0.0)
    told = (first.query(NEWS).metadata or {})["mlpmem"]
    assert "news (unknown)" in told["why"]


def test_everything_made_before_asks_the_new_memory(plain: MLPMemIndex, tmp_path: Path) -> None:
    shared = MLPMemLLM(plain.memory_folder, device="cpu", dtype="float32", max_new_tokens=12)
    own = plain.as_llm(max_new_tokens=12)
    engine, chat = plain.as_query_engine(), plain.as_chat_engine()
    streaming = plain.as_query_engine(streaming=True)
    copied = MLPMemIndex.load(plain.persist(tmp_path / "copy"), device="cpu", dtype="float32")
    before = plain.llm.model.log_probs([5, 6, 7])
    old = str(engine.query(QUESTION))

    plain.insert(Document(text=f"{NEWS} " * 8, doc_id="news"))
    for name in list(plain.ref_doc_info)[:15]:
        plain.delete_ref_doc(name, delete_from_docstore=True)
    plain.retrain()

    fresh = MemoryModel.load(plain.memory_folder, device="cpu", dtype="float32")
    expected = fresh.answer(QUESTION, max_new_tokens=12).text
    assert expected != old
    asked = [engine.query(QUESTION), streaming.query(QUESTION), chat.chat(QUESTION)]
    assert {str(response) for response in asked} == {expected}
    assert {llm.complete(QUESTION).text for llm in (own, plain.llm)} == {expected}
    torch.testing.assert_close(plain.llm.model.log_probs([5, 6, 7]), fresh.log_probs([5, 6, 7]))
    torch.testing.assert_close(copied.llm.model.log_probs([5, 6, 7]), before)
    # Sources are of the new rows, and nothing is stale.
    (source, *_) = asked[0].source_nodes
    assert (source.node.ref_doc_id, source.node.metadata[LABEL]) == ("news", TRACED)
    assert plain.stale == MLPMemIndex.load(plain.memory_folder, device="cpu").stale == {}
    # One model is loaded, not two: another LLM of this folder finds the one that was renewed.
    assert MLPMemLLM(plain.memory_folder, device="cpu", dtype="float32").model is shared.model
    assert shared.complete(QUESTION).text == expected


def test_what_changes_during_a_training_is_stale_after_it(
    plain: MLPMemIndex, documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service trains in a thread while documents come and go."""
    plain.insert(Document(text=NEWS, doc_id="news"))
    original = base.train_memory
    seen: list[dict[str, str]] = []

    def meanwhile(*args: Any) -> dict[str, str]:  # noqa: ANN401
        names: dict[str, str] = original(*args)
        plain.insert(Document(text="In the late train, a hat was found.", doc_id="late"))
        plain.update_ref_doc(Document(text=NEWS, doc_id="doc-0"))
        plain.delete_ref_doc("doc-1", delete_from_docstore=True)
        plain.update_ref_doc(Document(text=f"{NEWS} Twice.", doc_id="doc-2"))
        plain.update_ref_doc(documents[2])
        seen.append(plain.stale)
        return names

    monkeypatch.setattr(base, "train_memory", meanwhile)
    plain.retrain()
    assert seen[0]["news"] == "inserted", "until the new memory answers, the old one is told of"
    expected = {"late": "inserted", "doc-0": "changed", "doc-1": "deleted"}
    assert plain.stale == MLPMemIndex.load(plain.memory_folder, device="cpu").stale == expected
    monkeypatch.undo()
    # Back as the memory has learned them: nothing is left to learn.
    plain.update_ref_doc(documents[0])
    plain.insert(documents[1])
    plain.delete_ref_doc("late", delete_from_docstore=True)
    assert plain.stale == {}


def test_a_memory_that_cannot_be_loaded_again_leaves_the_notes(
    plain: MLPMemIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain.insert(Document(text=NEWS, doc_id="news"))

    def fail(_: object) -> None:
        raise ArtifactError("no")

    monkeypatch.setattr(base, "reload", fail)
    with pytest.raises(ArtifactError, match="no"):
        plain.retrain()
    assert plain.stale == {"news": "inserted"}


def test_other_metadata_is_no_change(plain: MLPMemIndex, documents: list[Document]) -> None:
    """Readers of files put dates there; of metadata only the title is learned."""
    touched = Document(
        text=documents[3].text, doc_id="doc-3", metadata={"last_modified_date": "2026-11-28"}
    )
    named = Document(text=documents[4].text, doc_id="doc-4", metadata={"title": "The Mill"})
    assert plain.refresh_ref_docs([touched, named]) == [True, True]
    assert plain.stale == {"doc-4": "changed"}
    plain.refresh_ref_docs([documents[4]])
    assert plain.stale == {}


def test_an_index_of_an_earlier_version_knows_its_documents(
    plain: MLPMemIndex, documents: list[Document]
) -> None:
    """It has kept LlamaIndex's hashes."""
    struct = plain.index_struct
    struct.documents = {document.doc_id: document.hash for document in documents}
    plain.update_ref_doc(Document(text=NEWS, doc_id="doc-3"))
    assert plain.stale == {"doc-3": "changed"}
    plain.update_ref_doc(documents[3])
    assert plain.stale == {}


def test_a_memory_trained_anew_by_others_is_not_taken_for_the_indexs(
    plain: MLPMemIndex, training: dict[str, Any], documents: list[Document], tmp_path: Path
) -> None:
    engine = plain.as_query_engine()
    assert (engine.query(QUESTION).metadata or {})["mlpmem"]["attribution"] == TRACED
    other = tmp_path / "other.txt"
    other.write_text(f"{NEWS} " * 8)
    train(str(other), out=plain.memory_folder, **training)
    # The one that is loaded does not take the other's rows for its own.
    again = MLPMemIndex.load(plain.memory_folder, device="cpu", dtype="float32")
    plain._rows._opened_for = None
    assert plain._rows() is None
    assert again.stale == dict.fromkeys((d.doc_id for d in documents), "unknown")
    again.update_ref_doc(documents[0])
    assert again.stale["doc-0"] == "changed"
    again.retrain()
    assert again.stale == {}


def test_a_memory_first_engine_takes_a_new_memorys_answers_again(
    plain: MLPMemIndex, documents: list[Document]
) -> None:
    first = MemoryFirstQueryEngine(plain.as_query_engine(), plain.as_query_engine(), 0.0)
    plain.update_ref_doc(Document(text=f"{documents[2].text} And more.", doc_id="doc-2"))

    def told() -> dict[str, Any]:
        response: Any = first.query(documents[2].text[:40])
        found: dict[str, Any] = response.metadata["mlpmem"]
        return found

    assert told()["why"] == "stale: doc-2 (changed)"
    plain.retrain()
    assert (told()["route"], told().get("why")) == ("memory", None)


def test_without_text_the_old_memory_stays(plain: MLPMemIndex) -> None:
    answer = str(plain.as_query_engine().query(QUESTION))
    for name in list(plain.ref_doc_info):
        plain.delete_ref_doc(name, delete_from_docstore=True)
    with pytest.raises(CorpusError, match="none of 0 documents"):
        plain.retrain()
    assert set(plain.stale.values()) == {"deleted"}
    response = plain.as_query_engine().query(QUESTION)
    assert str(response) == answer
    assert (response.metadata or {})["mlpmem"]["touched_stale"]
    assert plain.as_retriever().retrieve(QUESTION) == []


def test_training_finds_a_base_model_that_was_moved(
    plain: MLPMemIndex, chat_folder: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    moved.symlink_to(chat_folder)
    index = MLPMemIndex.load(plain.memory_folder, base_model=str(moved), device="cpu")
    index.insert(Document(text=NEWS, doc_id="news"))
    index.retrain()
    assert index.llm.model.backbone is not None
    assert index.llm.model.backbone.reference.name == str(moved)


def test_a_memory_without_a_folder_cannot_be_loaded_again(chat_model: MemoryModel) -> None:
    unnamed = MemoryModel(chat_model.model, chat_model.tokenizer)
    with pytest.raises(ConfigError, match="loaded from a folder"):
        reload(unnamed)
