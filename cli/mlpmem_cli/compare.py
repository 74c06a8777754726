"""`mlpmem-rag compare`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlpmem_cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from mlpmem_eval.schema import Report

ARMS = "base,rag,rag-tuned,memory"


def compare(
    memory: options.MemoryArgument,
    out: Annotated[Path, typer.Option(help="Folder to write the report to.")],
    questions: Annotated[
        Path | None,
        typer.Option(help="jsonl or csv of question and answers, or a LabelledRagDataset json."),
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(help="The documents: for RAG, and to write questions from.")
    ] = None,
    arms: Annotated[
        str,
        typer.Option(
            help="Comma-separated: base, rag, rag-tuned, memory, recall, memory+rag, "
            "memory-first, knn, lora."
        ),
    ] = ARMS,
    write: Annotated[
        int, typer.Option(min=0, help="Write so many questions from the corpus (synthetic).")
    ] = 0,
    limit: Annotated[
        int, typer.Option(min=0, help="Draw at most so many of the file's questions; 0: all.")
    ] = 0,
    max_new_tokens: options.MaxNewTokensOption = 24,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Questions that an arm has at the same time.")
    ] = 1,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Confidence below which memory-first asks RAG.",
            show_default="the best on questions that training held out",
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="Any LlamaIndex LLM that is to judge the answers: MODULE:CLASS?model=NAME&…, or "
            "FILE.py:NAME. What is named is run."
        ),
    ] = None,
    follow_links: options.FollowLinksOption = False,
    seed: options.SeedOption = 0,
    base_model: options.BasePlaceOption = None,
    device: options.DeviceOption = options.Device.auto,
    dtype: options.DtypeOption = options.Dtype.auto,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail on a row that is no question.")
    ] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Compare a memory with RAG and others on your own questions: right, fast, cheap?

    Writes report.json, report.html and report.md. An interrupted comparison goes on where it
    stopped when the same command is given again.
    """
    from mlpmem_cli import display

    display.quiet_libraries()
    with display.needs_extra("eval"):
        from mlpmem_eval.headtohead import CompareConfig
        from mlpmem_eval.headtohead import compare as run_comparison

    console = display.stderr()
    config = CompareConfig(
        memory=memory,
        out=out,
        questions=questions,
        corpus=corpus,
        arms=tuple(name.strip() for name in arms.split(",") if name.strip()),
        write=write,
        limit=limit,
        max_new_tokens=max_new_tokens,
        concurrency=concurrency,
        threshold=threshold,
        judge=judge,
        follow_links=follow_links,
        seed=seed or 0,
        base_model=base_model,
        device=device.value,
        dtype=dtype.value,
        strict=strict,
        command=shlex.join(["mlpmem-rag", *sys.argv[1:]]),
    )
    with display.keeping(console, out), display.progress_bars(console) as on_progress:
        report = run_comparison(config, on_progress=on_progress)
    show(report, as_json=as_json)
    console.print(f"written to {out}: report.html, report.md, report.json", markup=False)


def show(report: Report, *, as_json: bool) -> None:
    """The figures on stdout, remarks on stderr."""
    from mlpmem_cli import display
    from mlpmem_eval import wording

    if as_json:
        typer.echo(report.model_dump_json())
        return
    for warning in report.warnings:
        display.stderr().print(warning, style="yellow", markup=False)
    console = display.stdout()
    console.print(accuracy_table(report))
    console.print(speed_table(report))
    console.print(pairs_table(report))
    for line in (
        *wording.summary(report),
        *(wording.break_even_line(b) for b in report.cost.break_even),
    ):
        console.print(line, markup=False, highlight=False)


def accuracy_table(report: Report) -> Table:
    """How right each arm is."""
    from mlpmem_eval import wording

    judged = any(arm.judged for arm in report.arms.values())
    names = ("n", "EM (95 %)", "F1 (95 %)", "contains", "similarity", *["judge (95 %)"] * judged)
    table = _table("How right", "arm", *names)
    for name, arm in report.arms.items():
        failed = f" ({arm.failed} failed)" if arm.failed else ""
        table.add_row(
            name,
            f"{arm.n}{failed}",
            wording.decimals(arm.em) + wording.between(arm.intervals.get("em")),
            wording.decimals(arm.f1) + wording.between(arm.intervals.get("f1")),
            wording.decimals(arm.contains),
            wording.decimals(arm.similarity),
            *[wording.decimals(arm.judge) + wording.between(arm.intervals.get("judge"))] * judged,
        )
    return table


def speed_table(report: Report) -> Table:
    """How fast each arm is, and what it costs."""
    from mlpmem_eval import wording

    table = _table(
        "How fast (ms, p50 / p95), at what cost",
        "arm",
        "first token",
        "answer",
        "tokens in / out",
        "set-up",
        "disk",
    )
    for name, arm in report.arms.items():
        cost = report.cost.arms[name]
        table.add_row(
            name,
            wording.times(arm.ttft_ms),
            wording.times(arm.total_ms),
            f"{wording.whole(arm.prompt_tokens)} / {wording.whole(arm.completion_tokens)}",
            wording.duration(sum(cost.setup_seconds.values())),
            wording.size(sum(cost.disk_bytes.values())),
        )
    return table


def pairs_table(report: Report) -> Table:
    """What differs between any two arms."""
    from mlpmem_eval import wording

    table = _table("Pairs (differences with *: significant)", "a - b", "EM", "F1", "answer, ms")
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    for pair in report.pairs:
        star = " *" if pair.significant else ""
        pairs.setdefault((pair.a, pair.b), {})[pair.metric] = (
            f"{wording.signed(pair.difference)}{star}"
        )
    for (a, b), told in pairs.items():
        table.add_row(f"{a} - {b}", *(told.get(m, "–") for m in ("em", "f1", "total_ms")))
    return table


def _table(title: str, first: str, *others: str) -> Table:
    from rich.table import Table

    table = Table(first, title=title, title_justify="left")
    for name in others:
        table.add_column(name, justify="right")
    return table
