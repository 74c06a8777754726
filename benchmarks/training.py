"""A training from documents to memory, end to end, and its stages.

The time is that of a user: reading the documents, loading the base model, tokenising and writing
the memory are in it, beside the stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from benchmarks.figures import Figure, Goal
from benchmarks.results import RESULTS, figures_of, read
from benchmarks.rounds import Ratio
from benchmarks.setup import Setup, Training

FASTER = Goal(at_least=50.0)
"""A GPU, than the fastest CPU of the result files, both on the same corpus."""
RATE = "tokens/s"
CPU = "fastest CPU of the result files, same corpus"
NO_CPU = "no CPU in the result files has trained on this corpus"


def run(setup: Setup) -> list[Figure]:
    """On the first documents of the corpus."""
    return figures(setup, setup.trained)


def figures(setup: Setup, done: Training) -> list[Figure]:
    """Tokens of corpus a second, and the part of each stage in the time that it took."""
    speed = end_to_end(done)
    if setup.device.startswith("cuda"):
        speed = beside_cpus(setup, speed)
    return [speed, *parts(done)]


def end_to_end(done: Training) -> Figure:
    """All that lies between documents and memory."""
    report = done.report
    return Figure(
        f"training, {report.documents:,} documents to a memory",
        RATE,
        report.tokens / done.seconds,
        details={
            "documents": report.documents,
            "tokens": report.tokens,
            "questions": report.questions,
            "seconds": done.seconds,
            **{f"seconds_{stage}": took for stage, took in report.seconds.items()},
        },
    )


def parts(done: Training) -> Iterator[Figure]:
    """Each stage, and what is outside of all, beside the whole."""
    report = done.report
    outside = done.seconds - report.total_seconds
    named = {f"stage {name}": took for name, took in report.seconds.items()}
    for name, took in {**named, "outside the stages": outside}.items():
        share = took / done.seconds
        yield Figure(
            f"training, {report.documents:,} documents, {name}",
            "s",
            took,
            "the whole training",
            done.seconds,
            Ratio(share, share, share),
        )


def beside_cpus(setup: Setup, speed: Figure) -> Figure:
    """A GPU's rate beside what the fastest CPU was measured to do on the same corpus."""
    cpu = max(cpu_rates(setup, speed), default=None)
    if cpu is None:
        return replace(speed, against=NO_CPU)
    share = speed.ours / cpu
    return replace(speed, against=CPU, other=cpu, ratio=Ratio(share, share, share), goal=FASTER)


def cpu_rates(setup: Setup, speed: Figure) -> Iterator[float]:
    """Tokens a second of each CPU, in the folder of this run and in that of the repository."""
    for folder in {setup.results.resolve(), RESULTS.resolve()}:
        for found in read(folder):
            if found["machine"]["device"] == "cpu":
                yield from same_training(found["suites"].values(), setup.base_model, speed)


def same_training(
    suites: Iterable[Mapping[str, Any]], base_model: str, speed: Figure
) -> Iterator[float]:
    """Rates of trainings on as many documents and tokens, as the same base model counts them."""
    for suite in suites:
        for figure in figures_of(suite) if suite["base_model"] == base_model else ():
            same = (figure.what, figure.unit) == (speed.what, RATE)
            if same and figure.details.get("tokens") == speed.details["tokens"]:
                yield figure.ours
