"""Everything that loading a memory checks, without its base model: for folders from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlpmem_rag import checkpoint
from mlpmem_rag.artifact import (
    Manifest,
    file_problems,
    load_manifest,
    load_memory,
    load_settings,
)
from mlpmem_rag.checkpoint import Source
from mlpmem_rag.errors import MLPMemError
from mlpmem_rag.integrity import Verify


@dataclass(frozen=True)
class Verified:
    """What was found.

    Attributes:
        manifest: what the folder says of itself.
        how: how thoroughly it was compared with that.
        problems: what is wrong, with the file named; empty: nothing.
    """

    manifest: Manifest
    how: Verify
    problems: tuple[str, ...]


def verify_folder(folder: Path, how: Verify = Verify.full) -> Verified:
    """Check files, settings and tensors of a memory. All changed files are found, not the first.

    Raises:
        ArtifactError: there is no memory, or none whose manifest can be read.
    """
    manifest = load_manifest(folder)
    found = tuple(file_problems(folder, manifest, how))
    if not found:  # else what the files say is not worth reading
        found = _content_problems(folder, how)
    return Verified(manifest, how, found)


def _content_problems(folder: Path, how: Verify) -> tuple[str, ...]:
    try:
        _check_content(checkpoint.open_folder(folder, how))
    except MLPMemError as error:
        return (str(error),)
    return ()


def _check_content(source: Source) -> None:
    if source.merged:
        checkpoint.check_inside(source)
    else:
        settings = load_settings(source.folder)
        load_memory(source.folder, settings.memory, num_tokens=settings.base.vocab_size)
