"""What is asked wrongly, left early or goes wrong, at the level of query and chat engines."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import Any

import pytest
import torch
from llama_index.core.chat_engine.types import ChatMode

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
