"""What a memory is asked through: as an LLM, a retriever, a query engine or a chat engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.callbacks import CallbackManager
from llama_index.core.chat_engine.types import BaseChatEngine, ChatMode
from llama_index.core.indices.base import BaseIndex
from llama_index.core.llms.utils import LLMType
from llama_index.core.memory import BaseMemory
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.schema import BaseNode
from llama_index.core.settings import Settings
from llama_index.core.storage.docstore.types import RefDocInfo

from llama_index.indices.managed.mlpmem.attribution import Attribution, AttributionRetriever
from llama_index.indices.managed.mlpmem.chat import condensing_chat, conversation, simple_chat
from llama_index.indices.managed.mlpmem.documents import document_id
from llama_index.indices.managed.mlpmem.query_engine import MemoryQueryEngine
from llama_index.indices.managed.mlpmem.recalling import RecallRetriever
from llama_index.indices.managed.mlpmem.refused import (
    check_chat_attribution,
    check_chat_mode,
    check_fields,
    check_own,
    check_response_mode,
    refuse_unknown,
)
from llama_index.indices.managed.mlpmem.rows import KeptRows
from llama_index.indices.managed.mlpmem.search import NodeSearch, StoredNodes
from llama_index.indices.managed.mlpmem.struct import MLPMemIndexStruct
from llama_index.indices.managed.mlpmem.synthesizer import MemorySynthesizer
from llama_index.llms.mlpmem import MLPMemLLM
from mlpmem_rag.errors import ConfigError


class AskedIndex(BaseIndex[MLPMemIndexStruct]):
    """An index on a memory that is loaded already.

    Everything that it gives out asks the memory as it is at that moment.
    """

    _llm: MLPMemLLM
    _search: NodeSearch
    _stored: StoredNodes
    _rows: KeptRows

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
        """Documents that are not as the memory learned them.

        `inserted`, `changed` or `deleted`; `unknown` in an index on a memory alone, which does not
        know what that memory has learned.
        """
        return dict(self._index_struct.stale)

    @property
    def ref_doc_info(self) -> dict[str, RefDocInfo]:
        """The documents of the index with the ids of their nodes."""
        infos = self._docstore.get_all_ref_doc_info() or {}
        documents = {document_id(node) for node in self._nodes()}
        return {name: info for name, info in infos.items() if name in documents}

    def as_llm(self, **fields: Any) -> MLPMemLLM:  # noqa: ANN401
        """The memory as an LLM with settings of your own, on the same loaded model.

        Raises:
            ConfigError: a field that needs another loaded model.
        """
        check_fields(fields)
        # As it was loaded, so that a copy that is loaded elsewhere is the same.
        loaded = {n: getattr(self._llm, n) for n in ("base_model", "device", "dtype")}
        return MLPMemLLM.from_model(self._llm.model, **{**loaded, **fields})

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
            nodes=self._nodes,
            search=self._search,
            rows=self._rows,
            stale=lambda: self._index_struct.stale,
        )
        return AttributionRetriever(
            attribution,
            similarity_top_k=similarity_top_k,
            callback_manager=self._manager(callback_manager),
        )

    def as_recall_retriever(
        self,
        similarity_top_k: int = 1,
        callback_manager: CallbackManager | None = None,
    ) -> RecallRetriever:
        """Finds the sentences that taught the memory what is asked, for others to read.

        `RecallQueryEngine` has the memory's own base model read them.

        Raises:
            ConfigError: see `RecallRetriever`.
        """
        return RecallRetriever(
            self._llm.model,
            self._rows,
            lambda: self._index_struct.stale,
            similarity_top_k=similarity_top_k,
            callback_manager=self._manager(callback_manager),
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
        verbose: bool = False,
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
            callback_manager: LlamaIndex's callbacks, the LLM's too unless it has handlers.
            verbose: taken as other indexes do; there are no steps between to tell of.
            **kwargs: nothing else is taken.

        Raises:
            ConfigError: an argument that would have no effect.
        """
        refuse_unknown(
            kwargs,
            (
                "llm, attribution, streaming, similarity_top_k, node_postprocessors, output_cls, "
                "simple_template, callback_manager, verbose",
            ),
            "as_query_engine",
        )
        check_response_mode(response_mode)
        manager = self._manager(callback_manager)
        synthesizer = MemorySynthesizer(
            self._own(llm, manager),
            streaming=streaming,
            output_cls=output_cls,
            simple_template=simple_template,
            callback_manager=manager,
        )
        return MemoryQueryEngine(
            self.as_retriever(similarity_top_k, manager),
            synthesizer,
            attribution=attribution,
            node_postprocessors=node_postprocessors,
            callback_manager=manager,
        )

    def as_chat_engine(
        self,
        chat_mode: ChatMode | str = ChatMode.BEST,
        llm: LLMType | None = None,
        *,
        memory: BaseMemory | None = None,
        chat_history: list[ChatMessage] | None = None,
        system_prompt: str | None = None,
        condense_question_prompt: BasePromptTemplate | None = None,
        callback_manager: CallbackManager | None = None,
        verbose: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> BaseChatEngine:
        """Talk with the memory.

        Args:
            chat_mode: `best` and `condense_question` have the base model make one question of
                the conversation, and ask the memory; `simple` continues the conversation.
            llm: one on this memory.
            memory: LlamaIndex's memory of the conversation.
            chat_history: what was said before, without a `memory`.
            system_prompt: for `simple`.
            condense_question_prompt: how one question is made, for the other modes.
            callback_manager: LlamaIndex's callbacks.
            verbose: print the question that was made.
            **kwargs: of `as_query_engine`, for the other modes; `attribution` is `eager` or `none`.

        Raises:
            ConfigError: a chat mode that reads passages, or an argument that would have no effect.
        """
        mode, manager = check_chat_mode(chat_mode), self._manager(callback_manager)
        own = self._own(llm, manager)
        talk = conversation(own, memory, chat_history)
        if mode == ChatMode.SIMPLE:
            if condense_question_prompt is not None:
                kwargs["condense_question_prompt"] = condense_question_prompt
            return simple_chat(own, talk, system_prompt, manager, kwargs)
        if system_prompt is not None:
            raise ConfigError("system_prompt is for chat_mode='simple'; elsewhere set it on an llm")
        check_chat_attribution(kwargs.setdefault("attribution", "eager"))
        engine = self.as_query_engine(own, callback_manager=manager, **kwargs)
        return condensing_chat(engine, own, talk, condense_question_prompt, verbose, manager)

    def _manager(self, given: CallbackManager | None) -> CallbackManager:
        """The one given, else the index's, else what LlamaIndex's settings hold by now."""
        if given is not None:
            return given
        return (
            self._callback_manager if self._callback_manager.handlers else Settings.callback_manager
        )

    def _own(self, llm: LLMType | None, manager: CallbackManager) -> MLPMemLLM:
        """The index's LLM or the one given, heard by the manager unless it has its own handlers."""
        own = self._llm if llm is None else check_own(llm, self.memory_folder)
        if own.callback_manager.handlers:
            return own
        return own.model_copy(update={"callback_manager": manager})

    def _nodes(self) -> list[BaseNode]:
        return self._stored.get(self._index_struct.nodes)
