"""`mlpmem-rag bench`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlpmem_cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from mlpmem_eval.bench_schema import Bench, Section


DATA = ("questions.jsonl", "corpus.jsonl", "text.txt")


def bench(
    memory: options.MemoryArgument,
    out: Annotated[Path, typer.Option(help="Folder to write bench.json and bench.md to.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder with any of questions.jsonl, corpus.jsonl and text.txt, where the "
            "options below do not say otherwise."
        ),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(
            help="jsonl of question and answers; with hallucinated_answer, for HaluEval's "
            "preference as well."
        ),
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(help="The documents that the memory was trained on.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A text to measure perplexity on.")] = None,
    limit: Annotated[
        int, typer.Option(min=0, help="Questions, at most, drawn by chance; 0: all.")
    ] = 100,
    tokens: Annotated[int, typer.Option(min=0, help="Of the text, at most; 0: all.")] = 20_000,
    max_new_tokens: options.MaxNewTokensOption = 24,
    follow_links: options.FollowLinksOption = False,
    seed: options.SeedOption = 0,
    base_model: options.BasePlaceOption = None,
    device: options.DeviceOption = options.Device.auto,
    dtype: options.DtypeOption = options.Dtype.auto,
    as_json: options.JsonOption = False,
) -> None:
    """Run the paper's protocols on your data, beside the paper's figures.

    Perplexity with base model, kNN-LM and memory; questions; right against
    made-up answers; time by corpus size. What there is no data for is left
    out and named.
    """
    from mlpmem_cli import display

    display.quiet_libraries()
    with display.needs_extra("eval"):
        from mlpmem_eval.bench import BenchConfig, run_bench

    if data is not None and not any((data / name).is_file() for name in DATA):
        raise typer.BadParameter(f"--data {data} holds none of {', '.join(DATA)}")
    console = display.stderr()
    config = BenchConfig(
        memory=memory,
        out=out,
        questions=questions or _there(data, DATA[0]),
        corpus=corpus or _named(_there(data, DATA[1])),
        text=text or _there(data, DATA[2]),
        limit=limit,
        tokens=tokens,
        max_new_tokens=max_new_tokens,
        follow_links=follow_links,
        seed=seed or 0,
        base_model=base_model,
        device=device.value,
        dtype=dtype.value,
        command=shlex.join(["mlpmem-rag", *sys.argv[1:]]),
    )
    with display.keeping(console, out), display.progress_bars(console) as on_progress:
        found = run_bench(config, on_progress=on_progress)
    if as_json:
        typer.echo(found.model_dump_json())
    else:
        show(found)
    console.print(f"written to {out}: bench.json, bench.md", markup=False)


def show(found: Bench) -> None:
    """Tables on stdout, remarks on stderr."""
    from mlpmem_cli import display

    for warning in found.warnings:
        display.stderr().print(warning, style="yellow", markup=False)
    console = display.stdout()
    for section in found.sections:
        console.print(section_table(section))
        for note in section.differs:
            console.print(f"  {note}", style="dim", markup=False, highlight=False)
    for reason in found.not_run:
        console.print(f"not run: {reason}", markup=False, highlight=False)


def section_table(section: Section) -> Table:
    """One protocol's figures beside the paper's."""
    from rich.table import Table

    from mlpmem_eval.bench_schema import between, number

    table = Table(section.unit, title=section.title, title_justify="left")
    for name in ("here (95 %)", "n", "paper"):
        table.add_column(name, justify="right")
    for line in section.lines:
        here = number(line.value) + between(line)
        n = "–" if line.n is None else f"{line.n:,}"
        table.add_row(line.what, here, n, number(line.published))
    return table


def _there(folder: Path | None, name: str) -> Path | None:
    if folder is None or not (folder / name).is_file():
        return None
    return folder / name


def _named(path: Path | None) -> str | None:
    return None if path is None else str(path)
