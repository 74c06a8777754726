"""`mlpmem-rag train`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from mlpmem_cli import options


def train(
    corpus: options.CorpusArgument,
    out: Annotated[Path, typer.Option(help="Folder to write the memory to.")],
    base_model: options.BaseModelOption = None,
    size: options.SizeOption = None,
    recipe: options.RecipeOption = None,
    questions: options.QuestionsOption = None,
    encoder: options.EncoderOption = None,
    layer: options.LayerOption = None,
    neighbors: options.NeighborsOption = None,
    tau: Annotated[
        float | None,
        typer.Option(
            help="Temperature of the neighbours' votes.", show_default="from the distances"
        ),
    ] = None,
    device: options.DeviceOption = options.Device.auto,
    dtype: options.DtypeOption = options.Dtype.auto,
    seed: options.SeedOption = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh/--resume", help="Do every stage again, or go on where an earlier run stopped."
        ),
    ] = False,
    max_memory: options.MaxMemoryOption = None,
    strict: options.StrictOption = False,
    follow_links: options.FollowLinksOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Train a memory from documents.

    An interrupted run goes on where it stopped when the same command is given again. An earlier
    memory in the folder stays as it is until the new one is complete.
    """
    from mlpmem_cli import display
    from mlpmem_rag import train as run_training
    from mlpmem_rag.sizes import parse_size

    display.quiet_libraries()
    console = display.stderr()
    with display.keeping(console, out), display.progress_bars(console) as on_progress:
        report = run_training(
            corpus,
            out=out,
            base_model=base_model,
            size=size and size.value,
            recipe=recipe and recipe.value,
            questions=tuple(questions) if questions else None,
            encoder=encoder,
            layer=layer,
            neighbors=neighbors,
            tau=tau,
            device=device.value,
            dtype=dtype.value,
            seed=seed,
            fresh=fresh,
            max_memory=None if max_memory is None else parse_size(max_memory),
            strict=strict,
            follow_links=follow_links,
            on_progress=on_progress,
            on_plan=lambda plan: console.print(display.plan_table(plan)),
        )
    if os.environ.get("RANK", "0") != "0":
        return  # one of several processes: the first one tells
    display.show_skipped(console, report.skipped)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), ensure_ascii=False))
    else:
        display.stdout().print(display.report_table(report))
        typer.echo(f'Ask it: mlpmem-rag ask {out} "…"')
