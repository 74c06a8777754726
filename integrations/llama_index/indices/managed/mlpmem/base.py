"""`MLPMemIndex`: documents distilled into a memory, with LlamaIndex's own interface."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from llama_index.core.callbacks import CallbackManager
from llama_index.core.indices import registry
from llama_index.core.indices.base import BaseIndex
from llama_index.core.ingestion import run_transformations
from llama_index.core.llms.utils import LLMType
from llama_index.core.schema import BaseNode, Document, IndexNode, TransformComponent
from llama_index.core.settings import Settings
from llama_index.core.storage.storage_context import StorageContext

from llama_index.indices.managed.mlpmem.changes import ChangingIndex
from llama_index.indices.managed.mlpmem.documents import (
    NamedCorpus,
    corpus_of_documents,
    corpus_of_nodes,
    document_id,
    learned_digest,
    node_digests,
)
from llama_index.indices.managed.mlpmem.refused import (
    check_loading,
    check_own,
    check_stores,
    refuse_native,
)
from llama_index.indices.managed.mlpmem.rows import KeptRows
from llama_index.indices.managed.mlpmem.search import NodeSearch, StoredNodes
from llama_index.indices.managed.mlpmem.storage import STORES, stored_index
from llama_index.indices.managed.mlpmem.struct import MLPMemIndexStruct, MLPMemStructType
from llama_index.indices.managed.mlpmem.training import config_of, memory_folder, train_memory
from llama_index.llms.mlpmem import MLPMemLLM
from llama_index.llms.mlpmem.loading import reload
from mlpmem_rag.artifact import load_manifest
from mlpmem_rag.checkpoint import open_folder
from mlpmem_rag.config import resolve_config
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.export import export_memory
from mlpmem_rag.progress import OnProgress


class MLPMemIndex(ChangingIndex):
    """Documents distilled into a memory; asked without retrieval.

    Example:
        index = MLPMemIndex.from_documents(documents, out="./memory")
        print(index.as_query_engine().query("What does the warranty cover?"))

        index = MLPMemIndex.load("./memory")

    Args:
        nodes: train on these (give documents to `from_documents`).
        objects: not taken: a memory has no objects to hand a query to.
        index_struct: of an index that is stored already.
        storage_context: where nodes and the index's own notes are kept.
        callback_manager: LlamaIndex's callbacks.
        transformations: cut inserted documents into nodes.
        show_progress: show a bar for each stage of the training.
        out: folder of the memory. None: `mlpmem-` and the corpus's fingerprint, in the working
            folder, so that the same documents find their memory again.
        llm: one on this very memory, with settings of your own.
        on_progress: called with the training's progress.
        **options: settings of the training (`mlpmem_rag.TrainConfig`), such as `base_model`.

    Raises:
        CorpusError: no text to train on.
        ConfigError: an unknown setting, or an LLM that is not this memory's.
        ArtifactError: the memory's folder is missing, damaged, or belongs to another base model.
    """

    index_struct_cls = MLPMemIndexStruct

    def __init__(
        self,
        nodes: Sequence[BaseNode] | None = None,
        objects: Sequence[IndexNode] | None = None,
        index_struct: MLPMemIndexStruct | None = None,
        storage_context: StorageContext | None = None,
        callback_manager: CallbackManager | None = None,
        transformations: list[TransformComponent] | None = None,
        show_progress: bool = False,
        *,
        out: str | Path | None = None,
        llm: LLMType | None = None,
        on_progress: OnProgress | None = None,
        **options: Any,  # noqa: ANN401
    ) -> None:
        if objects:
            raise ConfigError("a memory has no objects to hand queries to; give nodes only")
        check_stores(storage_context)
        refuse_native(options)
        build: dict[str, Any] = {}
        if index_struct is None:
            build = {"out": out, "llm": llm, "on_progress": on_progress, **options}
        else:
            check_loading(llm, options, out=out, on_progress=on_progress)
        self._changing = threading.RLock()
        super().__init__(
            nodes=nodes,
            index_struct=index_struct,
            storage_context=storage_context,
            callback_manager=callback_manager,
            transformations=transformations,
            show_progress=show_progress,
            **build,
        )
        # Of a training, where it computed; of an index that is there, all that an LLM takes.
        settings = dict(options)
        if index_struct is None:
            settings = {n: v for n, v in options.items() if n in ("device", "dtype")}
        folder = self.memory_folder
        self._index_struct.run = load_manifest(folder).run  # of what is loaded now
        self._llm = MLPMemLLM(folder, **settings) if llm is None else check_own(llm, folder)
        self._search = NodeSearch(self._llm.model)
        self._stored = StoredNodes(self._docstore)
        self._rows = KeptRows(self._llm.model, self._index_struct)

    @classmethod
    def from_documents(
        cls,
        documents: Sequence[Document],
        storage_context: StorageContext | None = None,
        show_progress: bool = False,
        callback_manager: CallbackManager | None = None,
        transformations: list[TransformComponent] | None = None,
        *,
        out: str | Path | None = None,
        llm: LLMType | None = None,
        on_progress: OnProgress | None = None,
        **options: Any,  # noqa: ANN401
    ) -> Self:
        """Train a memory on whole documents, and keep their nodes for sources.

        A memory that these documents and settings have made before is loaded, not trained again;
        an interrupted training goes on. The index is stored beside its memory.
        """
        check_stores(storage_context)
        refuse_native(options)
        storage_context = storage_context or StorageContext.from_defaults()
        transformations = transformations or Settings.transformations
        corpus = corpus_of_documents(documents)
        for document in documents:
            storage_context.docstore.set_document_hash(document.id_, document.hash)
        index = cls(
            nodes=run_transformations(documents, transformations, show_progress=show_progress),
            storage_context=storage_context,
            callback_manager=callback_manager,
            transformations=transformations,
            show_progress=show_progress,
            out=out,
            llm=llm,
            on_progress=on_progress,
            corpus=corpus,
            learned={document.id_: learned_digest(document) for document in documents},
            **options,
        )
        index.persist()
        return index

    @classmethod
    def from_memory(cls, folder: str | Path, **kwargs: Any) -> Self:  # noqa: ANN401
        """An index on a memory that `mlpmem-rag train` has written.

        It has no nodes, so that sources are known only where the training's `work/` was kept.

        Args:
            folder: the memory.
            **kwargs: `llm`, or fields of `MLPMemLLM`; `callback_manager`, `transformations`.
        """
        struct = MLPMemIndexStruct(memory=str(Path(folder).resolve()))
        return cls(index_struct=struct, **kwargs)

    @classmethod
    def from_vector_store(cls, *_: object, **__: object) -> Self:
        """Not for a memory, which learns text.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "a memory is trained on text, and a vector store is asked for vectors; give the "
            "documents to MLPMemIndex.from_documents, or the nodes to MLPMemIndex(nodes)"
        )

    @classmethod
    def load(
        cls,
        folder: str | Path,
        storage_context: StorageContext | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Self:
        """An index that `from_documents` or `persist` has written.

        Where the memory was trained anew since, by `mlpmem-rag train` for instance, all its
        documents are marked `unknown`.

        Args:
            folder: the memory with the index in it; it may have been moved.
            storage_context: stores of one's own, if the index was made with them.
            **kwargs: as for `from_memory`.

        Raises:
            ArtifactError: the folder holds no index.
        """
        struct, context = stored_index(Path(folder), storage_context)
        struct.memory = str(Path(folder).resolve())
        return cls(index_struct=struct, storage_context=context, **kwargs)

    def persist(self, folder: str | Path | None = None) -> Path:
        """Store the index with its memory.

        Args:
            folder: where to; None: the memory's own folder. Elsewhere the memory is copied,
                without the training's rows. Stores of one's own that keep themselves elsewhere
                are not written.

        Returns:
            The folder, for `load`.

        Raises:
            OutputError: the folder holds something else than a memory.
        """
        own = Path(self.memory_folder)
        target = Path(folder) if folder is not None else own
        if target.resolve() != own.resolve():
            export_memory(own, target, merge_base=open_folder(own).merged)
        self._storage_context.index_store.add_index_struct(self._index_struct)
        self._storage_context.persist(str(target / STORES))
        return target

    def retrain(self, show_progress: bool = False, on_progress: OnProgress | None = None) -> None:
        """Learn the documents as they are now; only what changes meanwhile is stale afterwards.

        Every engine, retriever and LLM on this memory asks the new one from then on. Documents
        may come and go while it runs.

        Raises:
            CorpusError: no text is left to train on.
            ConfigError: the index does not hold what its memory has learned.
        """
        struct = self._index_struct
        if not struct.documents:
            raise ConfigError(
                f"this index was made from the memory {struct.memory} alone and does not hold what "
                "it has learned, which retrain would forget; train on all documents with "
                "MLPMemIndex.from_documents"
            )
        config = config_of(load_manifest(self.memory_folder).training)
        if self._llm.base_model is not None:  # it is no longer where it was in training
            config = replace(config, base_model=self._llm.base_model)
        with self._changing:
            nodes = self._nodes()
            documents, before = self._digests(nodes), node_digests(nodes)
        names = train_memory(
            corpus_of_nodes(nodes), self.memory_folder, config, show_progress, on_progress
        )
        reload(self._llm.model)
        with self._changing:
            struct.run, struct.names = load_manifest(self.memory_folder).run, names
            struct.learned(documents, before, node_digests(self._nodes()))
        self.persist()

    # What BaseIndex asks for.

    def _build_index_from_nodes(
        self,
        nodes: Sequence[BaseNode],
        *,
        out: str | Path | None = None,
        llm: LLMType | None = None,
        on_progress: OnProgress | None = None,
        corpus: NamedCorpus | None = None,
        learned: dict[str, str] | None = None,
        **options: Any,  # noqa: ANN401
    ) -> MLPMemIndexStruct:
        corpus = corpus or corpus_of_nodes(nodes)
        names = sorted({document_id(node) for node in nodes})
        struct = MLPMemIndexStruct(
            memory=str(memory_folder(out, corpus.corpus, options).resolve()),
            nodes=[node.node_id for node in nodes],
            documents=dict.fromkeys(names, "") if learned is None else learned,
            present=dict(learned or {}),
        )
        config = resolve_config(None, options)
        if llm is not None:
            check_own(llm, Path(struct.memory))  # before the work
        struct.names = train_memory(
            corpus, Path(struct.memory), config, self._show_progress, on_progress
        )
        struct.run = load_manifest(Path(struct.memory)).run
        return struct

    def _digests(self, nodes: Sequence[BaseNode]) -> dict[str, str]:
        """Documents of nodes; the digest is empty where only nodes were given."""
        names = sorted({document_id(node) for node in nodes})
        return {name: self._index_struct.present.get(name, "") for name in names}


_indexes: dict[Any, type[BaseIndex[Any]]] = registry.INDEX_STRUCT_TYPE_TO_INDEX_CLASS
_indexes[MLPMemStructType.MLPMEM] = MLPMemIndex
