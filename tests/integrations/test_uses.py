"""Chat engines, routers, workflows and settings made of a memory."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import (
    Document,
    PromptTemplate,
    Settings,
    SimpleDirectoryReader,
    SummaryIndex,
)
from llama_index.core.chat_engine.types import ChatMode
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import RouterQueryEngine, SubQuestionQueryEngine
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.response_synthesizers import ResponseMode, get_response_synthesizer
from llama_index.core.selectors import LLMSingleSelector
from llama_index.core.tools import QueryEngineTool
from llama_index.core.workflow import Event, StartEvent, StopEvent, Workflow, step

from llama_index.indices.managed.mlpmem import MLPMemIndex
from mlpmem_rag.errors import ConfigError

from .fakes import ScriptedLLM

QUESTION = "Who found wild honey in the old mill?"
RIGHT = "Ines Maro"
SURE = "Did Ines Maro find a map of the tunnels?"


def test_chat_engines_answer_from_the_memory(index: MLPMemIndex) -> None:
    answer = index.llm.model.answer(QUESTION, max_new_tokens=16).text
    assert str(index.as_chat_engine().chat(QUESTION)) == answer
    assert str(index.as_chat_engine(chat_mode=ChatMode.SIMPLE).chat(QUESTION)) == answer
    assert str(asyncio.run(index.as_chat_engine().achat(QUESTION))) == answer
    with pytest.raises(ConfigError, match="chat mode 'context' reads retrieved passages"):
        index.as_chat_engine(chat_mode=ChatMode.CONTEXT)


@pytest.fixture
def tool(index: MLPMemIndex) -> QueryEngineTool:
    return QueryEngineTool.from_defaults(
        index.as_query_engine(), name="documents", description="Answers about the documents."
    )


def test_it_can_be_a_tool(tool: QueryEngineTool) -> None:
    assert tool.call(QUESTION).content == RIGHT


# Query engines of query engines.


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_router_sends_questions_to_it(tool: QueryEngineTool, asynchronous: bool) -> None:
    other = QueryEngineTool.from_defaults(
        SummaryIndex([]).as_query_engine(llm=ScriptedLLM([])), name="other", description="Other."
    )
    choice = json.dumps([{"choice": 2, "reason": "It is about the documents."}])
    router = RouterQueryEngine.from_defaults(
        [other, tool],
        selector=LLMSingleSelector.from_defaults(llm=ScriptedLLM([choice])),
        llm=ScriptedLLM([]),
    )
    response: Any = asyncio.run(router.aquery(QUESTION)) if asynchronous else router.query(QUESTION)
    assert str(response) == RIGHT
    assert response.metadata["mlpmem"]["route"] == "memory"
    assert [source.node.ref_doc_id for source in response.source_nodes] == ["doc-10"]


@pytest.mark.parametrize("use_async", [False, True])
def test_it_answers_sub_questions(tool: QueryEngineTool, use_async: bool) -> None:
    asked = [{"sub_question": q, "tool_name": "documents"} for q in (QUESTION, SURE)]
    planner = ScriptedLLM([json.dumps({"items": asked})])
    writer = ScriptedLLM(["Ines Maro found both."])
    engine = SubQuestionQueryEngine.from_defaults(
        [tool],
        question_gen=LLMQuestionGenerator.from_defaults(llm=planner),
        response_synthesizer=get_response_synthesizer(
            llm=writer, response_mode=ResponseMode.COMPACT, use_async=use_async
        ),
        llm=writer,
        use_async=use_async,
        verbose=False,
    )
    response = engine.query("What did Ines Maro find?")
    assert str(response) == "Ines Maro found both."
    (prompt,) = writer.asked
    assert f"Sub question: {QUESTION}\nResponse: {RIGHT}" in prompt
    assert f"Sub question: {SURE}\nResponse: yes" in prompt
    # The questions with their answers, then the memory's own sources.
    sources = [source.node.ref_doc_id for source in response.source_nodes]
    assert sources[:2] == [None, None]
    assert {"doc-10", "doc-7"} <= set(sources[2:])


# Workflows.


class Checked(Event):
    """An answer with how sure the memory was."""

    answer: str
    sure: float


class AskThenRephrase(Workflow):
    """Asks the memory, then has its base model say the answer."""

    def __init__(self, index: MLPMemIndex) -> None:
        super().__init__(timeout=30)
        self.index = index

    @step
    async def ask(self, start: StartEvent) -> Checked:
        response = await self.index.as_query_engine().aquery(start.question)
        told = (response.metadata or {})["mlpmem"]
        return Checked(answer=str(response), sure=told["confidence"])

    @step
    async def rephrase(self, checked: Checked) -> StopEvent:
        llm = self.index.as_llm(lambda_=0.0, max_new_tokens=8)
        reply = await llm.acomplete(f"Say: {checked.answer}")
        return StopEvent(result=(checked.answer, checked.sure, str(reply)))


def test_it_works_in_workflows(index: MLPMemIndex) -> None:
    async def together() -> list[Any]:
        workflow = AskThenRephrase(index)
        return await asyncio.gather(*(workflow.run(question=QUESTION) for _ in range(4)))

    answer = index.llm.model.answer(QUESTION, max_new_tokens=16)
    said = index.as_llm(lambda_=0.0, max_new_tokens=8).complete(f"Say: {RIGHT}").text
    for found, sure, rephrased in asyncio.run(together()):  # perhaps in one batch
        assert (found, rephrased) == (RIGHT, said)
        assert sure == pytest.approx(answer.confidence, rel=1e-4)


# Settings, templates, ingestion.


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test sets is undone after it."""
    for name in ("_llm", "_embed_model"):
        monkeypatch.setattr(Settings, name, None)


