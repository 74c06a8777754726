"""MLPMemLLM under load, interrupted, and watched."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import pytest
import torch
from llama_index.core.bridge.pydantic import Field
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.llms import ChatMessage
from llama_index_instrumentation import get_dispatcher

from benchmarks.serving import Ask, Loop, all_at_once, all_watched
from llama_index.indices.managed.mlpmem import MLPMemIndex
from llama_index.llms.mlpmem import MLPMemLLM
from mlpmem_rag.memory_model import MemoryModel

OnForward = Callable[[Callable[[int], object]], None]
QUESTIONS = [f"What was found in place {n}, and by whom{'?' * (n % 5)}" for n in range(32)]
CALLS = ("complete", "chat", "stream_complete", "stream_chat")


@pytest.fixture(params=[1, 4])
def llm(chat_model: MemoryModel, request: pytest.FixtureRequest) -> MLPMemLLM:
    """One that answers alone, and one that answers up to four together."""
    return MLPMemLLM.from_model(chat_model, max_new_tokens=12, batch_size=request.param)


# Many at once.


def test_32_requests_at_once_get_the_answers_they_get_alone(llm: MLPMemLLM) -> None:
    alone = [llm.complete(question).text for question in QUESTIONS]
    assert len(set(alone)) > 16
    assert all_at_once(llm.acomplete, QUESTIONS) == alone


@pytest.mark.parametrize(
    ("dtype", "own", "expected"),
    [
        (torch.float32, None, 8),
        (torch.float32, 1, 1),
        (torch.bfloat16, None, 1),
        (torch.bfloat16, 4, 4),
    ],
)
def test_in_float32_those_who_wait_are_answered_together(
    chat_model: MemoryModel,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    own: int | None,
    expected: int,
) -> None:
    """How many sequences the base model reads at once, at most."""
    llm = MLPMemLLM.from_model(chat_model, max_new_tokens=12, batch_size=own)
    expected_texts = [llm.complete(question).text for question in QUESTIONS[:12]]
    widths: list[int] = []

    def note(_: object, args: tuple[torch.Tensor, ...]) -> None:
        widths.append(len(args[0]))

    # The tiny model computes in float32; only what it says of itself is changed.
    monkeypatch.setattr(type(chat_model.model), "dtype", property(lambda _: dtype))
    handle = chat_model.model.base.get_input_embeddings().register_forward_pre_hook(note)
    turns = chat_model._turns

    def until_all_wait() -> None:
        end = time.monotonic() + 30
        while len(turns._waiting) < 12 and time.monotonic() < end:
            time.sleep(0.001)

    turns._pool.submit(until_all_wait)
    try:
        texts = all_at_once(llm.acomplete, QUESTIONS[:12])
    finally:
        handle.remove()
    assert texts == expected_texts
    assert max(widths) == expected


def longest_wait(ask: Ask, questions: list[str]) -> float:
    """Of the event loop while all are answered; in seconds."""
    loop = Loop()
    all_watched(ask, questions, loop)
    return max(loop.waits)


def check_waits(ask: Ask, plain: Callable[[str], object], questions: list[str]) -> None:
    """The longest wait is under 50 ms, or not beyond that beside plain calls in threads.

    A loop has nothing to do with those: what it waits then is this machine's other load, which
    interrupts now the one and now the other, hence the factor and the tries.
    """

    async def in_a_thread(question: str) -> object:
        return await asyncio.to_thread(plain, question)

    waits = []
    for _ in range(5):
        beside = longest_wait(in_a_thread, questions)
        waits.append((longest_wait(ask, questions), beside))
        if waits[-1][0] < max(0.05, 2 * beside):
            return
    pytest.fail(f"the event loop had to wait, here and beside threads: {waits}")


def test_a_call_that_blocks_the_event_loop_is_noticed() -> None:
    async def blocking(_: str) -> None:
        time.sleep(0.1)

    with pytest.raises(pytest.fail.Exception, match="the event loop had to wait"):
        check_waits(blocking, lambda _: None, QUESTIONS[:2])


def test_32_requests_at_once_leave_the_event_loop_free(llm: MLPMemLLM) -> None:
    check_waits(llm.acomplete, llm.complete, QUESTIONS)


def test_answers_with_sources_leave_the_event_loop_free(
    index: MLPMemIndex,
    before_forward: Callable[[torch.nn.Module, Callable[[int], object]], None],
) -> None:
    engine = index.as_query_engine(llm=index.as_llm(max_new_tokens=4), attribution="eager")
    threads: set[threading.Thread] = set()

    def slowly(_: int) -> None:
        threads.add(threading.current_thread())
        time.sleep(0.1)

    before_forward(index.llm.model.model.base, slowly)
    check_waits(engine.aquery, engine.query, QUESTIONS[:4])
    assert threads
    assert threading.main_thread() not in threads
    assert engine.query(QUESTIONS[0]).source_nodes


def test_32_streams_at_once_do_not_mix(llm: MLPMemLLM) -> None:
    alone = [llm.complete(question).text for question in QUESTIONS]

    async def streamed(question: str) -> str:
        return "".join([r.delta or "" async for r in await llm.astream_complete(question)])

    async def together() -> list[str]:
        return await asyncio.gather(*map(streamed, QUESTIONS))

    assert asyncio.run(together()) == alone


def test_8_threads_get_the_answers_they_get_alone(llm: MLPMemLLM) -> None:
    def ask(number: int) -> str:
        lambda_ = number % 3 / 2
        if number % 2:
            return str(llm.complete(QUESTIONS[number], lambda_=lambda_))
        return str(list(llm.stream_complete(QUESTIONS[number], lambda_=lambda_))[-1])

    alone = [ask(number) for number in range(len(QUESTIONS))]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, range(len(QUESTIONS)))) == alone


def test_a_model_has_one_thread(llm: MLPMemLLM) -> None:
    llm.complete(QUESTIONS[0])
    before = set(threading.enumerate())

    async def together() -> None:
        await asyncio.gather(*(llm.acomplete(question) for question in QUESTIONS[:8]))

    asyncio.run(together())
    list(llm.stream_complete(QUESTIONS[0]))
    assert not set(threading.enumerate()) - before


# What goes wrong.


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_error_inside_reaches_the_one_who_asked(
    llm: MLPMemLLM, on_forward: OnForward, name: str, asynchronous: bool
) -> None:
    def fail(number: int) -> None:
        if number == 6:
            raise RuntimeError("the device is gone")

    on_forward(fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        ask(llm, name, asynchronous)
    assert llm.complete(QUESTIONS[0]).text


def ask(llm: MLPMemLLM, name: str, asynchronous: bool = False) -> Any:  # noqa: ANN401
    """One of the eight calls; a stream is read to its end."""
    given: Any = [ChatMessage(QUESTIONS[0])] if name.endswith("chat") else QUESTIONS[0]
    if not asynchronous:
        response = getattr(llm, name)(given)
        return list(response)[-1] if name.startswith("stream") else response

    async def wait() -> Any:  # noqa: ANN401
        response = await getattr(llm, f"a{name}")(given)
        return [r async for r in response][-1] if name.startswith("stream") else response

    return asyncio.run(wait())


@pytest.mark.parametrize("name", ["stream_complete", "stream_chat"])
def test_a_stream_that_is_left_stops(llm: MLPMemLLM, passes: list[int], name: str) -> None:
    given: Any = [ChatMessage(QUESTIONS[0])] if name.endswith("chat") else QUESTIONS[0]
    stream = getattr(llm, name)(given, max_tokens=40)
    next(stream)
    del stream
    llm.complete(QUESTIONS[0], max_tokens=1)  # served when the other has ended
    assert len(passes) < 30


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("name", ["stream_complete", "stream_chat"])
def test_an_async_stream_that_is_left_stops(
    llm: MLPMemLLM, passes: list[int], name: str, closed: bool
) -> None:
    given: Any = [ChatMessage(QUESTIONS[0])] if name.endswith("chat") else QUESTIONS[0]

    async def leave() -> None:
        stream = await getattr(llm, f"a{name}")(given, max_tokens=40)
        if closed:
            async with aclosing(stream):
                await anext(stream)
        else:
            async for _ in stream:
                break
            del stream
            gc.collect()
        await llm.acomplete(QUESTIONS[0], max_tokens=1)
        assert len(passes) < 30

    asyncio.run(leave())


def test_a_request_that_is_cancelled_stops(llm: MLPMemLLM, passes: list[int]) -> None:
    async def cancel() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await llm.acomplete(QUESTIONS[0], max_tokens=40, stop=["never"])
        await llm.acomplete(QUESTIONS[0], max_tokens=1)
        assert len(passes) < 40

    asyncio.run(cancel())


# Who watches.


class Events(BaseEventHandler):
    """Collects events."""

    seen: list[BaseEvent] = Field(default_factory=list)

    def handle(self, event: BaseEvent, **_: Any) -> None:  # noqa: ANN401
        self.seen.append(event)


@pytest.fixture
def watched() -> Iterator[tuple[Events, SimpleSpanHandler]]:
    """The root dispatcher's events and spans."""
    root, events, spans = get_dispatcher(), Events(), SimpleSpanHandler()
    handlers = root.event_handlers, root.span_handlers
    root.event_handlers, root.span_handlers = [events], [spans]
    yield events, spans
    root.event_handlers, root.span_handlers = handlers


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_call_is_one_span_with_a_beginning_and_an_end(
    llm: MLPMemLLM, watched: tuple[Events, SimpleSpanHandler], name: str, asynchronous: bool
) -> None:
    response = ask(llm, name, asynchronous)
    events, spans = watched
    kind = "Chat" if name.endswith("chat") else "Completion"
    names = [type(event).__name__ for event in events.seen]
    assert names[0] == f"LLM{kind}StartEvent"
    assert names[-1] == f"LLM{kind}EndEvent"
    assert set(names[1:-1]) == ({f"LLM{kind}InProgressEvent"} if "stream" in name else set())
    end: Any = events.seen[-1]
    assert end.response.raw == response.raw
    assert not spans.open_spans
    (span,) = spans.completed_spans
    assert span.id_.startswith(f"MLPMemLLM.{'a' if asynchronous else ''}{name}-")
    assert {event.span_id for event in events.seen} == {span.id_}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_tokens_are_counted_once_and_right(llm: MLPMemLLM, name: str, asynchronous: bool) -> None:
    counter = TokenCountingHandler(tokenizer=str.split)
    watching = llm.model_copy(update={"callback_manager": CallbackManager([counter])})
    ask(watching, name, asynchronous)
    answer = llm.model.answer(QUESTIONS[0], max_new_tokens=12)
    assert counter.prompt_llm_token_count == answer.prompt_tokens
    assert counter.completion_llm_token_count == answer.new_tokens
    assert len(counter.llm_token_counts) == 1
