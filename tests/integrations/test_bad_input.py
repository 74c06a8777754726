"""What is asked wrongly, left early or goes wrong, at the level of query and chat engines."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_index.core import Document, StorageContext
from llama_index.core.chat_engine.types import ChatMode
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    VectorStoreQuery,
    VectorStoreQueryResult,
)

from llama_index.indices.managed.mlpmem import MemoryFirstQueryEngine, MLPMemIndex
from mlpmem_rag.errors import ConfigError

QUESTIONS = [f"{who} found something in place {n}?" for n in range(8) for who in "ABCD"]
OnForward = Callable[[Callable[[int], object]], None]


@pytest.fixture
def on_forward(
    index: MLPMemIndex,
    before_forward: Callable[[torch.nn.Module, Callable[[int], object]], None],
) -> OnForward:
    return partial(before_forward, index.llm.model.model.base)


@pytest.fixture
def threads_stay(index: MLPMemIndex) -> Iterator[None]:
    """No thread is left that was not there, but for the model's own."""
    index.llm.complete("Who?", max_tokens=1)
    before = set(threading.enumerate())
    yield
    gc.collect()
    assert not {t for t in threading.enumerate() if t.is_alive()} - before


# Empty and unknown.


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_question_is_refused_everywhere(index: MLPMemIndex, empty: str) -> None:
    engine, streaming = index.as_query_engine(), index.as_query_engine(streaming=True)
    asks: list[Callable[[], object]] = [
        lambda: streaming.query(empty),
        lambda: asyncio.run(streaming.aquery(empty)),
        lambda: index.as_retriever().retrieve(empty),
        lambda: index.as_chat_engine().chat(empty),
        lambda: index.as_chat_engine(chat_mode=ChatMode.SIMPLE).chat(empty),
        lambda: MemoryFirstQueryEngine(engine, engine).query(empty),
    ]
    for ask in asks:
        with pytest.raises(ConfigError, match="the question is empty"):
            ask()


def test_unknown_arguments_are_refused_everywhere(index: MLPMemIndex) -> None:
    for make in (index.as_query_engine, index.as_chat_engine, index.as_retriever):
        with pytest.raises(ConfigError, match=r"similarity_topk \(not known\); allowed are"):
            make(similarity_topk=3)
    with pytest.raises(ConfigError, match="simple chat does not take attribution"):
        index.as_chat_engine(chat_mode=ChatMode.SIMPLE, attribution="none")
    with pytest.raises(ConfigError, match="system_prompt is for chat_mode='simple'"):
        index.as_chat_engine(system_prompt="Be brief.")
    with pytest.raises(ValueError, match="similarity_topk"):
        MLPMemIndex.load(index.memory_folder, similarity_topk=3)


def test_arguments_that_would_be_lost_are_refused(index: MLPMemIndex) -> None:
    own, folder = index.as_llm(max_new_tokens=2), index.memory_folder
    for make in (MLPMemIndex.load, MLPMemIndex.from_memory):
        with pytest.raises(ConfigError, match="device, max_new_tokens would have no effect beside"):
            make(folder, llm=own, device="cpu", max_new_tokens=3)
        with pytest.raises(ConfigError, match="out, on_progress would have no effect: nothing is"):
            make(folder, out=folder, on_progress=print)
        with pytest.raises(ConfigError, match=r"embed_model \(sources are found with the memory"):
            make(folder, embed_model="local")
    with pytest.raises(ConfigError, match="llm is a str"):
        index.as_query_engine(llm="")


class Elsewhere(BasePydanticVectorStore):
    """Stands for a vector database."""

    stores_text: bool = True

    @property
    def client(self) -> None:
        return None

    def add(self, nodes: Sequence[BaseNode], **_: Any) -> list[str]:  # noqa: ANN401
        raise AssertionError("nothing is to be written")

    def delete(self, ref_doc_id: str, **_: Any) -> None:  # noqa: ANN401
        raise AssertionError("nothing is to be deleted")

    def query(self, query: VectorStoreQuery, **_: Any) -> VectorStoreQueryResult:  # noqa: ANN401
        raise AssertionError("nothing is to be asked")


def test_what_is_for_vectors_is_refused_with_the_reason(
    documents: list[Document], tmp_path: Path
) -> None:
    from_documents = partial(
        MLPMemIndex.from_documents, documents, out=tmp_path / "memory", base_model="none"
    )
    with pytest.raises(ConfigError, match=r"embed_model \(.*own encoder\); use_async \(there is"):
        from_documents(embed_model="local", use_async=True)
    with pytest.raises(ConfigError, match=r"insert_batch_size \(there are no vectors"):
        MLPMemIndex([], insert_batch_size=8)
    with pytest.raises(ConfigError, match=r"trained on text, .*from_documents"):
        MLPMemIndex.from_vector_store(Elsewhere(), embed_model="local")
    context = StorageContext.from_defaults(vector_store=Elsewhere())
    for make in (from_documents, partial(MLPMemIndex, [])):
        with pytest.raises(ConfigError, match="storage_context has a Elsewhere: a memory neither"):
            make(storage_context=context)
    assert not (tmp_path / "memory").exists()


