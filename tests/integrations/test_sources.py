"""Sources of answers: what was really found, and what looking for them costs."""

from __future__ import annotations

import asyncio
import copy
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from llama_index.core import Document, PromptTemplate
from llama_index.core.agent.workflow import ToolCallResult
from llama_index.core.base.response.schema import Response
from llama_index.core.bridge.pydantic import BaseModel, TypeAdapter
from llama_index.core.instrumentation.events.query import QueryEndEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.tools import ToolOutput

from llama_index.indices.managed.mlpmem import MemoryFirstQueryEngine, MLPMemIndex
from llama_index.indices.managed.mlpmem.attribution import LABEL, SIMILAR, TAUGHT, TRACED
from llama_index.indices.managed.mlpmem.lazy import LazyNodes
from mlpmem_rag.backbone import Backbone
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.prompts import answer_ids
from mlpmem_rag.provenance import Provenance

from .fakes import Script

QUESTION = "Who found wild honey in the old mill?"
RIGHT = "Ines Maro"
SURE = "Did Ines Maro find a map of the tunnels?"
ASKED = [f"{start}{QUESTION}" for start in ("", "So: ", "Tell me. ")] + [SURE]


class Find(BaseModel):
    """Somebody who found something."""

    who: str
    things: list[str]
    year: int | None


