"""How stages tell their caller how far they are. The library itself never prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """`done` of `total` `unit`s of `stage` are finished (`total` is None while unknown)."""

    stage: str
    done: int
    total: int | None
    unit: str


OnProgress = Callable[[ProgressEvent], None]


def ignore_progress(event: ProgressEvent) -> None:
    """Take an event and do nothing: the default of every stage."""
