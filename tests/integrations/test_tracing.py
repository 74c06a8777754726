"""What OpenInference and token counters see of calls; and LlamaIndex's minimum tests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from llama_index.core import Settings
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.indices.base import BaseIndex
from llama_index.core.llms import ChatMessage
from llama_index.core.response_synthesizers import BaseSynthesizer
from openinference.instrumentation.llama_index import LlamaIndexInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from llama_index.indices.managed.mlpmem import (
    MemoryFirstQueryEngine,
    MemoryQueryEngine,
    MLPMemIndex,
)
from llama_index.indices.managed.mlpmem.attribution import AttributionRetriever
from llama_index.indices.managed.mlpmem.synthesizer import MemorySynthesizer
from llama_index.llms.mlpmem import MLPMemLLM
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.memory_model import MemoryModel

# OpenInference uses old names of pydantic.
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning")

QUESTION = "Who found wild honey in the old mill?"
CALLS = ("complete", "chat", "stream_complete", "stream_chat")
Spans = Callable[[], list[ReadableSpan]]


@pytest.mark.parametrize(
    ("made", "base"),
    [
        (MLPMemLLM, BaseLLM),
        (MLPMemIndex, BaseIndex),
        (MemoryQueryEngine, BaseQueryEngine),
        (MemoryFirstQueryEngine, BaseQueryEngine),
        (AttributionRetriever, BaseRetriever),
        (MemorySynthesizer, BaseSynthesizer),
    ],
)
def test_classes_are_of_llama_indexes_kinds(made: type, base: type) -> None:
    assert base.__name__ in [parent.__name__ for parent in made.__mro__]


@pytest.fixture
def spans() -> Iterator[Spans]:
    """The spans that are finished."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    instrumentor = LlamaIndexInstrumentor()
    instrumentor.instrument(tracer_provider=provider)
    yield lambda: list(exporter.get_finished_spans())
    instrumentor.uninstrument()
    provider.shutdown()


def told(span: ReadableSpan, name: str) -> Any:  # noqa: ANN401
    return (span.attributes or {}).get(name)


def of_kind(spans: list[ReadableSpan], kind: str) -> list[ReadableSpan]:
    return [span for span in spans if told(span, "openinference.span.kind") == kind]


def ask(llm: MLPMemLLM, name: str, asynchronous: bool) -> None:
    """One of the eight calls; a stream is read to its end."""
    given: Any = [ChatMessage(QUESTION)] if name.endswith("chat") else QUESTION

    async def wait() -> None:
        response = await getattr(llm, f"a{name}")(given)
        if name.startswith("stream"):
            async for _ in response:
                pass

    if asynchronous:
        asyncio.run(wait())
    elif name.startswith("stream"):
        list(getattr(llm, name)(given))
    else:
        getattr(llm, name)(given)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_openinference_sees_one_span_a_call_with_its_tokens(
    chat_model: MemoryModel, spans: Spans, name: str, asynchronous: bool
) -> None:
    ask(MLPMemLLM.from_model(chat_model, max_new_tokens=12), name, asynchronous)
    answer = chat_model.answer(QUESTION, max_new_tokens=12)
    (span,) = spans()
    assert span.name == f"MLPMemLLM.{'a' if asynchronous else ''}{name}"
    assert told(span, "openinference.span.kind") == "LLM"
    assert span.status.is_ok
    assert told(span, "llm.model_name") == "mlpmem:tiny-chat"
    assert told(span, "llm.token_count.prompt") == answer.prompt_tokens
    assert told(span, "llm.token_count.completion") == answer.new_tokens
    assert told(span, "llm.token_count.total") == answer.prompt_tokens + answer.new_tokens
    said = told(span, "output.value")
    if name.endswith("chat"):
        said = told(span, "llm.output_messages.0.message.content")
    assert said == answer.text


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_query_is_one_trace_with_one_call(
    index: MLPMemIndex, spans: Spans, streaming: bool, asynchronous: bool
) -> None:
    engine = index.as_query_engine(streaming=streaming, attribution="eager")

    async def wait() -> str:
        response: Any = await engine.aquery(QUESTION)
        if not streaming:
            return str(response)
        return "".join([piece async for piece in response.response_gen])

    text = asyncio.run(wait()) if asynchronous else str(engine.query(QUESTION))
    finished = settled(spans)
    assert text == "Ines Maro"
    assert all(span.status.is_ok for span in finished)
    (call,) = of_kind(finished, "LLM")
    answer = index.llm.model.answer(QUESTION, max_new_tokens=16)
    assert told(call, "llm.token_count.prompt") == answer.prompt_tokens
    assert told(call, "llm.token_count.completion") == answer.new_tokens
    # As with LlamaIndex's own retrievers, what is called and what does the work have one each.
    inner, retrieval = of_kind(finished, "RETRIEVER")
    assert inner.parent is not None
    assert told(retrieval, "retrieval.documents.0.document.id")
    assert len({span.context.trace_id for span in finished if span.context}) == 1
    (root,) = (span for span in finished if span.parent is None)
    assert root.name == f"MemoryQueryEngine.{'a' if asynchronous else ''}query"


