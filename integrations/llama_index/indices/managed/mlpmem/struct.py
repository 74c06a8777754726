"""What an index stores of itself: its memory's folder, its nodes, and what has gone stale."""

from __future__ import annotations

from collections.abc import Mapping
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
        run: fingerprint of the training that the memory is of.
        documents: what the memory has learned: document id -> digest of the document, empty where
            only its nodes were given. Nothing where only the memory was given: what it has learned
            is not known.
        present: documents as they are now: id -> digest, of those that were given whole.
        stale: documents that are not as the memory learned them: id -> `inserted`, `changed`,
            `deleted`, or `unknown` where what it has learned is.
        names: ids that the memory was taught with -> ids of the documents, where they differ.
    """

    memory: str = ""
    run: str = ""
    nodes: list[str] = field(default_factory=list)
    documents: dict[str, str] = field(default_factory=dict)
    present: dict[str, str] = field(default_factory=dict)
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
        self.present.pop(document, None)
        if document in self.documents or not self.documents:
            self.stale[document] = "deleted"
        else:
            self.stale.pop(document, None)

    def settled(self, document: str, digest: str, document_hash: str) -> None:
        """Take the note away when a document is again what the memory learned.

        An index of an earlier version has LlamaIndex's hashes instead of digests.
        """
        self.present[document] = digest
        if self.documents.get(document) in (digest, document_hash):
            self.stale.pop(document, None)

    def learned(
        self, documents: Mapping[str, str], before: Mapping[str, str], now: Mapping[str, str]
    ) -> None:
        """Note what a training has learned, and what has changed while it ran.

        Args:
            documents: id -> digest, as they were when it began.
            before: the same of the nodes that it read.
            now: of the nodes that are there now.
        """
        self.documents = dict(documents)
        self.stale = dict.fromkeys(before.keys() - now.keys(), "deleted")
        for name in now:
            if name not in before:
                self.stale[name] = "inserted"
            elif now[name] != before[name]:
                self.stale[name] = "changed"

    def distrusted(self) -> None:
        """Note that the memory is of another training than the index."""
        self.documents = dict.fromkeys(self.documents, "")
        self.stale = dict.fromkeys([*self.documents, *self.stale], "unknown")


_structs: dict[Any, type[IndexStruct]] = registry.INDEX_STRUCT_TYPE_TO_INDEX_STRUCT_CLASS
_structs[MLPMemStructType.MLPMEM] = MLPMemIndexStruct
