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
from llama_index.core.storage.docstore.types import RefDocInfo

from llama_index.indices.managed.mlpmem.attribution import (
    Attribution,
    AttributionRetriever,
    NodeSearch,
    Rows,
)
from llama_index.indices.managed.mlpmem.chat import chat_engine, conversation
from llama_index.indices.managed.mlpmem.documents import document_id
from llama_index.indices.managed.mlpmem.query_engine import MemoryQueryEngine
from llama_index.indices.managed.mlpmem.refused import (
    check_own,
    check_response_mode,
    refuse_unknown,
)
from llama_index.indices.managed.mlpmem.struct import MLPMemIndexStruct
from llama_index.indices.managed.mlpmem.synthesizer import MemorySynthesizer
from llama_index.llms.mlpmem import MLPMemLLM


class AskedIndex(BaseIndex[MLPMemIndexStruct]):
    """An index on a memory that is loaded already.

    Everything that it gives out asks the memory as it is at that moment.
    """

    _llm: MLPMemLLM
    _search: NodeSearch
    _rows: Rows | None = None

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
        self._open_rows()
        attribution = Attribution(self._llm.model, self._nodes, self._search, lambda: self._rows)
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
            check_own(llm, self.memory_folder) if llm else self._llm,
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
        own = check_own(llm, self.memory_folder) if llm else self._llm
        return chat_engine(
            ChatMode(chat_mode),
            own,
            self.as_query_engine,
            memory or conversation(own, chat_history),
            system_prompt,
            kwargs,
        )

    def _nodes(self) -> list[BaseNode]:
        found = (self._docstore.get_node(n, raise_error=False) for n in self._index_struct.nodes)
        return [node for node in found if node is not None]

    def _open_rows(self) -> None:
        self._rows = Rows.open(self.memory_folder, self._index_struct.names)
