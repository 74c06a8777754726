"""The rows that a training has kept: opened once, when somebody needs them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llama_index.indices.managed.mlpmem.struct import MLPMemIndexStruct
from mlpmem_rag.artifact import load_manifest
from mlpmem_rag.errors import ArtifactError
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.provenance import Origin, Provenance
from mlpmem_rag.questions import Question


@dataclass(frozen=True)
class Rows:
    """The rows of a training.

    Attributes:
        provenance: where each of them comes from.
        names: their documents' ids -> those of the index, where they differ.
    """

    provenance: Provenance
    names: Mapping[str, str]

    @classmethod
    def open(cls, struct: MLPMemIndexStruct) -> Rows | None:
        """Those that were kept with an index's memory.

        None: they were deleted, not copied with it, or are of another training by somebody else.
        """
        folder = Path(struct.memory)
        try:
            same = load_manifest(folder).run == struct.run
            return cls(Provenance.open(folder), struct.names) if same else None
        except ArtifactError:
            return None

    def document(self, row: Origin | Question) -> str:
        """The document of the index that a row or a question comes from."""
        return self.names.get(row.document, row.document)

    def text(self, origin: Origin, model: MemoryModel) -> str:
        """What a row was taught with."""
        if origin.question is not None:
            return origin.source
        ids = self.provenance.passage(origin.document, origin.position)
        return str(model.tokenizer.decode(ids, skip_special_tokens=True))


class KeptRows:
    """The rows of the memory that a model holds now; after another training, those of the new one.

    Args:
        model: the memory.
        struct: tells its folder, and the names of its documents.
    """

    def __init__(self, model: MemoryModel, struct: MLPMemIndexStruct) -> None:
        self._model = model
        self._struct = struct
        self._opened_for: object = None
        self._rows: Rows | None = None
        self._lock = threading.Lock()

    def __call__(self) -> Rows | None:
        """The rows; None: they were not kept."""
        with self._lock:
            if self._opened_for is not self._model.model:
                self._rows = Rows.open(self._struct)
                self._opened_for = self._model.model
            return self._rows
