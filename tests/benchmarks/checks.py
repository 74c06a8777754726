"""What holds for every figure."""

from __future__ import annotations

from benchmarks.figures import Figure


def check(figure: Figure) -> None:
    """A ratio of the two figures, in its interval."""
    assert figure.ours > 0
    if figure.ratio is not None:
        assert figure.ratio.low <= figure.ratio.value <= figure.ratio.high
