"""How progress and figures look in a terminal (rich honours NO_COLOR and pipes by itself)."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from mlpmem_rag.errors import MissingDependencyError

if TYPE_CHECKING:
    from mlpmem_rag.calibrate import StudyFigures
    from mlpmem_rag.corpus import Corpus
    from mlpmem_rag.plan import Plan
    from mlpmem_rag.progress import OnProgress, ProgressEvent
    from mlpmem_rag.report import TrainReport

SHOWN_SKIPS = 10
SPEED_PERIOD = 180.0
"""Seconds that rate and time left are estimated from: some steps take many seconds each."""


def stdout() -> Console:
    """For results."""
    return Console()


def stderr() -> Console:
    """For progress, plans and remarks."""
    return Console(stderr=True)


def quiet_libraries() -> None:
    """Keep other libraries' remarks off the terminal, and off the network's telemetry."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore")


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Say which extra to install when a package that it brings is missing."""
    try:
        yield
    except MissingDependencyError:
        raise
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"the package {error.name!r} is not installed; run: pip install 'mlpmem-rag[{extra}]'"
        ) from error


@contextmanager
def keeping(console: Console, out: Path) -> Iterator[None]:
    """Say after Ctrl-C that what is done is kept, and exit with 130."""
    try:
        yield
    except KeyboardInterrupt:
        console.print(
            f"interrupted; what is done is kept in {out}, run the same command to go on",
            markup=False,
            highlight=False,
        )
        raise typer.Exit(130) from None


class RateColumn(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        """E.g. `2,310 rows/s`, `0.7 answers/s`."""
        speed = task.finished_speed or task.speed
        unit = task.fields.get("unit", "")
        told = "" if not speed else f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"
        return Text(f"{told} {unit}/s" if told else "", style="progress.data.speed")


@contextmanager
def progress_bars(console: Console) -> Iterator[OnProgress]:
    """One bar a stage, as long as the `with` block runs."""
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        RateColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, speed_estimate_period=SPEED_PERIOD) as progress:

        def show(event: ProgressEvent) -> None:
            if event.stage not in tasks:
                tasks[event.stage] = progress.add_task(
                    event.stage, total=event.total, unit=event.unit
                )
            progress.update(tasks[event.stage], completed=event.done, total=event.total)

        yield show


def size(number_of_bytes: float) -> str:
    """`1234567` -> `1.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if number_of_bytes < 1000:
            return f"{number_of_bytes:.3g} {unit}"
        number_of_bytes /= 1000
    return f"{number_of_bytes:.3g} TB"


def duration(seconds: float) -> str:
    """`75` -> `1 min 15 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def two_columns(title: str) -> Table:
    """A table of names and values; long values go on in the next line."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    return table


def plain(text: str) -> Text:
    """Text from elsewhere as it is: no markup in it is followed, no command to the terminal."""
    kept = (c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return Text("".join(kept))


def plan_table(plan: Plan) -> Table:
    """What a run needs."""
    table = two_columns("Plan")
    table.add_row("documents, tokens", f"{plan.documents:,}, {plan.tokens:,}")
    table.add_row("datastore rows", f"{plan.rows:,}")
    table.add_row("memory", f"{plan.memory_parameters / 1e6:.1f} M parameters")
    table.add_row("disk", f"{size(plan.disk_bytes)} of {size(plan.free_disk_bytes)} free")
    table.add_row("main memory", f"about {size(plan.memory_bytes)}")
    for name, seconds in plan.seconds.items():
        table.add_row(f"time, {name}", f"about {duration(seconds)}")
    table.add_row("time, all", f"about {duration(sum(plan.seconds.values()))}")
    return table


def report_table(report: TrainReport) -> Table:
    """What a run has made."""
    table = two_columns("Memory")
    table.add_row("documents, tokens", f"{report.documents:,}, {report.tokens:,}")
    table.add_row("datastore rows", f"{report.rows:,}")
    for name, seconds in report.seconds.items():
        table.add_row(f"seconds, {name}", f"{seconds:.1f}")
    table.add_row("seconds, all", f"{report.total_seconds:.1f}")
    perplexity = report.perplexity
    if perplexity is None:
        table.add_row("held-out perplexity", "not measured: the corpus is too small")
    else:
        kept = perplexity.kept_gain
        by = f"{perplexity.tokens:,} tokens held out by {report.held_out_by}"
        table.add_row("held-out perplexity", by)
        table.add_row("  base model", f"{perplexity.base:.2f}")
        table.add_row("  base + kNN datastore (teacher)", f"{perplexity.teacher:.2f}")
        table.add_row("  base + memory", f"{perplexity.memory:.2f}")
        table.add_row("  teacher's gain kept", "–" if kept is None else f"{kept:.0%}")
    if report.questions:
        table.add_row("questions taught", f"{report.questions:,} ({report.study_rows:,} rows)")
    if report.study is not None:
        study_rows(table, report.study)
    table.add_row("λ, temperature", f"{report.memory_lambda:.3f}, {report.memory_temperature:g}")
    table.add_row("datastore on disk", size(report.datastore_bytes))
    table.add_row("memory on disk", size(report.memory_bytes))
    table.add_row("written to", report.out)
    return table


def study_rows(table: Table, study: StudyFigures) -> None:
    """What a memory of questions has learned, measured before it learned what was held out."""

    def share(value: float | None) -> str:
        return "–" if value is None else f"{value:.0%}"

    table.add_row("  corpus words in an answer", share(study.coverage))
    table.add_row("  right, questions it learned", share(study.taught))
    table.add_row("  right, other wordings", share(study.held_out))
    table.add_row("  … by the nearest question", share(study.nearest))
    table.add_row("  right, documents not learned", share(study.unknown))
    auroc = study.confidence_auroc
    table.add_row("  confidence, AUROC", "–" if auroc is None else f"{auroc:.2f}")
    table.add_row("  gate on text nobody asked for", share(study.text_gate))


def show_skipped(console: Console, skipped: Corpus | tuple[tuple[str, str], ...]) -> None:
    """List sources left out, with the reason."""
    pairs = (
        skipped
        if isinstance(skipped, tuple)
        else tuple((s.source, s.reason) for s in skipped.skipped)
    )
    for source, reason in pairs[:SHOWN_SKIPS]:
        console.print(f"skipped {source}: {reason}", style="yellow", markup=False)
    if len(pairs) > SHOWN_SKIPS:
        console.print(f"… and {len(pairs) - SHOWN_SKIPS} more", style="yellow")
