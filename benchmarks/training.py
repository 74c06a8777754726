"""A training from documents to memory, end to end, and its stages."""

from __future__ import annotations

from benchmarks.figures import Figure, Goal
from benchmarks.results import figures_of, read
from benchmarks.rounds import Ratio
from benchmarks.setup import Setup
from mlpmem_rag.report import TrainReport

FASTER = Goal(at_least=50.0)
"""A GPU, than the fastest CPU of the result files."""
MANY_TOKENS = 1_000_000
MINUTES = Goal(at_most=10.0)
"""For as many tokens, on a GPU."""
WHAT = "training, {} documents to a memory"


def run(setup: Setup) -> list[Figure]:
    """Tokens of corpus a second, the time that it took, and each stage's share of it."""
    report, gpu = setup.trained, setup.device.startswith("cuda")
    figures = [beside_cpus(setup, report) if gpu else whole(report)]
    if gpu and report.tokens >= MANY_TOKENS:
        minutes = report.total_seconds / 60
        what = f"training on {report.tokens:,} tokens"
        figures.append(Figure(what, "minutes", minutes, goal=MINUTES))
    return figures + [stage(report, name) for name in report.seconds]


def whole(report: TrainReport) -> Figure:
    """All stages."""
    return Figure(
        WHAT.format(report.documents),
        "tokens/s",
        report.tokens / report.total_seconds,
        details={
            "tokens": report.tokens,
            "questions": report.questions,
            **{f"seconds_{stage}": took for stage, took in report.seconds.items()},
        },
    )


def stage(report: TrainReport, name: str) -> Figure:
    """One of them beside all."""
    took, total = report.seconds[name], report.total_seconds
    share = took / total
    what = f"training, stage {name}"
    return Figure(what, "s", took, "all stages", total, Ratio(share, share, share))


def beside_cpus(setup: Setup, report: TrainReport) -> Figure:
    """All stages on a GPU beside what the fastest CPU was measured to do."""
    mine, cpu = whole(report), max(cpu_rates(setup), default=None)
    if cpu is None:
        return mine
    share = mine.ours / cpu
    return Figure(
        mine.what,
        mine.unit,
        mine.ours,
        "fastest CPU of the result files",
        cpu,
        Ratio(share, share, share),
        FASTER,
        details=mine.details,
    )


def cpu_rates(setup: Setup) -> list[float]:
    """Tokens a second of each CPU in the result files."""
    return [
        figure.ours
        for found in read(setup.results)
        if found["machine"]["device"] == "cpu" and "training" in found["suites"]
        for figure in figures_of(found["suites"]["training"])
        if figure.unit == "tokens/s"
    ]
