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


def running() -> int:
    return len(list(THREADS.iterdir()))


def soon(wanted: Callable[[], bool]) -> bool:
    """Ending takes the system a moment."""
    end = time.monotonic() + 5
    while not wanted() and time.monotonic() < end:
        time.sleep(0.005)
    return wanted()


def test_a_team_is_given_up_and_made_anew() -> None:
    before = running()
    compute()
    assert running() == before + 2
    release_threads()
    assert soon(lambda: running() == before)
    compute()
    assert running() == before + 2


def test_whoever_asks_and_whoever_answered_keep_no_team() -> None:
    compute()  # as an application does that embeds, then asks
    with_team = running()
    turns, inside = Turns(), list[int]()

    def work(give: Callable[[str], None], stop: threading.Event) -> None:
        compute()
        inside.append(running())
        give("done")

    assert list(turns.pieces(alone(work))) == ["done"]
    assert inside == [with_team + 1]  # the turns' own thread and its two, less the asker's two
    assert soon(lambda: running() == with_team - 2 + 1)