def settled(spans: Spans) -> list[ReadableSpan]:
    """All spans; those of streams are ended by a thread of OpenInference's."""
    until = time.monotonic() + 5
    while not any(span.parent is None for span in spans()) and time.monotonic() < until:
        time.sleep(0.01)
    return spans()


def test_openinference_sees_what_went_wrong(chat_model: MemoryModel, spans: Spans) -> None:
    with pytest.raises(ConfigError):
        MLPMemLLM.from_model(chat_model, max_new_tokens=12).complete(" ")
    (span,) = spans()
    assert not span.status.is_ok
    (event,) = span.events
    assert str((event.attributes or {})["exception.message"]).startswith("the question is empty")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_querys_tokens_are_counted_once(index: MLPMemIndex, streaming: bool) -> None:
    counter = TokenCountingHandler(tokenizer=str.split)
    manager = CallbackManager([counter])
    llm = index.as_llm(max_new_tokens=16).model_copy(update={"callback_manager": manager})
    str(index.as_query_engine(llm=llm, streaming=streaming).query(QUESTION))
    answer = index.llm.model.answer(QUESTION, max_new_tokens=16)
    (counted,) = counter.llm_token_counts
    assert counted.prompt_token_count == answer.prompt_tokens
    assert counted.completion_token_count == answer.new_tokens
    assert counter.total_embedding_token_count == 0


@pytest.fixture
def no_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    """LlamaIndex's settings hear nothing yet, and what a test sets is undone after it."""
    monkeypatch.setattr(Settings, "_callback_manager", None)


def counting() -> tuple[TokenCountingHandler, CallbackManager]:
    counter = TokenCountingHandler(tokenizer=str.split)
    return counter, CallbackManager([counter])


@pytest.mark.usefixtures("no_manager")
@pytest.mark.parametrize("given", ["settings", "index", "engine"])
def test_whoever_is_to_hear_hears_the_indexs_calls(index: MLPMemIndex, given: str) -> None:
    counter, manager = counting()
    llm, late = index.as_llm(max_new_tokens=16), None
    if given == "settings":
        Settings.callback_manager = manager  # after the index was made
    elif given == "index":
        index = MLPMemIndex.load(
            index.memory_folder, device="cpu", max_new_tokens=16, callback_manager=manager
        )
        llm = index.as_llm(max_new_tokens=16)
    else:
        late = manager
    answer = index.llm.model.answer(QUESTION, max_new_tokens=16)
    asks: list[Callable[[], Any]] = [
        lambda: index.as_query_engine(callback_manager=late).query(QUESTION),
        lambda: index.as_query_engine(llm=llm, callback_manager=late).query(QUESTION),
        lambda: index.as_chat_engine(callback_manager=late).chat(QUESTION),
        lambda: index.as_chat_engine("simple", llm, callback_manager=late).chat(QUESTION),
    ]
    for number, ask_it in enumerate(asks, start=1):
        assert str(ask_it()) == answer.text
        assert len(counter.llm_token_counts) == number
        assert counter.llm_token_counts[-1].prompt_token_count == answer.prompt_tokens
    assert manager is not index.llm.callback_manager  # nobody's LLM was changed
    assert manager is not llm.callback_manager


@pytest.mark.usefixtures("no_manager")
def test_an_llms_own_handlers_stay_the_only_ones(index: MLPMemIndex) -> None:
    (counter, manager), (other, others) = counting(), counting()
    llm = index.as_llm(max_new_tokens=16, callback_manager=manager)
    index.as_query_engine(llm=llm, callback_manager=others).query(QUESTION)
    assert len(counter.llm_token_counts) == 1
    assert not other.llm_token_counts
    assert llm.callback_manager is manager
