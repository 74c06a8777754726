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
        from mlpmem_eval.folder import check_report_folder
        from mlpmem_eval.render import write_report
        from mlpmem_eval.schema import REPORT, load_report

    found = load_report(source)
    folder = out or (source if source.is_dir() else source.parent)
    if out is None and source.is_file() and source.name != REPORT:
        raise typer.BadParameter(f"{source} is not named {REPORT}: say where to write with --out")
    check_report_folder(folder)
    write_report(found, folder)
    show(found, as_json=as_json)
    written = f"written to {folder}: report.html, report.md, report.json"
    display.stderr().print(written, markup=False)
