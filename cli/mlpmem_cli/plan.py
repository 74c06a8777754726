"""`mlpmem-rag plan`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mlpmem_cli import options


def plan(
    corpus: options.CorpusArgument,
    out: Annotated[
        Path, typer.Option(help="Where the memory would be written (for the free space).")
    ] = Path(),
    base_model: options.BaseModelOption = None,
    size: options.SizeOption = None,
    recipe: options.RecipeOption = None,
    layer: options.LayerOption = None,
    neighbors: options.NeighborsOption = None,
    device: options.DeviceOption = options.Device.auto,
    dtype: options.DtypeOption = options.Dtype.auto,
    max_memory: options.MaxMemoryOption = None,
    strict: options.StrictOption = False,
    follow_links: options.FollowLinksOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Say what training would need: tokens, rows, disk, memory, time. Writes nothing."""
    from mlpmem_cli import display
    from mlpmem_rag import plan_training
    from mlpmem_rag.sizes import parse_size

    display.quiet_libraries()
    console = display.stderr()
    with display.progress_bars(console) as on_progress:
        needs, read = plan_training(
            corpus,
            out=out,
            base_model=base_model,
            size=size and size.value,
            recipe=recipe and recipe.value,
            layer=layer,
            neighbors=neighbors,
            device=device.value,
            dtype=dtype.value,
            max_memory=None if max_memory is None else parse_size(max_memory),
            strict=strict,
            follow_links=follow_links,
            on_progress=on_progress,
        )
    display.show_skipped(console, read)
    if as_json:
        typer.echo(json.dumps(asdict(needs)))
    else:
        display.stdout().print(display.plan_table(needs))
    needs.check()
