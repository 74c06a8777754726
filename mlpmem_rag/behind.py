"""Work that a second thread does while the first goes on to the next piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def behind(jobs: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """Results in order; each job runs while the caller's thread makes the next one.

    At most one job waits. What it does should not loop in parallel itself (see `threads.py`).
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        running: Future[Result] | None = None
        for job in jobs:
            if running is not None:
                yield running.result()
            running = thread.submit(job)
        if running is not None:
            yield running.result()
