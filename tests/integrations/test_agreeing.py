"""Memory and retrieval together, beside the library's own answer with the same passages."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMCompletionEndEvent
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from llama_index.indices.managed.mlpmem import MemoryRAGQueryEngine, MLPMemIndex
from mlpmem_rag.errors import ConfigError

QUESTION = "Did Ines Maro find a map of the tunnels?"
PASSAGES = ("In the old mill, Ines Maro found wild honey.", "Nobody knows the king.")


class Found(BaseRetriever):
    """The same two passages for every question."""

    def __init__(self, *texts: str) -> None:
        super().__init__()
        self.asked: list[str] = []
        self._texts = texts

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        self.asked.append(query_bundle.query_str)
        nodes = [TextNode(text=text, id_=str(n)) for n, text in enumerate(self._texts)]
        return [NodeWithScore(node=node, score=1 / (n + 1)) for n, node in enumerate(nodes)]


def ask(engine: MemoryRAGQueryEngine, question: str, *, asynchronous: bool) -> Any:  # noqa: ANN401
    return asyncio.run(engine.aquery(question)) if asynchronous else engine.query(question)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("question", [QUESTION, "Who is the king?"])
def test_the_answer_is_the_librarys_with_these_passages(
    index: MLPMemIndex, question: str, asynchronous: bool
) -> None:
    retriever = Found(*PASSAGES)
    response = ask(MemoryRAGQueryEngine(index.llm, retriever), question, asynchronous=asynchronous)
    expected = index.llm.model.answer(question, max_new_tokens=16, passages=PASSAGES)
    assert str(response) == expected.text
    assert retriever.asked == [question]
    assert [node.node.get_content() for node in response.source_nodes] == [*PASSAGES]
    details = response.metadata["mlpmem"]
    assert (details["route"], details["attribution"]) == ("memory+rag", "retrieved passages")
    assert details["confidence"] == pytest.approx(expected.confidence)
    assert details["lambda"] == index.llm.mixing_weight
    usage = {"prompt_tokens": expected.prompt_tokens, "completion_tokens": expected.new_tokens}
    assert usage.items() <= details["usage"].items()
    alone = index.llm.model.answer(question, max_new_tokens=16)
    assert expected.prompt_tokens > alone.prompt_tokens


def test_what_a_postprocessor_leaves_out_is_not_read(index: MLPMemIndex) -> None:
    best = SimilarityPostprocessor(similarity_cutoff=0.6)
    engine = MemoryRAGQueryEngine(index.llm, Found(*PASSAGES), [best])
    response = engine.query(QUESTION)
    assert [node.node.node_id for node in response.source_nodes] == ["0"]
    expected = index.llm.model.answer(QUESTION, max_new_tokens=16, passages=PASSAGES[:1])
    assert str(response) == expected.text


def test_without_passages_the_memory_answers(index: MLPMemIndex) -> None:
    response = MemoryRAGQueryEngine(index.llm, Found()).query(QUESTION)
    assert str(response) == index.llm.model.answer(QUESTION, max_new_tokens=16).text == "yes"
    assert response.metadata is not None
    assert response.metadata["mlpmem"]["route"] == "memory"


def test_settings_of_the_llm_hold(index: MLPMemIndex) -> None:
    llm = index.as_llm(lambda_=0.0, max_new_tokens=3)
    response = MemoryRAGQueryEngine(llm, Found(*PASSAGES)).query(QUESTION)
    expected = llm.model.answer(QUESTION, max_new_tokens=3, lambda_=0.0, passages=PASSAGES)
    assert response.response == expected.text  # type: ignore[union-attr]
    assert response.metadata is not None
    assert response.metadata["mlpmem"]["confidence"] is None
    assert response.metadata["mlpmem"]["lambda"] == 0.0


def test_an_empty_question_is_refused_before_anything_is_found(index: MLPMemIndex) -> None:
    retriever = Found(*PASSAGES)
    with pytest.raises(ConfigError, match="the question is empty"):
        MemoryRAGQueryEngine(index.llm, retriever).query(" ")
    assert retriever.asked == []


def test_tracing_sees_the_answer(index: MLPMemIndex) -> None:
    seen: list[Any] = []

    class Noting(BaseEventHandler):
        def handle(self, event: Any, **_: Any) -> None:  # noqa: ANN401
            if isinstance(event, LLMCompletionEndEvent):
                seen.append(event)

    root = get_dispatcher()
    root.add_event_handler(handler := Noting())
    try:
        response = MemoryRAGQueryEngine(index.llm, Found(*PASSAGES)).query(QUESTION)
    finally:
        root.event_handlers.remove(handler)
    (event,) = seen
    assert (event.prompt, event.response.text) == (QUESTION, str(response))
    assert event.response.raw["usage"]["total_tokens"] > 0
