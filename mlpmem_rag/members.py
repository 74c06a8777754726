"""One memory of a stack, as it is read from its folder, and how its request vectors are shared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from mlpmem_rag import checkpoint
from mlpmem_rag.artifact import MemorySettings, check_base, load_memory, load_settings
from mlpmem_rag.backbone import Backbone, resolve_layer
from mlpmem_rag.checkpoint import Source
from mlpmem_rag.memory import Memory
from mlpmem_rag.query import POOLED, QueryEncoder, fitting_encoder


@dataclass(frozen=True)
class Member:
    """What a stack knows of one memory besides its weights."""

    settings: MemorySettings
    source: Source
    encoder: QueryEncoder | None

    @property
    def view(self) -> str:
        """The same for memories whose encoders give the same vectors."""
        return view_of(self.settings, self.source)


def view_of(settings: MemorySettings, source: Source) -> str:
    """What the requests of a memory are; pooled ones differ from layer to layer."""
    if settings.encoder == POOLED:
        return f"{POOLED} {settings.layer}"
    encoder = source.encoder_weights or settings.encoder
    return f"{encoder} and its words" if settings.memory.words else encoder


def open_member(
    folder: Path, backbone: Backbone, others: Iterable[Member]
) -> tuple[Member, Memory]:
    """Read a memory that is to stand beside others on a base model.

    A folder with a base model inside will do; only the memory is taken from it.

    Raises:
        ArtifactError: the folder is damaged, or belongs to another base model.
    """
    source = checkpoint.open_folder(folder)
    settings = load_settings(source.folder)
    check_base(settings, backbone.reference)
    settings = replace(settings, layer=resolve_layer(settings.layer, backbone.num_layers))
    memory = load_memory(
        source.folder,
        settings.memory,
        inside=source.merged,
        num_tokens=settings.base.vocab_size,
    )
    return Member(settings, source, _encoder(settings, source, backbone, others)), memory


def slices(members: Iterable[Member], *, words: bool = False) -> dict[str, slice]:
    """Where each different encoder's vector lies in all of them side by side.

    With `words`, its requests: its tokens' vectors lie behind it, where the memory compares these.
    """
    found: dict[str, slice] = {}
    end = 0
    for member in members:
        shape = member.settings.memory
        size = shape.request_size if words else shape.query_size
        if size and member.view not in found:
            found[member.view] = slice(end, end := end + size)
    return found


def _encoder(
    settings: MemorySettings, source: Source, backbone: Backbone, others: Iterable[Member]
) -> QueryEncoder | None:
    """The encoder of a memory, shared with the memories that have the same."""
    if not settings.memory.query_size:
        return None
    for other in others:
        if other.view == view_of(settings, source):
            return other.encoder
    name = str(source.encoder_folder or settings.encoder)
    at_layer = replace(backbone, layer=settings.layer)
    return fitting_encoder(name, at_layer, settings.memory.query_size)
