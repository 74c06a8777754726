"""`MLPMemIndex`: documents distilled into a memory, with LlamaIndex's own interface."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.callbacks import CallbackManager
from llama_index.core.chat_engine import CondenseQuestionChatEngine, SimpleChatEngine
from llama_index.core.chat_engine.types import BaseChatEngine, ChatMode
from llama_index.core.indices import registry
from llama_index.core.indices.base import BaseIndex
from llama_index.core.ingestion import run_transformations
from llama_index.core.llms.utils import LLMType
from llama_index.core.memory import BaseMemory
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.schema import BaseNode, Document, IndexNode, TransformComponent
from llama_index.core.settings import Settings
from llama_index.core.storage.docstore.types import RefDocInfo
from llama_index.core.storage.storage_context import StorageContext

from llama_index.indices.managed.mlpmem.attribution import (
    Attribution,
    AttributionRetriever,
    NodeSearch,
)
from llama_index.indices.managed.mlpmem.chat import conversation
from llama_index.indices.managed.mlpmem.documents import (
    NamedCorpus,
    corpus_of_documents,
    corpus_of_nodes,
    document_id,
)
from llama_index.indices.managed.mlpmem.query_engine import MemoryQueryEngine
from llama_index.indices.managed.mlpmem.refused import (
    check_chat_mode,
    check_response_mode,
    refuse_unknown,
)
from llama_index.indices.managed.mlpmem.storage import STORES, copy_memory, stored_index
from llama_index.indices.managed.mlpmem.struct import MLPMemIndexStruct, MLPMemStructType
from llama_index.indices.managed.mlpmem.synthesizer import MemorySynthesizer
from llama_index.indices.managed.mlpmem.training import bars, config_of, memory_folder
from llama_index.llms.mlpmem import MLPMemLLM
from mlpmem_rag.artifact import load_manifest
from mlpmem_rag.config import TrainConfig, resolve_config
from mlpmem_rag.errors import ArtifactError, ConfigError
from mlpmem_rag.pipeline import train
from mlpmem_rag.progress import OnProgress
from mlpmem_rag.provenance import Provenance


class MLPMemIndex(BaseIndex[MLPMemIndexStruct]):
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
        self._llm = self._own(llm) if llm else MLPMemLLM(self.memory_folder, **settings)
        self._search = NodeSearch(self._llm.model.encoder)

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
            copy_memory(own, target)
        self._storage_context.persist(str(target / STORES))
        return target

    @property
    def memory_folder(self) -> Path:
        """Where the memory is."""
        return Path(self._index_struct.memory)

    @property
    def llm(self) -> MLPMemLLM:
        """The memory as an LLM."""
        return self._llm

    @property
    def stale(self) -> dict[str, str]:
        """Documents that are not as the memory learned them: `inserted`, `changed`, `deleted`."""
        return dict(self._index_struct.stale)

    @property
    def ref_doc_info(self) -> dict[str, RefDocInfo]:
        """The documents of the index with the ids of their nodes."""
        infos = self._docstore.get_all_ref_doc_info() or {}
        documents = {document_id(node) for node in self._nodes()}
        return {name: info for name, info in infos.items() if name in documents}

    def as_llm(self, **fields: Any) -> MLPMemLLM:  # noqa: ANN401
        """The memory as an LLM with settings of your own, on the same loaded model."""
        return MLPMemLLM.from_model(self._llm.model, **fields)

    def as_retriever(
        self,
        similarity_top_k: int = 2,
        callback_manager: CallbackManager | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> AttributionRetriever:
        """Finds sources: of an answer the rows that taught it, of a question similar nodes."""
        refuse_unknown(kwargs, ("similarity_top_k", "callback_manager"), "as_retriever")
        attribution = Attribution(
            self._llm.model,
            self._nodes,
            self._search,
            self._provenance(),
            self._index_struct.names,
        )
        return AttributionRetriever(
            attribution,
            similarity_top_k=similarity_top_k,
            callback_manager=callback_manager or self._callback_manager,
        )

    def as_query_engine(
        self,
        llm: LLMType | None = None,
        *,
        attribution: str = "lazy",
        streaming: bool = False,
        similarity_top_k: int = 2,
        node_postprocessors: list[BaseNodePostprocessor] | None = None,
        output_cls: type[BaseModel] | None = None,
        simple_template: BasePromptTemplate | None = None,
        response_mode: ResponseMode | str = ResponseMode.GENERATION,
        callback_manager: CallbackManager | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> MemoryQueryEngine:
        """Ask the memory.

        Args:
            llm: one on this memory, for settings of your own; see `as_llm`.
            attribution: `none`, `lazy` (sources are looked for when somebody looks at them) or
                `eager`.
            streaming: give the answer in pieces.
            similarity_top_k: number of sources.
            node_postprocessors: applied to the sources.
            output_cls: answer with an object of this class.
            simple_template: around the question, instead of the question alone.
            response_mode: `generation`; others read passages.
            callback_manager: LlamaIndex's callbacks.
            **kwargs: nothing else is taken.

        Raises:
            ConfigError: an argument that would have no effect.
        """
        refuse_unknown(
            kwargs,
            (
                "llm, attribution, streaming, similarity_top_k, node_postprocessors, output_cls, "
                "simple_template, callback_manager",
            ),
            "as_query_engine",
        )
        check_response_mode(response_mode)
        manager = callback_manager or self._callback_manager
        retriever = self.as_retriever(similarity_top_k, manager)
        synthesizer = MemorySynthesizer(
            self._own(llm) if llm else self._llm,
            streaming=streaming,
            output_cls=output_cls,
            simple_template=simple_template,
            callback_manager=manager,
        )
        return MemoryQueryEngine(
            retriever,
            synthesizer,
            attribution=attribution,
            stale=lambda question, answer: retriever.attribution.staleness(
                self.stale, question, answer, retriever.similarity_top_k
            ),
            node_postprocessors=node_postprocessors,
            callback_manager=manager,
        )

    def as_chat_engine(
        self,
        chat_mode: ChatMode = ChatMode.BEST,
        llm: LLMType | None = None,
        *,
        memory: BaseMemory | None = None,
        chat_history: list[ChatMessage] | None = None,
        system_prompt: str | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> BaseChatEngine:
        """Talk with the memory.

        Args:
            chat_mode: `best` and `condense_question` have the base model make one question of
                the conversation, and ask the memory; `simple` continues the conversation.
            llm: one on this memory.
            memory: LlamaIndex's memory of the conversation.
            chat_history: what was said before.
            system_prompt: for `simple`.
            **kwargs: of `as_query_engine`, for the other modes.

        Raises:
            ConfigError: a chat mode that reads passages.
        """
        mode = ChatMode(chat_mode)
        check_chat_mode(mode)
        own = self._own(llm) if llm else self._llm
        memory = memory or conversation(own, chat_history)
        if mode == ChatMode.SIMPLE:
            refuse_unknown(kwargs, ("llm, memory, chat_history, system_prompt",), "simple chat")
            return SimpleChatEngine.from_defaults(
                memory=memory, system_prompt=system_prompt, llm=own
            )
        if system_prompt is not None:
            raise ConfigError("system_prompt is for chat_mode='simple'; elsewhere set it on an llm")
        return CondenseQuestionChatEngine.from_defaults(
            query_engine=self.as_query_engine(llm=own, **kwargs),
            memory=memory,
            # Rewording is the base model's work: the memory would answer instead.
            llm=own.model_copy(update={"lambda_": 0.0}),
        )

    def retrain(self, show_progress: bool = False, on_progress: OnProgress | None = None) -> None:
        """Learn the documents as they are now; nothing is stale afterwards.

        Engines made before go on asking the old memory.

        Raises:
            CorpusError: no text is left to train on.
        """
        nodes = self._nodes()
        struct = self._index_struct
        config = config_of(load_manifest(self.memory_folder).training)
        self._train(corpus_of_nodes(nodes), struct, config, show_progress, on_progress)
        struct.documents, struct.stale = self._hashes(nodes), {}
        self._storage_context.index_store.add_index_struct(struct)
        self._llm = MLPMemLLM.from_dict(self._llm.to_dict())  # loads what is there now
        self._search = NodeSearch(self._llm.model.encoder)
        self.persist()

    def insert(self, document: Document, **insert_kwargs: Any) -> None:  # noqa: ANN401
        """Add a document, which is stale until the memory is trained again."""
        super().insert(document, **insert_kwargs)
        self._settle(document)

    async def ainsert(self, document: Document, **insert_kwargs: Any) -> None:  # noqa: ANN401
        """Like `insert`."""
        await super().ainsert(document, **insert_kwargs)
        self._settle(document)

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
        self._train(corpus, struct, config, self._show_progress, on_progress)
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
        struct.deleted(node_id if node is None else document_id(node))

    # Its own.

    def _train(
        self,
        corpus: NamedCorpus,
        struct: MLPMemIndexStruct,
        config: TrainConfig,
        show_progress: bool,
        on_progress: OnProgress | None,
    ) -> None:
        with bars(show_progress, on_progress) as told:
            train(corpus.corpus, out=struct.memory, config=config, on_progress=told)
        struct.names = {name: given for name, given in corpus.names.items() if name != given}

    def _settle(self, document: Document) -> None:
        self._index_struct.settled(document.id_, document.hash)
        self._storage_context.index_store.add_index_struct(self._index_struct)

    def _nodes(self) -> list[BaseNode]:
        found = (self._docstore.get_node(n, raise_error=False) for n in self._index_struct.nodes)
        return [node for node in found if node is not None]

    def _hashes(self, nodes: Sequence[BaseNode]) -> dict[str, str]:
        """Documents of nodes; the hash is empty where only nodes were given."""
        names = {document_id(node) for node in nodes}
        return {name: self._docstore.get_document_hash(name) or "" for name in sorted(names)}

    def _own(self, llm: LLMType) -> MLPMemLLM:
        """Refuse an LLM that does not hold this memory."""
        if not isinstance(llm, MLPMemLLM):
            raise ConfigError(
                f"llm is a {type(llm).__name__}: a memory answers through its own base model "
                "only; give index.as_llm(...), or nothing"
            )
        theirs, mine = llm.model.folder, self.memory_folder
        if theirs is None or theirs.resolve() != mine.resolve():
            raise ConfigError(
                f"llm answers from the memory {theirs}, the index has {mine}; give "
                "index.as_llm(...), or nothing"
            )
        return llm

    def _provenance(self) -> Provenance | None:
        try:
            return Provenance.open(self.memory_folder)
        except ArtifactError:
            return None  # the rows were deleted or not copied: sources are found by likeness


_indexes: dict[Any, type[BaseIndex[Any]]] = registry.INDEX_STRUCT_TYPE_TO_INDEX_CLASS
_indexes[MLPMemStructType.MLPMEM] = MLPMemIndex