@pytest.mark.usefixtures("settings")
def test_it_is_the_llm_of_everything_else(index: MLPMemIndex) -> None:
    Settings.llm = index.as_llm(max_new_tokens=16)
    template = PromptTemplate("{query_str}")
    engine = SummaryIndex.from_documents([Document(text="A text.")]).as_query_engine(
        text_qa_template=template
    )
    assert str(engine.query(QUESTION)) == RIGHT
    other = ScriptedLLM(["Not asked."])
    Settings.llm = other
    assert str(index.as_query_engine().query(QUESTION)) == RIGHT  # an index asks its own
    assert not other.asked


def test_templates_are_filled_in(index: MLPMemIndex) -> None:
    llm = index.as_llm(max_new_tokens=16)
    template = PromptTemplate("Who found {what} in {where}?").partial_format(where="the old mill")

    async def streamed() -> str:
        return "".join([piece async for piece in await llm.astream(template, what="wild honey")])

    assert llm.predict(template, what="wild honey") == RIGHT
    assert asyncio.run(llm.apredict(template, what="wild honey")) == RIGHT
    assert "".join(llm.stream(template, what="wild honey")) == RIGHT
    assert asyncio.run(streamed()) == RIGHT


def test_an_ingestion_pipelines_nodes_are_learned(
    documents: list[Document], training: dict[str, Any], tmp_path: Path
) -> None:
    for document in documents:
        (tmp_path / f"{document.doc_id}.txt").write_text(document.text)
    read = SimpleDirectoryReader(str(tmp_path)).load_data()
    splitter = SentenceSplitter(chunk_size=40, chunk_overlap=10)
    nodes = IngestionPipeline(transformations=[splitter]).run(documents=read)
    index = MLPMemIndex(nodes, out=tmp_path / "memory", **training)
    assert set(index.ref_doc_info) == {document.doc_id for document in read}
    texts = {document.doc_id: document.text for document in read}
    sources = index.as_query_engine().query("In Lake Orsa, who").source_nodes
    assert sources
    assert all(s.node.get_content() in texts[str(s.node.ref_doc_id)] for s in sources)
