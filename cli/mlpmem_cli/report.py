"""`mlpmem-rag report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlpmem_cli import options


def report(
    source: Annotated[
        Path, typer.Argument(metavar="REPORT", help="A report.json, or the folder it is in.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to.", show_default="where the report is")
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Show a finished comparison again, and write its report.html and report.md anew."""
    from mlpmem_cli import display
    from mlpmem_cli.compare import show

    with display.needs_extra("eval"):
        from mlpmem_eval.render import write_report
        from mlpmem_eval.schema import load_report

    found = load_report(source)
    folder = out or (source if source.is_dir() else source.parent)
    write_report(found, folder)
    show(found, as_json=as_json)
    display.stderr().print(f"written to {folder}: report.html, report.md, report.json")
