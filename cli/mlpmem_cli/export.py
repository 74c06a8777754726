"""`mlpmem-rag export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlpmem_cli import options


def export(
    memory: options.MemoryArgument,
    out: Annotated[Path, typer.Option(help="Folder to write the copy to.")],
    merge_base: Annotated[
        bool,
        typer.Option(
            "--merge-base/--name-base",
            help="Put base model, tokenizer and query encoder into the copy, or only their names.",
        ),
    ] = False,
    base_model: options.BasePlaceOption = None,
) -> None:
    """Copy a memory to hand it on, without the training's own files.

    With --merge-base the copy needs nothing else to be loaded: no hub, no base model at hand.
    """
    from mlpmem_cli import display
    from mlpmem_rag.export import export_memory
    from mlpmem_rag.storage import folder_bytes

    display.quiet_libraries()
    export_memory(memory, out, merge_base=merge_base, base_model=base_model)
    typer.echo(f'{display.size(folder_bytes(out))}. Ask it: mlpmem-rag ask {out} "…"')