def watched(patch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:  # noqa: ANN401
    """Grows with the arguments of each call."""
    calls: list[Any] = []
    method = getattr(owner, name)

    def noting(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        calls.append(args)
        return method(*args, **kwargs)

    patch.setattr(owner, name, noting)
    return calls


def saying(index: MLPMemIndex, *texts: str, **fields: Any) -> dict[str, Any]:  # noqa: ANN401
    """An argument of `as_query_engine` that has the memory say texts, one after the other."""
    script = Script(index.llm.model.tokenizer, *texts)
    return {"llm": index.as_llm(max_new_tokens=60, logits_processor=script, **fields)}


# Lazy sources are a list.


def test_lazy_sources_are_used_like_a_list(
    index: MLPMemIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = watched(monkeypatch, MemoryModel, "origins")
    response = index.as_query_engine(attribution="lazy").query(QUESTION)
    sources, other = response.source_nodes, [NodeWithScore(node=Document(text="Another."))]
    assert "not looked for yet" in repr(response)
    assert not looked
    found = list(sources)
    assert len(found) == 1
    assert repr(sources) == repr(found)
    assert sources == found == copy.deepcopy(sources)
    assert sources != other
    assert sources + other == [*found, *other]
    assert other + sources == [*other, *found]
    assert len(looked) == 1


# Answers without text, and objects.


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_a_response_with_lazy_sources_becomes_json(index: MLPMemIndex) -> None:
    """As events that go to a front end, and the outputs of agents' tools, do."""
    question = "Who found wild honey in the old mill?"
    eager = index.as_query_engine(attribution="eager").query(question).source_nodes[0]
    response: Any = index.as_query_engine().query(question)
    assert isinstance(response.source_nodes, LazyNodes)
    output = ToolOutput(content="", tool_name="memory", raw_input={}, raw_output=response)
    result = ToolCallResult(
        tool_name="memory", tool_kwargs={}, tool_id="1", tool_output=output, return_direct=False
    )
    event = QueryEndEvent(query=question, response=response)
    kinds = [
        json.loads(output.model_dump_json())["raw_output"],
        json.loads(result.model_dump_json())["tool_output"]["raw_output"],
        json.loads(TypeAdapter(Response).dump_json(response)),
        json.loads(event.model_dump_json())["response"],
    ]
    for kind in kinds:
        (source,) = kind["source_nodes"]
        assert source["node"]["id_"] == eager.node.node_id
        assert source["score"] == pytest.approx(eager.score)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_answer_without_text_is_not_the_word_none(
    index: MLPMemIndex, monkeypatch: pytest.MonkeyPatch, streaming: bool, asynchronous: bool
) -> None:
    traced = watched(monkeypatch, MemoryModel, "origins")
    index.delete_ref_doc("doc-3")
    engine = index.as_query_engine(
        **saying(index, "", ""), streaming=streaming, attribution="eager"
    )
    first = MemoryFirstQueryEngine(engine, engine, threshold=0.0)

    async def wait() -> tuple[Any, Any]:
        responses: list[Any] = [await engine.aquery(QUESTION), await first.aquery(QUESTION)]
        if not streaming:
            return responses[0], responses[1].response
        whole = await responses[0].get_response()
        return whole, (await responses[1].get_response()).response

    if asynchronous:
        response, text = asyncio.run(wait())
    else:
        responses: list[Any] = [engine.query(QUESTION), first.query(QUESTION)]
        whole = [r.get_response() if streaming else r for r in responses]
        response, text = whole[0], whole[1].response
    assert response.response == text == ""
    assert not traced
    assert response.metadata["mlpmem"]["attribution"] == SIMILAR
    assert {source.node.metadata[LABEL] for source in response.source_nodes} == {SIMILAR}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_of_an_object_the_values_are_traced_and_the_figures_told(
    index: MLPMemIndex, asynchronous: bool
) -> None:
    written = '{"who": "Ines Maro", "things": ["wild honey"], "year": null}'
    engine = index.as_query_engine(**saying(index, written), output_cls=Find)
    response: Any = asyncio.run(engine.aquery(QUESTION)) if asynchronous else engine.query(QUESTION)
    assert response.response == Find(who="Ines Maro", things=["wild honey"], year=None)
    details = response.metadata["mlpmem"]
    tokens = len(index.llm.model.tokenizer(written, add_special_tokens=False)["input_ids"])
    assert details["usage"]["completion_tokens"] in (tokens, tokens + 1)
    assert 0 < details["ttft_seconds"] <= details["seconds"]
    assert details["confidence"] is None
    assert details["attribution"] == TRACED
    taught = [row["token"] for s in response.source_nodes for row in s.node.metadata[TAUGHT]]
    assert taught
    assert not {'"', "{", "}", ":"} & set("".join(taught))


def test_objects_made_at_once_have_figures_of_their_own(index: MLPMemIndex) -> None:
    texts = [
        '{"who": "Ines", "things": [], "year": 1}',
        '{"who": "I", "things": ["a", "b"], "year": 1}',
    ]
    engines = [index.as_query_engine(**saying(index, t), output_cls=Find) for t in texts]

    async def together() -> list[Any]:
        return await asyncio.gather(*(engine.aquery(QUESTION) for engine in engines))

    told = [response.metadata["mlpmem"]["usage"] for response in asyncio.run(together())]
    alone = [
        index.as_query_engine(**saying(index, t), output_cls=Find).query(QUESTION) for t in texts
    ]
    assert told == [(response.metadata or {})["mlpmem"]["usage"] for response in alone]
    assert told[0] != told[1]


def test_what_the_model_had_read_is_traced_with(
    index: MLPMemIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = index.as_query_engine(
        llm=index.as_llm(max_new_tokens=16, system_prompt="Answer in few words."),
        simple_template=PromptTemplate("Please tell me: {query_str}"),
        attribution="eager",
    )
    seen = watched(monkeypatch, Backbone, "hidden")
    response = engine.query(QUESTION)
    details = (response.metadata or {})["mlpmem"]
    answer = answer_ids(index.llm.model.tokenizer, str(response))[:-1]
    lengths = [batch.shape[1] for _, batch, _ in seen]
    assert details["usage"]["prompt_tokens"] + len(answer) in lengths


# Postprocessors, and many at once.


class Waiting(BaseNodePostprocessor):
    """Has work of its own for the event loop."""

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return nodes

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        await asyncio.sleep(0)
        return [NodeWithScore(node=item.node, score=-1.0) for item in nodes]


@pytest.mark.parametrize("streaming", [False, True])
def test_asynchronous_postprocessors_are_waited_for(index: MLPMemIndex, streaming: bool) -> None:
    engine = index.as_query_engine(
        attribution="eager", streaming=streaming, node_postprocessors=[Waiting()]
    )

    async def ask() -> Any:  # noqa: ANN401
        response: Any = await engine.aquery(QUESTION)
        if streaming:
            await response.get_response()
        return response

    sources = asyncio.run(ask()).source_nodes
    assert [(s.node.ref_doc_id, s.score) for s in sources] == [("doc-10", -1.0)]


def test_many_at_once_get_the_sources_they_get_alone(index: MLPMemIndex) -> None:
    index.update_ref_doc(Document(text="In Lake Orsa, nobody found anything.", doc_id="doc-7"))
    engine = index.as_query_engine(attribution="eager")
    asked = ASKED * 4

    def told(response: Any) -> Any:  # noqa: ANN401
        sources = [(s.node.node_id, s.score) for s in response.source_nodes]
        return str(response), sources, response.metadata["mlpmem"]["touched_stale"]

    alone = [told(engine.query(question)) for question in ASKED] * 4
    assert len({str(found) for found in alone}) > 1

    async def together() -> list[Any]:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(4) as threads:
            odd = [loop.run_in_executor(threads, engine.query, q) for q in asked[1::2]]
            even = [engine.aquery(question) for question in asked[::2]]
            return [told(response) for response in await asyncio.gather(*even, *odd)]

    assert asyncio.run(together()) == alone[::2] + alone[1::2]


# What it costs.


def test_rows_are_opened_when_they_are_needed_and_once(
    index: MLPMemIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = watched(monkeypatch, Provenance, "open")
    index.as_query_engine(attribution="none").query(QUESTION)
    index.as_retriever().retrieve(QUESTION)
    assert not opened
    for engine in (index.as_query_engine(), index.as_query_engine(attribution="eager")):
        assert engine.query(QUESTION).source_nodes
    index.as_chat_engine().chat(QUESTION)
    assert len(opened) == 1


def test_only_new_nodes_are_parsed_and_encoded(
    index: MLPMemIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (
        f"In the tower, nobody found a {what}." for what in ("bell", "bat", "key")
    )
    parsed = watched(monkeypatch, SimpleDocumentStore, "get_node")
    encoded = watched(monkeypatch, type(index.llm.model.encoder), "encode")
    retriever = index.as_retriever(similarity_top_k=1)

    def found(text: str) -> str:
        (source,) = retriever.retrieve(text)
        return str(source.node.get_content(metadata_mode=MetadataMode.NONE))

    index.insert(Document(text=first, doc_id="new-1"))
    assert found(first) == first
    assert len(parsed) == 17
    index.delete_ref_doc("doc-3", delete_from_docstore=True)
    del parsed[:], encoded[:]
    index.insert(Document(text=second, doc_id="new-2"))
    assert (found(second), found(first)) == (second, first)
    assert len(parsed) == 1
    assert [batch for _, batch in encoded] == [[second], [second], [first]]
    index.update_ref_doc(Document(text=third, doc_id="new-2"))
    assert found(third) == third


def test_a_node_that_changes_under_its_id_is_read_again(index: MLPMemIndex) -> None:
    node = index.as_retriever(similarity_top_k=1).retrieve(QUESTION)[0].node
    name = node.node_id
    stored = index.docstore.get_node(name).model_copy(deep=True)
    stored.set_content("A zebra was seen in the old mill.")
    index.docstore.add_documents([stored], allow_update=True)
    (found,) = index.as_retriever(similarity_top_k=1).retrieve("A zebra was seen in the old mill.")
    assert (found.node.node_id, found.node.get_content()) == (name, stored.get_content())
