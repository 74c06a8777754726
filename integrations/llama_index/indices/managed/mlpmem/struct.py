"""What an index stores of itself: its memory's folder, its nodes, and what has gone stale."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from llama_index.core.data_structs import registry
from llama_index.core.data_structs.data_structs import IndexStruct


class MLPMemStructType(StrEnum):
    """A type of its own, or LlamaIndex would load the index as a vector store's."""

    MLPMEM = "mlpmem"


@dataclass
class MLPMemIndexStruct(IndexStruct):
    """The part of an index that its index store keeps.

    Attributes:
        memory: folder of the memory.
        nodes: ids of the nodes that belong to the index.
        documents: what the memory has learned: document id -> hash of the document. Empty where
            only the memory was given: what it has learned is not known.
        stale: documents that are not as the memory learned them: id -> `inserted`, `changed`,
            `deleted`, or `unknown` where what it has learned is.
        names: ids that the memory was taught with -> ids of the documents, where they differ.
    """

    memory: str = ""
    nodes: list[str] = field(default_factory=list)
    documents: dict[str, str] = field(default_factory=dict)
    stale: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    @classmethod
    def get_type(cls) -> MLPMemStructType:  # type: ignore[override]  # theirs is a closed list
        """Name of the type in an index store."""
        return MLPMemStructType.MLPMEM

    def inserted(self, document: str) -> None:
        """Note a document that is not, or no longer whole, as the memory learned it."""
        if not self.documents:
            self.stale[document] = "unknown"
        else:
            self.stale[document] = "changed" if document in self.documents else "inserted"

    def deleted(self, document: str) -> None:
        """Note that text is gone, which the memory may know all the same."""
        if document in self.documents or not self.documents:
            self.stale[document] = "deleted"
        else:
            self.stale.pop(document, None)

    def settled(self, document: str, document_hash: str) -> None:
        """Take the note away when a document is again what the memory learned."""
        if self.documents.get(document) == document_hash:
            self.stale.pop(document, None)


_structs: dict[Any, type[IndexStruct]] = registry.INDEX_STRUCT_TYPE_TO_INDEX_STRUCT_CLASS
_structs[MLPMemStructType.MLPMEM] = MLPMemIndexStruct
