"""Two ways of doing the same, one after the other in turns of order, and their ratio.

What differs between rounds is the machine's other load, so a figure is the median of the rounds'
ratios and its interval comes from their order alone.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from scipy.stats import quantile_test

Work = Callable[[], object]
T = TypeVar("T")


@dataclass(frozen=True)
class Ratio:
    """A median of ratios and its interval: 95 % from six rounds on, all there is below that."""

    value: float
    low: float
    high: float


def seconds(work: Work, device: str = "cpu") -> float:
    """How long one call takes, what it has queued on a GPU included."""
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def timed(work: Callable[[], T], device: str = "cpu") -> tuple[T, float]:
    """What the call gives, and its seconds."""
    found: list[T] = []
    took = seconds(lambda: found.append(work()), device)
    return found[0], took


def exhaust(results: Iterable[object]) -> None:
    """Have all of them made, none of which is kept."""
    deque(results, maxlen=0)


def interleaved(
    arms: Mapping[str, Work], rounds: int, *, device: str = "cpu", warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of each arm in each round."""
    for arm in arms.values() if warm_up else ():
        arm()
    took: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in list(arms)[:: -1 if number % 2 else 1]:
            took[name].append(seconds(arms[name], device))
    return took


def median_ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Of numbers that belong together."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    low, high = min(ratios), max(ratios)
    if len(ratios) >= 6:
        interval = quantile_test(ratios, q=1, p=0.5).confidence_interval(0.95)
        low, high = float(interval.low), float(interval.high)
    return Ratio(statistics.median(ratios), low, high)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
