"""A training from documents to memory, end to end."""

from __future__ import annotations

from benchmarks.figures import Figure
from benchmarks.setup import Setup


def run(setup: Setup) -> list[Figure]:
    """Tokens of corpus a second, and the seconds of each stage."""
    report = setup.trained
    return [
        Figure(
            f"training, {report.documents} documents to a memory",
            "tokens/s",
            report.tokens / report.total_seconds,
            details={
                "tokens": report.tokens,
                "questions": report.questions,
                **{f"seconds_{stage}": took for stage, took in report.seconds.items()},
            },
        )
    ]
