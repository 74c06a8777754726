"""Work done in turns: one generation at a time on a model, in the order they were asked for.

Generations that run side by side would share the same cores and each be slower for it. Whoever
asked reads the pieces in a loop of his own, plain or of asyncio, which is never blocked.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from mlpmem_rag.threads import release_threads

Work = Callable[[Callable[[str], None], threading.Event], None]
"""Called with a function that takes each piece, and an event that says to stop."""


@dataclass(frozen=True)
class _End:
    error: BaseException | None = None


class Turns:
    """One thread; it ends when nobody holds this object any more."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mlpmem-generate")

    def pieces(self, work: Work) -> Generator[str, None, None]:
        """What the work gives out. An error inside it is raised here; leaving early stops it."""
        inbox: queue.SimpleQueue[str | _End] = queue.SimpleQueue()
        job = _Job(self._pool, work, inbox.put)
        try:
            while not isinstance(piece := inbox.get(), _End):
                yield piece
        finally:
            job.cancel()
        if piece.error is not None:
            raise piece.error

    async def apieces(self, work: Work) -> AsyncGenerator[str, None]:
        """Like `pieces`, for asyncio."""
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[str | _End] = asyncio.Queue()

        def tell(piece: str | _End) -> None:
            # Raises, and so ends the work, when the loop was closed with the stream unread.
            loop.call_soon_threadsafe(inbox.put_nowait, piece)

        job = _Job(self._pool, work, tell)
        try:
            while not isinstance(piece := await inbox.get(), _End):
                yield piece
        finally:
            job.cancel()
        if piece.error is not None:
            raise piece.error


class _Job:
    """Work that waits for its turn, runs, or is over."""

    def __init__(
        self, pool: ThreadPoolExecutor, work: Work, tell: Callable[[str | _End], None]
    ) -> None:
        self._stop = threading.Event()
        release_threads()  # whoever asks waits from here on
        self._future: Future[None] = pool.submit(self._run, work, tell)

    def cancel(self) -> None:
        """Take the work out of the queue, or have it stop soon. Does not wait.

        Nothing may wait here: the last reference to a stream can be dropped in any thread, the
        working one among them.
        """
        self._stop.set()
        self._future.cancel()

    def _run(self, work: Work, tell: Callable[[str | _End], None]) -> None:
        try:
            work(tell, self._stop)
        except BaseException as error:
            tell(_End(error))
        else:
            tell(_End())
        finally:
            release_threads()  # until the next turn, others compute
