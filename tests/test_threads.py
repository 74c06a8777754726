"""Idle OpenMP threads: given up by those who wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mlpmem_rag.threads import _pause, release_threads
from mlpmem_rag.turns import Turns, alone

THREADS = Path("/proc/self/task")

pytestmark = [
    pytest.mark.skipif(not THREADS.is_dir(), reason="threads are counted as Linux shows them"),
    pytest.mark.skipif(_pause() is None, reason="this OpenMP runtime cannot give threads up"),
]


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    release_threads()
    yield
    release_threads()
    torch.set_num_threads(before)


def compute() -> None:
    """Enough for torch to share it out."""
    torch.ones(1_000_000).exp()


def running() -> set[str]:
    """Ids of the process's threads: another test's may end meanwhile, so none are only counted."""
    return {thread.name for thread in THREADS.iterdir()}


def soon(wanted: Callable[[], bool]) -> bool:
    """Ending takes the system a moment."""
    end = time.monotonic() + 5
    while not wanted() and time.monotonic() < end:
        time.sleep(0.005)
    return wanted()


def test_a_team_is_given_up_and_made_anew() -> None:
    before = running()
    compute()
    team = running() - before
    assert len(team) == 2
    release_threads()
    assert soon(lambda: not team & running())
    before = running()
    compute()
    assert len(running() - before) == 2


def test_whoever_asks_and_whoever_answered_keep_no_team() -> None:
    before = running()
    compute()  # as an application does that embeds, then asks
    asked = running() - before
    assert len(asked) == 2
    turns, inside = Turns(), list[set[str]]()
    before = running()

    def work(give: Callable[[str], None], stop: threading.Event) -> None:
        compute()
        inside.append(running())
        give("done")

    assert list(turns.pieces(alone(work))) == ["done"]
    assert not asked & inside[0]
    answered = inside[0] - before
    assert len(answered) == 3  # the turns' own thread and its two
    assert soon(lambda: len(answered & running()) == 1)
