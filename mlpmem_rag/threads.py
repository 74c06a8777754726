"""Idle threads of parallel loops, sent home.

Every thread that computes on a CPU keeps a team of OpenMP threads for its parallel loops, as many
as there are cores. Two threads with a team each are more than there are cores, and from then on
GNU's runtime (the one in torch's packages for Linux) has idle threads sleep at once rather than
wait for the next loop a moment: a step of a small language model, hundreds of short loops, then
takes half as long again. Whoever has computed and now waits for another thread should therefore
give its team up.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

SOFT = 1
"""Of `omp_pause_resource_all` in OpenMP 5.0: what the program has set is kept."""


def release_threads() -> None:
    """End the calling thread's own OpenMP team; its next parallel loop makes a new one.

    Without an OpenMP runtime of version 5.0 in the process, nothing happens.
    """
    pause = _pause()
    if pause is not None:
        pause(SOFT)


@cache
def _pause() -> Callable[[int], int] | None:
    import torch  # noqa: F401  brings its runtime into the process

    try:
        return ctypes.CDLL(None).omp_pause_resource_all
    except (AttributeError, OSError, TypeError):  # an older runtime, another one, or Windows
        return None