# Many at once.


@pytest.mark.usefixtures("threads_stay")
def test_threads_and_asyncio_at_once_get_the_answers_they_get_alone(index: MLPMemIndex) -> None:
    engine = index.as_query_engine(attribution="none")
    alone = [str(engine.query(question)) for question in QUESTIONS]
    assert len(set(alone)) > 8

    async def together() -> list[str]:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(8) as threads:
            odd = [loop.run_in_executor(threads, engine.query, q) for q in QUESTIONS[1::2]]
            even = [engine.aquery(question) for question in QUESTIONS[::2]]
            answers = await asyncio.gather(*even, *odd)
        return [str(answer) for answer in answers]

    assert asyncio.run(together()) == alone[::2] + alone[1::2]


# Left early.


@pytest.mark.usefixtures("threads_stay")
def test_a_stream_that_is_left_stops(index: MLPMemIndex, passes: list[int]) -> None:
    llm = index.as_llm(max_new_tokens=200, lambda_=0.0)  # which does not come to an end
    engine: Any = index.as_query_engine(llm=llm, streaming=True)
    pieces = engine.query(QUESTIONS[0]).response_gen
    next(pieces)
    del pieces
    gc.collect()
    index.llm.complete("Who?", max_tokens=1)  # served when the other has ended
    assert len(passes) < 100
    passes.clear()

    async def leave() -> None:
        response = await engine.aquery(QUESTIONS[0])
        async with aclosing(response.response_gen) as pieces:
            await anext(pieces)

    asyncio.run(leave())
    index.llm.complete("Who?", max_tokens=1)
    assert len(passes) < 100


@pytest.mark.usefixtures("threads_stay")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_chat_stream_that_is_left_is_written_to_the_history(
    index: MLPMemIndex, asynchronous: bool
) -> None:
    """LlamaIndex writes the history whoever listens, and a stream is closed when it has."""
    llm = index.as_llm(max_new_tokens=40, lambda_=0.0)
    whole = str(index.as_query_engine(llm=llm).query(QUESTIONS[0])).strip()
    chat = index.as_chat_engine(llm=llm)

    async def leave() -> Any:  # noqa: ANN401
        stream = await chat.astream_chat(QUESTIONS[0])
        async with aclosing(stream.async_response_gen()) as pieces:
            await anext(pieces)
        return stream

    if asynchronous:
        stream = asyncio.run(leave())
    else:
        stream = chat.stream_chat(QUESTIONS[0])
        pieces: Any = stream.response_gen
        next(pieces)
        pieces.close()
    assert [message.content for message in chat.chat_history] == [QUESTIONS[0], whole]
    assert stream.source_nodes


# Gone wrong.


@pytest.mark.usefixtures("threads_stay")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_error_inside_reaches_the_one_who_asked(
    index: MLPMemIndex, on_forward: OnForward, streaming: bool, asynchronous: bool
) -> None:
    engine = index.as_query_engine(streaming=streaming)
    expected = str(index.as_query_engine().query(QUESTIONS[0]))

    def fail(number: int) -> None:
        if number == 1:
            raise RuntimeError("the device is gone")

    on_forward(fail)

    async def ask() -> None:
        response: Any = await engine.aquery(QUESTIONS[0])
        if streaming:
            async for _ in response.response_gen:
                pass

    with pytest.raises(RuntimeError, match="the device is gone"):
        asyncio.run(ask()) if asynchronous else str(engine.query(QUESTIONS[0]))
    assert str(index.as_query_engine().query(QUESTIONS[0])) == expected


@pytest.mark.usefixtures("threads_stay")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_error_inside_reaches_the_one_who_listens_to_a_chat(
    index: MLPMemIndex, on_forward: OnForward, asynchronous: bool
) -> None:
    expected = str(index.as_query_engine().query(QUESTIONS[0]))
    chat = index.as_chat_engine()

    def fail(number: int) -> None:
        if number == 1:
            raise RuntimeError("the device is gone")

    on_forward(fail)

    async def listen() -> None:
        stream = await chat.astream_chat(QUESTIONS[0])
        async for _ in stream.async_response_gen():
            pass

    with pytest.raises(RuntimeError, match="the device is gone"):
        asyncio.run(listen()) if asynchronous else list(chat.stream_chat(QUESTIONS[0]).response_gen)
    assert [message.content for message in chat.chat_history] == [QUESTIONS[0]]
    chat.reset()
    assert str(chat.chat(QUESTIONS[0])) == expected
