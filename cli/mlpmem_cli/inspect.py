"""`mlpmem-rag inspect`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from mlpmem_cli import options
from mlpmem_rag.integrity import Verify

if TYPE_CHECKING:
    from rich.table import Table

    from mlpmem_rag.artifact import Manifest, MemorySettings


def inspect(
    memory: options.MemoryArgument,
    verify: options.VerifyOption = Verify.full,
    as_json: options.JsonOption = False,
) -> None:
    """Show what a memory is, what it was made from, and what it measured; checks its files."""
    from mlpmem_cli import display
    from mlpmem_rag.artifact import WORK, load_manifest, load_settings, verify_files
    from mlpmem_rag.storage import folder_bytes

    manifest = load_manifest(memory)
    verify_files(memory, manifest, verify)
    settings = load_settings(memory)
    work = memory / WORK
    work_bytes = folder_bytes(work) if work.is_dir() else 0
    if as_json:
        typer.echo(
            json.dumps(
                {**asdict(manifest), "settings": asdict(settings), "work_bytes": work_bytes},
                ensure_ascii=False,
            )
        )
    else:
        state = "intact" if verify is Verify.full else "there"
        display.stdout().print(_table(manifest, settings, state, display.size(work_bytes)))


def _table(manifest: Manifest, settings: MemorySettings, state: str, work_size: str) -> Table:
    from mlpmem_cli import display

    table = display.two_columns("Memory")
    revision = f" @ {settings.base.revision}" if settings.base.revision else ""
    table.add_row("base model", display.plain(settings.base.name + revision))
    table.add_row("base fingerprint", settings.base.weights[:16])
    table.add_row("layer", str(settings.layer))
    table.add_row("shape", _flat(asdict(settings.memory)))
    table.add_row(
        "λ, temperature", f"{settings.memory_lambda:.3f}, {settings.memory_temperature:g}"
    )
    table.add_row("query encoder", display.plain(settings.encoder))
    table.add_row("gate, confidence", f"{_fitted(settings.gate)}, {_fitted(settings.confidence)}")
    table.add_row("created", display.plain(manifest.created))
    table.add_row("corpus", display.plain(_flat(manifest.corpus)))
    table.add_row("training", display.plain(_flat(manifest.training)))
    table.add_row("figures", display.plain(_flat(manifest.figures)))
    table.add_row("versions", display.plain(_flat(manifest.versions)))
    for name, entry in manifest.files.items():
        table.add_row(name, f"{entry['bytes']:,} bytes, SHA-256 {entry['sha256'][:16]}…, {state}")
    table.add_row("work/ (may be deleted)", work_size)
    return table


def _fitted(model: object | None) -> str:
    return "none" if model is None else "fitted"


def _flat(values: dict[str, Any], indent: str = "") -> str:
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", _flat(value, indent + "  ")]
        elif isinstance(value, float):
            lines.append(f"{indent}{name}: {value:.6g}")
        elif value is not None:
            lines.append(f"{indent}{name}: {value}")
    return "\n".join(lines)
