"""Turns: in order, one at a time, stopped when nobody listens, and no thread left behind."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from contextlib import aclosing

import pytest

from mlpmem_rag.turns import Turns, Work


def counting(upto: int, log: list[str] | None = None, name: str = "") -> Work:
    def work(give: Callable[[str], None], stop: threading.Event) -> None:
        for number in range(upto):
            if stop.is_set():
                break
            if log is not None:
                log.append(name)
            give(str(number))
            time.sleep(0.001)

    return work


def failing(give: Callable[[str], None], stop: threading.Event) -> None:
    give("one")
    raise RuntimeError("the device is gone")


def waiting(give: Callable[[str], None], stop: threading.Event) -> None:
    """Never ends by itself."""
    give("begun")
    assert stop.wait(10)


async def listed(turns: Turns, work: Work) -> list[str]:
    return [piece async for piece in turns.apieces(work)]


def test_pieces_come_in_order() -> None:
    turns = Turns()
    assert list(turns.pieces(counting(5))) == list("01234")
    assert asyncio.run(listed(turns, counting(5))) == list("01234")


def test_works_do_not_mix_and_keep_their_order() -> None:
    turns, log = Turns(), list[str]()

    async def together() -> list[list[str]]:
        works = [counting(3, log, name) for name in "abcd"]
        return await asyncio.gather(*(listed(turns, work) for work in works))

    assert asyncio.run(together()) == [list("012")] * 4
    assert "".join(log) == "aaabbbcccddd"


def test_an_error_reaches_the_reader_after_what_came_before_it() -> None:
    turns = Turns()
    seen: list[str] = []
    with pytest.raises(RuntimeError, match="the device is gone"):
        seen.extend(turns.pieces(failing))
    with pytest.raises(RuntimeError, match="the device is gone"):
        asyncio.run(listed(turns, failing))
    assert seen == ["one"]
    assert list(turns.pieces(counting(1))) == ["0"]


def test_a_reader_who_leaves_stops_the_work() -> None:
    turns = Turns()
    pieces = turns.pieces(waiting)
    assert next(pieces) == "begun"
    del pieces
    assert list(turns.pieces(counting(1))) == ["0"]  # would wait forever

    async def leave() -> None:
        async with aclosing(turns.apieces(waiting)) as pieces:
            async for _ in pieces:
                break

    asyncio.run(leave())
    assert list(turns.pieces(counting(1))) == ["0"]


def test_a_cancelled_task_stops_its_work() -> None:
    turns = Turns()

    async def cancel() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await listed(turns, waiting)

    asyncio.run(cancel())
    assert list(turns.pieces(counting(1))) == ["0"]


def test_who_leaves_before_his_turn_is_never_served() -> None:
    turns, log = Turns(), list[str]()
    first = turns.pieces(waiting)
    next(first)

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await listed(turns, counting(1, log, "never"))

    asyncio.run(give_up())
    first.close()
    assert list(turns.pieces(counting(1))) == ["0"]
    assert not log


def test_a_loop_that_was_closed_stops_the_work() -> None:
    turns, ended = Turns(), threading.Event()

    def work(give: Callable[[str], None], stop: threading.Event) -> None:
        try:
            for _ in range(10_000):
                give("x")
                time.sleep(0.001)
        finally:
            ended.set()

    loop = asyncio.new_event_loop()
    pieces = turns.apieces(work)
    loop.run_until_complete(anext(pieces))
    loop.close()
    assert ended.wait(5)
    del pieces
    gc.collect()


def test_no_thread_stays_when_nobody_needs_it() -> None:
    before = set(threading.enumerate())
    turns = Turns()
    assert list(turns.pieces(counting(1))) == ["0"]
    (thread,) = set(threading.enumerate()) - before
    del turns
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()
