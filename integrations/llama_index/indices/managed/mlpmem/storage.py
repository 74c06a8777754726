"""An index on disk: LlamaIndex's stores in a folder inside the memory's."""

from __future__ import annotations

from pathlib import Path

from llama_index.core.storage.storage_context import StorageContext

from llama_index.indices.managed.mlpmem.struct import MLPMemIndexStruct
from mlpmem_rag.errors import ArtifactError

STORES = "index"


def stored_index(folder: Path) -> tuple[MLPMemIndexStruct, StorageContext]:
    """What `persist` has written.

    Raises:
        ArtifactError: the folder holds no index.
    """
    stores = folder / STORES
    if not stores.is_dir():
        raise ArtifactError(
            f"{folder} holds no index (no folder {STORES!r}); use MLPMemIndex.from_memory for a "
            "memory alone, or MLPMemIndex.from_documents to train one"
        )
    context = StorageContext.from_defaults(persist_dir=str(stores))
    structs = context.index_store.index_structs()
    found = [struct for struct in structs if isinstance(struct, MLPMemIndexStruct)]
    if len(found) != 1:
        raise ArtifactError(f"{stores} holds {len(found)} memory indexes; one was expected")
    return found[0], context
