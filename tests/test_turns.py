"""Turns: in order, one at a time, stopped when nobody listens, and no thread left behind."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, suppress
from typing import Any

import pytest

from mlpmem_rag.turns import Listener, Task, Turns, Work, alone


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


async def listed(turns: Turns, task: Task[Any]) -> list[str]:
    return [piece async for piece in turns.apieces(task)]


def test_pieces_come_in_order() -> None:
    turns = Turns()
    assert list(turns.pieces(alone(counting(5)))) == list("01234")
    assert asyncio.run(listed(turns, alone(counting(5)))) == list("01234")


def test_works_do_not_mix_and_keep_their_order() -> None:
    turns, log = Turns(), list[str]()

    async def together() -> list[list[str]]:
        works = [counting(3, log, name) for name in "abcd"]
        return await asyncio.gather(*(listed(turns, alone(work)) for work in works))

    assert asyncio.run(together()) == [list("012")] * 4
    assert "".join(log) == "aaabbbcccddd"


def test_an_error_reaches_the_reader_after_what_came_before_it() -> None:
    turns = Turns()
    seen: list[str] = []
    with pytest.raises(RuntimeError, match="the device is gone"):
        seen.extend(turns.pieces(alone(failing)))
    with pytest.raises(RuntimeError, match="the device is gone"):
        asyncio.run(listed(turns, alone(failing)))
    assert seen == ["one"]
    assert list(turns.pieces(alone(counting(1)))) == ["0"]


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
def test_an_error_that_is_forgotten_frees_what_had_failed() -> None:
    """At once: on a full device the next request needs the room."""

    class Large:
        pass

    turns, large = Turns(), list[weakref.ref[Large]]()

    def work(give: Callable[[str], None], stop: threading.Event) -> None:
        held = Large()
        large.append(weakref.ref(held))
        raise RuntimeError("out of memory")

    async def forgiving() -> None:
        with suppress(RuntimeError):
            await listed(turns, alone(work))

    with suppress(RuntimeError):
        list(turns.pieces(alone(work)))
    asyncio.run(forgiving())
    assert list(turns.pieces(alone(counting(1)))) == ["0"]  # the thread is done with both
    assert [held() for held in large] == [None, None]


def test_a_reader_who_leaves_stops_the_work() -> None:
    turns = Turns()
    pieces = turns.pieces(alone(waiting))
    assert next(pieces) == "begun"
    del pieces
    assert list(turns.pieces(alone(counting(1)))) == ["0"]  # would wait forever

    async def leave() -> None:
        async with aclosing(turns.apieces(alone(waiting))) as pieces:
            async for _ in pieces:
                break

    asyncio.run(leave())
    assert list(turns.pieces(alone(counting(1)))) == ["0"]


def test_a_cancelled_task_stops_its_work() -> None:
    turns = Turns()

    async def cancel() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await listed(turns, alone(waiting))

    asyncio.run(cancel())
    assert list(turns.pieces(alone(counting(1)))) == ["0"]


def test_who_leaves_before_his_turn_is_never_served() -> None:
    turns, log = Turns(), list[str]()
    first = turns.pieces(alone(waiting))
    next(first)

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await listed(turns, alone(counting(1, log, "never")))

    asyncio.run(give_up())
    first.close()
    assert list(turns.pieces(alone(counting(1)))) == ["0"]
    assert not log


def test_a_loop_that_was_closed_stops_the_work() -> None:
    turns, ended = Turns(), threading.Event()

    def work(give: Callable[[str], None], stop: threading.Event) -> None:
        while not stop.is_set():
            give("x")
            time.sleep(0.001)
        ended.set()

    loop = asyncio.new_event_loop()
    pieces = turns.apieces(alone(work))
    loop.run_until_complete(anext(pieces))
    loop.close()
    assert ended.wait(5)
    del pieces
    gc.collect()


def test_no_thread_stays_when_nobody_needs_it() -> None:
    before = set(threading.enumerate())
    turns = Turns()
    assert list(turns.pieces(alone(counting(1)))) == ["0"]
    (thread,) = set(threading.enumerate()) - before
    del turns
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


# Tasks that share a turn.


class Batches:
    """Gives each item's name to its listener, and notes which items shared a turn."""

    def __init__(self) -> None:
        self.log: list[list[str]] = []

    def task(self, name: str, kind: str | None, most: int = 3) -> Task[str]:
        return Task(self._run, name, kind, most)

    def _run(self, names: Sequence[str], listeners: Sequence[Listener]) -> None:
        self.log.append(list(names))
        for name, listener in zip(names, listeners, strict=True):
            listener.give(name)


def all_after(turns: Turns, tasks: Sequence[Task[str]]) -> list[list[str] | BaseException]:
    """What each task gives or raises, when all of them had to wait for another one."""
    first = turns.pieces(alone(waiting))
    next(first)

    async def together() -> list[list[str] | BaseException]:
        running = [asyncio.create_task(listed(turns, task)) for task in tasks]
        await asyncio.sleep(0)
        first.close()
        return await asyncio.gather(*running, return_exceptions=True)

    return asyncio.run(together())


def test_tasks_of_one_kind_share_turns() -> None:
    turns, batches = Turns(), Batches()
    kinds = {"a": "x", "b": "y", "c": None, "d": "x", "e": None, "f": "x", "g": "x", "h": "y"}
    given = all_after(turns, [batches.task(name, kind) for name, kind in kinds.items()])
    assert given == [[name] for name in kinds]
    assert batches.log == [["a", "d", "f"], ["b", "h"], ["c"], ["e"], ["g"]]


def test_who_left_has_no_place_in_a_shared_turn() -> None:
    turns, batches = Turns(), Batches()
    first = turns.pieces(alone(waiting))
    next(first)

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await listed(turns, batches.task("gone", "x"))

    asyncio.run(give_up())
    first.close()
    assert all_after(turns, [batches.task(name, "x") for name in "ab"]) == [["a"], ["b"]]
    assert batches.log == [["a", "b"]]


def test_an_error_in_a_shared_turn_reaches_all_of_it() -> None:
    turns = Turns()

    def run(names: Sequence[str], listeners: Sequence[Listener]) -> None:
        listeners[0].give(names[0])
        listeners[0].end()
        raise RuntimeError("the device is gone")

    given = all_after(turns, [Task(run, name, "x", 3) for name in "abc"])
    assert [str(result) for result in given] == ["['a']", *["the device is gone"] * 2]
