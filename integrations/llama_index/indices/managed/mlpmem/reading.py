"""Answers that are read: from passages, beside the memory, or from what the memory recalls."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import CompletionResponse
from llama_index.core.base.response.schema import RESPONSE_TYPE, Response
from llama_index.core.callbacks import CallbackManager
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.instrumentation.events.llm import (
    LLMCompletionEndEvent,
    LLMCompletionStartEvent,
)
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts.mixin import PromptMixinType
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from llama_index_instrumentation import get_dispatcher

from llama_index.indices.managed.mlpmem.hybrid import RETRIEVED
from llama_index.indices.managed.mlpmem.recalling import RECALLED, recalled_of
from llama_index.indices.managed.mlpmem.refused import check_question
from llama_index.indices.managed.mlpmem.synthesizer import KEY
from llama_index.llms.mlpmem import MLPMemLLM
from llama_index.llms.mlpmem.calls import raw

dispatcher = get_dispatcher(__name__)


class ReadingQueryEngine(BaseQueryEngine):
    """Has the memory's base model read what a retriever finds.

    Nothing of an answer is told before its end, so that there is no stream.

    `response.metadata["mlpmem"]`: `route` (the engine's; `memory` where nothing was read),
    `confidence` (what the memory thinks of the answer that is given; None where it cannot tell),
    `lambda`, `attribution`, `usage`, `seconds`.

    Args:
        llm: the memory, see `MLPMemIndex.as_llm`.
        retriever: finds what is read.
        node_postprocessors: applied to what is found.
        callback_manager: LlamaIndex's callbacks.
    """

    route: str
    attribution: str

    def __init__(
        self,
        llm: MLPMemLLM,
        retriever: BaseRetriever,
        node_postprocessors: Sequence[BaseNodePostprocessor] = (),
        callback_manager: CallbackManager | None = None,
    ) -> None:
        self._llm = llm
        self._retriever = retriever
        self._node_postprocessors = node_postprocessors
        super().__init__(callback_manager or llm.callback_manager)

    def retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """The passages that are read."""
        return self._chosen(self._retriever.retrieve(query_bundle), query_bundle)

    async def aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """Like `retrieve`."""
        return self._chosen(await self._retriever.aretrieve(query_bundle), query_bundle)

    def _chosen(self, nodes: list[NodeWithScore], query: QueryBundle) -> list[NodeWithScore]:
        for postprocessor in self._node_postprocessors:
            nodes = postprocessor.postprocess_nodes(nodes, query_bundle=query)
        return nodes

    def _get_prompt_modules(self) -> PromptMixinType:
        return {}

    @dispatcher.span
    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        check_question(query_bundle.query_str)
        with self.callback_manager.event(
            CBEventType.QUERY, payload={EventPayload.QUERY_STR: query_bundle.query_str}
        ) as event:
            response = self._read(query_bundle.query_str, self.retrieve(query_bundle))
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    @dispatcher.span
    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        check_question(query_bundle.query_str)
        with self.callback_manager.event(
            CBEventType.QUERY, payload={EventPayload.QUERY_STR: query_bundle.query_str}
        ) as event:
            nodes = await self.aretrieve(query_bundle)
            response = await asyncio.to_thread(self._read, query_bundle.query_str, nodes)
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    @abstractmethod
    def _shown(self, nodes: Sequence[NodeWithScore]) -> dict[str, Any]:
        """What was found, as arguments of `MemoryModel.answer`."""

    def _read(self, question: str, nodes: list[NodeWithScore]) -> Response:
        llm = self._llm
        dispatcher.event(
            LLMCompletionStartEvent(prompt=question, additional_kwargs={}, model_dict=llm.to_dict())
        )
        answer = llm.model.answer(
            question,
            max_new_tokens=llm.metadata.num_output,
            lambda_=llm.lambda_,
            **self._shown(nodes),
        )
        told = raw(answer, model=llm.metadata.model_name)
        reply = CompletionResponse(text=answer.text, raw=told)
        dispatcher.event(LLMCompletionEndEvent(prompt=question, response=reply))
        details = {
            "route": self.route if answer.read else "memory",
            "attribution": self.attribution,
            "usage": told["usage"],
            **told[KEY],
        }
        return Response(answer.text, source_nodes=nodes, metadata={KEY: details})


class MemoryRAGQueryEngine(ReadingQueryEngine):
    """Retrieves, reads and remembers: of two answers, the jointly more probable one.

    The base model answers from the passages, the memory without them, and each judges what the
    other says (`MemoryModel.answer` with `passages`). It takes both their times. Few and short
    passages suit a small base model (docs/experiments.md). The route is `memory+rag`.
    """

    route = "memory+rag"
    attribution = RETRIEVED

    def _shown(self, nodes: Sequence[NodeWithScore]) -> dict[str, Any]:
        return {"passages": [node.node.get_content(MetadataMode.LLM) for node in nodes]}


class RecallQueryEngine(ReadingQueryEngine):
    """Where the memory is not sure, reads the sentence that it recalls.

    `MemoryModel.answer` with `recalled`: oftener right than the memory alone, and slower
    (docs/experiments.md). Where the memory holds its answer for more likely right than wrong, or
    nothing is recalled, it answers alone. The route is `recall` where something was read.

    Its retriever is a `RecallRetriever`, see `MLPMemIndex.as_recall_retriever`.
    """

    route = "recall"
    attribution = RECALLED

    def _shown(self, nodes: Sequence[NodeWithScore]) -> dict[str, Any]:
        return {"recalled": [recalled_of(node) for node in nodes]}
