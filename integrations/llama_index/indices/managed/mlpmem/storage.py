"""An index on disk: LlamaIndex's stores in a folder inside the memory's."""

from __future__ import annotations

from pathlib import Path

from llama_index.core.storage.storage_context import StorageContext

from llama_index.indices.managed.mlpmem.struct import MLPMemIndexStruct
from mlpmem_rag.artifact import load_manifest
from mlpmem_rag.errors import ArtifactError

STORES = "index"


def stored_index(
    folder: Path, given: StorageContext | None = None
) -> tuple[MLPMemIndexStruct, StorageContext]:
    """What `persist` has written, or the stores given hold of it.

    A memory that was trained anew since makes all that the index knows of it doubtful.

    Raises:
        ArtifactError: there is no index.
    """
    stores = folder / STORES
    if given is None and not stores.is_dir():
        raise ArtifactError(
            f"{folder} holds no index (no folder {STORES!r}); use MLPMemIndex.from_memory for a "
            "memory alone, or MLPMemIndex.from_documents to train one"
        )
    try:
        context = given or StorageContext.from_defaults(persist_dir=str(stores))
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{stores} is not whole ({error.filename} is missing); where the index was made with "
            "stores of one's own, give them: MLPMemIndex.load(folder, storage_context=...)"
        ) from error
    structs = context.index_store.index_structs()
    found = [struct for struct in structs if isinstance(struct, MLPMemIndexStruct)]
    if len(found) > 1:  # stores that several indexes share
        found = [struct for struct in found if Path(struct.memory) == folder.resolve()]
    if len(found) != 1:
        raise ArtifactError(
            f"{'the storage context' if given else stores} holds {len(found)} indexes of the "
            f"memory {folder}; one was expected"
        )
    struct = found[0]
    if struct.run not in ("", load_manifest(folder).run):
        struct.distrusted()
    return struct, context
