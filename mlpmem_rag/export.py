"""A copy of a memory to hand on: without `work/`, its base model by name or inside.

Weights keep the precision they are stored with, so that the copy answers as the memory does,
whatever the number format it is loaded in.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from mlpmem_rag import checkpoint
from mlpmem_rag.artifact import WORK, load_memory, load_settings, save_artifact
from mlpmem_rag.backbone import STORED
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.lock import exclusive
from mlpmem_rag.model import load_model
from mlpmem_rag.output import check_output, is_memory


def export_memory(
    folder: str | Path, out: str | Path, *, merge_base: bool, base_model: str | None = None
) -> None:
    """Write a copy; an earlier memory at its place is replaced.

    Args:
        folder: the memory.
        out: where to.
        merge_base: put base model, tokenizer and query encoder into the copy.
        base_model: where to take the base from when its place has changed since the training.

    Raises:
        ArtifactError: the folder is missing, damaged, or belongs to another base model.
        BaseModelError: the base model cannot be loaded.
        ConfigError: the copy would lie where the memory does.
        OutputError: `out` is a file, holds something else, or is being written to.
    """
    out = Path(out)
    source = checkpoint.open_folder(Path(folder))
    if out.resolve() == source.folder.resolve():
        raise ConfigError(f"{out} is the memory itself; give another folder for the copy")
    check_output(out, "memory", is_memory)
    with exclusive(out / WORK, out) if (out / WORK).is_dir() else nullcontext():
        _write_copy(source, out, merge_base=merge_base, base_model=base_model)


def _write_copy(
    source: checkpoint.Source, out: Path, *, merge_base: bool, base_model: str | None
) -> None:
    if source.merged == merge_base:
        checkpoint.copy_memory(source, out)
        return
    settings = load_settings(source.folder)
    memory = load_memory(source.folder, settings.memory, inside=source.merged)
    if not merge_base:
        encoder = checkpoint.own_encoder(source, settings)
        save_artifact(out, settings, memory, source.manifest, source.card, encoder)
        checkpoint.drop_work(out)
        return
    model, _, _ = load_model(source.folder, base_model=base_model, device="cpu", dtype=STORED)
    model.memory = memory  # not as it was rounded to the base model's number format
    model.save_pretrained(out, merge_base=True)
