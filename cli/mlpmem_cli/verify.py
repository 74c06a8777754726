"""`mlpmem-rag verify`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

from mlpmem_cli import options
from mlpmem_rag.integrity import Verify

if TYPE_CHECKING:
    from mlpmem_rag.verification import Verified


def verify(
    memory: options.MemoryArgument,
    how: options.VerifyOption = Verify.full,
    as_json: options.JsonOption = False,
) -> None:
    """Check a memory's files against its manifest, and what they hold; exit code 1 where not.

    Needs no base model. A manifest comes with its folder: this finds damage, not a stranger who
    wrote both. What loading a memory can do at worst is in SECURITY.md.
    """
    from mlpmem_cli import display
    from mlpmem_rag.errors import ArtifactError
    from mlpmem_rag.verification import verify_folder

    display.quiet_libraries()
    found = verify_folder(memory, how)
    if as_json:
        typer.echo(json.dumps(_fields(found), ensure_ascii=False))
    elif not found.problems:
        count = len(found.manifest.files)
        typer.echo(f"{memory}: {count} files and the memory's tensors are intact ({how})")
    for problem in found.problems[:-1]:
        display.stderr().print(problem, markup=False, highlight=False, soft_wrap=True)
    if found.problems:
        raise ArtifactError(found.problems[-1])


def _fields(found: Verified) -> dict[str, object]:
    """The object that `--json` prints."""
    return {
        "intact": not found.problems,
        "verify": str(found.how),
        "problems": list(found.problems),
        "files": found.manifest.files,
    }
