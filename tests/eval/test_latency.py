"""Where the time goes, told from LlamaIndex's events: known delays come out as they went in."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.instrumentation import get_dispatcher

from mlpmem_eval.answerers import ChatAnswerer, QueryEngineAnswerer
from mlpmem_eval.latency import Timing, recording

from .fakes import FakeClock, SlowLLM, letter_index

TEXTS = ("aaa apples and apes", "zzz zebras doze")


def arm(clock: FakeClock, *, streaming: bool = True) -> QueryEngineAnswerer:
    llm = SlowLLM(clock, lambda _: "one two three", prefill=0.5, decode=0.25)
    index = letter_index(clock, 0.125, TEXTS)
    engine = index.as_query_engine(llm=llm, streaming=streaming, similarity_top_k=1)
    return QueryEngineAnswerer("rag", engine)


def test_a_streamed_answer_is_split_into_its_parts(clock: FakeClock) -> None:
    rag = arm(clock)
    with recording(clock) as recorder:
        reply, timing = recorder.timed(lambda: rag.answer("zebras?"))
    assert (reply.text, reply.documents) == ("one two three", ("d1",))
    assert timing.retrieval == timing.embedding == pytest.approx(0.125)
    assert timing.prefill == pytest.approx(0.5)
    assert timing.decode == pytest.approx(0.5)  # two more words
    assert timing.ttft == pytest.approx(0.625)
    assert timing.total == pytest.approx(1.125)
    assert timing.other == pytest.approx(0.0)
    assert timing.llm_calls == 1
    assert timing.completion_tokens == 3
    assert timing.prompt_tokens is not None
    assert timing.prompt_tokens > 10


def test_without_a_stream_everything_comes_at_the_end(clock: FakeClock) -> None:
    rag = arm(clock, streaming=False)
    with recording(clock) as recorder:
        _, timing = recorder.timed(lambda: rag.answer("zebras?"))
    assert timing.prefill == pytest.approx(1.0)
    assert timing.decode == 0.0
    assert timing.ttft == timing.total == pytest.approx(1.125)


def test_a_chat_that_completes_inside_counts_once(clock: FakeClock) -> None:
    llm = SlowLLM(clock, lambda _: "one two", prefill=0.5, decode=0.25)
    with recording(clock) as recorder:
        reply, timing = recorder.timed(lambda: ChatAnswerer("llm", llm).answer("Who?"))
    assert reply.text == "one two"
    assert timing.llm_calls == 1
    assert (timing.prefill, timing.decode) == pytest.approx((0.5, 0.25))


def test_several_calls_are_added_up(clock: FakeClock) -> None:
    llm = SlowLLM(clock, lambda _: "one two", prefill=0.5, decode=0.25)

    def twice() -> str:
        clock.sleep(1.0)
        return f"{llm.complete('first')} {llm.complete('second')}"

    with recording(clock) as recorder:
        _, timing = recorder.timed(twice)
    assert timing.llm_calls == 2
    assert timing.prefill == pytest.approx(1.5)
    assert timing.other == pytest.approx(1.0)
    assert timing.total == pytest.approx(2.5)
    assert timing.completion_tokens == 4


def test_on_a_real_clock_the_parts_add_up_within_two_percent() -> None:
    class RealSleep(FakeClock):
        def sleep(self, seconds: float) -> None:
            time.sleep(seconds)

    rag = arm(RealSleep())
    rag.answer("warm up")
    with recording() as recorder:
        _, timing = recorder.timed(lambda: rag.answer("zebras?"))
    parts = timing.retrieval + timing.prefill + timing.decode
    assert parts == pytest.approx(timing.total, rel=0.02)
    assert timing.decode == pytest.approx(0.5, rel=0.1)


def test_answers_at_the_same_time_are_kept_apart() -> None:
    barrier = threading.Barrier(2)

    def says(_: str) -> str:
        barrier.wait(5)
        return "word " * 3

    def ask(clock: FakeClock) -> Timing:
        llm = SlowLLM(clock, says, prefill=0.5, decode=0.25)
        return recorder.timed(
            lambda: list(llm.stream_chat([ChatMessage(content="Who?")])), alone=False
        )[1]

    with recording(FakeClock()) as recorder, ThreadPoolExecutor(2) as pool:
        timings = list(pool.map(ask, [FakeClock(), FakeClock()]))
    assert [t.llm_calls for t in timings] == [1, 1]
    assert [t.completion_tokens for t in timings] == [3, 3]


def test_the_recorder_leaves_nothing_behind(clock: FakeClock) -> None:
    before = list(get_dispatcher().event_handlers)
    with pytest.raises(RuntimeError), recording(clock):
        raise RuntimeError
    assert get_dispatcher().event_handlers == before
