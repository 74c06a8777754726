"""`MLPMemIndex`: documents distilled into a memory, with LlamaIndex's own interface."""

from __future__ import annotations

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

from llama_index.indices.managed.mlpmem.asking import AskedIndex
from llama_index.indices.managed.mlpmem.attribution import (
    NodeSearch,
)
from llama_index.indices.managed.mlpmem.documents import (
    NamedCorpus,
    corpus_of_documents,
    corpus_of_nodes,
    document_id,
)
from llama_index.indices.managed.mlpmem.refused import (
    check_own,
)
from llama_index.indices.managed.mlpmem.storage import STORES, stored_index
from llama_index.indices.managed.mlpmem.struct import MLPMemIndexStruct, MLPMemStructType
from llama_index.indices.managed.mlpmem.training import config_of, memory_folder, train_memory
from llama_index.llms.mlpmem import MLPMemLLM
from llama_index.llms.mlpmem.loading import reload
from mlpmem_rag.artifact import load_manifest
from mlpmem_rag.checkpoint import copy_memory, open_folder
from mlpmem_rag.config import resolve_config
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.progress import OnProgress


class MLPMemIndex(AskedIndex):
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
        build = {"out": out, "on_progress": on_progress, **options} if index_struct is None else {}
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
        self._llm = check_own(llm, folder) if llm else MLPMemLLM(folder, **settings)
        self._search = NodeSearch(self._llm.model)

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
            learned={document.id_: document.hash for document in documents},
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
    def load(cls, folder: str | Path, **kwargs: Any) -> Self:  # noqa: ANN401
        """An index that `from_documents` or `persist` has written.

        Args:
            folder: the memory with the index in it; it may have been moved.
            **kwargs: as for `from_memory`.

        Raises:
            ArtifactError: the folder holds no index.
        """
        struct, context = stored_index(Path(folder))
        struct.memory = str(Path(folder).resolve())
        return cls(index_struct=struct, storage_context=context, **kwargs)

    def persist(self, folder: str | Path | None = None) -> Path:
        """Store the index with its memory.

        Args:
            folder: where to; None: the memory's own folder. Elsewhere the memory is copied,
                without the training's rows.

        Returns:
            The folder, for `load`.
        """
        own = Path(self.memory_folder)
        target = Path(folder) if folder is not None else own
        if target.resolve() != own.resolve():
            copy_memory(open_folder(own), target)
        self._storage_context.persist(str(target / STORES))
        return target

    def retrain(self, show_progress: bool = False, on_progress: OnProgress | None = None) -> None:
        """Learn the documents as they are now; nothing is stale afterwards.

        Every engine, retriever and LLM on this memory asks the new one from then on.

        Raises:
            CorpusError: no text is left to train on.
        """
        nodes, struct = self._nodes(), self._index_struct
        config = config_of(load_manifest(self.memory_folder).training)
        if self._llm.base_model is not None:  # it is no longer where it was in training
            config = replace(config, base_model=self._llm.base_model)
        struct.names = train_memory(
            corpus_of_nodes(nodes), self.memory_folder, config, show_progress, on_progress
        )
        struct.documents, struct.stale = self._hashes(nodes), {}
        self._storage_context.index_store.add_index_struct(struct)
        reload(self._llm.model)
        self._open_rows()
        self.persist()

    def insert(self, document: Document, **insert_kwargs: Any) -> None:  # noqa: ANN401
        """Add a document, which is stale until the memory is trained again."""
        super().insert(document, **insert_kwargs)
        self._settle(document)

    async def ainsert(self, document: Document, **insert_kwargs: Any) -> None:  # noqa: ANN401
        """Like `insert`."""
        await super().ainsert(document, **insert_kwargs)
        self._settle(document)

    def delete_ref_doc(
        self,
        ref_doc_id: str,
        delete_from_docstore: bool = False,
        **delete_kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Take a document out; the memory knows it until it is trained again."""
        info = self._docstore.get_ref_doc_info(ref_doc_id)
        nodes = [] if info is None else list(info.node_ids)
        super().delete_ref_doc(ref_doc_id, delete_from_docstore, **delete_kwargs)
        self._forget(ref_doc_id, nodes)

    async def adelete_ref_doc(
        self,
        ref_doc_id: str,
        delete_from_docstore: bool = False,
        **delete_kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Like `delete_ref_doc`."""
        info = await self._docstore.aget_ref_doc_info(ref_doc_id)
        nodes = [] if info is None else list(info.node_ids)
        await super().adelete_ref_doc(ref_doc_id, delete_from_docstore, **delete_kwargs)
        self._forget(ref_doc_id, nodes)

    # What BaseIndex asks for.

    def _build_index_from_nodes(
        self,
        nodes: Sequence[BaseNode],
        *,
        out: str | Path | None = None,
        on_progress: OnProgress | None = None,
        corpus: NamedCorpus | None = None,
        learned: dict[str, str] | None = None,
        **options: Any,  # noqa: ANN401
    ) -> MLPMemIndexStruct:
        corpus = corpus or corpus_of_nodes(nodes)
        if learned is None:
            learned = self._hashes(nodes)
        struct = MLPMemIndexStruct(
            memory=str(memory_folder(out, corpus.corpus).resolve()),
            nodes=[node.node_id for node in nodes],
            documents=learned,
        )
        config = resolve_config(None, options)
        struct.names = train_memory(
            corpus, Path(struct.memory), config, self._show_progress, on_progress
        )
        return struct

    def _insert(self, nodes: Sequence[BaseNode], **insert_kwargs: Any) -> None:  # noqa: ANN401
        struct = self._index_struct
        for node in nodes:
            if node.node_id not in struct.nodes:
                struct.nodes.append(node.node_id)
            struct.inserted(document_id(node))

    def _delete_node(self, node_id: str, **delete_kwargs: Any) -> None:  # noqa: ANN401
        struct = self._index_struct
        if node_id not in struct.nodes:
            return
        struct.nodes.remove(node_id)
        node = self._docstore.get_node(node_id, raise_error=False)
        document = node_id if node is None else document_id(node)
        info = self._docstore.get_ref_doc_info(document)
        if info is not None and not set(info.node_ids).isdisjoint(struct.nodes):
            struct.inserted(document)  # a part of it is still there
        else:
            struct.deleted(document)

    # Its own.

    def _forget(self, document: str, nodes: Sequence[str]) -> None:
        """Of a document's nodes LlamaIndex deletes every other one only from the index."""
        struct = self._index_struct
        if nodes:
            struct.nodes = [node for node in struct.nodes if node not in nodes]
            struct.deleted(document)
            self._storage_context.index_store.add_index_struct(struct)

    def _settle(self, document: Document) -> None:
        self._index_struct.settled(document.id_, document.hash)
        self._storage_context.index_store.add_index_struct(self._index_struct)

    def _hashes(self, nodes: Sequence[BaseNode]) -> dict[str, str]:
        """Documents of nodes; the hash is empty where only nodes were given."""
        names = {document_id(node) for node in nodes}
        return {name: self._docstore.get_document_hash(name) or "" for name in sorted(names)}


_indexes: dict[Any, type[BaseIndex[Any]]] = registry.INDEX_STRUCT_TYPE_TO_INDEX_CLASS
_indexes[MLPMemStructType.MLPMEM] = MLPMemIndex
