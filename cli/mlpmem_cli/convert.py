"""`mlpmem-rag convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A memory published with the paper.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write the memory to.")],
    base_model: Annotated[str, typer.Option(help="The base model it was trained beside.")],
    layer: Annotated[
        int | None, typer.Option(help="Layer it reads.", show_default="as it says, else the last")
    ] = None,
    lambda_: Annotated[
        float, typer.Option("--lambda", min=0.0, max=1.0, help="Share of the memory.")
    ] = 0.25,
    temperature: Annotated[float, typer.Option(min=1e-3, help="Divides its logits.")] = 1.0,
) -> None:
    """Take a memory published with the paper, as safetensors, into this program's form."""
    from mlpmem_cli import display
    from mlpmem_rag.backbone import load_backbone
    from mlpmem_rag.published import published_model

    display.quiet_libraries()
    model = published_model(
        checkpoint,
        load_backbone(base_model, device="cpu", dtype="float32"),
        layer=layer,
        memory_lambda=lambda_,
        memory_temperature=temperature,
    )
    model.save_pretrained(out, merge_base=False)
    typer.echo(f'Ask it: mlpmem-rag ask {out} "…"')
