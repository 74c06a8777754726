"""Jobs in a second thread: in order, beside the next one's making, and what fails is told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from mlpmem_rag.behind import behind


def test_results_come_in_order_from_one_other_thread() -> None:
    def job(number: int) -> tuple[int, str]:
        return number, threading.current_thread().name

    results = list(behind(partial(job, number) for number in range(20)))
    assert [number for number, _ in results] == list(range(20))
    (name,) = {name for _, name in results}
    assert name != threading.current_thread().name
    assert not list(behind(iter([])))


def test_a_job_runs_while_the_next_is_made() -> None:
    """The first job ends only when the second has been made: in turns it would never end."""
    made = threading.Event()

    def jobs() -> Iterator[Callable[[], bool]]:
        yield lambda: made.wait(20)
        made.set()
        yield lambda: True

    assert list(behind(jobs())) == [True, True]


def test_a_failing_job_ends_the_work_and_no_further_job_is_made() -> None:
    made = []

    def fail() -> None:
        raise OSError("the disk is full")

    def jobs() -> Iterator[Callable[[], None]]:
        for number in range(9):
            made.append(number)
            yield fail

    with pytest.raises(OSError, match="the disk is full"):
        list(behind(jobs()))
    assert made == [0, 1]
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]
