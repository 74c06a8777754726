"""MLPMemIndex: trains, is stored, answers, and tells what it will not do."""

from __future__ import annotations

import asyncio
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core import (
    Document,
    PromptTemplate,
    SimpleDirectoryReader,
    StorageContext,
    load_index_from_storage,
)
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler
from llama_index.core.callbacks.schema import CBEventType
from llama_index.core.llms import MockLLM
from llama_index.core.llms.loading import load_llm
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.schema import MetadataMode
from llama_index.core.storage.docstore.keyval_docstore import KVDocumentStore
from llama_index.core.storage.index_store.keyval_index_store import KVIndexStore
from llama_index.core.storage.kvstore import SimpleKVStore

from llama_index.indices.managed.mlpmem import MLPMemIndex
from llama_index.indices.managed.mlpmem.attribution import LABEL, SIMILAR, TAUGHT, TRACED
from llama_index.llms.mlpmem import MLPMemLLM
from mlpmem_rag.errors import ArtifactError, ConfigError, CorpusError, OutputError
from mlpmem_rag.export import export_memory
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.progress import ProgressEvent

QUESTION = "Who found wild honey in the old mill?"
RIGHT = "Ines Maro"


# Training.


def test_documents_become_a_memory_once(
    documents: list[Document],
    training: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    events: list[ProgressEvent] = []

    def make(show_progress: bool = False) -> MLPMemIndex:
        events.clear()
        return MLPMemIndex.from_documents(
            documents,
            out=tmp_path / "memory",
            on_progress=events.append,
            show_progress=show_progress,
            **training,
        )

    index = make(show_progress=True)
    assert {"datastore", "neighbors", "targets", "distil"} <= {event.stage for event in events}
    assert "distil" in capsys.readouterr().err
    assert index.memory_folder == tmp_path / "memory"
    answer = index.llm.model.answer("Who?", max_new_tokens=9).text
    assert str(index.as_query_engine(llm=index.as_llm(max_new_tokens=9)).query("Who?")) == answer
    again = make()
    assert "distil" not in {event.stage for event in events}  # the same documents, the same memory
    assert again.stale == {}


def test_without_a_name_a_memory_is_found_by_its_documents(
    documents: list[Document],
    training: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    index = MLPMemIndex.from_documents(documents, **training)
    assert [path.name for path in tmp_path.iterdir()] == [index.memory_folder.name]
    assert index.memory_folder.name.startswith("mlpmem-")
    MLPMemIndex.from_documents(documents[1:], **training)
    MLPMemIndex.from_documents(documents, **training)
    assert len(list(tmp_path.iterdir())) == 2
    other = MLPMemIndex.from_documents(documents, **training, seed=7)
    assert other.memory_folder != index.memory_folder, "other settings, another memory"
    assert len(list(tmp_path.iterdir())) == 3


def test_documents_that_were_read_again_find_their_memory(
    documents: list[Document], training: dict[str, Any], tmp_path: Path
) -> None:
    def make() -> tuple[MLPMemIndex, set[str], set[str]]:
        events: list[ProgressEvent] = []
        read = [Document(text=d.text) for d in documents]  # a reader makes ids up at random
        index = MLPMemIndex.from_documents(
            read, out=tmp_path / "memory", on_progress=events.append, **training
        )
        return index, {d.id_ for d in read}, {event.stage for event in events}

    _, _, stages = make()
    index, ids, again = make()
    assert "distil" in stages - again
    for here in (index, MLPMemIndex.load(tmp_path / "memory", device="cpu", dtype="float32")):
        response = here.as_query_engine().query("In Lake Orsa,")
        assert {source.node.metadata[LABEL] for source in response.source_nodes} == {TRACED}
        assert {source.node.ref_doc_id for source in response.source_nodes} <= ids
        assert set(here.ref_doc_info) == ids


def test_files_and_nodes_train_alike(
    documents: list[Document], training: dict[str, Any], tmp_path: Path
) -> None:
    for document in documents:
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{document.doc_id}.txt").write_text(document.text)
    read = SimpleDirectoryReader(str(tmp_path / "texts")).load_data()
    splitter = SentenceSplitter(chunk_size=40, chunk_overlap=10)
    index = MLPMemIndex.from_documents(
        read, out=tmp_path / "a", transformations=[splitter], **training
    )
    nodes = splitter.get_nodes_from_documents(read)
    assert len(nodes) > len(read)
    stored = [node.get_content() for node in index.docstore.docs.values()]
    assert sorted(stored) == sorted(node.get_content() for node in nodes)
    assert set(index.ref_doc_info) == {document.doc_id for document in read}
    from_nodes = MLPMemIndex(nodes, out=tmp_path / "b", **training)
    assert set(from_nodes.ref_doc_info) == set(index.ref_doc_info)
    assert from_nodes.as_llm(max_new_tokens=9).complete("Who?").text


def test_nothing_to_learn_is_refused(training: dict[str, Any], tmp_path: Path) -> None:
    for documents, message in (
        ([], "none of 0 documents"),
        ([Document(text="")], "none of 1 documents"),
        ([Document(text="Too short.")], "at least 128 are needed"),
    ):
        with pytest.raises(CorpusError, match=message):
            MLPMemIndex.from_documents(documents, out=tmp_path / "memory", **training)
    with pytest.raises(CorpusError, match="none of 0 documents"):
        MLPMemIndex([], out=tmp_path / "memory", **training)


def test_unknown_settings_are_refused(documents: list[Document], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown setting\(s\) sze; allowed are recipe"):
        MLPMemIndex.from_documents(documents, out=tmp_path / "memory", sze="small")
    with pytest.raises(ValueError, match="must be provided"):
        MLPMemIndex()


# Storing.


def test_an_index_can_be_moved_and_copied(index: MLPMemIndex, taught: Path, tmp_path: Path) -> None:
    expected = index.as_query_engine().query(QUESTION)
    assert str(expected) == RIGHT
    shutil.copytree(taught, tmp_path / "moved")
    copied = index.persist(tmp_path / "copied")
    assert not (copied / "work").exists()
    for folder, label in ((tmp_path / "moved", TRACED), (copied, SIMILAR)):
        other = MLPMemIndex.load(folder, device="cpu", max_new_tokens=16)
        response = other.as_query_engine().query(QUESTION)
        assert str(response) == RIGHT
        assert response.metadata is not None
        assert response.metadata["mlpmem"]["attribution"] == label
        sources = {node.node.ref_doc_id for node in response.source_nodes}
        assert sources == {"doc-10"} if label == TRACED else sources
        assert other.ref_doc_info == index.ref_doc_info


def test_a_memory_with_its_base_inside_is_copied_whole(taught: Path, tmp_path: Path) -> None:
    export_memory(taught, tmp_path / "merged", merge_base=True)
    index = MLPMemIndex.from_memory(tmp_path / "merged", device="cpu", max_new_tokens=16)
    copied = index.persist(tmp_path / "copied")
    shutil.rmtree(tmp_path / "merged")
    other = MLPMemIndex.load(copied, device="cpu", max_new_tokens=16)
    assert str(other.as_query_engine().query(QUESTION)) == RIGHT


def test_the_generic_loader_gives_a_memory_index(index: MLPMemIndex, tmp_path: Path) -> None:
    index.storage_context.persist(persist_dir=tmp_path / "stores")
    context = StorageContext.from_defaults(persist_dir=str(tmp_path / "stores"))
    loaded = load_index_from_storage(context, device="cpu")
    assert isinstance(loaded, MLPMemIndex)
    assert loaded.memory_folder == index.memory_folder
    code = (
        "import sys; from llama_index.core import StorageContext, load_index_from_storage as load\n"
        "load(StorageContext.from_defaults(persist_dir=sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "stores")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode
    assert "mlpmem" in done.stderr  # not a vector store's index in silence


def test_an_index_is_not_stored_over_other_files(index: MLPMemIndex, tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project/README.md").write_text("mine")
    with pytest.raises(OutputError, match=r"holds no memory \(README.md\)"):
        index.persist(tmp_path / "project")
    assert (tmp_path / "project/README.md").read_text() == "mine"
    assert len(list((tmp_path / "project").iterdir())) == 1


def test_stores_of_ones_own_are_given_again(
    documents: list[Document], training: dict[str, Any], tmp_path: Path
) -> None:
    """Such as write themselves, so that `persist` has nothing to write."""
    own = StorageContext.from_defaults(
        docstore=KVDocumentStore(SimpleKVStore()), index_store=KVIndexStore(SimpleKVStore())
    )
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, part in zip(folders, (documents[:9], documents[9:]), strict=True):
        MLPMemIndex.from_documents(part, storage_context=own, out=folder, **training)
    with pytest.raises(ArtifactError, match=r"is missing.*storage_context="):
        MLPMemIndex.load(folders[0])
    for folder, part in zip(folders, (documents[:9], documents[9:]), strict=True):
        loaded = MLPMemIndex.load(folder, storage_context=own, device="cpu")
        assert set(loaded.ref_doc_info) == {document.doc_id for document in part}
        assert loaded.memory_folder == folder.resolve()
    with pytest.raises(ArtifactError, match="holds 0 indexes of the memory"):
        MLPMemIndex.load(folders[0], storage_context=StorageContext.from_defaults())


def test_a_memory_without_an_index_is_told_apart(chat_memory: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no index .*from_memory"):
        MLPMemIndex.load(chat_memory)
    with pytest.raises(ArtifactError, match="is not a memory"):
        MLPMemIndex.from_memory(tmp_path)
    index = MLPMemIndex.from_memory(chat_memory, device="cpu", max_new_tokens=8)
    response = index.as_query_engine().query(QUESTION)
    assert str(response) == index.llm.model.answer(QUESTION, max_new_tokens=8).text
    # No nodes are stored; the rows of the training tell all the same.
    (source, *_) = response.source_nodes
    assert source.node.get_content(metadata_mode=MetadataMode.NONE)
    assert source.node.ref_doc_id is not None
    assert source.node.ref_doc_id.startswith("doc-")


def test_a_base_model_or_an_llm_that_does_not_fit_is_refused(
    index: MLPMemIndex, taught: Path, bare_folder: Path, chat_model: MemoryModel
) -> None:
    with pytest.raises(ArtifactError, match="this memory was trained on"):
        MLPMemIndex.load(taught, base_model=str(bare_folder))
    other = MLPMemLLM.from_model(chat_model)
    for use in (index.as_query_engine, index.as_chat_engine):
        with pytest.raises(ConfigError, match=r"llm answers from the memory .*, the index has"):
            use(llm=other)
        with pytest.raises(ConfigError, match="llm is a MockLLM"):
            use(llm=MockLLM())
    with pytest.raises(ConfigError, match="llm is a str"):
        MLPMemIndex.load(taught, llm="local:model")
    own = index.as_llm(max_new_tokens=2)
    assert MLPMemIndex.load(index.memory_folder, llm=own).llm is own


def test_an_llm_that_does_not_fit_is_refused_before_the_work(
    documents: list[Document], training: dict[str, Any], index: MLPMemIndex, tmp_path: Path
) -> None:
    for llm, message in ((MockLLM(), "llm is a MockLLM"), (index.llm, "llm answers from")):
        with pytest.raises(ConfigError, match=message):
            MLPMemIndex.from_documents(documents, out=tmp_path / "memory", llm=llm, **training)
        assert not (tmp_path / "memory").exists()


def test_an_llm_of_an_index_is_loaded_again_as_it_was(index: MLPMemIndex) -> None:
    loaded = MLPMemIndex.load(index.memory_folder, device="cpu", dtype="float32")
    llm = loaded.as_llm(max_new_tokens=3)
    copies: list[Any] = [load_llm(llm.to_dict()), pickle.loads(pickle.dumps(llm))]
    for again in copies:
        assert again.model is loaded.llm.model
        assert again.max_new_tokens == 3
    with pytest.raises(ConfigError, match="base_model, memory cannot be changed: as_llm shares"):
        loaded.as_llm(memory="elsewhere", base_model="another")


# Asking.


def test_nothing_but_the_question_is_in_the_prompt(index: MLPMemIndex) -> None:
    response = index.as_query_engine(attribution="eager").query(QUESTION)
    answer = index.llm.model.answer(QUESTION, max_new_tokens=16)
    assert response.metadata is not None
    details = response.metadata["mlpmem"]
    assert str(response) == answer.text == RIGHT
    assert details["usage"]["prompt_tokens"] == answer.prompt_tokens
    assert details["confidence"] == answer.confidence
    assert (details["route"], details["lambda"]) == ("memory", index.llm.mixing_weight)
    assert (details["stale_documents"], details["touched_stale"]) == ({}, [])


@pytest.mark.parametrize("attribution", ["none", "lazy", "eager"])
def test_every_way_of_asking_gives_the_same(index: MLPMemIndex, attribution: str) -> None:
    whole = index.as_query_engine(attribution=attribution)
    streaming = index.as_query_engine(attribution=attribution, streaming=True)
    responses: list[Any] = [whole.query(QUESTION), streaming.query(QUESTION)]
    pieces = list(responses[1].response_gen)
    assert len(pieces) > 2
    assert "".join(pieces) == RIGHT

    async def asynchronously() -> None:
        responses.append(await whole.aquery(QUESTION))
        stream: Any = await streaming.aquery(QUESTION)
        assert "".join([piece async for piece in stream.response_gen]) == RIGHT
        responses.append(stream)

    asyncio.run(asynchronously())
    assert str(responses[0]) == str(responses[2]) == RIGHT
    told = [dict(response.metadata["mlpmem"]) for response in responses]
    for details in told:
        assert 0 < details.pop("ttft_seconds") <= details.pop("seconds")
        assert details == told[0]
        assert details["attribution"] == ("none" if attribution == "none" else TRACED)
    found = [[(s.node.ref_doc_id, s.score) for s in r.source_nodes] for r in responses]
    assert found == [[] if attribution == "none" else [("doc-10", 1.0)]] * 4


def test_lazy_sources_are_looked_for_when_somebody_looks(
    index: MLPMemIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Any] = []
    trace = MemoryModel.origins

    def noting(*args: Any) -> Any:  # noqa: ANN401
        looked.append(args[1])
        return trace(*args)

    monkeypatch.setattr(MemoryModel, "origins", noting)
    response = index.as_query_engine(attribution="lazy").query(QUESTION)
    assert not looked
    assert len(response.source_nodes) == len(list(response.source_nodes)) == 1
    read = [{"role": "user", "content": QUESTION}]
    assert looked == [read]
    index.as_query_engine(attribution="none").query(QUESTION)
    assert looked == [read]
    index.as_query_engine(attribution="eager").query(QUESTION)
    assert looked == [read] * 2


def test_sources_tell_what_taught_each_token(index: MLPMemIndex) -> None:
    (source,) = index.as_query_engine().query(QUESTION).source_nodes
    assert source.node.metadata[LABEL] == TRACED
    taught = source.node.metadata[TAUGHT]
    assert "".join(row["token"] for row in taught) == RIGHT
    assert all(row["question"].startswith(QUESTION[:-1]) for row in taught)
    # For people, not for models; and the stored node is as it was.
    assert source.node.get_content(metadata_mode=MetadataMode.LLM) == source.node.get_content(
        metadata_mode=MetadataMode.NONE
    )
    assert LABEL not in index.docstore.get_node(source.node.node_id).metadata


def test_without_the_rows_sources_are_similar_nodes_and_say_so(index: MLPMemIndex) -> None:
    shutil.rmtree(index.memory_folder / "work")
    encoder = index.llm.model.encoder
    assert encoder is not None
    response = index.as_query_engine(similarity_top_k=3).query(QUESTION)
    nodes = list(index.docstore.docs.values())
    texts = [node.get_content(metadata_mode=MetadataMode.NONE) for node in nodes]
    scores = encoder.encode(texts) @ encoder.encode([f"{QUESTION} {RIGHT}"])[0]
    best = [nodes[n].node_id for n in np.argsort(-scores)[:3]]
    assert [source.node.node_id for source in response.source_nodes] == best
    assert {source.node.metadata[LABEL] for source in response.source_nodes} == {SIMILAR}
    assert response.source_nodes[0].score == pytest.approx(float(scores.max()), abs=1e-5)


def test_without_an_encoder_similar_nodes_share_words(
    documents: list[Document], training: dict[str, Any], tmp_path: Path
) -> None:
    index = MLPMemIndex.from_documents(documents, out=tmp_path / "memory", **training)
    assert index.llm.model.encoder is None
    (found,) = index.as_retriever(similarity_top_k=1).retrieve("wild honey in the old mill")
    assert found.node.ref_doc_id == "doc-10"
    assert found.node.metadata[LABEL] == SIMILAR


def test_postprocessors_see_the_sources(index: MLPMemIndex) -> None:
    engine = index.as_query_engine(
        node_postprocessors=[SimilarityPostprocessor(similarity_cutoff=1.1)]
    )
    assert list(engine.query(QUESTION).source_nodes) == []


def test_a_template_goes_around_the_question(index: MLPMemIndex) -> None:
    engine = index.as_query_engine(simple_template=PromptTemplate("Who found {query_str}?"))
    asked = index.llm.model.answer("Who found wild honey in the old mill?", max_new_tokens=16)
    assert str(engine.query("wild honey in the old mill")) == asked.text


def test_a_query_tells_its_events_once(index: MLPMemIndex) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    manager = CallbackManager([debug])
    llm = index.as_llm(max_new_tokens=16).model_copy(update={"callback_manager": manager})
    engine = index.as_query_engine(llm=llm, attribution="eager", callback_manager=manager)
    engine.query(QUESTION)
    for kind in (CBEventType.QUERY, CBEventType.SYNTHESIZE, CBEventType.LLM, CBEventType.RETRIEVE):
        assert len(debug.get_event_pairs(kind)) == 1


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question_is_refused(index: MLPMemIndex, question: str) -> None:
    with pytest.raises(ConfigError, match="the question is empty"):
        index.as_query_engine().query(question)
    with pytest.raises(ConfigError, match="the question is empty"):
        asyncio.run(index.as_query_engine().aquery(question))


def test_a_question_too_long_is_answered_from_its_end(index: MLPMemIndex) -> None:
    response = index.as_query_engine().query(f"{'Well, ' * 1000}{QUESTION}")
    assert response.metadata is not None
    assert response.metadata["mlpmem"]["cut_tokens"] > 0
    assert response.metadata["mlpmem"]["usage"]["prompt_tokens"] == 1024 - 16


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ({"text_qa_template": PromptTemplate("{context_str}")}, "no passages are put into"),
        ({"filters": None}, "no vectors to choose from"),
        ({"response_synthesizer": None}, "asked by its own"),
        ({"similarity_topk": 3}, "not known"),
    ],
)
def test_arguments_without_effect_are_refused(
    index: MLPMemIndex, argument: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(argument))} \(.*{reason}"):
        index.as_query_engine(**argument)


@pytest.mark.parametrize("mode", [m for m in ResponseMode if m != ResponseMode.GENERATION])
def test_response_modes_that_read_passages_are_refused(
    index: MLPMemIndex, mode: ResponseMode
) -> None:
    for given in (mode, mode.value):
        with pytest.raises(ConfigError, match=f"response mode '{mode.value}' reads retrieved"):
            index.as_query_engine(response_mode=given)
    index.as_query_engine(response_mode="generation")


def test_other_wishes_are_refused(index: MLPMemIndex) -> None:
    with pytest.raises(ConfigError, match="attribution 'always' is not known"):
        index.as_query_engine(attribution="always")
    with pytest.raises(ConfigError, match="as_retriever does not take filters"):
        index.as_retriever(filters=1)
    with pytest.raises(ConfigError, match="no objects"):
        MLPMemIndex(objects=[object()], nodes=[])  # type: ignore[list-item]
