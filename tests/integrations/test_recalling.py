"""A memory as its own retriever: the sentences behind the questions that it takes a request for."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from llama_index.core.schema import MetadataMode

from llama_index.indices.managed.mlpmem import MemoryRAGQueryEngine, MLPMemIndex, RecallRetriever
from llama_index.indices.managed.mlpmem.attribution import LABEL
from llama_index.indices.managed.mlpmem.recalling import MEANT, RECALLED
from mlpmem_cli.app import main
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.provenance import Provenance
from mlpmem_rag.recall import question_keys

ASKED = ("Who found wild honey in the old mill?", "So, what did Ines Maro find?", "Who is king?")


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
    assert nodes[0].node.metadata == {LABEL: RECALLED, MEANT: first.text}
    assert nodes[0].node.ref_doc_id == first.document


def test_what_is_recalled_is_read_beside_the_memory(index: MLPMemIndex) -> None:
    engine = MemoryRAGQueryEngine(index.llm, index.as_recall_retriever())
    response = engine.query(ASKED[0])
    (node,) = response.source_nodes
    assert "found wild honey" in node.node.get_content()
    passages = [node.node.get_content()]
    expected = index.llm.model.answer(ASKED[0], max_new_tokens=16, passages=passages)
    assert (str(response), expected.text) == ("Ines Maro", "Ines Maro")
    assert response.metadata is not None
    assert response.metadata["mlpmem"]["usage"]["prompt_tokens"] == expected.prompt_tokens


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
    response = MemoryRAGQueryEngine(index.llm, gone).query(ASKED[0])
    assert (response.source_nodes, str(response)) == ([], "Ines Maro")
    with pytest.raises(ConfigError, match="the question is empty"):
        retriever.retrieve(" ")


def test_ask_reads_what_it_recalls(
    index: MLPMemIndex, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*options: str) -> tuple[str, str]:
        given = ["ask", str(index.memory_folder), ASKED[0], "--read", "--max-new-tokens", "16"]
        monkeypatch.setattr("sys.argv", ["mlpmem-rag", *given, "--device", "cpu", *options])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capsys.readouterr()

    (node,) = index.as_recall_retriever().retrieve(ASKED[0])
    passages = [node.node.get_content()]
    expected = index.llm.model.answer(ASKED[0], max_new_tokens=16, passages=passages)
    found = json.loads(ask("--json")[0])
    assert found["answer"] == expected.text
    assert found["prompt_tokens"] == expected.prompt_tokens
    assert found["sources"] == [{"document": node.node.ref_doc_id, "text": passages[0]}]
    out, err = ask()
    assert out.strip() == expected.text
    assert f"{node.node.ref_doc_id}: {passages[0]}" in " ".join(err.split())
