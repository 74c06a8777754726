"""A training on all documents of a large corpus."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks import training
from benchmarks.figures import Figure, Goal
from benchmarks.setup import Setup

MANY_TOKENS = 1_000_000
MINUTES = Goal(at_most=10.0)
"""For as many tokens, on a GPU."""


def run(setup: Setup) -> list[Figure]:
    """The minutes that it took, and what the suite `training` tells of a smaller one.

    Raises:
        AssertionError: no large corpus is given.
    """
    assert setup.large_corpus is not None, "give a corpus: --large-corpus PATH"
    with tempfile.TemporaryDirectory(dir=setup.work) as folder:
        done = setup.training(setup.large_corpus, Path(folder) / "memory")
    tokens, on_gpu = done.report.tokens, setup.device.startswith("cuda")
    minutes = Figure(
        f"training on {tokens:,} tokens",
        "minutes",
        done.seconds / 60,
        goal=MINUTES if on_gpu and tokens >= MANY_TOKENS else Goal(),
        details={"documents": done.report.documents, "tokens": tokens},
    )
    return [minutes, *training.figures(setup, done)]
