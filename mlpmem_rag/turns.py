"""Work done in turns: one thing at a time on a model, in the order it was asked for.

Generations that run side by side would share the same cores and each be slower for it; those that
can be computed as one batch may share a turn. Whoever asked reads the pieces in a loop of his own,
plain or of asyncio, which is never blocked.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar
from weakref import WeakSet

from mlpmem_rag.errors import ClosedError
from mlpmem_rag.threads import release_threads

T = TypeVar("T")
Work = Callable[[Callable[[str], None], threading.Event], None]
"""Called with a function that takes each piece, and an event that says to stop."""


@dataclass(frozen=True)
class _End:
    error: BaseException | None = None


class Listener:
    """Whoever waits for the pieces of one task.

    Attributes:
        stop: set when nobody listens any more.
    """

    def __init__(self, tell: Callable[[str | _End], None]) -> None:
        self.stop = threading.Event()
        self._tell = tell
        self._ended = False

    def give(self, piece: str) -> None:
        """The next piece."""
        self._send(piece)

    def end(self, error: BaseException | None = None) -> None:
        """There are no more; only the first call counts."""
        if not self._ended:
            self._ended = True
            self._send(_End(error))

    def _send(self, message: str | _End) -> None:
        try:
            self._tell(message)
        except RuntimeError:  # its event loop was closed with the stream unread
            self.stop.set()


@dataclass(frozen=True)
class Task(Generic[T]):
    """What waits for its turn.

    Attributes:
        run: does the items of one turn, each for its listener. It may end a listener early.
        item: what `run` is given of this task.
        kind: tasks of an equal kind can share a turn; None: this one has a turn to itself.
        most: tasks that may share one.
    """

    run: Callable[[Sequence[T], Sequence[Listener]], None]
    item: T
    kind: Hashable | None = None
    most: int = 1


def alone(work: Work) -> Task[None]:
    """Work that has a turn to itself."""

    def run(_: Sequence[None], listeners: Sequence[Listener]) -> None:
        work(listeners[0].give, listeners[0].stop)

    return Task(run, None)


class Turns:
    """One thread; it ends when nobody holds this object any more."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mlpmem-generate")
        self._waiting: deque[_Job] = deque()
        self._listeners: WeakSet[Listener] = WeakSet()
        self._closed = False
        self._lock = threading.Lock()

    def close(self) -> None:
        """Stop what runs and what waits, refuse what comes, and wait for the thread's end.

        Whoever listens gets a `ClosedError`.
        """
        with self._lock:
            self._closed = True
            listeners = list(self._listeners)
        for listener in listeners:
            listener.stop.set()
            listener.end(_closed())
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _job(self, task: Task[Any], tell: Callable[[str | _End], None]) -> _Job:
        with self._lock:  # after `close` nobody must wait for an end that never comes
            if self._closed:
                raise _closed()
            listener = Listener(tell)
            self._listeners.add(listener)
            return _Job(self._pool, self._waiting, task, listener)

    def pieces(self, task: Task[Any]) -> Generator[str, None, None]:
        """What the task gives out. An error inside it is raised here; leaving early stops it."""
        inbox: queue.SimpleQueue[str | _End] = queue.SimpleQueue()
        job = self._job(task, inbox.put)
        try:
            while not isinstance(piece := inbox.get(), _End):
                yield piece
        finally:
            job.cancel()
        error, piece = piece.error, ""
        if error is not None:
            try:
                raise error
            finally:
                del error  # a frame that holds its own error keeps all that had failed in memory

    async def apieces(self, task: Task[Any]) -> AsyncGenerator[str, None]:
        """Like `pieces`, for asyncio."""
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[str | _End] = asyncio.Queue()

        def tell(piece: str | _End) -> None:
            loop.call_soon_threadsafe(inbox.put_nowait, piece)

        job = self._job(task, tell)
        try:
            while not isinstance(piece := await inbox.get(), _End):
                yield piece
        finally:
            job.cancel()
        error, piece = piece.error, ""
        if error is not None:
            try:
                raise error
            finally:
                del error  # a frame that holds its own error keeps all that had failed in memory


def _closed() -> ClosedError:
    return ClosedError("this memory was closed; load it again to ask it")


class _Job:
    """A task that waits for its turn, runs, or is over.

    `waiting` needs no lock: one thread alone takes jobs out to run them, and single operations on
    a deque are atomic.
    """

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        waiting: deque[_Job],
        task: Task[Any],
        listener: Listener,
    ) -> None:
        self.task = task
        self.listener = listener
        self._waiting = waiting
        release_threads()  # whoever asks waits from here on
        waiting.append(self)
        self._turn: Future[None] = pool.submit(self._run)

    def cancel(self) -> None:
        """Take the task out of the queue, or have it stop soon. Does not wait.

        Nothing may wait here: the last reference to a stream can be dropped in any thread, the
        working one among them.
        """
        self.listener.stop.set()
        self._turn.cancel()
        self._leave()

    def _run(self) -> None:
        if not self._leave():
            return  # done in the turn of an earlier one
        jobs = [self, *self._companions()]
        try:
            self.task.run([job.task.item for job in jobs], [job.listener for job in jobs])
        except BaseException as error:
            _end(jobs, error)
        else:
            _end(jobs)

    def _companions(self) -> list[_Job]:
        """Those who wait, too, and can share this turn; they wait no longer."""
        task = self.task
        if task.kind is None:
            return []
        alike = (job for job in list(self._waiting) if job.task.kind == task.kind)
        return [job for job in islice(alike, task.most - 1) if job._leave()]

    def _leave(self) -> bool:
        """Leave the queue; whether this job was still in it."""
        try:
            self._waiting.remove(self)
        except ValueError:
            return False
        return True


def _end(jobs: Sequence[_Job], error: BaseException | None = None) -> None:
    release_threads()  # until the next turn, others compute
    for job in jobs:
        job.listener.end(error)
