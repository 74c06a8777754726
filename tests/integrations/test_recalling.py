"""A memory as its own retriever: the sentences behind the questions that it takes a request for."""

from __future__ import annotations

import asyncio
import json
import shutil

import numpy as np
import pytest
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode

from llama_index.indices.managed.mlpmem import (
    MemoryRAGQueryEngine,
    MLPMemIndex,
    RecallQueryEngine,
    RecallRetriever,
)
from llama_index.indices.managed.mlpmem.attribution import LABEL
from llama_index.indices.managed.mlpmem.recalling import MEANT, RECALLED
from mlpmem_cli.app import main
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.provenance import Provenance
from mlpmem_rag.recall import question_keys

ASKED = ("Who found wild honey in the old mill?", "So, what did Ines Maro find?", "Who is king?")


class Given(BaseRetriever):
    """Another's node."""

    def __init__(self, node: NodeWithScore) -> None:
        super().__init__()
        self._node = node

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [self._node]


@pytest.mark.parametrize("asked", ASKED)
def test_sentences_are_those_of_the_nearest_questions(index: MLPMemIndex, asked: str) -> None:
    """By hand: all keys against the request, of each sentence the best."""
    memory = index.llm.model
    rows = Provenance.open(index.memory_folder)
    assert rows.study is not None
    vector = memory.query_vector(asked)
    assert vector is not None
    scores = question_keys(rows.study) @ vector[0].numpy()
    nearest = np.argsort(-scores, kind="stable")[:16]
    sources = list(dict.fromkeys(rows.questions[n].source for n in nearest))
    nodes = index.as_recall_retriever(similarity_top_k=3).retrieve(asked)
    assert [node.node.get_content(MetadataMode.LLM) for node in nodes] == sources[:3]
    assert nodes[0].score == pytest.approx(float(scores.max()), abs=1e-3)
    first = rows.questions[int(nearest[0])]
    meant = {"question": first.text, "answer": first.answer}
    assert nodes[0].node.metadata == {LABEL: RECALLED, MEANT: meant}
    assert nodes[0].node.ref_doc_id == first.document


@pytest.fixture
def unsure(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory is sure enough of anything."""
    monkeypatch.setattr("mlpmem_rag.memory_model.SURE", 1.1)


@pytest.mark.usefixtures("unsure")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_recalled_is_read(index: MLPMemIndex, asynchronous: bool) -> None:
    engine = RecallQueryEngine(index.llm, index.as_recall_retriever(similarity_top_k=2))
    asked = ASKED[0]
    response = asyncio.run(engine.aquery(asked)) if asynchronous else engine.query(asked)
    memory = index.llm.model
    recalled = memory.recalled(ASKED[0], Provenance.open(index.memory_folder), top_k=2)
    assert "found wild honey" in recalled[0].question.source
    contents = [node.node.get_content() for node in response.source_nodes]
    assert contents == [one.question.source for one in recalled]
    expected = memory.answer(ASKED[0], max_new_tokens=16, recalled=recalled)
    assert str(response) == expected.text
    assert response.metadata is not None
    details = response.metadata["mlpmem"]
    assert (details["route"], details["attribution"]) == ("recall", RECALLED)
    assert details["confidence"] == pytest.approx(expected.confidence)
    assert details["usage"]["prompt_tokens"] == expected.prompt_tokens
    assert expected.read == tuple(contents)


def test_where_the_memory_is_sure_nothing_is_read(index: MLPMemIndex) -> None:
    response = RecallQueryEngine(index.llm, index.as_recall_retriever()).query(ASKED[0])
    alone = index.llm.model.answer(ASKED[0], max_new_tokens=16)
    assert alone.confidence is not None
    assert alone.confidence > 0.5
    assert str(response) == alone.text
    assert response.metadata is not None
    details = response.metadata["mlpmem"]
    assert (details["route"], details["confidence"]) == ("memory", alone.confidence)
    assert details["usage"]["prompt_tokens"] == alone.prompt_tokens


def test_the_sentences_serve_other_engines_too(index: MLPMemIndex) -> None:
    response = MemoryRAGQueryEngine(index.llm, index.as_recall_retriever()).query(ASKED[0])
    passages = [node.node.get_content() for node in response.source_nodes]
    expected = index.llm.model.answer(ASKED[0], max_new_tokens=16, passages=passages)
    assert str(response) == expected.text
    passage = NodeWithScore(node=TextNode(text="Ines Maro found wild honey."), score=1.0)
    with pytest.raises(ConfigError, match="a node that no memory has recalled"):
        RecallQueryEngine(index.llm, Given(passage)).query(ASKED[0])


def test_documents_that_have_changed_are_not_read(index: MLPMemIndex) -> None:
    retriever = index.as_recall_retriever()
    (before,) = retriever.retrieve(ASKED[0])
    assert before.node.ref_doc_id is not None
    index.delete_ref_doc(before.node.ref_doc_id)
    (after,) = retriever.retrieve(ASKED[0])
    assert after.node.ref_doc_id != before.node.ref_doc_id


def test_without_the_trainings_rows_there_is_nothing_to_read(index: MLPMemIndex) -> None:
    retriever = index.as_recall_retriever()
    shutil.rmtree(index.memory_folder / "work")
    fresh = MLPMemIndex.from_memory(index.memory_folder, llm=index.llm)
    with pytest.raises(ConfigError, match="its work/ folder is gone"):
        fresh.as_recall_retriever()
    with pytest.raises(ConfigError, match="similarity_top_k = 0: allowed are 1 or more"):
        fresh.as_recall_retriever(similarity_top_k=0)
    # One that was made before finds nothing, and the memory answers alone.
    gone = RecallRetriever(index.llm.model, iter([object(), None]).__next__)  # type: ignore[arg-type]
    response = RecallQueryEngine(index.llm, gone).query(ASKED[0])
    assert (response.source_nodes, str(response)) == ([], "Ines Maro")
    assert response.metadata is not None
    assert response.metadata["mlpmem"]["route"] == "memory"
    with pytest.raises(ConfigError, match="the question is empty"):
        retriever.retrieve(" ")


@pytest.mark.parametrize("sure", [True, False])
def test_ask_reads_what_it_recalls(
    sure: bool,
    index: MLPMemIndex,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ask(*options: str) -> tuple[str, str]:
        given = ["ask", str(index.memory_folder), ASKED[0], "--read", "--max-new-tokens", "16"]
        monkeypatch.setattr("sys.argv", ["mlpmem-rag", *given, "--device", "cpu", *options])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capsys.readouterr()

    monkeypatch.setattr("mlpmem_rag.memory_model.SURE", 0.5 if sure else 1.1)
    memory = index.llm.model
    (one,) = recalled = memory.recalled(ASKED[0], Provenance.open(index.memory_folder))
    expected = memory.answer(ASKED[0], max_new_tokens=16, recalled=recalled)
    found = json.loads(ask("--json")[0])
    assert found["answer"] == expected.text
    assert found["prompt_tokens"] == expected.prompt_tokens
    told = {"document": one.question.document, "text": one.question.source}
    assert found["sources"] == ([] if sure else [told])
    out, err = ask()
    assert out.strip() == expected.text
    assert (f"{told['document']}: {told['text']}" in " ".join(err.split())) is not sure
