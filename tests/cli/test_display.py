"""Progress as people see it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mlpmem_cli.display import progress_bars
from mlpmem_rag.progress import ProgressEvent


@pytest.mark.parametrize(
    ("seconds", "rate", "left"),
    [(20.0, "0.05 answers/s", "0:02:00"), (0.01, "100 answers/s", "0:00")],
)
def test_slow_and_fast_steps_have_a_rate_and_a_time_left(
    seconds: float, rate: str, left: str
) -> None:
    now = [0.0]
    screen = io.StringIO()
    console = Console(file=screen, width=120, get_time=lambda: now[0])
    with progress_bars(console) as on_progress:
        for done in range(5):
            on_progress(ProgressEvent("comparison", done, 10, "answers"))
            now[0] += seconds
    shown = screen.getvalue().splitlines()[-1]
    assert "4/10" in shown
    assert rate in shown
    assert left in shown
